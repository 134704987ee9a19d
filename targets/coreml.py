"""Core ML: programs for the GPU, the neural engine and the CPU of iPhones and Macs."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import ClassVar, Literal

import torch
from torch import fx

from movdc.compiler.abilities import Abilities
from movdc.compiler.hashed_file import HashedFile
from movdc.compiler.pieces import Piece
from movdc.compiler.program import value_of
from movdc.compiler.target import Artifact, Slot, Target, Written
from movdc.compiler.weights import WeightRef
from movdc.runtime.bundle import DType
from movdc.targets.mil import convert
from movdc.targets.mil_blobs import write_blobs

_MAX_RANK = 5


@dataclass(frozen=True)
class Coreml(Target):
    """Models for iOS 18 without weights, and weight files; `movdc package` makes .mlpackage folders of them."""

    name: ClassVar[str] = "coreml"
    abilities: ClassVar[Abilities] = Abilities(int8_products="float", int8_rows=True)
    packages: ClassVar[tuple[str, ...]] = ("torch", "coremltools")
    rewrites: ClassVar[tuple[str, ...]] = ("conv3d-to-conv2d", "gelu-to-tanh", "group-norm-to-rows")
    program_suffix: ClassVar[str] = ".mlmodel"
    node_bytes: ClassVar[int] = 2000  # of the model; what Core ML makes of it on a device was not measured

    fp16: tuple[str, ...] = ()  # patterns of stage names that compute in half precision, norms and softmax apart
    fp32: tuple[str, ...] = ("*.DenseReluDense.wo.weight",)  # patterns of weight keys that are not; these overflow

    def refuse(self, node: fx.Node) -> str | None:
        """Why Core ML cannot run a node."""
        if node.target is operator.getitem:
            return None  # one of the scales and zero points of tokens, which are left out of the program
        value = node.meta.get("val")
        if node.target is torch.ops.aten.group_norm.default and value_of(node).dim() >= _MAX_RANK:
            return "its groups would have six dimensions, Core ML takes five; run the pass group-norm-to-rows before"
        if node.target is torch.ops.aten.gelu.default and node.kwargs.get("approximate") == "tanh":
            return "coremltools converts the tanh approximation to the exact GELU; run the pass gelu-to-tanh before"
        if isinstance(value, torch.Tensor) and value.is_complex():
            return "Core ML has no complex numbers; write them as pairs of real ones"
        if isinstance(value, torch.Tensor) and value.dtype == torch.float64:
            return "Core ML has no double precision; compute in fp32"
        return None

    def emit(self, piece: Piece, directory: Path) -> Artifact:
        """Convert to a model with every weight outside."""
        half = any(fnmatchcase(piece.stage, pattern) for pattern in self.fp16)
        spec, slots = convert(piece, directory, self.fp32 if half else None)
        path = directory / "program.mlmodel"
        with HashedFile(path) as file:
            file.write(spec.SerializeToString(deterministic=True))
        return Artifact(path, file.sha256, slots, self.estimate(piece), delegated_nodes=len(piece.nodes))

    def write_weights(self, slots: Sequence[Slot], refs: Mapping[str, WeightRef], path: Path) -> Written:
        """Write a file of blobs."""
        return write_blobs(slots, refs, path)

    def computes_in(self) -> Literal["f32", "f16"]:
        """What the denoiser computes in, which has most of the products."""
        return "f16" if any(fnmatchcase("denoiser", pattern) for pattern in self.fp16) else "f32"

    def held_as(self) -> Mapping[DType, DType]:
        """Core ML restores int8 weights when it loads a model."""
        return {"i8": "f32"}
