"""Evaluating pieces of graphs with PyTorch: as before they were quantized, or with int8 as a target has it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

from movdc.compiler.pieces import Piece, PieceWeight
from movdc.compiler.program import value_of
from movdc.compiler.weights import INT8, INT8_SCALE

ThroughInt8 = Callable[[Tensor], Tensor]  # Target.through_int8


def evaluate(piece: Piece, inputs: Mapping[str, Tensor], through_int8: ThroughInt8 | None = None) -> dict[str, Tensor]:
    """The outputs of a piece by name, in fp32.

    Without `through_int8` quantizing is left out: int8 weights are read as the floats that they were, their scales as
    ones, and what goes to int8 and back stays as it is. With it int8 weights are multiplied, and it gives what is left
    of an input of a product that goes to int8 and back, [rows, items]: tokens, or the images of a convolution.
    """
    inside = set(piece.nodes)
    left = {node: sum(user in inside for user in node.users) for node in piece.nodes}
    values: dict[fx.Node, Any] = {node: inputs[piece.tensor(node).name] for node in piece.inputs}
    read = _as_float if through_int8 is None else _as_stored
    values |= {weight.node: read(weight) for weight in piece.weights}
    with torch.no_grad():
        for node in piece.nodes:
            arguments = fx.map_arg(node.args, lambda one: values[one])
            values[node] = _run(node, arguments, fx.map_arg(node.kwargs, lambda one: values[one]), through_int8)
            for source in node.all_input_nodes:
                if source in left:
                    left[source] -= 1
                    if left[source] == 0 and source not in piece.outputs:
                        del values[source]  # large values come and go
    return {piece.tensor(node).name: values[node].contiguous() for node in piece.outputs}


def _run(node: fx.Node, arguments: Any, keywords: Any, through_int8: ThroughInt8 | None) -> Any:
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or target.namespace != "quantized_decomposed":
        return target(*arguments, **keywords)
    name, first = target._opname, arguments[0]
    if through_int8 is not None and name == "dequantize_per_channel":
        return target(*arguments, **keywords)
    if through_int8 is not None and name.startswith("quantize_"):
        rows = first.flatten(1) if name == "quantize_per_tensor" else first.flatten(0, -2)
        return through_int8(rows).reshape(first.shape)
    return (first, first) if "choose_qparams" in name else first  # a scale and a zero point


def _as_float(weight: PieceWeight) -> Tensor:
    if INT8_SCALE in weight.ref.transforms:
        return torch.ones(value_of(weight.node).shape)
    kept = tuple(one for one in weight.ref.transforms if one != INT8)
    return replace(weight.ref, transforms=kept).read()


def _as_stored(weight: PieceWeight) -> Tensor:
    return weight.ref.read()
