"""ExecuTorch with the Vulkan delegate: GPUs of Android phones."""

from __future__ import annotations

import hashlib
import logging
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import fx

from movdc.compiler.abilities import Abilities
from movdc.compiler.heap import give_back_memory
from movdc.compiler.pieces import Piece
from movdc.compiler.program import value_of
from movdc.compiler.target import Artifact, Slot, Target, Written
from movdc.compiler.weights import WeightRef
from movdc.targets.delegation import delegation
from movdc.targets.inside import fill_weights, find_weights


@dataclass(frozen=True)
class ExecutorchVulkan(Target):
    """A .pte for each partition, fp32, which stock ExecuTorch runs on a GPU; what Vulkan does not take runs on the CPU.

    The delegate reads its weights from the program, so a partition's is its template's with other weights inside.
    """

    name: ClassVar[str] = "executorch-vulkan"
    abilities: ClassVar[Abilities] = Abilities(shared_weights=False)
    packages: ClassVar[tuple[str, ...]] = ("torch", "executorch")
    rewrites: ClassVar[tuple[str, ...]] = ("split-to-slices", "attention-to-bmm", "gelu-to-tanh", "conv3d-to-conv2d")
    program_suffix: ClassVar[str] = ".pte"
    weights_in_program: ClassVar[bool] = True
    node_bytes: ClassVar[int] = 2400  # as XNNPACK's, which were measured: both load a program of ExecuTorch

    def refuse(self, node: fx.Node) -> str | None:
        """Why neither Vulkan nor the portable kernels can run a node."""
        if node.target in (torch.ops.aten.conv3d.default, torch.ops.aten.conv3d.padding):
            return "Vulkan and the portable kernels convolve in two dimensions; run the pass conv3d-to-conv2d before"
        if node.target is torch.ops.aten.gelu.default and node.kwargs.get("approximate", "none") == "none":
            return (
                "Vulkan computes the tanh approximation for the exact GELU; use GELU(approximate='tanh') in the model"
            )
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor) and value.is_complex():
            return "complex numbers have no kernels; write them as pairs of real ones"
        return None

    def emit(self, piece: Piece, directory: Path) -> Artifact:
        """Lower through to_edge_transform_and_lower, with stand-ins that are found again in the program."""
        data, delegated_nodes, fallback = _lower(piece, directory)
        give_back_memory()  # what was exported is a knot of references, and holds copies of all the stand-ins
        slots = tuple(find_weights(piece, data))
        path = directory / "program.pte"
        path.write_bytes(data)
        sha256 = hashlib.sha256(data).hexdigest()
        return Artifact(path, sha256, slots, self.estimate(piece), delegated_nodes, fallback)

    def fill(self, program: Path, slots: Sequence[Slot], refs: Mapping[str, WeightRef], path: Path) -> Written:
        """Copy a template's program, with weights in the place of its stand-ins."""
        return fill_weights(program, slots, refs, path)


def _lower(piece: Piece, directory: Path) -> tuple[bytearray, int, Mapping[str, int]]:
    """A program, its delegated nodes and its fallback nodes."""
    from executorch.backends.vulkan.partitioner.vulkan_partitioner import VulkanPartitioner
    from executorch.exir import ExecutorchBackendConfig, to_edge_transform_and_lower
    from executorch.exir.passes import MemoryPlanningPass

    for name in ("", "torch", "executorch"):  # importing the partitioner sets the root's level
        logging.getLogger(name).setLevel(logging.ERROR)
    arguments = tuple(torch.zeros(value_of(node).shape, dtype=value_of(node).dtype) for node in piece.inputs)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exported = torch.export.export(piece.module(directory), arguments, strict=False)
        edge = to_edge_transform_and_lower(exported, partitioner=[VulkanPartitioner()])
        delegated_nodes, fallback = delegation(edge.exported_program().graph_module)
        program = edge.to_executorch(
            # Inputs and outputs are the caller's buffers, so that none is copied between partitions.
            ExecutorchBackendConfig(
                memory_planning_pass=MemoryPlanningPass(alloc_graph_input=False, alloc_graph_output=False)
            )
        )
    return bytearray(program.buffer), delegated_nodes, fallback
