"""partition: cut every stage so that it fits the budget and loading overlaps running."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise
from typing import ClassVar

from movdc.compiler.chain import chain_of, common_positions, costs, stretch_texts
from movdc.compiler.cut import Costs, largest, least_s, planned, smallest_budget
from movdc.compiler.device import Machine
from movdc.compiler.errors import BudgetError, MovdcError
from movdc.compiler.pass_base import Pass, PassResult
from movdc.compiler.pieces import piece_of
from movdc.compiler.program import Graph, Program, Stage
from movdc.compiler.repeats import Programs, fewest_programs
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
    a tenth is about what the rates of a device are known to, and 0 takes plans of equal time only.
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
            for variants, plan in _plans(stage, program, self):
                notes.append(f"{stage.name} ({', '.join(variants)}) {plan.note}")
                for index, (variant, graph) in enumerate(variants.items()):
                    nodes = graph.compute_nodes
                    names = tuple(nodes[plan.positions[at][index] - 1].name for at in plan.cuts[1:-1])
                    if names != graph.cuts:
                        graph, modified = replace(graph, cuts=names, templates=()), True
                    cut[stage.name, variant] = replace(graph, estimated_bytes=planned(plan.costs, plan.cuts).peak_bytes)
        return PassResult(program.map_graphs(cut), modified, "; ".join(notes))


@dataclass(frozen=True)
class _Plan:
    """Cuts of variants that are cut alike: indices of `positions`, which has one position for each variant."""

    positions: list[tuple[int, ...]]
    costs: Costs
    cuts: list[int]
    programs: int

    @property
    def note(self) -> str:
        """What was found, and how far it is from what no cutting can beat."""
        one = planned(self.costs, self.cuts)
        count, least = len(self.cuts) - 1, least_s(self.costs)
        return (
            f"{count} partitions, {self.programs} programs, {count - 1 - one.overlapped} loads that wait: "
            f"{one.seconds:.4g} s, at least {least:.4g} s ({one.seconds / least - 1:.0%} above), "
            f"peak {format_bytes(one.peak_bytes)}"
        )


def _plans(stage: Stage, program: Program, options: Partition) -> list[tuple[Mapping[str, Graph], _Plan]]:
    """Plans for all variants together, or for each alone if they have too little in common to fit."""
    machine = program.machine.planning(stage.name)
    whole = _plan(list(stage.variants.values()), machine, options)
    if whole is not None:
        return [(stage.variants, whole)]
    alone = [(name, graph, _plan([graph], machine, options)) for name, graph in stage.variants.items()]
    if any(plan is None for *_, plan in alone):
        raise _infeasible(program)
    return [({name: graph}, plan) for name, graph, plan in alone if plan is not None]


def _plan(graphs: Sequence[Graph], machine: Machine, options: Partition) -> _Plan | None:
    positions = common_positions(graphs)
    each = list(zip(*positions, strict=True))
    most_bytes = options.weights_mb * 10**6
    of_all = largest(
        costs(chain_of(one, machine.held_as), own, machine, most_bytes) for one, own in zip(graphs, each, strict=True)
    )
    texts = zip(*[stretch_texts(graph, own) for graph, own in zip(graphs, each, strict=True)], strict=True)
    numbers: dict[tuple[str, ...], int] = {}
    kinds = [numbers.setdefault(text, len(numbers)) for text in texts]
    programs = _programs(graphs, each)
    cuts = fewest_programs(of_all, kinds, options.slack, programs)
    return None if cuts is None else _Plan(positions, of_all, cuts, programs(cuts))


def _programs(graphs: Sequence[Graph], positions: Sequence[Sequence[int]]) -> Programs:
    """Counts the distinct texts of pieces, which is what share-templates lowers."""
    nodes = [graph.compute_nodes for graph in graphs]

    @cache
    def digests(start: int, stop: int) -> tuple[bytes, ...]:
        pieces = [piece_of(g, some[at[start] : at[stop]]) for g, some, at in zip(graphs, nodes, positions, strict=True)]
        return tuple(hashlib.sha256(piece.text().encode()).digest() for piece in pieces)

    return lambda cuts: len({digest for start, stop in pairwise(cuts) for digest in digests(start, stop)})


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
