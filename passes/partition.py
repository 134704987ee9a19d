"""partition: cut every stage so that it fits the budget and loading overlaps running."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

from movdc.compiler.chain import chain_of, common_positions, costs
from movdc.compiler.cut import smallest_budget
from movdc.compiler.errors import BudgetError, MovdcError
from movdc.compiler.pass_base import Pass, PassResult
from movdc.compiler.planner import Plan, plan
from movdc.compiler.program import Graph, Program, Stage
from movdc.compiler.units import format_bytes


@dataclass(frozen=True)
class Partition(Pass):
    """Cut each stage where its predicted time is least, in at most the memory of the budget.

    Before:  %a = aten.linear(%x, %w1)        After:  %a = aten.linear(%x, %w1)
             %b = aten.linear(%a, %w2)                ---- cut ----
                                                      %b = aten.linear(%a, %w2)

    Works on the linear order of the nodes, not on module names, and is optimal for that order and the cost model:
    while a partition runs the next one loads, where both fit together (compiler/cut.py). The variants of a stage are
    cut behind the same nodes, so that they share weights, where their names and weights allow. Of plans within
    1 + `slack` of the least time the one with the fewest programs wins, so that equal blocks become equal partitions;
    a tenth is about what the rates of a device are known to, and 0 takes plans of equal time only. Of those plans one
    that cuts at waists, where little crosses, goes before all that do not (compiler/planner.py).
    Refuses: 1. a budget that no cutting can meet (BudgetError with the smallest one that can be met, and the node that
    sets it). Never cuts: 2. between a node with several results and the nodes that pick them, because only tensors
    cross; 3. inside a quantized linear, because its nodes are one kernel.
    Cost: tensors across cuts are written and read; results are the same.
    Idea: On-device Sora (arXiv 2502.04363, section 3.4) overlaps the loads of blocks that it cut by hand.
    """

    name: ClassVar[str] = "partition"
    exact: ClassVar[bool] = True
    paper: ClassVar[str] = "arXiv 2502.04363, section 3.4"
    slack: float = 0.1
    weights_mb: int = 512  # of a partition at most: lowering takes several times as much, and loads stay short

    def requires(self, program: Program) -> None:
        """The slack is a part of the least time, and partitions have weights."""
        if self.weights_mb < 1:
            raise MovdcError(f"pass partition: option weights_mb is {self.weights_mb}; write 1 or more, such as 512")
        if not 0 <= self.slack <= 1:
            raise MovdcError(f"pass partition: option slack is {self.slack}; write a number from 0 to 1, such as 0.1")

    def apply(self, program: Program) -> PassResult:
        """Cut every stage afresh."""
        cut: dict[tuple[str, str], Graph] = {}
        modified = False
        notes = []
        for stage in program.stages:
            for variants, found in _plans(stage, program, self):
                notes.append(f"{stage.name} ({', '.join(variants)}) {found.note}")
                for index, (variant, graph) in enumerate(variants.items()):
                    nodes = graph.compute_nodes
                    names = tuple(nodes[found.positions[at][index] - 1].name for at in found.cuts[1:-1])
                    if names != graph.cuts:
                        graph, modified = replace(graph, cuts=names, templates=()), True
                    cut[stage.name, variant] = replace(graph, estimated_bytes=found.prediction.peak_bytes)
        return PassResult(program.map_graphs(cut), modified, "; ".join(notes))


def _plans(stage: Stage, program: Program, options: Partition) -> list[tuple[Mapping[str, Graph], Plan]]:
    """Plans for all variants together, or for each alone if they have too little in common to fit."""
    machine = program.machine.planning(stage.name)
    most_bytes = options.weights_mb * 10**6
    whole = plan(list(stage.variants.values()), machine, options.slack, most_bytes)
    if whole is not None:
        return [(stage.variants, whole)]
    alone = [(name, graph, plan([graph], machine, options.slack, most_bytes)) for name, graph in stage.variants.items()]
    if any(one is None for *_, one in alone):
        raise _infeasible(program)
    return [({name: graph}, one) for name, graph, one in alone if one is not None]


def _infeasible(program: Program) -> BudgetError:
    """Name the smallest budget that every stage can meet, and the stage and node that set it."""
    smallest = []
    for stage, _, graph in program.graphs():
        positions = common_positions([graph])
        chain = chain_of(graph, program.machine.held_as)
        needed_bytes, step = smallest_budget(costs(chain, [one for (one,) in positions], program.machine))
        needed_bytes += dict(program.machine.reserves).get(stage, 0)
        node = graph.compute_nodes[positions[step + 1][0] - 1]
        smallest.append((needed_bytes, stage, f"%{node.name} ({node.target})"))
    needed_bytes, stage, where = max(smallest)
    budget_bytes = program.machine.budget_bytes
    return BudgetError(
        stage,
        f"does not fit into {budget_bytes} bytes ({format_bytes(budget_bytes)}) however it is cut; the smallest "
        f"memory budget is {needed_bytes} bytes ({format_bytes(needed_bytes)}), set by {where}; "
        "raise memory_budget, or make the video smaller",
    )
