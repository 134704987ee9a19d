"""Pieces: the subgraphs between the cuts of a graph, with their tensors, weights and sizes."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import fx, nn

from movdc.compiler.cost import flops, int8_flops, maker, scratch_bytes, size_bytes
from movdc.compiler.folded import FoldedSource
from movdc.compiler.printer import print_node, print_type
from movdc.compiler.program import Graph, spec_of, value_of
from movdc.compiler.weights import WeightRef
from movdc.runtime.bundle import TensorSpec


@dataclass(frozen=True)
class PieceWeight:
    """A weight of a piece: the ordinal counts the weights of its group in order of appearance."""

    node: fx.Node
    ref: WeightRef
    group: str  # "weights" of the checkpoint, which variants of a stage share, or "tables" folded for one variant
    ordinal: int

    @property
    def name(self) -> str:
        """The name under which the lowered program knows it."""
        return f"{self.group}_{self.ordinal}"

    def text(self) -> str:
        """What programs that share it must agree on: type and place, and the values where lowering may look at them."""
        value = value_of(self.node)
        if self.is_read_by_lowering:
            return f"{print_type(value)} = {hashlib.sha256(self.ref.read().numpy().tobytes()).hexdigest()}"
        return print_type(value)

    def stand_in(self) -> torch.Tensor:
        """Data that no other weight of the piece has, so that it can be recognised in what the target made of it."""
        if self.is_read_by_lowering:
            return self.ref.read()
        value = value_of(self.node)
        digest = hashlib.sha256(f"{self.name}: {print_type(value)}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
        if value.dtype == torch.int8:
            return torch.randint(-127, 128, value.shape, generator=generator, dtype=torch.int8)
        return 0.5 + torch.rand(value.shape, generator=generator, dtype=value.dtype)  # positive: scales must be

    @property
    def is_read_by_lowering(self) -> bool:
        """Indices and zero points decide how a target lowers what reads them, and single numbers are folded."""
        value = value_of(self.node)
        is_number = self.group == "tables" and value.numel() == 1
        return is_number or (value.dtype != torch.int8 and not value.dtype.is_floating_point)


@dataclass(frozen=True)
class Piece:
    """The nodes of one partition, with the tensors that enter and leave it."""

    graph: Graph
    nodes: tuple[fx.Node, ...]
    inputs: tuple[fx.Node, ...]
    outputs: tuple[fx.Node, ...]
    weights: tuple[PieceWeight, ...]
    stage: str = ""  # whose piece it is, for targets that lower stages differently

    @property
    def weight_bytes(self) -> int:
        """Bytes of its weights."""
        return sum(size_bytes(weight.node) for weight in self.weights)

    @property
    def flops(self) -> int:
        """2 x multiply-adds."""
        return sum(flops(node) for node in self.nodes)

    @property
    def int8_flops(self) -> int:
        """Those of products with int8 weights."""
        return sum(int8_flops(node) for node in self.nodes)

    @property
    def working_bytes(self) -> int:
        """The most bytes of values that neither enter nor leave, at any node."""
        inner = {node: index for index, node in enumerate(self.nodes)}
        live = [scratch_bytes(node) for node in self.nodes]
        for node, index in inner.items():
            if node not in self.outputs:
                last = max((inner[user] for user in node.users if user in inner), default=index)
                for position in range(inner[maker(node)], last + 1):
                    live[position] += size_bytes(node)
        return max(live, default=0)

    def tensor(self, node: fx.Node) -> TensorSpec:
        """The name, dtype and shape under which the engine knows a value."""
        results = list(self.graph.output_node.args[0])
        name = self.graph.outputs[results.index(node)].name if node in results else node.name
        return spec_of(name, value_of(node))

    def module(self, directory: Path) -> fx.GraphModule:
        """The subgraph with stand-ins for its weights, which each partition of the same text shares.

        They lie in files, in some directory: together they are as large as the weights, and need not be in memory.
        """
        root = nn.Module()
        graph = fx.Graph()
        copies: dict[fx.Node, fx.Node] = {}
        for index, node in enumerate(self.inputs):
            copies[node] = graph.placeholder(f"input_{index}")
            copies[node].meta["val"] = value_of(node)
        for weight in self.weights:
            data = _mapped_copy(weight.stand_in(), directory)
            root.register_parameter(weight.name, nn.Parameter(data, requires_grad=False))
            copies[weight.node] = graph.get_attr(weight.name)
        for node in self.nodes:
            copies[node] = graph.node_copy(node, lambda source: copies[source])
            copies[node].meta = {}  # its history would be copied by every step of the lowering
        graph.output(tuple(copies[node] for node in self.outputs))
        return fx.GraphModule(root, graph)

    def text(self) -> str:
        """The subgraph with every name replaced by a number: pieces of one text can share one program."""
        names = {node: f"%input_{index}" for index, node in enumerate(self.inputs)}
        names |= {weight.node: f"%{weight.name}" for weight in self.weights}
        lines = [f"{names[node]}: {print_type(value_of(node))}" for node in self.inputs]
        lines += [f"{names[weight.node]}: {weight.text()}" for weight in self.weights]
        for index, node in enumerate(self.nodes):
            names[node] = f"%{index}"
            lines.append(print_node(node, names))
        lines.append(f"return {', '.join(names[node] for node in self.outputs)}")
        return "\n".join(lines) + "\n"


def split(graph: Graph, stage: str = "") -> list[Piece]:
    """The pieces of a graph, in order."""
    groups: list[list[fx.Node]] = [[]]
    for node in graph.compute_nodes:
        groups[-1].append(node)
        if node.name in graph.cuts:
            groups.append([])
    return [replace(piece_of(graph, group), stage=stage) for group in groups]


def piece_of(graph: Graph, nodes: Sequence[fx.Node]) -> Piece:
    """The piece of some neighbouring nodes."""
    results = set(graph.output_node.all_input_nodes)
    inside = set(nodes)
    read = list(dict.fromkeys(source for node in nodes for source in node.all_input_nodes))
    return Piece(
        graph,
        tuple(nodes),
        tuple(node for node in read if node not in inside and node.name not in graph.weights),
        tuple(node for node in nodes if node in results or not inside.issuperset(node.users)),
        _weights(graph, [node for node in read if node.name in graph.weights]),
    )


def _weights(graph: Graph, nodes: list[fx.Node]) -> tuple[PieceWeight, ...]:
    weights: list[PieceWeight] = []
    for node in nodes:
        ref = graph.weights[node.name]
        group = "tables" if isinstance(ref.source, FoldedSource) else "weights"
        weights.append(PieceWeight(node, ref, group, sum(weight.group == group for weight in weights)))
    return tuple(weights)


def _mapped_copy(tensor: torch.Tensor, directory: Path) -> torch.Tensor:
    """The same tensor in a file without a name, which is gone when the tensor is."""
    if not tensor.numel():
        return tensor
    path = directory / "stand-in"
    mapped = torch.from_file(str(path), shared=True, size=tensor.numel(), dtype=tensor.dtype)
    path.unlink()
    return mapped.copy_(tensor.flatten()).reshape(tensor.shape)
