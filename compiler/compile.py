"""Compiling: trace, passes, lowering, bundle."""

from __future__ import annotations

import platform
import tempfile
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path

from movdc.compiler.bundle_writer import BundleWriter, new_bundle
from movdc.compiler.device import Machine
from movdc.compiler.errors import BudgetError, InternalError, MovdcError
from movdc.compiler.family import Family
from movdc.compiler.pass_base import Pass, PassResult, run_passes
from movdc.compiler.pieces import Piece, split
from movdc.compiler.printer import print_program
from movdc.compiler.program import Graph, Program
from movdc.compiler.schedule import check, sequential
from movdc.compiler.spec import SpecFile
from movdc.compiler.target import Artifact, Target
from movdc.runtime.bundle import FORMAT_VERSION, Manifest, Partition, Stage, Variant, Video

Progress = Callable[[str, int, int], None]  # what is being done, done so far, in all


def compile_bundle(
    spec_file: SpecFile,
    out: Path,
    family: Family,
    target: Target,
    machine: Machine,
    phases: Sequence[tuple[str, Sequence[Pass]]],
    dump: Path | None,
    progress: Progress,
) -> Manifest:
    """Compile a spec into the bundle `out` and return its manifest."""
    with new_bundle(out) as writer:
        program = _optimise(spec_file, family, machine, phases, dump, progress)
        _refuse(program, target)
        stages, partitions = _lower(program, target, writer, progress)
        writer.add_bytes(program.prompt.tokenizer, program.tokenizer_json)
        manifest = Manifest(
            format_version=FORMAT_VERSION,
            family=family.name,
            target=target.name,
            device=program.spec.device,
            budget_bytes=machine.budget_bytes,
            peak_bytes=max(variant.peak_bytes for stage in stages for variant in stage.variants.values()),
            video=Video.model_validate(program.spec.video.model_dump()),
            prompt=program.prompt,
            sampler=program.sampler,
            decode=program.decode,
            stages=stages,
            partitions=partitions,
            weights=tuple(writer.weights[path] for path in sorted(writer.weights)),
            files=tuple(writer.files[path] for path in sorted(writer.files)),
            spec=program.spec.model_dump(mode="json"),
            pipeline=",".join(str(one) for _, passes in phases for one in passes),
            versions={"movdc": version("movdc"), "torch": version("torch"), "executorch": version("executorch")}
            | {"python": platform.python_version()},
        )
        writer.finish(manifest)
    return manifest


def _optimise(
    spec_file: SpecFile,
    family: Family,
    machine: Machine,
    phases: Sequence[tuple[str, Sequence[Pass]]],
    dump: Path | None,
    progress: Progress,
) -> Program:
    """Trace and run the passes, with the largest micro-batch of the decoder that fits the budget."""
    passes = [one for _, some in phases for one in some]
    last_of = {some[-1]: phase for phase, some in phases}
    for micro_batch_frames in family.micro_batches:
        progress("trace", 0, 1)
        program = family.trace(spec_file, machine, micro_batch_frames)
        progress("trace", 1, 1)
        if dump is not None:
            _dump(dump, "0-trace", program)

        def after(one: Pass, result: PassResult) -> None:
            if dump is not None and one in last_of:
                names = [phase for phase, _ in phases]
                _dump(dump, f"{names.index(last_of[one]) + 1}-{last_of[one]}", result.program)
            progress("passes", passes.index(one) + 1, len(passes))

        try:
            return run_passes(program, passes, after)
        except BudgetError as error:
            if error.stage != "vae_spatial" or micro_batch_frames == family.micro_batches[-1]:
                raise
    raise InternalError(f"family {family.name} names no micro-batch")


def _dump(folder: Path, name: str, program: Program) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.txt").write_text(print_program(program))


def _refuse(program: Program, target: Target) -> None:
    for stage, _, graph in program.graphs():
        for node in graph.compute_nodes:
            if reason := target.refuse(node):
                raise MovdcError(f"{stage}: {target.name} cannot run %{node.name} ({node.target}): {reason}")


def _lower(
    program: Program, target: Target, writer: BundleWriter, progress: Progress
) -> tuple[tuple[Stage, ...], tuple[Partition, ...]]:
    """Lower each template once and write the weights of every partition."""
    pieces = {(stage, variant): split(graph) for stage, variant, graph in program.graphs()}
    total = sum(len(some) for some in pieces.values())
    lowered: dict[str, tuple[str, Artifact]] = {}
    partitions: list[Partition] = []
    stages = []
    for stage in program.stages:
        variants = {}
        for variant, graph in stage.variants.items():
            made = []
            for index, piece in enumerate(pieces[stage.name, variant]):
                progress("lower", len(partitions), total)
                name = f"{stage.name}.{variant}.{index}"
                template = graph.templates[index] if graph.templates else name
                with tempfile.TemporaryDirectory(dir=writer.root) as folder:
                    if template not in lowered:
                        artifact = target.emit(piece, Path(folder))
                        lowered[template] = writer.add_program(artifact.program), artifact
                    made.append(_partition(name, piece, *lowered[template], target, writer, Path(folder)))
                partitions.append(made[-1])
            variants[variant] = _variant(graph, made, program.machine.budget_bytes)
        stages.append(Stage(name=stage.name, cadence=stage.cadence, variants=variants))
    progress("lower", total, total)
    return tuple(stages), tuple(partitions)


def _partition(
    name: str, piece: Piece, program: str, artifact: Artifact, target: Target, writer: BundleWriter, folder: Path
) -> Partition:
    weights = []
    for group in dict.fromkeys(weight.group for weight in piece.weights):
        path = folder / f"{group}{target.weights_suffix}"
        if slots := artifact.slots_of(piece, group):
            weights.append(writer.add_weights(path, target.write_weights(slots, path)))
    return Partition(
        name=name,
        program=program,
        weights=tuple(weights),
        inputs=tuple(piece.tensor(node) for node in piece.inputs),
        outputs=tuple(piece.tensor(node) for node in piece.outputs),
        weight_bytes=piece.weight_bytes,
        held_bytes=piece.weight_bytes,
        load_bytes=int(target.load_copies * piece.weight_bytes),
        working_bytes=piece.working_bytes,
        flops=piece.flops,
    )


def _variant(graph: Graph, partitions: Sequence[Partition], budget_bytes: int) -> Variant:
    schedule = sequential(partitions)
    by_name = {partition.name: partition for partition in partitions}
    peak_bytes = check(schedule, by_name, graph.inputs, graph.outputs, budget_bytes)
    return Variant(inputs=graph.inputs, outputs=graph.outputs, schedule=schedule, peak_bytes=peak_bytes)
