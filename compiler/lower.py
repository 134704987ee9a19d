"""Lowering: each template becomes one program, and each partition of it a set of weights in the bundle."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from movdc.compiler.bundle_writer import BundleWriter
from movdc.compiler.pieces import Piece, split
from movdc.compiler.program import Graph, Program
from movdc.compiler.schedule import check, sequential
from movdc.compiler.target import Artifact, Target
from movdc.runtime.bundle import Partition, Stage, Variant

Progress = Callable[[str, int, int], None]  # what is being done, done so far, in all


def lower(
    program: Program, target: Target, writer: BundleWriter, progress: Progress
) -> tuple[tuple[Stage, ...], tuple[Partition, ...]]:
    """Lower each template once and write the weights of every partition; raises InternalError for a wrong schedule."""
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
