"""group-norm-to-rows: group norms of clips as group norms of rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from movdc.compiler.node_pass import NodePass
from movdc.compiler.program import value_of
from movdc.compiler.trace import insert_after

aten = torch.ops.aten


@dataclass(frozen=True)
class GroupNormToRows(NodePass):
    """Rewrite group norms over [B, C, T, H, W] as ones over [B, C, T H W].

    Before:  %y: f32[1,64,5,8,8] = aten.group_norm(%x, 32, %w, %b, 1e-06)
    After:   %rows: f32[1,64,320] = aten.reshape(%x, [1, 64, -1])
             %n: f32[1,64,320] = aten.group_norm(%rows, 32, %w, %b, 1e-06)
             %y: f32[1,64,5,8,8] = aten.reshape(%n, [1, 64, 5, 8, 8])

    Leaves as it is: 1. norms over images and rows, whose groups have at most five dimensions; 2. other norms.
    Cost: none where reshapes are free. Core ML takes five dimensions, and a group norm adds one for the groups.
    """

    name: ClassVar[str] = "group-norm-to-rows"
    exact: ClassVar[bool] = True
    after: ClassVar[tuple[str, ...]] = ("merge-tokens",)  # which aligns two traces, as they were traced

    rewrites: ClassVar[str] = "group norms"

    @staticmethod
    def qualifies(node: fx.Node) -> bool:
        """Those of five dimensions and more."""
        return node.target is aten.group_norm.default and value_of(node).dim() > 4

    @staticmethod
    def rewrite(node: fx.Node) -> None:
        """Fold all but batch and channels into rows, and unfold the result."""
        shape = [int(size) for size in value_of(node).shape]
        call = insert_after(node)
        rows = call(aten.reshape.default, node.args[0], [*shape[:2], -1])
        normed = call(aten.group_norm.default, rows, *node.args[1:])
        node.replace_all_uses_with(call(aten.reshape.default, normed, shape))
        node.graph.erase_node(node)
