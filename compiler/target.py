"""The Target protocol: what turns a partition of a graph into files that a device runs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from torch import Tensor, fx

from movdc.compiler.pieces import Piece, PieceWeight
from movdc.runtime.bundle import Constant, DType


@dataclass(frozen=True)
class Slot:
    """A constant that a lowered program asks for by key, and the weight of the piece that fills it."""

    key: str
    weight: PieceWeight
    layout: Literal["plain", "channels-last"]
    dtype: DType | None  # None where the target asks for bytes
    shape: tuple[int, ...]

    def fill(self) -> Tensor:
        """The weight's data, as the program wants it."""
        data = self.weight.ref.read()
        return data if self.layout == "plain" else data.permute(0, 2, 3, 1).contiguous()


@dataclass(frozen=True)
class Artifact:
    """A lowered template: one program for all partitions of the same text."""

    program: Path
    slots: tuple[Slot, ...]
    scratch_bytes: int  # memory the program plans for itself, without inputs and outputs

    def slots_of(self, piece: Piece, group: str) -> tuple[Slot, ...]:
        """The slots of one group of weights, to be filled with those of another piece of the same text."""
        weights = {weight.name: weight for weight in piece.weights}
        return tuple(
            Slot(slot.key, weights[slot.weight.name], slot.layout, slot.dtype, slot.shape)
            for slot in self.slots
            if slot.weight.group == group
        )


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
    def write_weights(self, slots: Sequence[Slot], path: Path) -> tuple[Constant, ...]:
        """Write the weights of one piece under the keys of its program, and say where each lies."""
