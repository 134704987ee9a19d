"""Lowering: each template becomes one program, and each partition of it a set of weights in the bundle."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

from movdc.compiler.bundle_writer import BundleWriter
from movdc.compiler.emit import emit_all
from movdc.compiler.pieces import Piece, split
from movdc.compiler.program import Program
from movdc.compiler.residency import Chain, variant_of
from movdc.compiler.target import Artifact, Memory, Target
from movdc.runtime.bundle import Partition, Stage

Progress = Callable[[str, int, int], None]  # what is being done, done so far, in all


def lower(
    program: Program, target: Target, writer: BundleWriter, progress: Progress, jobs: int = 1
) -> tuple[tuple[Stage, ...], tuple[Partition, ...]]:
    """Lower each template once, in `jobs` processes, and write the weights of every partition.

    Raises BudgetError if no level of residency fits the budget.
    """
    pieces = {(stage, variant): split(graph) for stage, variant, graph in program.graphs()}
    templates: dict[str, Piece] = {}
    template_of: dict[tuple[str, str], list[str]] = {}
    for stage_name, variant, graph in program.graphs():
        key = stage_name, variant
        template_of[key] = list(graph.templates) or [_name(*key, index) for index in range(len(pieces[key]))]
        for template, piece in zip(template_of[key], pieces[key], strict=True):
            templates.setdefault(template, piece)
    with tempfile.TemporaryDirectory(dir=writer.root) as folder:
        artifacts = emit_all(
            templates, target, Path(folder), jobs, lambda done: progress("lower", done, len(templates))
        )
        programs = {template: writer.add_program(artifact.program) for template, artifact in artifacts.items()}
        total = sum(len(some) for some in pieces.values())
        made: list[Partition] = []
        stages = []
        for stage in program.stages:
            variants = {}
            for variant, graph in stage.variants.items():
                first = len(made)
                for index, piece in enumerate(pieces[stage.name, variant]):
                    template = template_of[stage.name, variant][index]
                    weights = _write_weights(piece, artifacts[template], target, writer, Path(folder))
                    made.append(
                        _partition(
                            _name(stage.name, variant, index),
                            piece,
                            programs[template],
                            weights,
                            artifacts[template].memory,
                        )
                    )
                    progress("weights", len(made), total)
                chain = Chain.of(made[first:], graph.inputs, program.machine.slab_bytes)
                variants[variant] = variant_of(
                    chain, program.machine, stage.cadence, stage.name, graph.inputs, graph.outputs
                )
            stages.append(Stage(name=stage.name, cadence=stage.cadence, variants=variants))
    return tuple(stages), tuple(made)


def _name(stage: str, variant: str, index: int) -> str:
    return f"{stage}.{variant}.{index}"


def _write_weights(
    piece: Piece, artifact: Artifact, target: Target, writer: BundleWriter, folder: Path
) -> tuple[str, ...]:
    """A file for each group of the piece's weights, so that variants share those of the checkpoint."""
    refs = {weight.name: weight.ref for weight in piece.weights}
    paths = []
    for group in dict.fromkeys(weight.group for weight in piece.weights):
        names = {weight.name for weight in piece.weights if weight.group == group}
        path = folder / f"{group}{target.weights_suffix}"
        if slots := [slot for slot in artifact.slots if slot.weight in names]:
            paths.append(writer.add_weights(path, target.write_weights(slots, refs, path)))
    return tuple(paths)


def _partition(name: str, piece: Piece, program: str, weights: tuple[str, ...], memory: Memory) -> Partition:
    return Partition(
        name=name,
        program=program,
        weights=weights,
        inputs=tuple(piece.tensor(node) for node in piece.inputs),
        outputs=tuple(piece.tensor(node) for node in piece.outputs),
        weight_bytes=piece.weight_bytes,
        held_bytes=memory.held_bytes,
        load_bytes=memory.held_bytes + piece.weight_bytes,
        program_bytes=memory.program_bytes,
        workspace_bytes=memory.workspace_bytes,
        planned_bytes=memory.planned_bytes,
        flops=piece.flops,
    )
