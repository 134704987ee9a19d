"""The Target protocol: what turns a partition of a graph into files that a device runs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from torch import Tensor, fx

from movdc.compiler.pieces import Piece
from movdc.compiler.weights import WeightRef
from movdc.runtime.bundle import Constant, DType


@dataclass(frozen=True)
class Slot:
    """A constant that a lowered program asks for by key, and the weight of a piece that fills it."""

    key: str
    weight: str  # PieceWeight.name
    layout: Literal["plain", "channels-last"]
    dtype: DType | None  # None where the target asks for bytes
    shape: tuple[int, ...]

    def fill(self, ref: WeightRef) -> Tensor:
        """The weight's data, as the program wants it."""
        data = ref.read()
        return data if self.layout == "plain" else data.permute(0, 2, 3, 1).contiguous()


@dataclass(frozen=True)
class Artifact:
    """A lowered template: one program for all partitions of the same text."""

    program: Path
    slots: tuple[Slot, ...]
    scratch_bytes: int  # memory the program plans for itself, without inputs and outputs


@dataclass(frozen=True)
class Target(ABC):
    """An emitter; subclasses import their SDK inside the methods, so that listing targets needs none."""

    name: ClassVar[str]
    weights_suffix: ClassVar[str]
    load_copies: ClassVar[float]  # bytes held for a moment while loading, per byte of weights

    @abstractmethod
    def refuse(self, node: fx.Node) -> str | None:
        """Why this target cannot run an ATen node well, or None."""

    @abstractmethod
    def emit(self, piece: Piece, directory: Path) -> Artifact:
        """Lower a piece with stand-ins for its weights; reads no weight."""

    @abstractmethod
    def write_weights(self, slots: Sequence[Slot], refs: Mapping[str, WeightRef], path: Path) -> tuple[Constant, ...]:
        """Write the weights of one piece (by name) under the keys of its program, and say where each lies."""
