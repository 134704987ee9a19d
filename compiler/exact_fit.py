"""Exact fit: what a compile would make of a spec, by its own passes, planner and levels, with nothing lowered.

A compile measures what its programs take where the target can; here it is the estimate that the planner goes by.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from movdc.compiler.bounds import calls_bound_s
from movdc.compiler.compile import plan
from movdc.compiler.cost import size_bytes
from movdc.compiler.device import Machine
from movdc.compiler.errors import BudgetError
from movdc.compiler.family import Family
from movdc.compiler.fit import Fit, StageFit
from movdc.compiler.lower import Progress, partition_of, pieces_of, stages_of
from movdc.compiler.pass_base import Pass
from movdc.compiler.pieces import Piece
from movdc.compiler.program import Program
from movdc.compiler.residency import Chain, most_bytes
from movdc.compiler.spec import SpecFile
from movdc.compiler.target import Target
from movdc.runtime.bundle import FORWARD, Partition, Stage
from movdc.runtime.simulate import Call, Simulator, named_calls
from movdc.runtime.timeline import Event, stage_times

FILE_NODE_BYTES = 200  # of a program's file, for each node, about


def exact_fit(
    spec_file: SpecFile,
    family: Family,
    target: Target,
    machine: Machine,
    phases: Sequence[tuple[str, Sequence[Pass]]],
    progress: Progress,
    note: Callable[[str, str], None],
) -> Fit:
    """Trace, pass, cut and play a spec; `needs_bytes` is left at 0."""
    try:
        make = partial(_fit, target=target)
        return plan(spec_file, family, target, machine, phases, None, progress, note, make)[0]
    except BudgetError as error:
        return Fit({}, 0, 0, str(error))


def _fit(program: Program, target: Target) -> Fit:
    pieces = pieces_of(program)
    parts = {
        of: [
            partition_of(name, one, f"programs/{one.stage}", FORWARD, target.estimate(one), target)
            for name, one in own.items()
        ]
        for of, own in pieces.items()
    }
    stages = stages_of(program, parts)
    events = _played(program, stages, parts)
    found = {}
    for stage in stages:
        own = [one for (name, _), some in pieces.items() if name == stage.name for one in some.values()]
        found[stage.name] = _stage_fit(stage, program, own, parts, events)
    nodes = {piece.text(): len(piece.nodes) for own in pieces.values() for piece in own.values()}
    bundle_bytes = sum(one.weight_bytes for one in found.values()) + len(program.tokenizer_json)
    return Fit(found, 0, bundle_bytes + FILE_NODE_BYTES * sum(nodes.values()))


def _stage_fit(
    stage: Stage,
    program: Program,
    pieces: Sequence[Piece],
    parts: dict[tuple[str, str], list[Partition]],
    events: Sequence[Event],
) -> StageFit:
    machine = program.machine
    calls = _calls(program)
    own = [(variant, parts[stage.name, name]) for name, variant in stage.variants.items()]
    bounds_s = [
        calls_bound_s(Chain.of(some, one.inputs, machine.slab_bytes), machine.rates, machine.budget_bytes, count)
        for name, one in stage.variants.items()
        for some in [parts[stage.name, name]]
        if (count := calls.count((stage.name, name)))
    ]
    return StageFit(
        partitions=len(pieces),
        programs=len({piece.text() for piece in pieces}),
        weight_bytes=_weights_bytes(pieces),
        peak_bytes=max(most_bytes(one, some, machine.budget_bytes) for one, some in own),
        times=stage_times(events)[stage.name],
        bound_s=sum(bounds_s),
    )


def _weights_bytes(pieces: Sequence[Piece]) -> int:
    """Of the files that a bundle has: one for each set of weights, whichever variants read it."""
    files: dict[tuple[str, ...], int] = {}
    for piece in pieces:
        for group in ("weights", "tables"):
            own = [weight for weight in piece.weights if weight.group == group]
            files[tuple(str(weight.ref) for weight in own)] = sum(size_bytes(weight.node) for weight in own)
    return sum(files.values())


def _played(program: Program, stages: Sequence[Stage], parts: dict[tuple[str, str], list[Partition]]) -> list[Event]:
    machine = program.machine
    named = {one.name: one for some in parts.values() for one in some}
    variants = {(stage.name, name): one for stage in stages for name, one in stage.variants.items()}
    calls = _calls(program)
    simulator = Simulator(named, machine.slab_bytes, machine.rates, machine.budget_bytes)
    again = [one == after for one, after in zip(calls, [*calls[1:], None], strict=True)]
    return simulator.run(Call(one[0], variants[one], more) for one, more in zip(calls, again, strict=True))


def _calls(program: Program) -> list[tuple[str, str]]:
    merges = any("merged" in stage.variants for stage in program.stages if stage.name == "denoiser")
    return named_calls(program.sampler, program.decode, merges)
