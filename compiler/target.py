"""The Target protocol: what turns a partition of a graph into files that a device runs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from torch import fx

from movdc.runtime.bundle import Constant


@dataclass(frozen=True)
class Artifact:
    """What a target made of one partition."""

    program: Path
    weights: Path | None  # None if the partition has no weights
    constants: tuple[Constant, ...]  # where each tensor lies in the weights file
    scratch_bytes: int  # memory the program plans for itself, without inputs and outputs


@dataclass(frozen=True)
class Target(ABC):
    """An emitter; subclasses import their SDK inside the methods, so that listing targets needs none."""

    name: ClassVar[str]
    load_copies: ClassVar[float]  # bytes held for a moment while loading, per byte of weights

    @abstractmethod
    def refuse(self, node: fx.Node) -> str | None:
        """Why this target cannot run an ATen node well, or None."""

    @abstractmethod
    def emit(self, module: fx.GraphModule, directory: Path) -> Artifact:
        """Lower one partition: placeholders carry fake tensors in meta["val"], weights are parameters with data."""
