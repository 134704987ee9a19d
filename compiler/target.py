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
class Memory:
    """What a lowered program takes on the device, in bytes."""

    held_bytes: int  # by its weights, while it is loaded
    program_bytes: int  # by the program itself, as long as its stage runs
    workspace_bytes: int  # while it runs; the programs of a stage share one workspace
    planned_bytes: int  # planned ahead for values on the way; the programs of a stage share that, too


@dataclass(frozen=True)
class Artifact:
    """A lowered template: one program for all partitions of the same text."""

    program: Path
    slots: tuple[Slot, ...]
    memory: Memory


@dataclass(frozen=True)
class Target(ABC):
    """An emitter; subclasses import their SDK inside the methods, so that listing targets needs none."""

    name: ClassVar[str]
    weights_suffix: ClassVar[str]
    load_copies: ClassVar[float]  # bytes held while weights are loaded for the first time, per byte of weights
    value_copies: ClassVar[float]  # bytes that a running program takes, per byte of the values within it
    node_bytes: ClassVar[int]  # that a loaded program takes for each of its nodes

    @abstractmethod
    def refuse(self, node: fx.Node) -> str | None:
        """Why this target cannot run an ATen node well, or None."""

    @abstractmethod
    def emit(self, piece: Piece, directory: Path) -> Artifact:
        """Lower a piece with stand-ins for its weights; reads no weight."""

    @abstractmethod
    def write_weights(self, slots: Sequence[Slot], refs: Mapping[str, WeightRef], path: Path) -> tuple[Constant, ...]:
        """Write the weights of one piece (by name) under the keys of its program, and say where each lies."""
