"""What reads int8 weights, in the operators that targets recognise: products (linear, convolution) and row lookups."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

import torch
import torch.ao.quantization.fx._decomposed  # registers the operators of quantized_decomposed
from torch import fx

from movdc.compiler.int8 import MAX_VALUE
from movdc.compiler.program import Graph, value_of
from movdc.compiler.weights import INT8, INT8_SCALE, Transform, WeightRef, Zeros

aten = torch.ops.aten
quantized = torch.ops.quantized_decomposed
_SHAPES = {aten.reshape.default, aten.permute.default, aten.transpose.int, aten.slice.Tensor, aten.cat.default}
_NORMS = {aten.group_norm.default, aten.layer_norm.default}  # which are in no delegate of XNNPACK's
_MIN_SCALE = torch.finfo(torch.float32).eps  # of an input of zeros; scales of tokens are held to it too


def quantized_graph(graph: Graph, names: list[str]) -> Graph:
    """The graph with the named weights as int8, each with its scales and with what reads it rewritten."""
    copied = graph.copy()
    weights = dict(graph.weights)

    def add_weight(name: str, ref: WeightRef, value: torch.Tensor, before: fx.Node) -> fx.Node:
        with copied.inserting_before(before):
            node = copied.placeholder(name)
        node.meta["val"] = value
        weights[node.name] = ref
        return node

    zeros: dict[int, fx.Node] = {}  # one tensor for all weights of so many channels
    for weight in [node for node in copied.find_nodes(op="placeholder") if node.name in names]:
        ref, value, users = weights[weight.name], value_of(weight), list(weight.users)
        lookup = reader_kind(weight, users[0], graph) == "lookup"
        channels = int(value.shape[0])
        scale_ref, scales = ref.then(INT8_SCALE), INT8_SCALE.apply(value)
        if lookup:
            as_column = Transform("reshape", (channels, 1))
            scale_ref, scales = scale_ref.then(as_column), as_column.apply(scales)
        scale = add_weight(f"{weight.name}_scale", scale_ref, scales, weight)
        weights[weight.name] = ref.then(INT8)
        weight.meta["val"] = INT8.apply(value)
        if not lookup and channels not in zeros:
            none = value.new_zeros(channels, dtype=torch.int32)
            zeros[channels] = add_weight(f"zeros_{channels}", Zeros().ref(channels), none, weight)
        for user in users:
            if lookup:
                look_up_int8(user, weight, scale)
            else:
                multiply_int8(user, weight, scale, zeros[channels])
    copied.lint()
    return replace(graph, graph=copied, weights=weights)


def reader_kind(weight: fx.Node, user: fx.Node, graph: Graph) -> Literal["product", "lookup"] | None:
    """How a node reads a weight that can be int8: as the matrix of a product, row by row, or None for any other way."""
    if user.kwargs:
        return None
    if user.target is aten.embedding.default:
        return "lookup" if user.args[0] is weight else None
    if user.target not in (aten.linear.default, aten.conv2d.default):
        return None
    x, matrix, bias, *settings = (*user.args, None)[: max(3, len(user.args))]
    grouped = len(settings) > 3 and settings[3] != 1
    given = bias is None or bias.name in graph.weights
    single = matrix is weight and weight not in (x, bias)
    if user.target is aten.conv2d.default and not _are_images(x):
        return None
    return "product" if single and given and not grouped and value_of(x).dim() > 1 else None


def _are_images(x: fx.Node) -> bool:
    """Whether x is [N, C, H, W], and so is all that it is made of, back to a norm or an input.

    XNNPACK follows the input of an int8 convolution to the first tensor that its delegate is given and has that one in
    channels-last order; it fails where a change of shape lies between.
    """
    while x.op == "call_function" and x.target not in _NORMS:
        if x.target in _SHAPES or value_of(x).dim() != 4 or not isinstance(x.args[0], fx.Node):
            return False
        x = x.args[0]
    return bool(value_of(x).dim() == 4)


def multiply_int8(product: fx.Node, weight: fx.Node, scale: fx.Node, zeros: fx.Node) -> None:
    """Let a product read its weight as int8 and its input as int8 quantized when it comes.

    Everything is put directly before the product, so that cuts can keep clear of it.
    """
    call = _calls_before(product)
    x = product.args[0]
    span = (-128, 127, torch.int8)
    if product.target is aten.linear.default:
        chosen = call(quantized.choose_qparams_per_token_asymmetric.default, x, torch.int8)
        grid = (call(operator.getitem, chosen, 0), call(operator.getitem, chosen, 1), *span)
        stored = call(quantized.quantize_per_token.default, x, *grid)
        restored = call(quantized.dequantize_per_token.default, stored, *grid, torch.float32)
    else:
        chosen = call(quantized.choose_qparams.tensor, x, -128, 127, _MIN_SCALE, torch.int8)
        grid = (call(operator.getitem, chosen, 0), call(operator.getitem, chosen, 1), *span)
        stored = call(quantized.quantize_per_tensor.tensor, x, *grid)
        restored = call(quantized.dequantize_per_tensor.tensor, stored, *grid)
    matrix = call(quantized.dequantize_per_channel.default, weight, scale, zeros, 0, -MAX_VALUE, MAX_VALUE, torch.int8)
    product.args = (restored, matrix, *product.args[2:])


def look_up_int8(lookup: fx.Node, weight: fx.Node, scale: fx.Node) -> None:
    """Let a lookup take int8 rows and restore only those; `scale` is [rows, 1]."""
    call = _calls_before(lookup)
    rows = call(aten.embedding.default, weight, *lookup.args[1:])
    steps = call(aten.embedding.default, scale, *lookup.args[1:])
    lookup.replace_all_uses_with(call(aten.mul.Tensor, call(aten.to.dtype, rows, torch.float32), steps))
    lookup.graph.erase_node(lookup)


def _calls_before(node: fx.Node) -> Callable[..., fx.Node]:
    """A function that adds calls directly before a node, with its history and their own values."""

    def call(target: Any, *arguments: Any) -> fx.Node:
        with node.graph.inserting_before(node):
            created = node.graph.call_function(target, arguments)
        created.meta = {key: value for key, value in node.meta.items() if key != "val"}
        created.meta["val"] = target(*fx.map_arg(arguments, lambda argument: argument.meta["val"]))
        return created

    return call
