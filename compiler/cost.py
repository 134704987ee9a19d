"""The cost model: bytes and FLOPs of nodes, and how long each value lives in the linear order."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from movdc.compiler.program import Graph
from movdc.compiler.trace import is_pick

aten = torch.ops.aten


def size_bytes(node: fx.Node) -> int:
    """Bytes that a node's result takes; results picked from a list share the list's bytes."""
    if is_pick(node):
        return 0
    return sum(value.nbytes for value in _tensors(node.meta["val"]))


def _tensors(value: Any) -> list[torch.Tensor]:
    return [value] if isinstance(value, torch.Tensor) else [item for item in value if isinstance(item, torch.Tensor)]


def weight_bytes(node: fx.Node, graph: Graph) -> int:
    """Bytes of the weights that a node reads."""
    return sum(size_bytes(source) for source in node.all_input_nodes if source.name in graph.weights)


def scratch_bytes(node: fx.Node) -> int:
    """Bytes that a kernel needs beside its inputs and outputs: the scores of an attention."""
    if node.target is aten.scaled_dot_product_attention.default:
        query, key = (argument.meta["val"] for argument in node.args[:2])
        scores = math.prod(query.shape[:-1]) * int(key.shape[-2]) * query.element_size()
        return 2 * int(scores)  # before and after the softmax
    return 0


def flops(node: fx.Node) -> int:
    """2 x multiply-adds of a matrix product, attention or convolution; 0 for everything else."""
    if node.target is aten.linear.default:
        weight = node.args[1].meta["val"]
        return int(2 * math.prod(node.meta["val"].shape[:-1]) * math.prod(weight.shape))
    if node.target in (aten.conv2d.default, aten.conv3d.default):
        weight, out = node.args[1].meta["val"], node.meta["val"]
        return int(2 * math.prod(weight.shape[1:]) * math.prod(out.shape))
    if node.target in (aten.matmul.default, aten.bmm.default):
        return int(2 * math.prod(node.meta["val"].shape) * int(node.args[0].meta["val"].shape[-1]))
    if node.target is aten.scaled_dot_product_attention.default:
        query, key = (argument.meta["val"] for argument in node.args[:2])
        return int(4 * math.prod(query.shape) * int(key.shape[-2]))
    return 0
