"""Evaluating pieces of graphs with PyTorch, in fp32 and with the weights as they were before they were quantized."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

from movdc.compiler.pieces import Piece, PieceWeight
from movdc.compiler.program import value_of
from movdc.compiler.weights import INT8, INT8_SCALE


def evaluate(
    piece: Piece, inputs: Mapping[str, Tensor], watch: Callable[[fx.Node, Any], None] = lambda node, value: None
) -> dict[str, Tensor]:
    """The outputs of a piece by name; `watch` gets the value of every node.

    Quantizing is left out: int8 weights are read as the floats that they were, their scales as ones, and what goes to
    int8 and back stays as it is.
    """
    inside = set(piece.nodes)
    left = {node: sum(user in inside for user in node.users) for node in piece.nodes}
    values: dict[fx.Node, Any] = {node: inputs[piece.tensor(node).name] for node in piece.inputs}
    values |= {weight.node: _as_float(weight) for weight in piece.weights}
    with torch.no_grad():
        for node in piece.nodes:
            arguments = fx.map_arg(node.args, lambda one: values[one])
            values[node] = _run(node, arguments, fx.map_arg(node.kwargs, lambda one: values[one]))
            watch(node, values[node])
            for source in node.all_input_nodes:
                if source in left:
                    left[source] -= 1
                    if left[source] == 0 and source not in piece.outputs:
                        del values[source]  # large values come and go
    return {piece.tensor(node).name: values[node].contiguous() for node in piece.outputs}


def _run(node: fx.Node, arguments: Any, keywords: Any) -> Any:
    target = node.target
    if isinstance(target, torch._ops.OpOverload) and target.namespace == "quantized_decomposed":
        first = arguments[0]
        return (first, first) if "choose_qparams" in target._opname else first  # a scale and a zero point
    return target(*arguments, **keywords)


def _as_float(weight: PieceWeight) -> Tensor:
    if INT8_SCALE in weight.ref.transforms:
        return torch.ones(value_of(weight.node).shape)
    kept = tuple(one for one in weight.ref.transforms if one != INT8)
    return replace(weight.ref, transforms=kept).read()
