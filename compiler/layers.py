"""Layers: what a model computes, as sizes that follow from its config alone, so that a plan needs no trace.

A layer is what lies between two waists of the traced graph (compiler/waists.py), where a compile cuts. Sizes are those
that the graph has; what kernels need beside is the target's to say, as in a compile.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

F32_BYTES = 4


@dataclass(frozen=True)
class Layer:
    """A few operators; layers of one kind have equal programs."""

    kind: str
    weights: int  # values of matrices and kernels, which int8 makes smaller
    rows: int  # of those matrices, each of which has a scale in int8
    others: int  # values of norms, biases, tables: always fp32
    flops: int
    live_bytes: int  # of tensors that later layers read, this one's results included
    working_bytes: int  # the most bytes of values within it, those that enter and leave left out
    kept_bytes: int = 0  # of what enters it that is still there when it works the most
    looks_up: bool = False  # rows of a table instead of products
    shared: int = 0  # values of a folded table that each partition with such layers reads, once

    def stored_bytes(self, int8: bool) -> int:
        """Bytes of its weights."""
        matrices = self.weights + F32_BYTES * self.rows if int8 else F32_BYTES * self.weights
        return matrices + F32_BYTES * self.others

    def int8_flops(self, stored_bytes: int) -> int:
        """All its FLOPs where its weights are stored as int8, the few of attention scores included."""
        return self.flops if stored_bytes < self.stored_bytes(int8=False) else 0


def joined(first: Layer, second: Layer) -> Layer:
    """Two layers without a waist between them."""
    return Layer(
        kind=f"{first.kind}, {second.kind}",
        weights=first.weights + second.weights,
        rows=first.rows + second.rows,
        others=first.others + second.others,
        flops=first.flops + second.flops,
        live_bytes=second.live_bytes,
        working_bytes=most_working_bytes((first, second)),
        kept_bytes=first.kept_bytes,
        shared=max(first.shared, second.shared),
    )


def most_working_bytes(layers: Sequence[Layer]) -> int:
    """The most bytes of values within some layers, one after the other: what they pass on is within them, too."""
    return max(one.working_bytes + (one.kept_bytes if index else 0) for index, one in enumerate(layers))


def shared_bytes(layers: Sequence[Layer]) -> int:
    """Bytes of the table that they share."""
    return F32_BYTES * max((one.shared for one in layers), default=0)


@dataclass(frozen=True)
class StageLayers:
    """One stage: its variants have the same layers with the same weights."""

    name: str
    cadence: str  # once, per_step or per_chunk
    variants: Mapping[str, Sequence[Layer]]
    input_bytes: int
    output_bytes: int

    def with_variant(self, name: str, layers: Sequence[Layer]) -> StageLayers:
        """The stage with one more variant."""
        return replace(self, variants={**self.variants, name: layers})
