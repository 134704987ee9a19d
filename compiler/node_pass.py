"""Passes that rewrite single nodes, wherever they are."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import fx

from movdc.compiler.pass_base import Pass, PassResult
from movdc.compiler.program import Program


@dataclass(frozen=True)
class NodePass(Pass):
    """A pass that finds its nodes one by one and puts others behind each (compiler.trace.insert_after)."""

    rewrites: ClassVar[str]  # what is counted in the note

    @staticmethod
    @abstractmethod
    def qualifies(node: fx.Node) -> bool:
        """Whether a node is to be rewritten."""

    @staticmethod
    @abstractmethod
    def rewrite(node: fx.Node) -> None:
        """Give the node's readers something else to read, and erase it."""

    def apply(self, program: Program) -> PassResult:
        """Rewrite every node that qualifies, in every graph."""
        changed = {}
        count = 0
        for stage, variant, graph in program.graphs():
            names = {node.name for node in graph.compute_nodes if self.qualifies(node)}
            if names:
                copied = graph.copy()
                for node in copied.nodes:
                    if node.name in names:
                        self.rewrite(node)
                changed[stage, variant] = replace(graph, graph=copied)
                count += len(names)
        return PassResult(program.map_graphs(changed), bool(changed), f"{count} {self.rewrites} rewritten")
