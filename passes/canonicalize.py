"""canonicalize: constants folded, masks finite, unused rows of a last projection dropped."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import fx

from movdc.compiler.dead_rows import drop_dead_rows
from movdc.compiler.folded import FoldedSource
from movdc.compiler.pass_base import Pass, PassResult
from movdc.compiler.program import Graph, Program, value_of
from movdc.compiler.trace import VIEWS, erase_unused

aten = torch.ops.aten
MASKED_SCORE = -1e9  # exp() of it is exactly 0 in fp32, and no sum of two overflows to -inf
_MASK_BELOW = -1e30


@dataclass(frozen=True)
class Canonicalize(Pass):
    """Compute at compile time what no stage input changes, and compute nothing that nobody reads.

    Before:  %p: f32[10] = aten.arange(10)             After:  %cos: f32[10,16] = weight(folded:5f1c...)
             %a: f32[10,16] = aten.mul(%p, %freqs)             %y = aten.linear(%x, %w[16,128] of the rows read)
             %cos: f32[10,16] = aten.cos(%a)
             %y: f32[..,32] = aten.linear(%x, %w)              (then the same views, half as wide)
             %v: f32[..,8] = aten.reshape(%y, [.., 8])
             %s: f32[..,4] = aten.slice(%v, -1, 0, 4)

    Folded are position and rope tables, T5's relative-position bias for its text length, the embedding of the fps.
    Mask values below -1e30 (also -inf) become -1e9: some delegates can write no infinity. Factors of 1 go.
    Leaves as it is: 1. an expansion, which is cheaper to repeat than to store (what it expands is folded); 2. a mere
    view of a weight, which would store the weight again; 3. a slice behind anything but views of one linear, because
    only there its rows are known.
    Cost: bytes of the tables, read from the bundle; fewer nodes; results are the same to the last bit of a fold.
    Idea: arXiv 2502.04363 drops the sigma half of the denoiser's output on the phone; here it is not computed.
    """

    name: ClassVar[str] = "canonicalize"
    exact: ClassVar[bool] = True
    paper: ClassVar[str] = "arXiv 2502.04363, section 3"
    # Merging traces the stage again and aligns the two traces, so the plain one must still be as traced.
    after: ClassVar[tuple[str, ...]] = ("merge-tokens",)

    def apply(self, program: Program) -> PassResult:
        """Rewrite every graph that has something to fold, clamp or drop."""
        changed: dict[tuple[str, str], Graph] = {}
        counts = {"folded": 0, "masks": 0, "factors of 1": 0, "dead rows": 0}
        for stage, variant, graph in program.graphs():
            copied = replace(graph, graph=graph.copy(), weights=dict(graph.weights))
            done = {"folded": _fold(copied), "masks": _finite_masks(copied), "factors of 1": _drop_ones(copied)}
            done["dead rows"] = drop_dead_rows(copied)
            for key, count in done.items():
                counts[key] += count
            if any(done.values()):
                changed[stage, variant] = replace(copied, weights=erase_unused(copied.graph, copied.weights))
        note = ", ".join(f"{count} {key}" for key, count in counts.items())
        return PassResult(program.map_graphs(changed), bool(changed), note)


def _fold(graph: Graph) -> int:
    """Replace each constant that something variable reads by a table; returns how many."""
    constant = {node for node in graph.graph.find_nodes(op="placeholder") if node.name in graph.weights}
    computed: set[fx.Node] = set()  # constants with an operator in their history that is no view
    for node in graph.compute_nodes:
        if constant.issuperset(node.all_input_nodes) and isinstance(node.meta["val"], torch.Tensor):
            constant.add(node)
            if node.target not in VIEWS or computed.intersection(node.all_input_nodes):
                computed.add(node)
    for node in reversed(graph.compute_nodes):
        if node.target is aten.expand.default and not constant.issuperset(node.users):
            constant.discard(node)
    read = [node for node in graph.compute_nodes if node in computed & constant and not constant.issuperset(node.users)]
    for node in read:
        _replace(graph, node)
    return len(read)


def _replace(graph: Graph, node: fx.Node) -> None:
    """A placeholder of the node's own name, so that variants of a stage keep equal names."""
    source = FoldedSource(graph, node)
    with graph.graph.inserting_before(next(iter(graph.graph.nodes))):
        placeholder = graph.graph.placeholder(f"{node.name}_table")
    placeholder.meta = {"val": node.meta["val"]}
    node.replace_all_uses_with(placeholder)
    assert isinstance(graph.weights, dict)
    graph.weights[placeholder.name] = source.ref


def _finite_masks(graph: Graph) -> int:
    """Clamp the numbers among the arguments; returns how many."""
    clamped = 0
    for node in graph.compute_nodes:
        arguments = [_finite(argument) for argument in node.args]
        if arguments != list(node.args):
            node.args = tuple(arguments)
            clamped += 1
    return clamped


def _finite(argument: fx.node.Argument) -> fx.node.Argument:
    return MASKED_SCORE if isinstance(argument, float) and argument < _MASK_BELOW else argument


def _drop_ones(graph: Graph) -> int:
    """Remove multiplications by the number 1; returns how many."""
    dropped = 0
    for node in graph.compute_nodes:
        if node.target is aten.mul.Tensor and node.args[1] == 1 and isinstance(node.args[1], (int, float)):
            source = node.args[0]
            assert isinstance(source, fx.Node)
            if value_of(source).dtype == value_of(node).dtype:
                node.replace_all_uses_with(source)
                graph.graph.erase_node(node)
                dropped += 1
    return dropped
