"""share-templates: structurally equal partitions share one lowered program."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from typing import ClassVar

from movdc.compiler.pass_base import Pass, PassResult
from movdc.compiler.pieces import split
from movdc.compiler.program import Program


@dataclass(frozen=True)
class ShareTemplates(Pass):
    """Give partitions that differ in nothing but their weights one template, which is lowered once.

    Before:  %h1 = aten.linear(%x, %w1)       After:  ---- template 5f1c ----
             ---- cut ----                            %h1 = aten.linear(%x, %w1)
             %h2 = aten.linear(%h1, %w2)              ---- cut ---- template 5f1c ----
                                                      %h2 = aten.linear(%h1, %w2)

    A template is the digest of the partition's nodes with every name replaced by a number. Partitions keep a template
    of their own where: 1. an operator, a shape or a number in an argument differs, because it is baked into the
    program; 2. an integer table differs in value, because lowering looks at indices and zero points.
    Cost: none at run time; the 24 blocks of T5 lower once, which is most of the time of a compile.
    Idea: On-device Sora (arXiv 2502.04363, section 3.1) exports every block on its own; this makes it one export.
    """

    name: ClassVar[str] = "share-templates"
    exact: ClassVar[bool] = True
    paper: ClassVar[str] = "arXiv 2502.04363, section 3.1"
    after: ClassVar[tuple[str, ...]] = ("partition",)  # templates are of partitions as they are cut

    def apply(self, program: Program) -> PassResult:
        """Write down the template of each partition of each graph."""
        changed = {}
        templates: list[str] = []
        for stage, variant, graph in program.graphs():
            found = tuple(hashlib.sha256(piece.text().encode()).hexdigest() for piece in split(graph))
            templates += found
            if found != graph.templates:
                changed[stage, variant] = replace(graph, templates=found)
        note = f"{len(templates)} partitions, {len(set(templates))} programs"
        return PassResult(program.map_graphs(changed), bool(changed), note)
