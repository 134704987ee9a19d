"""Lowering: each template becomes one program, and each partition of it a set of weights in the bundle."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial

from pydantic import TypeAdapter

from movdc.compiler.bundle_writer import BundleWriter
from movdc.compiler.cache import CompileCache, Entry, key_of
from movdc.compiler.emit import emit_all
from movdc.compiler.layer_errors import LayerErrors
from movdc.compiler.levels import count_calls, variant_of
from movdc.compiler.pieces import Piece, split
from movdc.compiler.program import Program
from movdc.compiler.residency import Chain
from movdc.compiler.target import Artifact, Memory, Slot, Target
from movdc.compiler.weights_files import files_of, make_files
from movdc.runtime.bundle import Constant, LayerError, Partition, Stage

Progress = Callable[[str, int, int], None]  # what is being done, done so far, in all


@dataclass(frozen=True)
class Lowered:
    """What the manifest says of the programs and weights that are in the bundle now."""

    stages: tuple[Stage, ...]
    partitions: tuple[Partition, ...]
    quantization: tuple[LayerError, ...]


@dataclass(frozen=True)
class _Program:
    """A template's program, and what is known of it."""

    entry: Entry
    slots: tuple[Slot, ...]
    memory: Memory
    delegated_nodes: int
    fallback: Mapping[str, int]


def lower(
    program: Program, target: Target, writer: BundleWriter, cache: CompileCache, progress: Progress, jobs: int = 1
) -> Lowered:
    """Lower each template once, in `jobs` processes, and write the weights of every partition, unless they are cached.

    Raises BudgetError if no level of residency fits the budget, before anything is written to the bundle.
    """
    templates: dict[str, Piece] = {}
    lowered_as: dict[str, str] = {}  # the template of each partition
    pieces = pieces_of(program)
    for stage_name, variant, graph in program.graphs():
        own = pieces[stage_name, variant]
        for name, template in zip(own, graph.templates or own, strict=True):
            lowered_as[name] = f"{stage_name} {template}"
            templates.setdefault(lowered_as[name], own[name])
    programs = _programs(templates, target, cache, progress, jobs)
    parts: dict[tuple[str, str], list[Partition]] = {}
    for of, own in pieces.items():
        parts[of] = []
        for name, piece in own.items():
            one = programs[lowered_as[name]]
            path = writer.program_path(one.entry, target.program_suffix)
            lowered = partition_of(name, piece, path, one.memory, target)
            parts[of].append(
                lowered.model_copy(update={"delegated_nodes": one.delegated_nodes, "fallback": dict(one.fallback)})
            )
    stages = stages_of(program, parts)
    made = {part.name: part for own in parts.values() for part in own}
    files = {
        name: files_of(piece, programs[lowered_as[name]].slots, programs[lowered_as[name]].entry, target)
        for own in pieces.values()
        for name, piece in own.items()
    }
    wanted = [file for some in files.values() for file in some]
    entries = make_files(wanted, target, cache, jobs, partial(progress, "weights"))
    errors = LayerErrors()
    for (stage_name, _), own in pieces.items():
        for name in own:
            program_entry, weights = programs[lowered_as[name]].entry, []
            for file in files[name]:
                entry = entries[file.key]
                errors.add(stage_name, file.refs, entry.note["sqnr_db"])
                if file.template is not None:
                    program_entry = entry
                    continue
                constants = TypeAdapter(tuple[Constant, ...]).validate_python(entry.note["constants"])
                weights.append(writer.add_weights(entry, target.weights_suffix, constants))
            path = writer.add_program(program_entry, target.program_suffix)
            made[name] = made[name].model_copy(update={"program": path, "weights": tuple(weights)})
    return Lowered(stages, tuple(made.values()), errors.worst_first())


def pieces_of(program: Program) -> dict[tuple[str, str], dict[str, Piece]]:
    """The pieces of each stage and variant, by the names of their partitions."""
    return {
        (stage, variant): {f"{stage}.{variant}.{index}": piece for index, piece in enumerate(split(graph, stage))}
        for stage, variant, graph in program.graphs()
    }


def stages_of(program: Program, parts: Mapping[tuple[str, str], Sequence[Partition]]) -> tuple[Stage, ...]:
    """The stages with the levels of their partitions; raises BudgetError if no level fits the budget."""
    stages = []
    for stage in program.stages:
        variants = {}
        for variant, graph in stage.variants.items():
            chain = Chain.of(parts[stage.name, variant], graph.inputs, program.machine.slab_bytes)
            calls = count_calls(program.sampler, program.decode, program.stages, stage.name, variant)
            variants[variant] = variant_of(
                chain, program.machine, stage.cadence, calls, stage.name, graph.inputs, graph.outputs
            )
        stages.append(Stage(name=stage.name, cadence=stage.cadence, variants=variants))
    return tuple(stages)


def _programs(
    templates: Mapping[str, Piece], target: Target, cache: CompileCache, progress: Progress, jobs: int
) -> dict[str, _Program]:
    """The program of each template; one that is made goes to the cache at once."""
    identity = target.program_identity
    keys = {one: key_of("program", identity, piece.stage, piece.text()) for one, piece in templates.items()}
    programs: dict[str, _Program] = {}

    def add(template: str, entry: Entry) -> None:
        slots = TypeAdapter(tuple[Slot, ...]).validate_python(entry.note["slots"])
        memory = Memory(**entry.note["memory"])
        programs[template] = _Program(entry, slots, memory, entry.note["delegated_nodes"], entry.note["fallback"])
        progress("lower", len(programs), len(templates))

    def done(template: str, artifact: Artifact) -> None:
        note = {
            "slots": [asdict(slot) for slot in artifact.slots],
            "memory": asdict(artifact.memory),
            "delegated_nodes": artifact.delegated_nodes,
            "fallback": dict(sorted(artifact.fallback.items())),
        }
        add(template, cache.put(keys[template], artifact.program, artifact.sha256, note))

    progress("lower", 0, len(templates))
    for template, key in keys.items():
        if entry := cache.get(key):
            add(template, entry)
    missing = {template: piece for template, piece in templates.items() if template not in programs}
    emit_all(missing, target, cache.work, jobs, done)
    return programs


def partition_of(name: str, piece: Piece, path: str, memory: Memory, target: Target) -> Partition:
    """A partition whose weights are not written yet."""
    unpacked_bytes = piece.weight_bytes if target.load_copies > 1 else 0  # beside what is made of them
    return Partition(
        name=name,
        program=path,
        weights=(),
        inputs=tuple(piece.tensor(node) for node in piece.inputs),
        outputs=tuple(piece.tensor(node) for node in piece.outputs),
        weight_bytes=piece.weight_bytes,
        held_bytes=memory.held_bytes,
        load_bytes=memory.held_bytes + unpacked_bytes,
        program_bytes=memory.program_bytes,
        workspace_bytes=memory.workspace_bytes,
        planned_bytes=memory.planned_bytes,
        flops=piece.flops,
        int8_flops=piece.int8_flops,
    )
