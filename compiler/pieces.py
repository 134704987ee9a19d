"""Pieces: the subgraphs between the cuts of a graph, with their tensors, weights and sizes."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx, nn

from movdc.compiler.cost import flops, scratch_bytes, size_bytes
from movdc.compiler.program import Graph, spec_of, value_of
from movdc.compiler.trace import is_pick
from movdc.runtime.bundle import TensorSpec


@dataclass(frozen=True)
class Piece:
    """The nodes of one partition, with the tensors that enter and leave it."""

    graph: Graph
    nodes: tuple[fx.Node, ...]
    inputs: tuple[fx.Node, ...]
    outputs: tuple[fx.Node, ...]
    weights: tuple[fx.Node, ...]

    @property
    def weight_bytes(self) -> int:
        """Bytes of its weights."""
        return sum(size_bytes(node) for node in self.weights)

    @property
    def flops(self) -> int:
        """2 x multiply-adds."""
        return sum(flops(node) for node in self.nodes)

    @property
    def working_bytes(self) -> int:
        """The most bytes of values that neither enter nor leave, at any node."""
        inner = {node: index for index, node in enumerate(self.nodes)}
        live = [scratch_bytes(node) for node in self.nodes]
        for node, index in inner.items():
            if node not in self.outputs:
                users = [user for direct in node.users for user in (direct, *(direct.users if is_pick(direct) else ()))]
                last = max((inner[user] for user in users if user in inner), default=index)
                for position in range(index, last + 1):
                    live[position] += size_bytes(node)
        return max(live, default=0)

    def tensor(self, node: fx.Node) -> TensorSpec:
        """The name, dtype and shape under which the engine knows a value."""
        results = list(self.graph.output_node.args[0])
        name = self.graph.outputs[results.index(node)].name if node in results else node.name
        return spec_of(name, value_of(node))

    def module(self) -> fx.GraphModule:
        """The subgraph with its weights read, transformed and attached; names follow the order of appearance."""
        root = nn.Module()
        graph = fx.Graph()
        copies: dict[fx.Node, fx.Node] = {}
        for index, node in enumerate(self.inputs):
            copies[node] = graph.placeholder(f"input_{index}")
            copies[node].meta["val"] = value_of(node)
        for index, node in enumerate(self.weights):
            data = self.graph.weights[node.name].read()
            root.register_parameter(f"weight_{index}", nn.Parameter(data, requires_grad=False))
            copies[node] = graph.get_attr(f"weight_{index}")
        for node in self.nodes:
            copies[node] = graph.node_copy(node, lambda source: copies[source])
        graph.output(tuple(copies[node] for node in self.outputs))
        return fx.GraphModule(root, graph)


def split(graph: Graph) -> list[Piece]:
    """The pieces of a graph, in order."""
    groups: list[list[fx.Node]] = [[]]
    for node in graph.compute_nodes:
        groups[-1].append(node)
        if node.name in graph.cuts:
            groups.append([])
    results = set(graph.output_node.all_input_nodes)
    pieces = []
    for group in groups:
        inside = set(group)
        read = list(dict.fromkeys(source for node in group for source in node.all_input_nodes))
        pieces.append(
            Piece(
                graph,
                tuple(group),
                tuple(node for node in read if node not in inside and node.name not in graph.weights),
                tuple(node for node in group if node in results or not inside.issuperset(node.users)),
                tuple(node for node in read if node.name in graph.weights),
            )
        )
    return pieces
