"""share-templates on a T5 of 24 blocks, lowered: few programs, and each block's result is that of its own program."""

import hashlib
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
from executorch.exir import to_edge_transform_and_lower
from executorch.extension.pybindings.portable_lib import _load_for_executorch_from_buffer
from torch import Tensor
from transformers import T5Config

from movdc.compiler.bundle_writer import BundleWriter
from movdc.compiler.lower import lower
from movdc.compiler.pass_base import run_passes
from movdc.compiler.pieces import Piece, split
from movdc.compiler.program import Graph, Program
from movdc.compiler.target import Artifact
from movdc.compiler.trace import trace
from movdc.compiler.weights import RandomSource
from movdc.models.opensora import TextEncoder
from movdc.passes.pipeline import parse_pipeline
from movdc.passes.share_templates import ShareTemplates
from movdc.runtime import _engine
from movdc.runtime.bundle import NUMPY_DTYPES, Partition, TensorSpec
from movdc.targets.executorch_xnnpack import ExecutorchXnnpack

TOKENS = 12


@dataclass(frozen=True)
class Counting(ExecutorchXnnpack):
    """The real target, which also notes what it lowered."""

    lowered: list[str] = field(default_factory=list)

    def emit(self, piece: Piece, directory: Path) -> Artifact:
        self.lowered.append(piece.text())
        return super().emit(piece, directory)


def _text_encoder(blocks: int) -> Graph:
    """The graph of a T5 of tiny width, cut behind each block."""
    config = T5Config(
        d_model=16, d_kv=8, d_ff=32, num_heads=2, vocab_size=64, num_layers=blocks, feed_forward_proj="gated-gelu"
    )
    config._attn_implementation = "eager"
    with torch.device("meta"):
        shapes = {key: tuple(tensor.shape) for key, tensor in TextEncoder(config).state_dict().items()}
    inputs = (
        TensorSpec(name="input_ids", dtype="i64", shape=(1, TOKENS)),
        TensorSpec(name="text_mask", dtype="f32", shape=(1, TOKENS)),
    )
    return trace(lambda: TextEncoder(config), inputs, ("text",), RandomSource(3, shapes).refs())


def _cut(program: Program) -> Program:
    """Cut behind the last sum of each block."""
    graph = program.stages[0].variants["plain"]
    last = {}
    for node in graph.compute_nodes:
        scopes = [scope for scope, _ in (node.meta.get("nn_module_stack") or {}).values()]
        blocks = [scope for scope in scopes if scope.startswith("t5.encoder.block.") and scope.count(".") == 3]
        if blocks and node.target is torch.ops.aten.add.Tensor and node.meta["val"].shape == (1, TOKENS, 16):
            last[blocks[0]] = node.name
    return program.map_graphs({("text_encoder", "plain"): replace(graph, cuts=tuple(last.values()))})


def _compiled(blocks: int, program_of: Callable[..., Program]) -> Program:
    graph = _text_encoder(blocks)
    program = run_passes(
        program_of(text_encoder=graph), parse_pipeline("canonicalize,split-to-slices,attention-to-bmm")
    )
    return ShareTemplates()(_cut(program)).program


def _own_program(piece: Piece, inputs: list[Tensor]) -> list[Tensor]:
    """The piece with its own weights inside, lowered and run by ExecuTorch alone."""
    module = piece.module()
    for weight in piece.weights:
        module.get_parameter(weight.name).data = weight.ref.read()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exported = torch.export.export(module, tuple(inputs), strict=False)
        program = to_edge_transform_and_lower(exported, partitioner=[XnnpackPartitioner()]).to_executorch()
    return list(_load_for_executorch_from_buffer(program.buffer).run_method("forward", inputs))


def _template(root: Path, writer: BundleWriter, partition: Partition, inputs: list[Tensor]) -> list[Tensor]:
    """The partition as the bundle has it, run by the engine."""

    def tensor(spec: TensorSpec) -> _engine.TensorRecord:
        return _engine.TensorRecord(spec.name, spec.dtype, spec.shape)

    weights = [
        _engine.WeightsRecord(
            path,
            [
                _engine.ConstantRecord(c.key, c.offset_bytes, c.size_bytes, c.dtype, c.shape)
                for c in writer.weights[path].constants
            ],
        )
        for path in partition.weights
    ]
    record = _engine.PartitionRecord(
        partition.name,
        partition.program,
        weights,
        [tensor(spec) for spec in partition.inputs],
        [tensor(spec) for spec in partition.outputs],
        0,
        0,
        0,
    )
    files = [_engine.FileRecord(file.path, file.size_bytes, file.sha256) for file in writer.files.values()]
    outputs: dict[str, Any] = {s.name: np.empty(s.shape, NUMPY_DTYPES[s.dtype]) for s in partition.outputs}
    arrays = {spec.name: value.numpy() for spec, value in zip(partition.inputs, inputs, strict=True)}
    schedule = [(op, partition.name) for op in ("load", "run", "free")]
    _engine.Engine(str(root), files, [record]).run(schedule, arrays, outputs, lambda index: None)
    return [torch.from_numpy(outputs[spec.name]) for spec in partition.outputs]


@pytest.mark.slow
def test_24_blocks_lower_once_and_run_as_their_own_programs(program_of: Callable[..., Program], tmp_path: Path) -> None:
    program = _compiled(24, program_of)
    writer = BundleWriter(tmp_path)
    target = Counting()
    _, partitions = lower(program, target, writer, lambda what, done, total: None)
    assert len(partitions) == 25  # 24 blocks and the last norm
    assert len(target.lowered) == 3  # the first block has the embedding, the last partition the norm
    blocks = partitions[1:24]
    assert len({partition.program for partition in blocks}) == 1
    assert len({partition.weights for partition in blocks}) == 23

    pieces = split(program.stages[0].variants["plain"])
    generator = torch.Generator().manual_seed(5)
    for index in (0, 1, 2, 12, 23, 24):
        inputs = [
            torch.randint(2, 60, spec.shape, generator=generator)
            if spec.dtype == "i64"
            else torch.randn(spec.shape, generator=generator)
            for spec in partitions[index].inputs
        ]
        shared = _template(tmp_path, writer, partitions[index], inputs)
        for mine, own in zip(shared, _own_program(pieces[index], inputs), strict=True):
            assert torch.equal(mine, own), partitions[index].name


def test_programs_do_not_grow_with_the_blocks(program_of: Callable[..., Program]) -> None:
    templates = {
        blocks: {hashlib.sha256(piece.text().encode()).hexdigest() for piece in split(graph)}
        for blocks in (3, 6)
        for graph in [_compiled(blocks, program_of).stages[0].variants["plain"]]
    }
    assert templates[3] == templates[6]
