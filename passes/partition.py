"""partition: cut every stage so that no partition needs more memory than the budget."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np

from movdc.compiler.cost import scratch_bytes, size_bytes, weight_bytes
from movdc.compiler.errors import BudgetError
from movdc.compiler.pass_base import Pass, PassResult
from movdc.compiler.program import Graph, Program
from movdc.compiler.trace import is_pick
from movdc.compiler.units import format_bytes

Array = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True)
class Partition(Pass):
    """Mark the cuts of each stage: the fewest partitions that fit, and among those the least bytes across cuts.

    Before:  %a = aten.linear(%x, %w1)        After:  %a = aten.linear(%x, %w1)
             %b = aten.linear(%a, %w2)                ---- cut ----
                                                      %b = aten.linear(%a, %w2)

    Works on the linear order of the nodes, not on module names, and is optimal for that order.
    Refuses: 1. a budget that no cutting can meet (MovdcError with the smallest one that can be met); 2. a cut between
    a node with several results and the nodes that pick them.
    """

    name: ClassVar[str] = "partition"
    exact: ClassVar[bool] = True

    def apply(self, program: Program) -> PassResult:
        """Cut every graph afresh."""
        cut = {}
        notes = []
        for stage, variant, graph in program.graphs():
            need = _needs(graph, program.machine.load_copies)
            cuts = _fewest(need, _crossing(graph), program.machine.budget_bytes)
            if cuts is None:
                raise _infeasible(stage, graph, need, program.machine.budget_bytes)
            names = tuple(graph.compute_nodes[position - 1].name for position in cuts)
            notes.append(f"{stage} ({variant}) {len(names) + 1}")
            if names != graph.cuts:
                cut[stage, variant] = replace(graph, cuts=names)
        return PassResult(program.map_graphs(cut), bool(cut), "partitions: " + ", ".join(notes))


def _lifetimes(graph: Graph) -> list[tuple[int, int, int]]:
    """(first, last, bytes) of each compute node's value; outputs live to the end."""
    position = {node: index for index, node in enumerate(graph.compute_nodes)}
    results = set(graph.output_node.all_input_nodes)
    spans = []
    for node, index in position.items():
        # A picked result keeps the list it comes from alive.
        users = [user for direct in node.users for user in (direct, *(direct.users if is_pick(direct) else ()))]
        last = max([position[user] for user in users if user in position], default=index)
        if node in results or any(user in results for user in users):
            last = len(position)
        spans.append((index, last, size_bytes(node)))
    return spans


def _crossing(graph: Graph) -> Array:
    """Bytes that live across the cut before node i, for i = 0 .. n; a cut that may not be made costs all there is."""
    count = len(graph.compute_nodes)
    crossing = np.zeros(count + 1, np.int64)
    for first, last, bytes_ in _lifetimes(graph):
        crossing[first + 1 : last + 1] += bytes_
    for index, node in enumerate(graph.compute_nodes):
        if isinstance(node.meta["val"], (list, tuple)):
            after = max(graph.compute_nodes.index(user) for user in node.users)
            crossing[index + 1 : after + 1] = _NEVER
    return crossing


_NEVER = np.int64(2**60)


def _needs(graph: Graph, load_copies: float) -> Array:
    """need[i, j]: bytes held while the partition of nodes i .. j-1 is loaded and run."""
    nodes = graph.compute_nodes
    count = len(nodes)
    spans = _lifetimes(graph)
    crossing = _crossing(graph)
    stage_inputs = sum(spec.size_bytes for spec in graph.inputs)
    weights = np.cumsum([0, *(weight_bytes(node, graph) for node in nodes)])
    live = np.zeros(count, np.int64)  # made at or after i, and living while node k runs
    for index, node in enumerate(nodes):
        live[index] += scratch_bytes(node)
    for first, last, bytes_ in spans:
        live[first : min(last, count - 1) + 1] += bytes_
    older = np.zeros(count + 1, np.int64)  # made before i, and living across the cut before node j
    need = np.full((count, count + 1), _NEVER)
    for i in range(count):
        if crossing[i] < _NEVER:
            held = weights[i + 1 :] - weights[i]
            made = np.minimum(crossing[i + 1 :], _NEVER) - older[i + 1 :]
            running = np.maximum.accumulate(live[i:]) + made + held
            loading = (load_copies * held).astype(np.int64)
            need[i, i + 1 :] = stage_inputs + older[i] + np.maximum(running, loading)
        first, last, bytes_ = spans[i]
        live[first : min(last, count - 1) + 1] -= bytes_
        older[first + 1 : last + 1] += bytes_
    need[:, crossing >= _NEVER] = _NEVER
    return need


def _fewest(need: Array, crossing: Array, budget_bytes: int) -> list[int] | None:
    """Cut positions of the fewest partitions within the budget, then of the least crossing bytes; None if none fit."""
    count = need.shape[0]
    cost = np.full(count + 1, np.iinfo(np.int64).max)
    previous = np.zeros(count + 1, np.int64)
    cost[0] = 0
    for i in range(count):
        if cost[i] == np.iinfo(np.int64).max:
            continue
        ends = np.nonzero(need[i] <= budget_bytes)[0]
        # One partition more outweighs any bytes: 2**44 is 16 TiB.
        offer = cost[i] + 2**44 + np.where(ends == count, 0, crossing[ends] // 256)
        better = offer < cost[ends]
        cost[ends[better]] = offer[better]
        previous[ends[better]] = i
    if cost[count] == np.iinfo(np.int64).max:
        return None
    cuts = []
    position = int(previous[count])
    while position > 0:
        cuts.append(position)
        position = int(previous[position])
    return cuts[::-1]


def _infeasible(stage: str, graph: Graph, need: Array, budget_bytes: int) -> BudgetError:
    """Name the smallest budget that can be met, and the node that sets it."""
    count = need.shape[0]
    best = np.full(count + 1, _NEVER)
    best[0] = 0
    for i in range(count):
        best[i + 1 :] = np.minimum(best[i + 1 :], np.maximum(best[i], need[i, i + 1 :]))
    smallest = int(best[count])
    alone = np.array([need[i, i + 1] if need[i, i + 1] < _NEVER else 0 for i in range(count)])
    node = graph.compute_nodes[int(alone.argmax())]
    return BudgetError(
        stage,
        f"does not fit into {budget_bytes} bytes ({format_bytes(budget_bytes)}) however it is cut; the "
        f"smallest memory budget is {smallest} bytes ({format_bytes(smallest)}), set by %{node.name} ({node.target}); "
        "raise memory_budget, or make the video smaller",
    )
