"""No device at all: sizes for the planner and for tests, without an SDK."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from torch import fx

from movdc.compiler.abilities import Abilities
from movdc.compiler.hashed_file import HashedFile
from movdc.compiler.pieces import Piece
from movdc.compiler.target import Artifact, Target


@dataclass(frozen=True)
class Null(Target):
    """Sizes only: a plan in seconds, a bundle without weights that nothing can run."""

    name: ClassVar[str] = "null"
    abilities: ClassVar[Abilities] = Abilities(int8_products="int8", int8_rows=True)
    packages: ClassVar[tuple[str, ...]] = ()
    program_suffix: ClassVar[str] = ".json"

    def refuse(self, node: fx.Node) -> str | None:
        """Nothing is refused."""
        return None

    def emit(self, piece: Piece, directory: Path) -> Artifact:
        """Write down what the piece weighs and computes; its weights stay where they are."""
        sizes = {
            "nodes": len(piece.nodes),
            "weight_bytes": piece.weight_bytes,
            "working_bytes": piece.working_bytes,
            "flops": piece.flops,
        }
        path = directory / "program.json"
        with HashedFile(path) as file:
            file.write((json.dumps(sizes, indent=1) + "\n").encode())
        return Artifact(path, file.sha256, (), self.estimate(piece), delegated_nodes=len(piece.nodes))

    def min_sqnr_db(self) -> None:
        """It makes no programs."""
        return None
