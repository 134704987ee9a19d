"""split-to-slices: a split with several results as one slice for each result that is read."""

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
class SplitToSlices(NodePass):
    """Rewrite splits so that every node has one result.

    Before:  %s: (f32[2,128], f32[2,128]) = aten.split(%x, 128, -1)
             %a: f32[2,128] = getitem(%s, 0)
    After:   %a_slice: f32[2,128] = aten.slice(%x, 1, 0, 128)

    Leaves as it is: 1. a split whose list is an output or goes into an operator as a list; 2. other operators with
    several results, such as native_layer_norm. Cost: none; XNNPACK runs slices and no splits.
    """

    name: ClassVar[str] = "split-to-slices"
    exact: ClassVar[bool] = True
    after: ClassVar[tuple[str, ...]] = ("merge-tokens",)  # which aligns two traces, as they were traced

    rewrites: ClassVar[str] = "splits"

    @staticmethod
    def qualifies(node: fx.Node) -> bool:
        """A split whose results are picked one by one."""
        splits = (aten.split.Tensor, aten.split_with_sizes.default)
        return node.target in splits and all(user.target.__name__ == "getitem" for user in node.users)

    @staticmethod
    def rewrite(node: fx.Node) -> None:
        """Cut a slice for each pick."""
        source = node.args[0]
        dim = (node.args[2] if len(node.args) > 2 else 0) % value_of(source).dim()
        ends = [0]
        for part in node.meta["val"]:
            ends.append(ends[-1] + int(part.shape[dim]))
        for pick in list(node.users):
            index = pick.args[1] % len(node.meta["val"])
            made = insert_after(pick)(aten.slice.Tensor, source, dim, ends[index], ends[index + 1])
            pick.replace_all_uses_with(made)
            node.graph.erase_node(pick)
        node.graph.erase_node(node)
