"""A graph as a chain of nodes: what each stretch of it weighs, holds and takes, so that a planner can cut it.

A position is a boundary between two nodes of the linear order; a partition is the stretch between two positions.
The bytes of a stretch are those that the schedule's checker counts when it runs as a partition: what lives before it
stays until it has run, its results are there from its start, and other values live from the node that makes them to
the last that reads them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from types import MappingProxyType

import numpy as np
import numpy.typing as npt
from torch import fx

from movdc.compiler.cost import (
    flops,
    held_bytes,
    int8_flops,
    is_fused_with_users,
    maker,
    pointer_bytes,
    scratch_bytes,
    size_bytes,
)
from movdc.compiler.cut import NEVER, Costs, Floats
from movdc.compiler.device import Machine
from movdc.compiler.folded import FoldedSource
from movdc.compiler.printer import print_node, print_type
from movdc.compiler.program import Graph
from movdc.runtime.bundle import DType

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Value:
    """A tensor that nodes first .. last need; last is the number of nodes for what outlives them all."""

    first: int
    last: int
    size_bytes: int


@dataclass(frozen=True)
class Chain:
    """The numbers of a graph that planning needs."""

    flops: tuple[int, ...]  # of each node
    scratch_bytes: tuple[int, ...]  # of each node
    values: tuple[Value, ...]
    reads: tuple[tuple[int, ...], ...]  # the weights of each node, as indices of weight_bytes
    weight_bytes: tuple[int, ...]  # as the device holds them
    input_bytes: int  # the inputs of the stage, which stay to its end
    output_bytes: int  # its results, which are still there when the next run begins to load
    pointer_bytes: int = 0  # what convolutions keep, as long as the stage runs
    int8_flops: tuple[int, ...] = ()  # of each node: those of products with int8 weights; empty where there are none

    @property
    def length(self) -> int:
        """How many nodes there are."""
        return len(self.flops)


def chain_of(graph: Graph, held_as: Mapping[DType, DType] = MappingProxyType({})) -> Chain:
    """Measure the nodes of a graph, whose weights the device may hold as other types."""
    nodes = graph.compute_nodes
    place = {node: index for index, node in enumerate(nodes)}
    names = {name: index for index, name in enumerate(graph.weights)}
    sizes = {node.name: held_bytes(node, held_as) for node in graph.graph.find_nodes(op="placeholder")}
    results = set(graph.output_node.all_input_nodes)
    values = []
    for node, index in place.items():
        last = max((place[user] for user in node.users if user in place), default=index)
        values.append(Value(place[maker(node)], len(nodes) if node in results else last, size_bytes(node)))
    return Chain(
        flops=tuple(flops(node) for node in nodes),
        scratch_bytes=tuple(scratch_bytes(node) for node in nodes),
        values=tuple(value for value in values if value.size_bytes),
        reads=tuple(tuple(names[arg.name] for arg in node.all_input_nodes if arg.name in names) for node in nodes),
        weight_bytes=tuple(sizes[name] for name in names),
        input_bytes=sum(spec.size_bytes for spec in graph.inputs),
        output_bytes=sum(spec.size_bytes for spec in graph.outputs),
        pointer_bytes=sum(pointer_bytes(node) for node in nodes),
        int8_flops=tuple(int8_flops(node) for node in nodes),
    )


def legal_positions(graph: Graph) -> list[int]:
    """Where a graph may be cut, its two ends included: never between a node and users that it must stay with."""
    nodes = graph.compute_nodes
    place = {node: index for index, node in enumerate(nodes)}
    barred: set[int] = set()
    for index, node in enumerate(nodes):
        if is_fused_with_users(node):
            barred.update(
                range(index + 1, max((place[user] for user in node.users if user in place), default=index) + 1)
            )
    return [position for position in range(len(nodes) + 1) if position not in barred]


def common_positions(graphs: Sequence[Graph]) -> list[tuple[int, ...]]:
    """Where variants can be cut alike, one position for each: behind the same node, with the same weights before."""
    nodes = [graph.compute_nodes for graph in graphs]
    legal = [set(legal_positions(graph)) for graph in graphs]
    places = [{node.name: index + 1 for index, node in enumerate(some)} for some in nodes]
    found = [(0,) * len(graphs)]
    at = found[0]
    read: list[set[str]] = [set() for _ in graphs]
    for node in nodes[0][:-1]:
        here = tuple(place.get(node.name, 0) for place in places)
        if any(there <= position for there, position in zip(here, at, strict=True)):
            continue
        for index, graph in enumerate(graphs):
            read[index] |= _weights_read(graph, nodes[index][at[index] : here[index]])
        at = here
        if all(some == read[0] for some in read) and all(p in some for p, some in zip(here, legal, strict=True)):
            found.append(here)
    return [*found, tuple(len(some) for some in nodes)]


def _weights_read(graph: Graph, nodes: Sequence[fx.Node]) -> set[str]:
    """The stored weights that nodes read; folded tables are a variant's own."""
    names = {arg.name for node in nodes for arg in node.all_input_nodes if arg.name in graph.weights}
    return {str(ref) for ref in map(graph.weights.__getitem__, names) if not isinstance(ref.source, FoldedSource)}


def stretch_texts(graph: Graph, positions: Sequence[int]) -> list[str]:
    """What each stretch between neighbouring positions computes, names left out: equal texts may be equal programs."""
    texts = [print_node(node, _types(node)) for node in graph.compute_nodes]
    return ["\n".join(texts[low:high]) for low, high in pairwise(positions)]


def _types(node: fx.Node) -> dict[fx.Node, str]:
    return {node: ""} | {arg: print_type(arg.meta["val"]) for arg in node.all_input_nodes}


def crossing_bytes(chain: Chain, positions: Sequence[int] | Ints) -> Ints:
    """Bytes that live across each of the positions."""
    change = np.zeros(chain.length + 2, np.int64)
    for value in chain.values:
        change[value.first + 1] += value.size_bytes
        change[value.last + 1] -= value.size_bytes
    crossing: Ints = np.cumsum(change)[np.asarray(positions)]
    return crossing


def costs(chain: Chain, positions: Sequence[int], machine: Machine, most_held_bytes: int = NEVER) -> Costs:
    """What every stretch between two of the positions costs; one with more weights fits no budget, if it can be cut."""
    chosen = np.asarray(positions)
    held = _held_bytes(chain, chosen)
    before, working = _activation_bytes(chain, chosen)
    # What enters a stretch, leaves it, or both. Arrays are reused: each may be hundreds of megabytes.
    running = _passing_bytes(chain, chosen)
    np.subtract(before[:, None] + before[None, :], running, out=running)
    np.maximum(working - running, 0, out=working)
    for row in working:
        row[:] = machine.value_copies * row
    before[0] = max(before[0], chain.output_bytes)
    running[0] = np.maximum(running[0], chain.output_bytes)
    lasting_bytes = chain.input_bytes + machine.slab_bytes + chain.pointer_bytes + machine.node_bytes * chain.length
    running += held
    running += working
    running += lasting_bytes
    for start, row in enumerate(running):
        row[start + 2 :][held[start, start + 2 :] > most_held_bytes] = NEVER
    run_s: Floats = np.multiply(machine.run_s(1), _sums(chain.flops, chosen), dtype=np.float64)
    if any(chain.int8_flops):
        run_s += (machine.run_s(1, 1) - machine.run_s(1)) * _sums(chain.int8_flops, chosen)
    return Costs(
        machine=machine,
        before_bytes=lasting_bytes + before,
        held_bytes=held,
        working_bytes=working,
        running_bytes=running,
        run_s=run_s,
    )


def _sums(figures: Sequence[int], chosen: Ints) -> Ints:
    """[a, b]: the sum of a figure over the nodes of a stretch."""
    done: Ints = np.cumsum([0, *figures])[chosen]
    made: Ints = np.maximum(done[None, :] - done[:, None], 0)
    return made


def _held_bytes(chain: Chain, chosen: Ints) -> Ints:
    """[a, b]: bytes of the weights of a stretch, each counted once however often the stretch reads it."""
    later: dict[int, list[int]] = {}
    for index, read in enumerate(chain.reads):
        for weight in set(read):
            later.setdefault(weight, []).append(index)
    added = np.zeros(chain.length + 1, np.int64)  # by node, for a stretch that starts at node `start`
    for weight, readers in later.items():
        added[readers[0]] += chain.weight_bytes[weight]
    held = np.zeros((len(chosen), len(chosen)), np.int64)
    start = 0
    for row, position in enumerate(chosen):
        for index in range(start, position):
            for weight in set(chain.reads[index]):
                later[weight].pop(0)
                if later[weight]:
                    added[later[weight][0]] += chain.weight_bytes[weight]
        start = position
        held[row, row:] = np.concatenate(([0], np.cumsum(added[start:])))[chosen[row:] - start]
    return held


def _activation_bytes(chain: Chain, chosen: Ints) -> tuple[Ints, Ints]:
    """[a]: bytes that live across a position; [a, b]: the most that live, weights aside, while a stretch runs.

    At node k of the stretch i .. j there are the values that live at k, the values that crossed i and are dead by k
    (they stay until the stretch has run) and the results made behind k (they are there from its start). The second
    grows with k in steps, the third falls with k in steps, so the maximum over k is the maximum over those steps of a
    maximum over a range of nodes.
    """
    live = np.array(chain.scratch_bytes, np.int64)
    crossing: dict[int, list[Value]] = {int(position): [] for position in chosen}
    for value in chain.values:
        live[value.first : value.last + 1] += value.size_bytes
        low, high = np.searchsorted(chosen, [value.first, value.last], side="right")
        for position in chosen[low:high]:
            crossing[int(position)].append(value)
    ahead = np.zeros((chain.length + 2, len(chosen)), np.int64)  # [k, b]: from node k to position b, with later results
    for column, end in enumerate(chosen):
        for stop, waiting in _steps([(value.first, value.size_bytes) for value in crossing[int(end)]], int(end)):
            reach = np.maximum.accumulate(live[:stop][::-1])[::-1] + waiting
            np.maximum(ahead[:stop, column], reach, out=ahead[:stop, column])
    running = np.zeros((len(chosen), len(chosen)), np.int64)
    for row, start in enumerate(chosen):
        gone = 0
        for last, group in _by_last(crossing[int(start)], int(start)):
            gone += group
            after = int(np.searchsorted(chosen, last + 1, side="right"))
            np.maximum(running[row, after:], ahead[last + 1, after:] + gone, out=running[row, after:])
    return crossing_bytes(chain, chosen), running


def _passing_bytes(chain: Chain, chosen: Ints) -> Ints:
    """[a, b]: bytes of the values that live across both positions."""
    passing = np.zeros((len(chosen), len(chosen)), np.int64)
    for value in chain.values:
        low, high = np.searchsorted(chosen, [value.first, value.last], side="right")
        passing[low:high, low:high] += value.size_bytes
    return passing


def _steps(starts: list[tuple[int, int]], end: int) -> list[tuple[int, int]]:
    """(stop, bytes of values made at or after stop), for stop = end and each place where a value is made."""
    stops = sorted({end, *(first for first, _ in starts)})
    return [(stop, sum(size for first, size in starts if first >= stop)) for stop in stops if stop > 0]


def _by_last(values: list[Value], start: int) -> list[tuple[int, int]]:
    """(last, bytes of values whose last reader it is), ascending, after a step of nothing just before the start."""
    groups = {start - 1: 0}
    for value in values:
        groups[value.last] = groups.get(value.last, 0) + value.size_bytes
    return sorted(groups.items())
