"""A piece as torch.onnx exports it: its weights are arguments behind its inputs, so that no exporter looks at them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from movdc.compiler.pieces import Piece, PieceWeight
from movdc.compiler.program import DTYPES, TORCH_DTYPES, value_of
from movdc.compiler.target import Slot
from movdc.targets.onnx_products import conv2d_int8, linear, linear_int8

aten = torch.ops.aten
quantized = torch.ops.quantized_decomposed


@dataclass(frozen=True)
class OnnxModule:
    """A graph module that takes the inputs of a piece and then the weights of the slots, in their order."""

    module: fx.GraphModule
    inputs: tuple[Tensor, ...]  # of the sizes and types of both; nothing is in them
    slots: tuple[Slot, ...]


def onnx_module(piece: Piece) -> OnnxModule:
    """Rewrite the products of a piece; raises nothing that the piece could cause."""
    weights = {weight.node: weight for weight in piece.weights}
    slots = {weight.node: _slot(weight, piece) for weight in piece.weights}
    graph = fx.Graph()
    copies = {node: graph.placeholder(f"input_{index}") for index, node in enumerate(piece.inputs)}
    copies |= {node: graph.placeholder(weight.name) for node, weight in weights.items()}
    for node in piece.nodes:
        product = _product(node, slots)
        if product is None:
            copies[node] = graph.node_copy(node, lambda source: copies[source])
        else:
            target, arguments = product
            copies[node] = graph.call_function(target, fx.map_arg(arguments, lambda source: copies[source]))
        copies[node].meta = {}
    graph.output(tuple(copies[node] for node in piece.outputs))
    graph.eliminate_dead_code()  # what stood between the choice of a scale and its product
    for node in weights:
        if not copies[node].users:
            graph.erase_node(copies[node])
            del slots[node]
    inputs = [torch.empty(value_of(node).shape, dtype=value_of(node).dtype) for node in piece.inputs]
    inputs += [torch.empty(slot.shape, dtype=TORCH_DTYPES[slot.dtype or "u8"]) for slot in slots.values()]
    return OnnxModule(fx.GraphModule(nn.Module(), graph), tuple(inputs), tuple(slots.values()))


def _slot(weight: PieceWeight, piece: Piece) -> Slot:
    """How the program wants a weight: matrices transposed, int8 ones as uint8, scales of kernels [C, 1, 1]."""
    value = value_of(weight.node)
    shape, dtype = tuple(int(size) for size in value.shape), DTYPES[value.dtype]
    inside = set(piece.nodes)
    users = [user for user in weight.node.users if user in inside]
    if all(user.target is quantized.dequantize_per_channel.default for user in users):
        products = [product for user in users for product in user.users]
        is_kernel = any(product.target is aten.conv2d.default for product in products)
        if dtype != "i8":  # a scale, for a zero point is read by nothing that stays
            return Slot(weight.name, weight.name, "plain", dtype, (*shape, 1, 1) if is_kernel else shape)
        if is_kernel:
            return Slot(weight.name, weight.name, "plain", "u8", shape)
        return Slot(weight.name, weight.name, "transposed", "u8", shape[::-1])
    if all(_is_matrix(weight.node, user) for user in users):
        return Slot(weight.name, weight.name, "transposed", dtype, shape[::-1])
    return Slot(weight.name, weight.name, "plain", dtype, shape)


def _is_matrix(weight: fx.Node, user: fx.Node) -> bool:
    return (
        user.target is aten.linear.default and user.args[1] is weight and weight not in (user.args[0], *user.args[2:])
    )


def _product(node: fx.Node, slots: Mapping[fx.Node, Slot]) -> tuple[Callable[..., Tensor], tuple[object, ...]] | None:
    """What computes a product instead, and its arguments; None if the node stays as it is."""
    if node.target not in (aten.linear.default, aten.conv2d.default):
        return None
    x, matrix, bias, *settings = (*node.args, None)[: max(3, len(node.args))]
    if matrix.target is quantized.dequantize_per_channel.default:
        weight, scale = matrix.args[:2]
        x = x.args[0].args[0]  # before it was quantized and restored
        if node.target is aten.linear.default:
            return linear_int8, (x, weight, scale, bias)
        defaults = ((1, 1), (0, 0), (1, 1))  # of stride, padding and dilation
        chosen = (*settings[:3], *defaults[len(settings) :])
        return conv2d_int8, (x, weight, scale, bias, *chosen, tuple(value_of(node).shape))
    if node.target is aten.linear.default and matrix in slots and slots[matrix].layout == "transposed":
        return linear, (x, matrix, bias)
    return None
