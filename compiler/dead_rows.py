"""Rows of a linear projection that a slice behind it throws away, found through the views in between."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from movdc.compiler.program import Graph, value_of
from movdc.compiler.weights import Transform

aten = torch.ops.aten


def drop_dead_rows(graph: Graph) -> int:
    """Compute only the rows that are read: the slice goes, linear and views get narrower; returns how many slices.

    A slice [lo, hi) of a dimension of `period` channels reads of the linear's rows r those with lo <= r % period < hi,
    as long as each view in between keeps the channels fastest, or moves them as a whole.
    """
    dropped = 0
    for node in graph.compute_nodes:
        if node.target is not aten.slice.Tensor:
            continue
        source, dim, low, high, *step = node.args
        period = int(value_of(source).shape[dim])
        high = min(int(high), period)
        views = _views_to_linear(source, int(dim) % value_of(source).dim(), period)
        if step in ([], [1]) and views and 0 <= low < high < low + period and _narrow(graph, views, low, high, period):
            node.replace_all_uses_with(source)
            graph.graph.erase_node(node)
            dropped += 1
    return dropped


def _views_to_linear(node: fx.Node, dim: int, period: int) -> list[fx.Node]:
    """The linear and the views behind it, in order; empty if something else is on the way or reads a value of it."""
    chain = []
    while len(node.users) == 1:
        chain.append(node)
        last = value_of(node).dim() - 1
        if node.target is aten.linear.default:
            return chain[::-1] if dim == last else []
        if node.target is aten.permute.default:
            dim = int(node.args[1][dim]) % (last + 1)
        elif node.target is aten.transpose.int:
            swapped = [int(axis) % (last + 1) for axis in node.args[1:]]
            dim = swapped[1 - swapped.index(dim)] if dim in swapped else dim
        elif node.target is aten.reshape.default and dim == last:
            source = value_of(node.args[0])
            dim = source.dim() - 1
            if source.shape[dim] % period or value_of(node).shape[last] % period:
                return []
        elif node.target is not aten.slice.Tensor or int(node.args[1]) % (last + 1) == dim:
            return []
        node = node.args[0]
    return []


def _narrow(graph: Graph, chain: list[fx.Node], low: int, high: int, period: int) -> bool:
    linear, *views = chain
    parameters = [node for node in linear.args[1:] if node is not None]
    if any(node.name not in graph.weights or len(node.users) > 1 for node in parameters):
        return False
    assert isinstance(graph.weights, dict)
    rows = Transform("rows", (period, low, high))
    for node in parameters:
        graph.weights[node.name] = graph.weights[node.name].then(rows)
        node.meta["val"] = rows.apply(value_of(node))
    _infer(linear)
    for node in views:
        if node.target is aten.reshape.default:
            *sizes, channels = (int(size) for size in value_of(node).shape)
            node.args = (node.args[0], [*sizes, channels * (high - low) // period])
        _infer(node)
    return True


def _infer(node: fx.Node) -> None:
    arguments: Any = fx.map_arg(node.args, lambda argument: argument.meta["val"])
    node.meta["val"] = node.target(*arguments, **node.kwargs)
