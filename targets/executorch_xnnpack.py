"""ExecuTorch with the XNNPACK delegate: CPUs of hosts and Android phones."""

from __future__ import annotations

import logging
import mmap
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
import torch.ao.quantization.fx._decomposed  # registers the operators of quantized_decomposed
from torch import Tensor, fx

from movdc.compiler.abilities import Abilities
from movdc.compiler.hashed_file import HashedFile
from movdc.compiler.heap import give_back_memory
from movdc.compiler.pieces import Piece
from movdc.compiler.program import value_of
from movdc.compiler.target import Artifact, Slot, Target, Written
from movdc.compiler.weights import WeightRef
from movdc.targets.delegation import delegation
from movdc.targets.footprint import measure
from movdc.targets.ptd import constants_of, recognise, write_ptd

quantized = torch.ops.quantized_decomposed
_TAG = "weights"


@dataclass(frozen=True)
class ExecutorchXnnpack(Target):
    """A small .pte program and a .ptd file with all its weights, which stock ExecuTorch runs too."""

    name: ClassVar[str] = "executorch-xnnpack"
    abilities: ClassVar[Abilities] = Abilities(int8_products="int8", int8_rows=True)
    packages: ClassVar[tuple[str, ...]] = ("torch", "executorch")  # executorch brings XNNPACK, torch exports
    rewrites: ClassVar[tuple[str, ...]] = ("split-to-slices", "attention-to-bmm", "gelu-to-tanh", "conv3d-to-conv2d")
    program_suffix: ClassVar[str] = ".pte"
    weights_suffix: ClassVar[str] = ".ptd"
    load_copies: ClassVar[float] = 2.1  # XNNPACK packs the mapped weights into its own, slightly larger copy
    value_copies: ClassVar[float] = 2.5  # in XNNPACK's workspace, or between delegates in what ExecuTorch plans
    node_bytes: ClassVar[int] = 2400

    def refuse(self, node: fx.Node) -> str | None:
        """Why the XNNPACK and portable kernels cannot run a node."""
        if node.target in (torch.ops.aten.conv3d.default, torch.ops.aten.conv3d.padding):
            return "XNNPACK and the portable kernels convolve in two dimensions; run the pass conv3d-to-conv2d before"
        if node.target is torch.ops.aten.gelu.default and node.kwargs.get("approximate") == "tanh":
            return "XNNPACK computes the exact GELU for the tanh approximation; run the pass gelu-to-tanh before"
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor) and value.is_complex():
            return "complex numbers have no kernels; write them as pairs of real ones"
        return None

    def emit(self, piece: Piece, directory: Path) -> Artifact:
        """Lower through to_edge_transform_and_lower with every weight outside the program."""
        path = directory / "program.pte"
        sha256, delegated_nodes, fallback = _lower(piece, path)
        give_back_memory()  # what was exported is a knot of references, and holds copies of all the stand-ins
        inputs, outputs = ([piece.tensor(node) for node in nodes] for nodes in (piece.inputs, piece.outputs))
        stand_ins = directory / f"{_TAG}.ptd"
        if not stand_ins.exists():
            memory = measure(path, None, (), inputs, outputs)
            return Artifact(path, sha256, (), memory, delegated_nodes, fallback)
        with stand_ins.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
            data = memoryview(mapped)
            slots, constants = recognise(piece, data), constants_of(data)
            data.release()
        memory = measure(path, stand_ins, constants, inputs, outputs)
        stand_ins.unlink()
        return Artifact(path, sha256, slots, memory, delegated_nodes, fallback)

    def through_int8(self, rows: Tensor) -> Tensor:
        """A row from its least to its largest value, zero included, in 255 steps, as PyTorch has it from XNNPACK."""
        grid = (*quantized.choose_qparams_per_token_asymmetric(rows, torch.int8), -128, 127, torch.int8)
        stored = quantized.quantize_per_token(rows, *grid)
        restored: Tensor = quantized.dequantize_per_token(stored, *grid, torch.float32)
        return restored

    def write_weights(self, slots: Sequence[Slot], refs: Mapping[str, WeightRef], path: Path) -> Written:
        """Write a .ptd file."""
        return write_ptd(slots, refs, path)


def _lower(piece: Piece, path: Path) -> tuple[str, int, Mapping[str, int]]:
    """Write a program, and its stand-ins beside it; gives its SHA-256, its delegated nodes and its fallback nodes."""
    logging.getLogger("torch").setLevel(logging.ERROR)
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import ExecutorchBackendConfig, to_edge_transform_and_lower
    from executorch.exir.passes import MemoryPlanningPass

    arguments = tuple(torch.zeros(value_of(node).shape, dtype=value_of(node).dtype) for node in piece.inputs)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exported = torch.export.export(piece.module(path.parent), arguments, strict=False)
        for node in exported.graph.find_nodes(op="placeholder"):
            if node.name not in exported.graph_signature.user_inputs:
                node.meta.setdefault("custom", {})["delegate_constant_tag"] = _TAG
        edge = to_edge_transform_and_lower(exported, partitioner=[XnnpackPartitioner()])
        delegated_nodes, fallback = delegation(edge.exported_program().graph_module)
        program = edge.to_executorch(
            ExecutorchBackendConfig(
                external_constants=lambda _: _TAG,
                # Inputs and outputs are the engine's buffers, so that none is copied between partitions.
                memory_planning_pass=MemoryPlanningPass(alloc_graph_input=False, alloc_graph_output=False),
            )
        )
    with HashedFile(path) as written:
        written.write(program.buffer)
    program.write_tensor_data_to_file(str(path.parent))
    return written.sha256, delegated_nodes, fallback
