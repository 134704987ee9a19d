"""The Target protocol: what turns a partition of a graph into files that a device runs."""

from __future__ import annotations

import math
import platform
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import torch
from torch import Tensor, fx

from movdc.compiler.identity import code_identity, library_identity
from movdc.compiler.int8 import Loss
from movdc.compiler.pieces import Piece
from movdc.compiler.weights import WeightRef
from movdc.runtime.bundle import ITEM_BYTES, Constant, DType

_WRITES_WEIGHTS = ("pieces", "weights", "int8", "folded", "target")  # modules of the compiler


@dataclass(frozen=True)
class Slot:
    """A constant that a lowered program asks for by key, and the weight of a piece that fills it."""

    key: str
    weight: str  # PieceWeight.name
    layout: Literal["plain", "channels-last"]
    dtype: DType | None  # None where the target asks for bytes
    shape: tuple[int, ...]

    @property
    def size_bytes(self) -> int:
        """Bytes of its data."""
        return math.prod(self.shape) * ITEM_BYTES[self.dtype or "u8"]

    def parts(self, ref: WeightRef, loss: Loss | None) -> Iterator[Tensor]:
        """The weight's data, as the program wants it; `loss` gets what int8 loses."""
        if self.layout == "plain":
            yield from ref.parts(loss)
        else:
            yield torch.cat(list(ref.parts(loss))).permute(0, 2, 3, 1).contiguous()


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
    sha256: str  # of the program
    slots: tuple[Slot, ...]
    memory: Memory


@dataclass(frozen=True)
class Written:
    """A file of weights: where each constant lies in it, in the order of the keys, and what was noticed on the way."""

    constants: tuple[Constant, ...]
    sha256: str
    sqnr_db: Mapping[str, float]  # of each weight that became int8


@dataclass(frozen=True)
class Target(ABC):
    """An emitter; subclasses import their SDK inside the methods, so that listing targets needs none."""

    name: ClassVar[str]
    program_suffix: ClassVar[str]
    weights_suffix: ClassVar[str]
    load_copies: ClassVar[float]  # bytes held while weights are loaded for the first time, per byte of weights
    value_copies: ClassVar[float]  # bytes that a running program takes, per byte of the values within it
    node_bytes: ClassVar[int]  # that a loaded program takes for each of its nodes

    @property
    def identity(self) -> str:
        """What weights depend on beside the checkpoint: our code and the SDK."""
        code = code_identity("movdc.targets", *(f"movdc.compiler.{name}" for name in _WRITES_WEIGHTS))
        return f"{self.name} {code} {sorted(self.versions().items())} {platform.machine()}"

    @property
    def program_identity(self) -> str:
        """What programs depend on beside the piece: the same, and the engine that measures them."""
        return f"{self.identity} {library_identity('movdc.runtime')}"

    @abstractmethod
    def refuse(self, node: fx.Node) -> str | None:
        """Why this target cannot run an ATen node well, or None."""

    @abstractmethod
    def emit(self, piece: Piece, directory: Path) -> Artifact:
        """Lower a piece with stand-ins for its weights; reads no weight."""

    @abstractmethod
    def write_weights(self, slots: Sequence[Slot], refs: Mapping[str, WeightRef], path: Path) -> Written:
        """Write the weights of one piece (by name) under the keys of its program, a part of a tensor at a time."""

    @abstractmethod
    def versions(self) -> dict[str, str]:
        """The SDK's packages with their versions: with another one, programs and weights are made anew."""
