"""share-templates on a T5 of 24 blocks, lowered: few programs, and each block's result is that of its own program."""

import hashlib
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lowering
import numpy as np
import pytest
import torch
from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
from executorch.exir import to_edge_transform_and_lower
from executorch.extension.pybindings.portable_lib import _load_for_executorch_from_buffer
from torch import Tensor

from movdc.compiler.bundle_writer import BundleWriter
from movdc.compiler.cache import open_cache
from movdc.compiler.lower import lower
from movdc.compiler.pieces import Piece, split
from movdc.compiler.program import Program
from movdc.compiler.target import Artifact
from movdc.passes.share_templates import ShareTemplates
from movdc.runtime import _engine
from movdc.runtime.bundle import NUMPY_DTYPES, Partition, Residency, Stage, Variant
from movdc.targets.executorch_xnnpack import ExecutorchXnnpack

Seal = Callable[..., None]


@dataclass(frozen=True)
class Counting(ExecutorchXnnpack):
    """The real target, which also notes what it lowered."""

    lowered: list[str] = field(default_factory=list)

    def emit(self, piece: Piece, directory: Path) -> Artifact:
        self.lowered.append(piece.text())
        return super().emit(piece, directory)


def _compiled(blocks: int, program_of: Callable[..., Program]) -> Program:
    return ShareTemplates()(lowering.program_of(blocks, program_of())).program


def _own_program(piece: Piece, inputs: list[Tensor], folder: Path) -> list[Tensor]:
    """The piece with its own weights inside, lowered and run by ExecuTorch alone."""
    module = piece.module(folder)
    for weight in piece.weights:
        module.get_parameter(weight.name).data = weight.ref.read()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exported = torch.export.export(module, tuple(inputs), strict=False)
        program = to_edge_transform_and_lower(exported, partitioner=[XnnpackPartitioner()]).to_executorch()
    return list(_load_for_executorch_from_buffer(program.buffer).run_method("forward", inputs))


def _template(root: Path, writer: BundleWriter, partition: Partition, inputs: list[Tensor], seal: Seal) -> list[Tensor]:
    """The partition as the bundle has it, run by the engine."""
    level = Residency(needs_bytes=0, prefetch=0)
    variant = Variant(
        inputs=partition.inputs,
        outputs=partition.outputs,
        order=(partition.name,),
        residency=(level,),
        first_needs_bytes=0,
        certificate=(),
        peak_bytes=0,
    )
    seal(
        root,
        stages=(Stage(name="stage", cadence="once", variants={"plain": variant}),),
        partitions=(partition,),
        weights=tuple(writer.weights[path] for path in partition.weights),
        files=tuple(writer.files.values()),
    )
    outputs: dict[str, Any] = {s.name: np.empty(s.shape, NUMPY_DTYPES[s.dtype]) for s in partition.outputs}
    arrays = {spec.name: value.numpy() for spec, value in zip(partition.inputs, inputs, strict=True)}
    options = _engine.Options(
        mode=_engine.Mode.sequential,
        budget_bytes=10**9,
        packed_cache=str(root / "packed"),
        packed_cache_limit_bytes=10**9,
        keeps_trace=False,
    )
    _engine.Engine(str(root), options).run("stage", "plain", arrays, outputs, "")
    return [torch.from_numpy(outputs[spec.name]) for spec in partition.outputs]


@pytest.mark.slow
def test_24_blocks_lower_once_and_run_as_their_own_programs(
    program_of: Callable[..., Program], tmp_path: Path, seal: Seal
) -> None:
    program = _compiled(24, program_of)
    writer = BundleWriter(tmp_path)
    target = Counting()
    with open_cache(tmp_path / "cache") as cache:
        partitions = lower(program, target, writer, cache, lambda what, done, total: None).partitions
    assert len(partitions) == 25  # 24 blocks and the last norm
    assert len(target.lowered) == 3  # the first block has the embedding, the last partition the norm
    blocks = partitions[1:24]
    assert len({partition.program for partition in blocks}) == 1
    assert len({partition.weights for partition in blocks}) == 23

    pieces = split(program.stages[0].variants["plain"])
    generator = torch.Generator().manual_seed(5)
    for index in (0, 1, 2, 12, 23, 24):
        inputs = [
            torch.randint(2, 250, spec.shape, generator=generator)
            if spec.dtype == "i64"
            else torch.randn(spec.shape, generator=generator)
            for spec in partitions[index].inputs
        ]
        shared = _template(tmp_path, writer, partitions[index], inputs, seal)
        for mine, own in zip(shared, _own_program(pieces[index], inputs, tmp_path), strict=True):
            assert torch.equal(mine, own), partitions[index].name


def test_programs_do_not_grow_with_the_blocks(program_of: Callable[..., Program]) -> None:
    templates = {
        blocks: {hashlib.sha256(piece.text().encode()).hexdigest() for piece in split(graph)}
        for blocks in (3, 6)
        for graph in [_compiled(blocks, program_of).stages[0].variants["plain"]]
    }
    assert templates[3] == templates[6]
