"""Residency: what each level of memory lets a variant keep loaded, and the certificate that says what it holds.

Two lanes run a variant: one loads partitions in the order of their runs, the other runs them. Partitions of the pinned
set stay; of the others, the transient ones, at most 1 + prefetch are there at a time. In a cyclic scan every fixed set
of equal partitions is as good as the best that can be done (an LRU cache has no hits at all), and spread ones hide more
loading than the first ones, because the loader gets ahead while they run. (Section 3.4 of arXiv 2502.04363 pins
the first.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from movdc.compiler.device import Machine
from movdc.compiler.errors import BudgetError
from movdc.runtime.bundle import Interval, Partition, Residency, TensorSpec, Variant

MOST_AHEAD = 2  # partitions loaded ahead: with a second one, a load or a run that takes long stops neither lane


@dataclass(frozen=True)
class Chain:
    """The partitions of a variant as they run, with the bytes of tensors before each runs and while it does.

    Before the first there may be the tensors that the end of the run before has left: they go when their reader has
    them, and meanwhile the first partition loads.
    """

    partitions: tuple[Partition, ...]
    waiting_bytes: tuple[int, ...]
    running_bytes: tuple[int, ...]
    slab_bytes: int

    @classmethod
    def of(cls, partitions: Sequence[Partition], inputs: Sequence[TensorSpec], slab_bytes: int) -> Chain:
        """A tensor lives from the run that makes it to the last that reads it; what nobody reads is an output."""
        reads = {spec.name: index for index, one in enumerate(partitions) for spec in one.inputs}
        ends = len(partitions)
        live = {spec.name: (ends, spec.size_bytes) for spec in inputs}
        waiting, running = [], []
        for index, one in enumerate(partitions):
            waiting.append(sum(size for _, size in live.values()))
            live |= {spec.name: (reads.get(spec.name, ends), spec.size_bytes) for spec in one.outputs}
            running.append(sum(size for _, size in live.values()))
            live = {name: (last, size) for name, (last, size) in live.items() if last > index}
        left_bytes = sum(size for _, size in live.values())
        waiting[0], running[0] = max(waiting[0], left_bytes), max(running[0], left_bytes)
        return cls(tuple(partitions), tuple(waiting), tuple(running), slab_bytes)


def lasting_bytes(partitions: Sequence[Partition]) -> int:
    """What is held as long as a variant runs: programs, and the workspace and planned memory that they share."""
    shared = max((one.workspace_bytes for one in partitions), default=0)
    planned = max((one.planned_bytes for one in partitions), default=0)
    return sum(one.program_bytes for one in partitions) + shared + planned


def intervals(chain: Chain, pinned: frozenset[str], prefetch: int, waits: frozenset[str]) -> list[Interval]:
    """The most that can be held in each interval, whatever the two lanes' speeds, in any run but a first one."""
    stay_bytes = sum(one.held_bytes for one in chain.partitions if one.name in pinned)
    lasting = lasting_bytes(chain.partitions)
    transient = [one for one in chain.partitions if one.name not in pinned]
    found = []
    done = 0  # transient partitions that have run
    for index, one in enumerate(chain.partitions):
        is_pinned = one.name in pinned
        own_bytes = 0 if is_pinned else one.held_bytes
        found.append(
            Interval(
                partition=one.name,
                phase="load",
                weights_bytes=stay_bytes,
                loading_bytes=own_bytes + chain.slab_bytes,
                activation_bytes=chain.waiting_bytes[index],
                lasting_bytes=lasting,
            )
        )
        ahead = _ahead(transient, done + (not is_pinned), prefetch + is_pinned, waits, alone=is_pinned)
        *before, last_bytes = [own_bytes, *(some.held_bytes for some in ahead)] if ahead else [own_bytes, 0]
        found.append(
            Interval(
                partition=one.name,
                phase="run",
                weights_bytes=stay_bytes + sum(before),
                loading_bytes=last_bytes + chain.slab_bytes,
                activation_bytes=chain.running_bytes[index],
                lasting_bytes=lasting,
            )
        )
        done += not is_pinned
    return found


def _ahead(
    transient: Sequence[Partition], first: int, slots: int, waits: frozenset[str], alone: bool
) -> list[Partition]:
    """The transient partitions that may be loaded beyond those that have run; `alone` if no other one is there."""
    ahead: list[Partition] = []
    for offset in range(min(slots, len(transient) - (not alone))):  # none is there twice
        one = transient[(first + offset) % len(transient)]
        if one.name in waits and not (alone and offset == 0):
            break
        ahead.append(one)
    return ahead


def residency(chain: Chain, machine: Machine, cadence: str) -> list[Residency]:
    """The levels, from the least memory that works to everything loaded; a stage that runs once keeps nothing."""
    nothing: frozenset[str] = frozenset()
    levels = [_level(chain, nothing, 0, nothing)]
    if waits := _waits(chain, machine.budget_bytes):
        levels.append(_level(chain, nothing, 1, waits))
    levels += [_level(chain, nothing, ahead, nothing) for ahead in range(1, MOST_AHEAD + 1)]
    if cadence != "once":
        pinned: list[str] = []
        for name in pinning_order(chain, machine):
            pinned.append(name)
            levels.append(_level(chain, frozenset(pinned), MOST_AHEAD, nothing))
    kept = levels[:1]
    for level in levels[1:]:
        while len(kept) > 1 and kept[-1].needs_bytes >= level.needs_bytes:  # less memory for more that stays
            kept.pop()
        if level.needs_bytes > kept[0].needs_bytes or level.pinned or level.prefetch:
            kept.append(level)
    return kept


def variant_of(
    chain: Chain,
    machine: Machine,
    cadence: str,
    stage: str,
    inputs: Sequence[TensorSpec],
    outputs: Sequence[TensorSpec],
) -> Variant:
    """A variant with its levels, and the certificate of the one that the budget allows; raises BudgetError."""
    levels = residency(chain, machine, cadence)
    first_needs_bytes = _first_needs_bytes(chain)
    if first_needs_bytes > machine.budget_bytes:
        raise BudgetError(
            stage,
            f"holds {first_needs_bytes} bytes, the budget is {machine.budget_bytes}; "
            "run the pass partition, or raise memory_budget",
            first_needs_bytes - machine.budget_bytes,
        )
    best = [level for level in levels if level.needs_bytes <= machine.budget_bytes][-1]
    return Variant(
        inputs=tuple(inputs),
        outputs=tuple(outputs),
        order=tuple(one.name for one in chain.partitions),
        residency=tuple(levels),
        first_needs_bytes=first_needs_bytes,
        certificate=tuple(intervals(chain, frozenset(best.pinned), best.prefetch, frozenset(best.waits))),
        peak_bytes=best.needs_bytes,
    )


def most_bytes(variant: Variant, partitions: Sequence[Partition], budget_bytes: int) -> int:
    """The most bytes that any run of a variant holds within a budget.

    In a first run the workspace grows: it packs weights by the first level, or, where they are packed already, goes by
    the best level that leaves room for that.
    """
    growing_bytes = max(_growing_bytes(partitions))
    first = (level.needs_bytes + growing_bytes for level in variant.residency)
    return max(variant.peak_bytes, variant.first_needs_bytes, *(most for most in first if most <= budget_bytes))


def _first_needs_bytes(chain: Chain) -> int:
    """The most bytes held in a first run by the first level, which packs weights and lets the workspace grow."""
    most_bytes = 0
    for one, waiting_bytes, running_bytes, growing_bytes in zip(
        chain.partitions, chain.waiting_bytes, chain.running_bytes, _growing_bytes(chain.partitions), strict=True
    ):
        running_bytes += one.held_bytes + growing_bytes
        most_bytes = max(most_bytes, waiting_bytes + one.load_bytes, running_bytes)
    return most_bytes + chain.slab_bytes + lasting_bytes(chain.partitions)


def _growing_bytes(partitions: Sequence[Partition]) -> list[int]:
    """What the workspace takes beyond its largest size when it grows for each: the one before is there meanwhile."""
    largest_bytes = max(one.workspace_bytes for one in partitions)
    before = [0, *accumulate((one.workspace_bytes for one in partitions), max)]
    return [
        max(before_bytes + one.workspace_bytes - largest_bytes, 0) if one.workspace_bytes > before_bytes else 0
        for one, before_bytes in zip(partitions, before, strict=False)
    ]


def _level(chain: Chain, pinned: frozenset[str], prefetch: int, waits: frozenset[str]) -> Residency:
    needs_bytes = max(one.total_bytes for one in intervals(chain, pinned, prefetch, waits))
    in_order = [one.name for one in chain.partitions]
    return Residency(
        needs_bytes=needs_bytes,
        prefetch=prefetch,
        pinned=tuple(name for name in in_order if name in pinned),
        waits=tuple(name for name in in_order if name in waits),
    )


def _waits(chain: Chain, budget_bytes: int) -> frozenset[str]:
    """The partitions whose load does not fit beside the run before; empty if all do, or if that does not help."""
    names = [one.name for one in chain.partitions]
    waits: frozenset[str] = frozenset()
    while True:
        over = [
            one.partition
            for one in intervals(chain, frozenset(), 1, waits)
            if one.phase == "run" and one.total_bytes > budget_bytes
        ]
        more = waits | {names[(names.index(name) + 1) % len(names)] for name in over}
        if more == waits:
            return waits if len(waits) < len(names) and not over else frozenset()
        waits = more


def pinning_order(chain: Chain, machine: Machine) -> list[str]:
    """All partitions, those first whose staying saves the most predicted time for its bytes; sets of them nest.

    Where two save the same, the one goes first whose load is longest for its bytes, and then the one that is farthest
    from those that stay already.
    """
    count = len(chain.partitions)
    order: list[int] = []
    while len(order) < count:
        now_s = cycle_s(chain, machine, frozenset(order))
        left = [index for index in range(count) if index not in order]

        def worth(index: int, now_s: float = now_s) -> tuple[float, float, int, int]:
            one = chain.partitions[index]
            size_bytes = max(one.held_bytes, 1)
            saved_s = now_s - cycle_s(chain, machine, frozenset([*order, index]))
            apart = min((min((index - other) % count, (other - index) % count) for other in order), default=0)
            load_s = machine.load_s(one.weight_bytes)
            return round(saved_s / size_bytes * 1e12, 3), round(load_s / size_bytes * 1e12, 3), apart, -index

        order.append(max(left, key=worth))
    return [chain.partitions[index].name for index in order]


def cycle_s(chain: Chain, machine: Machine, pinned: frozenset[int]) -> float:
    """Predicted seconds of a run in the steady state of many, with partitions loaded ahead."""
    cycles = 3  # the first one starts with nothing loaded
    runs = [machine.run_s(one.flops, one.int8_flops) for one in chain.partitions]
    loads = [machine.load_s(one.weight_bytes) for one in chain.partitions]
    freed: list[float] = []  # when each transient run so far was over
    loader_s = run_end_s = begin_s = 0.0
    for cycle in range(cycles):
        begin_s = run_end_s
        for index, run_s in enumerate(runs):
            ready_s = 0.0
            if index not in pinned:
                loader_s = max(loader_s, freed[-1 - MOST_AHEAD] if len(freed) > MOST_AHEAD else 0.0) + loads[index]
                ready_s = loader_s
            elif cycle == 0:
                loader_s += loads[index]
                ready_s = loader_s
            run_end_s = max(run_end_s, ready_s) + run_s
            if index not in pinned:
                freed.append(run_end_s)
    return run_end_s - begin_s
