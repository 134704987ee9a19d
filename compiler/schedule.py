"""Schedules: making them, and the checker that replays one and proves what it promises."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from movdc.compiler.errors import BudgetError, InternalError
from movdc.runtime.bundle import Instruction, Partition, TensorSpec


def sequential(partitions: Sequence[Partition]) -> tuple[Instruction, ...]:
    """Load, run and free one partition after the other."""
    return tuple(
        Instruction(op=op, partition=partition.name) for partition in partitions for op in ("load", "run", "free")
    )


def check(
    schedule: Sequence[Instruction],
    partitions: Mapping[str, Partition],
    inputs: Sequence[TensorSpec],
    outputs: Sequence[TensorSpec],
    budget_bytes: int,
) -> int:
    """Replay a schedule and return its peak bytes; raises InternalError (BudgetError) for the first rule it breaks.

    Each run follows its load, no tensor is read before it is made or after its last use, what is loaded is freed, the
    outputs exist at the end, and the bytes held at every instruction are within the budget.
    """
    last_read: dict[str, int] = {spec.name: len(schedule) for spec in (*inputs, *outputs)}
    for index, step in enumerate(schedule):
        if step.op == "run":
            for spec in partitions[step.partition].inputs:
                last_read[spec.name] = max(last_read.get(spec.name, 0), index)
    tensors = {spec.name: spec.size_bytes for spec in inputs}
    loaded: dict[str, int] = {}
    peak_bytes = 0
    for index, step in enumerate(schedule):
        where = f"instruction {index} ({step.op} {step.partition})"
        partition = partitions[step.partition]
        now_bytes = sum(tensors.values()) + sum(loaded.values())
        if step.op == "load":
            if step.partition in loaded:
                raise InternalError(f"{where}: is loaded already")
            now_bytes += partition.load_bytes
            loaded[step.partition] = partition.held_bytes
        elif step.op == "free":
            if loaded.pop(step.partition, None) is None:
                raise InternalError(f"{where}: is not loaded")
        else:
            if step.partition not in loaded:
                raise InternalError(f"{where}: is not loaded")
            for spec in partition.inputs:
                if tensors.get(spec.name) != spec.size_bytes:
                    raise InternalError(f"{where}: tensor {spec.name} does not exist")
            tensors |= {spec.name: spec.size_bytes for spec in partition.outputs}
            now_bytes = sum(tensors.values()) + sum(loaded.values()) + partition.working_bytes
            for spec in partition.inputs:
                if last_read[spec.name] == index:
                    del tensors[spec.name]
        peak_bytes = max(peak_bytes, now_bytes)
        if now_bytes > budget_bytes:
            raise BudgetError(
                step.partition.split(".")[0],
                f"{where} holds {now_bytes} bytes, the budget is {budget_bytes}; "
                "run the pass partition, or raise memory_budget",
            )
    if missing := [spec.name for spec in outputs if spec.name not in tensors]:
        raise InternalError(f"outputs {', '.join(missing)} do not exist at the end")
    if loaded:
        raise InternalError(f"{', '.join(loaded)} are never freed")
    return peak_bytes
