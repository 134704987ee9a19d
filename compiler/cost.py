"""The cost model: bytes and FLOPs of nodes, and which nodes cannot be parted."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import fx

from movdc.compiler.program import DTYPES, Graph, value_of
from movdc.compiler.trace import is_pick
from movdc.runtime.bundle import ITEM_BYTES, DType

aten = torch.ops.aten


def size_bytes(node: fx.Node) -> int:
    """Bytes that a node's result takes; of a node with several results, those that pick them take the bytes."""
    if "dequantize" in getattr(node.target, "__name__", ""):
        return 0  # what int8 kernels read stays int8
    value = node.meta["val"]
    return int(value.nbytes) if isinstance(value, torch.Tensor) else 0


def maker(node: fx.Node) -> fx.Node:
    """The node at which a node's result comes into being: a picked result does where all results do."""
    return node.args[0] if is_pick(node) else node


def is_fused_with_users(node: fx.Node) -> bool:
    """Whether a node and those that read it must stay in one partition.

    Results are picked where they are made, and quantized arithmetic is one kernel from the choice of the scale to the
    linear, whatever the nodes between say.
    """
    several = not isinstance(node.meta["val"], torch.Tensor)
    return several or getattr(maker(node).target, "namespace", "") == "quantized_decomposed"


def weight_bytes(node: fx.Node, graph: Graph) -> int:
    """Bytes of the weights that a node reads."""
    return sum(size_bytes(source) for source in node.all_input_nodes if source.name in graph.weights)


def held_bytes(weight: fx.Node, held_as: Mapping[DType, DType]) -> int:
    """Bytes that a device holds of a weight, where it holds weights of some types as another one."""
    value = value_of(weight)
    stored = DTYPES[value.dtype]
    return value.numel() * ITEM_BYTES[held_as.get(stored, stored)]


def scratch_bytes(node: fx.Node) -> int:
    """Bytes that a kernel needs beside its inputs and outputs: the scores of an attention, results nobody picks."""
    if not isinstance(node.meta["val"], torch.Tensor):
        picked = {user.args[1] for user in node.users if is_pick(user)}
        results = enumerate(node.meta["val"])
        return sum(value.nbytes for index, value in results if index not in picked and isinstance(value, torch.Tensor))
    if node.target is aten.scaled_dot_product_attention.default:
        query, key = (argument.meta["val"] for argument in node.args[:2])
        scores = math.prod(query.shape[:-1]) * int(key.shape[-2]) * query.element_size()
        return 2 * int(scores)  # before and after the softmax
    return 0


def pointer_bytes(node: fx.Node) -> int:
    """Bytes of the pointers that a convolution keeps to what each place of its kernel reads for each pixel."""
    if node.target is not aten.conv2d.default:
        return 0
    out, weight = node.meta["val"], node.args[1].meta["val"]
    taps = math.prod(weight.shape[2:])
    return 8 * math.prod(out.shape[2:]) * taps if taps > 1 else 0


def int8_flops(node: fx.Node) -> int:
    """The FLOPs of a product whose weight is int8; 0 for everything else."""
    if node.target not in (aten.linear.default, aten.conv2d.default):
        return 0
    restored = getattr(node.args[1].target, "__name__", "") if isinstance(node.args[1], fx.Node) else ""
    return flops(node) if restored.startswith("dequantize_per_channel") else 0


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
