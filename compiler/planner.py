"""The plan of a stage: where all its variants are cut, and what that takes.

Cuts at waists (compiler/waists.py) are tried first: there are tens of them where there are thousands of nodes. Where
they do not fit the budget, or cost more time than the slack allows, every position between two nodes is tried.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise

import numpy as np

from movdc.compiler.chain import Chain, chain_of, common_positions, costs, crossing_bytes, stretch_texts
from movdc.compiler.cut import Costs, Prediction, cheapest, largest, least_s, planned
from movdc.compiler.device import Machine
from movdc.compiler.pieces import piece_of
from movdc.compiler.program import Graph
from movdc.compiler.repeats import Programs, fewest_programs
from movdc.compiler.units import format_bytes
from movdc.compiler.waists import waists

Positions = Sequence[tuple[int, ...]]  # each has one position for each variant


@dataclass(frozen=True)
class Plan:
    """Cuts of variants that are cut alike: indices of `positions`."""

    positions: Positions
    costs: Costs
    cuts: list[int]
    programs: int

    @property
    def prediction(self) -> Prediction:
        """What it takes."""
        return planned(self.costs, self.cuts)

    @property
    def heaviest_bytes(self) -> int:
        """The most weights of a partition."""
        return int(self.costs.held_bytes[self.cuts[:-1], self.cuts[1:]].max())

    @property
    def note(self) -> str:
        """What was found, and how far it is from what no cutting can beat."""
        one, count, least = self.prediction, len(self.cuts) - 1, least_s(self.costs)
        return (
            f"{count} partitions, {self.programs} programs, {count - 1 - one.overlapped} loads that wait: "
            f"{one.seconds:.4g} s, at least {least:.4g} s ({one.seconds / least - 1:.0%} above), "
            f"peak {format_bytes(one.peak_bytes)}"
        )


def plan(graphs: Sequence[Graph], machine: Machine, slack: float, most_weight_bytes: int) -> Plan | None:
    """The cuts with the fewest programs within 1 + slack of the least time; None if none fit the budget."""
    everywhere = common_positions(graphs)
    chains = [chain_of(graph, machine.held_as) for graph in graphs]
    planner = _Planner(graphs, chains, machine, slack, most_weight_bytes)
    at_waists = planner.plan(_waists(chains, everywhere))
    if at_waists is not None and at_waists.heaviest_bytes > max((most_weight_bytes, *chains[0].weight_bytes)):
        at_waists = None  # between two waists there are more weights than asked for, and somewhere to cut them
    if at_waists is not None and at_waists.prediction.seconds <= least_s(at_waists.costs) * (1 + slack):
        return at_waists
    of_all = planner.costs(everywhere)
    if at_waists is not None:
        fastest_s = planned(of_all, cheapest(of_all) or []).seconds
        if at_waists.prediction.seconds <= fastest_s * (1 + slack):
            return at_waists
    return planner.plan(everywhere, of_all)


@dataclass(frozen=True)
class _Planner:
    graphs: Sequence[Graph]
    chains: Sequence[Chain]
    machine: Machine
    slack: float
    most_weight_bytes: int

    def costs(self, positions: Positions) -> Costs:
        """What stretches between positions cost at most, of all variants."""
        own = zip(self.chains, zip(*positions, strict=True), strict=True)
        return largest(costs(chain, each, self.machine, self.most_weight_bytes) for chain, each in own)

    def plan(self, positions: Positions, of_all: Costs | None = None) -> Plan | None:
        """The cuts at some of the positions, whose costs may be known."""
        of_all = of_all or self.costs(positions)
        each = list(zip(*positions, strict=True))
        texts = zip(*[stretch_texts(graph, own) for graph, own in zip(self.graphs, each, strict=True)], strict=True)
        numbers: dict[tuple[str, ...], int] = {}
        kinds = [numbers.setdefault(text, len(numbers)) for text in texts]
        programs = _programs(self.graphs, each)
        cuts = fewest_programs(of_all, kinds, self.slack, programs)
        return None if cuts is None else Plan(positions, of_all, cuts, programs(cuts))


def _waists(chains: Sequence[Chain], positions: Positions) -> list[tuple[int, ...]]:
    """Those of the positions at which little crosses, of all variants."""
    each = list(zip(*positions, strict=True))
    crossing = np.max([crossing_bytes(chain, own) for chain, own in zip(chains, each, strict=True)], axis=0)
    reads = np.cumsum([0, *map(len, chains[0].reads)])[list(each[0])]
    return [positions[place] for place in waists(crossing.tolist(), reads.tolist())]


def _programs(graphs: Sequence[Graph], positions: Sequence[Sequence[int]]) -> Programs:
    """Counts the distinct texts of pieces, which is what share-templates lowers."""
    nodes = [graph.compute_nodes for graph in graphs]

    @cache
    def digests(start: int, stop: int) -> tuple[bytes, ...]:
        pieces = [piece_of(g, some[at[start] : at[stop]]) for g, some, at in zip(graphs, nodes, positions, strict=True)]
        return tuple(hashlib.sha256(piece.text().encode()).digest() for piece in pieces)

    return lambda cuts: len({digest for start, stop in pairwise(cuts) for digest in digests(start, stop)})
