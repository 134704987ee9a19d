"""A bundle against PyTorch: each of its partitions and stages on the same inputs, from the checkpoints in fp32."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from torch import Tensor, fx

from movdc.compiler.device import Machine
from movdc.compiler.eager import evaluate
from movdc.compiler.errors import MovdcError
from movdc.compiler.family import Family
from movdc.compiler.pass_base import Pass, run_passes
from movdc.compiler.pieces import Piece, piece_of
from movdc.compiler.program import Graph
from movdc.compiler.record import made_inputs, min_sqnr_db, recipes_of, run_pieces
from movdc.compiler.spec import SpecFile
from movdc.compiler.target import Target
from movdc.runtime.bundle import Manifest, Partition, Sampler
from movdc.runtime.errors import RunError
from movdc.runtime.executors import AnyExecutor
from movdc.runtime.expected import Error, compare, worst_of
from movdc.runtime.replay import Finding, Progress, replay_sampler
from movdc.runtime.replay_sampler import sampler_check

Array = np.ndarray[Any, Any]
_LEFT_OUT = ("partition", "share-templates")  # the bundle says how it is cut


@dataclass(frozen=True)
class Source:
    """The graphs that a bundle was made of, traced again and cut as it is cut."""

    pieces: Mapping[str, Piece]  # by partition
    graphs: Mapping[str, Graph]  # by STAGE.VARIANT
    sampler: Sampler  # the plan that the passes make
    passes: Sequence[Pass]
    target: Target
    manifest: Manifest

    def figure_db(self, pieces: Sequence[Piece]) -> float:
        """What these pieces are held to."""
        return min_sqnr_db(pieces, self.passes, self.target.min_sqnr_db() or 0.0)


def source_of(
    spec_file: SpecFile,
    family: Family,
    target: Target,
    machine: Machine,
    passes: Sequence[Pass],
    manifest: Manifest,
) -> Source:
    """Trace a spec and run the bundle's passes; raises MovdcError if that does not give the bundle's graphs."""
    traced = family.trace(spec_file, machine, manifest.decode.micro_batch_frames)
    program = run_passes(traced, [one for one in passes if one.name not in _LEFT_OUT])
    graphs = {f"{stage}.{variant}": graph for stage, variant, graph in program.graphs()}
    stages = {stage.name: stage for stage in manifest.stages}
    partitions = {one.name: one for one in manifest.partitions}
    pieces: dict[str, Piece] = {}
    for stage_name, stage in stages.items():
        for name, variant in stage.variants.items():
            graph = graphs.get(f"{stage_name}.{name}")
            if graph is None or (graph.inputs, graph.outputs) != (variant.inputs, variant.outputs):
                raise _other(spec_file, f"{stage_name} ({name})")
            for own in (one for one in partitions.values() if one.name.startswith(f"{stage_name}.{name}.")):
                try:
                    pieces[own.name] = piece_between(graph, own, stage_name)
                except KeyError as error:
                    raise _other(spec_file, f"{own.name}, which has no {error.args[0]}") from None
    return Source(pieces, graphs, program.sampler, passes, target, manifest)


def compare_with_eager(source: Source, executor: AnyExecutor, on_progress: Progress) -> list[Finding]:
    """Every partition by itself, then every stage as a whole, then the sampler's plan."""
    manifest, found = source.manifest, []
    for done, partition in enumerate(manifest.partitions):
        on_progress("partitions", done, len(manifest.partitions))
        found.append(_partition_finding(source, partition.name, executor))
    on_progress("partitions", len(manifest.partitions), len(manifest.partitions))
    variants = [(stage.name, name) for stage in manifest.stages for name in stage.variants]
    for done, (stage, variant) in enumerate(variants):
        on_progress("stages", done, len(variants))
        found.append(_stage_finding(source, stage, variant, executor))
    on_progress("stages", len(variants), len(variants))
    return [*found, replay_sampler(manifest.sampler, sampler_check(source.sampler))]


def inputs_for(name: str, piece: Piece) -> dict[str, Tensor]:
    """The inputs of a partition, which follow from its name."""
    specs = [piece.tensor(node) for node in piece.inputs]
    return made_inputs(name, recipes_of(piece.graph, specs), specs)


def compared(piece: Piece, inputs: Mapping[str, Tensor], ours: Mapping[str, Array]) -> Error:
    """The worst of a piece's outputs."""
    right = evaluate(piece, inputs)
    return worst_of({name: compare(ours[name], tensor.numpy(), name) for name, tensor in right.items()})


def _partition_finding(source: Source, name: str, executor: AnyExecutor) -> Finding:
    piece = source.pieces[name]
    inputs = inputs_for(name, piece)

    def error() -> Error:
        return compared(piece, inputs, executor.run_partition(name, {k: v.numpy() for k, v in inputs.items()}))

    return _finding("partition", name, source.figure_db([piece]), error)


def _stage_finding(source: Source, stage: str, variant: str, executor: AnyExecutor) -> Finding:
    name = f"{stage}.{variant}"
    graph = source.graphs[name]
    pieces = [piece for one, piece in source.pieces.items() if one.startswith(f"{name}.")]
    inputs = made_inputs(name, recipes_of(graph, graph.inputs), graph.inputs)

    def error() -> Error:
        ours = executor.run(stage, variant, {k: v.numpy() for k, v in inputs.items()})
        right = run_pieces(pieces, inputs)
        names = [spec.name for spec in graph.outputs]
        return worst_of({one: compare(ours[one], right[one].numpy(), one) for one in names})

    return _finding("stage", name, source.figure_db(pieces), error)


def _finding(kind: Literal["partition", "stage"], name: str, figure_db: float, error: Callable[[], Error]) -> Finding:
    try:
        found = error()
    except RunError as failed:
        return Finding(kind, name, False, figure_db, note=str(failed))
    return Finding(kind, name, found.sqnr_db >= figure_db, figure_db, found)


def piece_between(graph: Graph, partition: Partition, stage: str) -> Piece:
    """The nodes between the inputs and the outputs of a partition; raises KeyError for what the graph does not have."""
    nodes = {node.name: node for node in graph.graph.nodes}
    nodes |= {spec.name: result for spec, result in zip(graph.outputs, graph.output_node.args[0], strict=True)}
    known = {nodes[spec.name] for spec in partition.inputs}
    stack = [nodes[spec.name] for spec in partition.outputs]
    inside: set[fx.Node] = set()
    while stack:
        node = stack.pop()
        if node in inside or node in known or node.name in graph.weights:
            continue
        if node.op != "call_function":
            raise KeyError(f"input {node.name}")
        inside.add(node)
        stack += node.all_input_nodes
    return replace(piece_of(graph, [node for node in graph.compute_nodes if node in inside]), stage=stage)


def _other(spec_file: SpecFile, where: str) -> MovdcError:
    return MovdcError(
        f"--spec: {spec_file.path} does not give the graphs of this bundle ({where}); give the YAML that it was "
        "compiled from, or compile it again with this movdc"
    )
