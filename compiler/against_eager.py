"""A bundle against PyTorch, from the checkpoints: partitions as the target should compute them, stages in fp32."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from torch import Tensor, fx

from movdc.compiler.device import Machine
from movdc.compiler.errors import MovdcError
from movdc.compiler.expectation import expectation
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
Run = Callable[[Mapping[str, Array]], Mapping[str, Array]]
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


def compared(piece: Piece, target: Target, name: str, run: Run) -> tuple[Error, float]:
    """How far a program is from what it should make of the inputs that follow from a name, and what it is held to."""
    inputs = inputs_for(name, piece)
    right, figure_db = expectation(piece, inputs, target)
    ours = run({one: tensor.numpy() for one, tensor in inputs.items()})
    return worst_of({one: compare(ours[one], tensor.numpy(), one) for one, tensor in right.items()}), figure_db


def _partition_finding(source: Source, name: str, executor: AnyExecutor) -> Finding:
    try:
        error, figure_db = compared(source.pieces[name], source.target, name, partial(executor.run_partition, name))
    except RunError as failed:
        return Finding("partition", name, False, note=str(failed))
    return Finding("partition", name, error.sqnr_db >= figure_db, figure_db, error)


def _stage_finding(source: Source, stage: str, variant: str, executor: AnyExecutor) -> Finding:
    name = f"{stage}.{variant}"
    graph = source.graphs[name]
    pieces = [piece for one, piece in source.pieces.items() if one.startswith(f"{name}.")]
    inputs = made_inputs(name, recipes_of(graph, graph.inputs), graph.inputs)
    figure_db = min_sqnr_db(pieces, source.passes, source.target.min_sqnr_db() or 0.0)
    try:
        ours = executor.run(stage, variant, {k: v.numpy() for k, v in inputs.items()})
    except RunError as failed:
        return Finding("stage", name, False, figure_db, note=str(failed))
    right = run_pieces(pieces, inputs)
    error = worst_of(
        {spec.name: compare(ours[spec.name], right[spec.name].numpy(), spec.name) for spec in graph.outputs}
    )
    return Finding("stage", name, error.sqnr_db >= figure_db, figure_db, error)


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
