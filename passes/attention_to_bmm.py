"""attention-to-bmm: attention as two batched matrix products and a softmax."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from movdc.compiler.node_pass import NodePass
from movdc.compiler.program import value_of
from movdc.compiler.trace import insert_after

aten = torch.ops.aten


@dataclass(frozen=True)
class AttentionToBmm(NodePass):
    """Rewrite attention and products of stacked matrices so that delegates take them whole.

    Before:  %y: f32[B,h,N,d] = aten.scaled_dot_product_attention(%q, %k, %v, %mask)
    After:   %s: f32[B*h,N,M] = aten.bmm(%q as [B*h,N,d], %k as [B*h,d,M])
             %p: f32[B*h,N,M] = aten.softmax(%s * d**-0.5 + %mask, -1)
             %y: f32[B,h,N,d] = aten.bmm(%p, %v as [B*h,M,d]) as [B,h,N,d]
    and aten.matmul of two stacks of matrices becomes aten.bmm.

    Leaves as it is: 1. a boolean mask or a causal one, whose rows may be empty; 2. a product whose stacks differ,
    because bmm repeats nothing; 3. grouped heads (enable_gqa), for the same reason.
    Cost: none; ExecuTorch's own decomposition guards against rows without any key, with six more operators that
    XNNPACK does not take, so that each attention became several delegates. Masks here are finite numbers.
    """

    name: ClassVar[str] = "attention-to-bmm"
    exact: ClassVar[bool] = True
    # Merging finds attentions by their operator; canonicalize makes their masks finite.
    after: ClassVar[tuple[str, ...]] = ("merge-tokens", "canonicalize")

    rewrites: ClassVar[str] = "attentions and products"

    @staticmethod
    def qualifies(node: fx.Node) -> bool:
        """An attention with a mask of numbers or none, or a product of equal stacks."""
        return _is_attention(node) or _is_product(node)

    @staticmethod
    def rewrite(node: fx.Node) -> None:
        """Compute it with bmm."""
        node.replace_all_uses_with(_attention(node) if _is_attention(node) else _product(node))
        node.graph.erase_node(node)


def _is_attention(node: fx.Node) -> bool:
    if node.target is not aten.scaled_dot_product_attention.default or node.kwargs.get("enable_gqa"):
        return False
    given = list(node.args[3:])
    mask, dropout, causal = given + [None, 0.0, False][len(given) :]
    numbers = mask is None or value_of(mask).is_floating_point()
    return numbers and not dropout and not causal


def _is_product(node: fx.Node) -> bool:
    if node.target is not aten.matmul.default:
        return False
    left, right = (value_of(argument) for argument in node.args)
    return left.dim() == right.dim() > 3 and left.shape[:-2] == right.shape[:-2]


def _product(node: fx.Node) -> fx.Node:
    call = insert_after(node)
    left, right = (_stacked(call, argument) for argument in node.args)
    return call(aten.reshape.default, call(aten.bmm.default, left, right), _sizes(node))


def _attention(node: fx.Node) -> fx.Node:
    call = insert_after(node)
    query, key, value = (_stacked(call, argument) for argument in node.args[:3])
    scale = node.kwargs.get("scale") or 1 / math.sqrt(value_of(query).shape[-1])
    scores = call(aten.bmm.default, call(aten.mul.Tensor, query, scale), call(aten.transpose.int, key, 1, 2))
    if len(node.args) > 3 and node.args[3] is not None:
        stacked = _sizes(scores)
        batch = [int(size) for size in value_of(node.args[0]).shape[:-2]]
        apart = call(aten.reshape.default, scores, [*batch, *stacked[1:]])
        scores = call(aten.reshape.default, call(aten.add.Tensor, apart, node.args[3]), stacked)
    weights = call(aten.softmax.int, scores, -1)
    return call(aten.reshape.default, call(aten.bmm.default, weights, value), _sizes(node))


def _stacked(call: Any, node: fx.Node) -> fx.Node:
    """[..., N, d] as [B*h, N, d]."""
    *_, rows, columns = _sizes(node)
    return call(aten.reshape.default, node, [-1, rows, columns])


def _sizes(node: fx.Node) -> list[int]:
    return [int(size) for size in value_of(node).shape]
