"""Lowering: each template becomes one program, and each partition of it a set of weights in the bundle."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial

from pydantic import TypeAdapter

from movdc.compiler.bundle_writer import BundleWriter
from movdc.compiler.cache import CompileCache, Entry, key_of
from movdc.compiler.emit import emit_all
from movdc.compiler.layer_errors import LayerErrors
from movdc.compiler.levels import count_calls, variant_of
from movdc.compiler.methods import Methods, methods_of
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
class _Method:
    """What is known of a method of a program."""

    memory: Memory
    delegated_nodes: int
    fallback: Mapping[str, int]


@dataclass(frozen=True)
class _Program:
    """A template's program, and what is known of it."""

    entry: Entry
    slots: tuple[Slot, ...]
    methods: Mapping[str, _Method]


def lower(
    program: Program, target: Target, writer: BundleWriter, cache: CompileCache, progress: Progress, jobs: int = 1
) -> Lowered:
    """Lower each template once, in `jobs` processes, and write the weights of every partition, unless they are cached.

    Raises BudgetError if no level of residency fits the budget, before anything is written to the bundle.
    """
    pieces = pieces_of(program)
    wanted = _wanted(program, pieces, target)
    programs = _programs({template: methods for methods, template in wanted}, target, cache, progress, jobs)
    made: dict[str, Partition] = {}
    for methods, template in wanted:
        one = programs[template]
        path = writer.program_path(one.entry, target.program_suffix)
        for method, name in methods.partitions.items():
            made[name] = _lowered(name, methods.pieces[method], path, method, one.methods[method], target)
    stages = stages_of(program, {of: [made[name] for name in own] for of, own in pieces.items()})
    files = [
        files_of(methods, programs[template].slots, programs[template].entry, target) for methods, template in wanted
    ]
    entries = make_files([file for some in files for file in some], target, cache, jobs, partial(progress, "weights"))
    errors = LayerErrors()
    for (methods, template), some in zip(wanted, files, strict=True):
        program_entry, weights = programs[template].entry, []
        for file in some:
            entry = entries[file.key]
            errors.add(methods.stage, file.refs, entry.note["sqnr_db"])
            if file.template is not None:
                program_entry = entry
                continue
            constants = TypeAdapter(tuple[Constant, ...]).validate_python(entry.note["constants"])
            weights.append(writer.add_weights(entry, target.weights_suffix, constants))
        path = writer.add_program(program_entry, target.program_suffix)
        for name in methods.partitions.values():
            made[name] = made[name].model_copy(update={"program": path, "weights": tuple(weights)})
    partitions = tuple(made[name] for own in pieces.values() for name in own)
    return Lowered(stages, partitions, errors.worst_first())


def _wanted(
    program: Program, pieces: Mapping[tuple[str, str], Mapping[str, Piece]], target: Target
) -> list[tuple[Methods, str]]:
    """The programs of all stages, each with the name of its template; those of one template are lowered once."""
    template_of: dict[str, str] = {}
    stages: dict[str, dict[str, Mapping[str, Piece]]] = {}
    for stage, variant, graph in program.graphs():
        own = stages.setdefault(stage, {})[variant] = pieces[stage, variant]
        template_of.update(zip(own, graph.templates or own, strict=True))
    found = []
    for stage, variants in stages.items():
        for methods in methods_of(variants, target):
            label = [stage, *(template_of[name] for name in methods.partitions.values())]
            if len(methods.pieces) > 1:  # programs must agree on methods, and on which weights are the same ones, too
                names = [weight.name for piece in methods.pieces.values() for weight in piece.weights]
                label.append(hashlib.sha256(" ".join([*methods.pieces, *names]).encode()).hexdigest())
            found.append((methods, " ".join(label)))
    return found


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
    templates: Mapping[str, Methods], target: Target, cache: CompileCache, progress: Progress, jobs: int
) -> dict[str, _Program]:
    """The program of each template; one that is made goes to the cache at once."""
    identity = target.program_identity
    keys = {one: key_of("program", identity, methods.stage, methods.text()) for one, methods in templates.items()}
    programs: dict[str, _Program] = {}

    def add(template: str, entry: Entry) -> None:
        slots = TypeAdapter(tuple[Slot, ...]).validate_python(entry.note["slots"])
        methods = TypeAdapter(dict[str, _Method]).validate_python(entry.note["methods"])
        programs[template] = _Program(entry, slots, methods)
        progress("lower", len(programs), len(templates))

    def done(template: str, artifacts: Mapping[str, Artifact]) -> None:
        one, *_ = artifacts.values()
        methods = {
            method: {
                "memory": asdict(artifact.memory),
                "delegated_nodes": artifact.delegated_nodes,
                "fallback": dict(sorted(artifact.fallback.items())),
            }
            for method, artifact in artifacts.items()
        }
        note = {"slots": [asdict(slot) for slot in one.slots], "methods": methods}
        add(template, cache.put(keys[template], one.program, one.sha256, note))

    progress("lower", 0, len(templates))
    for template, key in keys.items():
        if entry := cache.get(key):
            add(template, entry)
    missing = {template: methods for template, methods in templates.items() if template not in programs}
    emit_all(missing, target, cache.work, jobs, done)
    return programs


def _lowered(name: str, piece: Piece, path: str, method: str, of: _Method, target: Target) -> Partition:
    return partition_of(name, piece, path, method, of.memory, target).model_copy(
        update={"delegated_nodes": of.delegated_nodes, "fallback": dict(of.fallback)}
    )


def partition_of(name: str, piece: Piece, path: str, method: str, memory: Memory, target: Target) -> Partition:
    """A partition whose weights are not written yet."""
    unpacked_bytes = piece.weight_bytes if target.load_copies > 1 else 0  # beside what is made of them
    return Partition(
        name=name,
        program=path,
        method=method,
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
