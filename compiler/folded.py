"""Folded constants: a subgraph that needs no stage input, as a source of one tensor that is evaluated when read."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor, fx, nn

from movdc.compiler.printer import print_node, print_type
from movdc.compiler.program import Graph, value_of
from movdc.compiler.weights import WeightRef


class FoldedSource:
    """One tensor, computed from weights of the checkpoint and Python numbers alone."""

    label = "folded"

    def __init__(self, graph: Graph, node: fx.Node) -> None:
        self._graph = fx.Graph()
        self._weights: dict[str, WeightRef] = {}
        needed = _ancestors(node)
        copies: dict[fx.Node, fx.Node] = {}
        lines = []
        for source in graph.graph.nodes:
            if source in needed:
                copies[source] = self._graph.node_copy(source, lambda one: copies[one])
                if source.name in graph.weights:
                    self._weights[copies[source].name] = graph.weights[source.name]
                    lines.append(f"%{source.name}: {print_type(value_of(source))} = {graph.weights[source.name]}")
                else:
                    lines.append(print_node(source))
        self._graph.output(copies[node])
        self.key = hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]
        self._ref = WeightRef(self, self.key, tuple(int(size) for size in value_of(node).shape), value_of(node).dtype)

    @property
    def ref(self) -> WeightRef:
        """The reference to the tensor."""
        return self._ref

    def refs(self) -> Mapping[str, WeightRef]:
        return {self.key: self._ref}

    def read(self, key: str) -> Tensor:
        arguments = [self._weights[node.name].read() for node in self._graph.find_nodes(op="placeholder")]
        with torch.no_grad():
            tensor: Tensor = fx.Interpreter(fx.GraphModule(nn.Module(), self._graph)).run(*arguments)
        return tensor.contiguous()

    def identity(self, key: str) -> str:
        return " ".join([f"folded {self.key}", *(ref.identity for ref in self._weights.values())])


def _ancestors(node: fx.Node) -> set[fx.Node]:
    found = {node}
    stack = [node]
    while stack:
        for source in stack.pop().all_input_nodes:
            if source not in found:
                found.add(source)
                stack.append(source)
    return found
