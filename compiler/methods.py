"""Methods: the pieces that one program runs, so that weights inside of it are stored once for all that read them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

from movdc.compiler.pieces import Piece, PieceWeight
from movdc.compiler.target import Target
from movdc.runtime.bundle import FORWARD


@dataclass(frozen=True)
class Methods:
    """Partitions of a stage that one program runs: the name and the piece of each, by the method that runs it."""

    partitions: Mapping[str, str]
    pieces: Mapping[str, Piece]

    @property
    def stage(self) -> str:
        """Whose partitions they are."""
        return next(iter(self.pieces.values())).stage

    @property
    def weights(self) -> Collection[PieceWeight]:
        """The weights of all, once each."""
        return {weight.name: weight for piece in self.pieces.values() for weight in piece.weights}.values()

    @property
    def nodes(self) -> int:
        """How many operators all of them have."""
        return sum(len(piece.nodes) for piece in self.pieces.values())

    @property
    def lowering_bytes(self) -> int:
        """Of weights and values that are lowered together."""
        return sum(piece.weight_bytes + piece.working_bytes for piece in self.pieces.values())

    def text(self) -> str:
        """What programs of the same text can share, whatever their weights are."""
        return "".join(f"{method}\n{piece.text()}" for method, piece in self.pieces.items())


def methods_of(stage: Mapping[str, Mapping[str, Piece]], target: Target) -> list[Methods]:
    """The programs of a stage, by the pieces of its variants: one for each partition.

    Where programs have their weights inside, one for all partitions that read the same weights of the checkpoint, at
    most one of each variant. Its methods have the variants' names, with _ for -, which Core ML allows in no name.
    """
    if not target.weights_in_program:
        return [
            Methods({FORWARD: name}, {FORWARD: piece}) for pieces in stage.values() for name, piece in pieces.items()
        ]
    groups: dict[object, dict[str, tuple[str, Piece]]] = {}
    for variant, pieces in stage.items():
        for name, piece in pieces.items():
            shared = frozenset(weight.ref.identity for weight in piece.weights if weight.group == "weights")
            if not shared or variant in groups.get(shared, ()):
                groups[name] = {variant: (name, piece)}
            else:
                groups.setdefault(shared, {})[variant] = name, piece
    return [_together(group) for group in groups.values()]


def _together(group: Mapping[str, tuple[str, Piece]]) -> Methods:
    if len(group) == 1:
        ((name, piece),) = group.values()
        return Methods({FORWARD: name}, {FORWARD: piece})
    methods = {variant.replace("-", "_"): one for variant, one in group.items()}
    pieces = _with_common_names({method: piece for method, (_, piece) in methods.items()})
    return Methods({method: name for method, (name, _) in methods.items()}, pieces)


def _with_common_names(pieces: Mapping[str, Piece]) -> dict[str, Piece]:
    """The same pieces, with one name for a weight whichever of them reads it, and other names for others."""
    ordinals: dict[str, dict[str, int]] = {}  # of each weight of a group
    renamed = {}
    for method, piece in pieces.items():
        weights = []
        for weight in piece.weights:
            of = ordinals.setdefault(weight.group, {})
            weights.append(replace(weight, ordinal=of.setdefault(weight.ref.identity, len(of))))
        renamed[method] = replace(piece, weights=tuple(weights))
    return renamed
