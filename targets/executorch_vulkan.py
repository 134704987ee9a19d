"""ExecuTorch with the Vulkan delegate: GPUs of Android phones."""

from __future__ import annotations

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
from movdc.runtime.bundle import FORWARD
from movdc.targets.delegation import delegation, program_of
from movdc.targets.inside import fill_weights, write_program


@dataclass(frozen=True)
class ExecutorchVulkan(Target):
    """A .pte, fp32, a method a variant, which stock ExecuTorch runs on a GPU.

    What Vulkan does not take runs on the CPU. The delegate reads its weights from the program, which is its template's
    with other weights inside.
    """

    name: ClassVar[str] = "executorch-vulkan"
    abilities: ClassVar[Abilities] = Abilities()
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
        """Lower a program of one method."""
        return self.emit_methods({FORWARD: piece}, directory)[FORWARD]

    def emit_methods(self, pieces: Mapping[str, Piece], directory: Path) -> dict[str, Artifact]:
        """Lower through to_edge_transform_and_lower, with stand-ins that are found again in the program.

        The delegate names constants by their content, so that methods share those that are the same.
        """
        data, found = _lower(pieces, directory)
        give_back_memory()  # what was exported is a knot of references, and holds copies of all the stand-ins
        return write_program(self, pieces, data, found, directory)

    def fill(self, program: Path, slots: Sequence[Slot], refs: Mapping[str, WeightRef], path: Path) -> Written:
        """Copy a template's program, with weights in the place of its stand-ins."""
        return fill_weights(program, slots, refs, path)


def _lower(pieces: Mapping[str, Piece], directory: Path) -> tuple[bytearray, dict[str, tuple[int, dict[str, int]]]]:
    """A program, and of each method its delegated nodes and its fallback nodes."""
    from executorch.backends.vulkan.partitioner.vulkan_partitioner import VulkanPartitioner
    from executorch.exir import to_edge_transform_and_lower

    for name in ("", "torch", "executorch"):  # importing the partitioner sets the root's level
        logging.getLogger(name).setLevel(logging.ERROR)
    exported = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for method, piece in pieces.items():
            arguments = tuple(torch.zeros(value_of(node).shape, dtype=value_of(node).dtype) for node in piece.inputs)
            exported[method] = torch.export.export(piece.module(directory), arguments, strict=False)
        edge = to_edge_transform_and_lower(exported, partitioner={method: [VulkanPartitioner()] for method in pieces})
        found = {method: delegation(edge.exported_program(method).graph_module) for method in pieces}
        return program_of(edge), found
