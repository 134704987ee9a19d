"""Levels of residency: which partitions stay and how far loads run ahead, so that a video's calls take the least time.

Every candidate is played by the simulator (runtime/simulate.py) through all the calls of its variant, the first one
and loads that go on into the next call included. The budget that the bundle is compiled for comes first: its level is
the best of all sets where there are few enough to try, else of those that are built one partition after the other.
Less memory drops partitions of that set, more adds others, so that sets nest: under pressure a suffix goes.

Of equal partitions, whose loads wait for nothing else, any set of a size saves as many loads (an LRU cache has no hits
in a cyclic scan at all); spread ones let the loader get ahead while they run. Loading further ahead moves loads and
saves none, so memory goes to it only where that is worth more than what could stay. Of levels that are as fast, one
that loads less is better: rates are not known so well, and reading costs energy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, reduce
from itertools import combinations
from typing import Protocol

from movdc.compiler.device import Machine
from movdc.compiler.errors import BudgetError
from movdc.compiler.residency import Chain, first_needs_bytes, intervals, needs_bytes, run_sizes
from movdc.runtime.bundle import Decode, Residency, Sampler, TensorSpec, Variant
from movdc.runtime.rates import Rates
from movdc.runtime.simulate import Call, Simulator, named_calls

MOST_AHEAD = 2  # partitions loaded ahead: with a second one, a load or a run that takes long stops neither lane
SETTLED = 4  # calls after which each takes as long as the one before
TRIED = 6  # partitions of which every set is tried
TURNS = 8  # places at which evenly spread partitions are tried to begin
SAME = 1e-9  # seconds that differ by less of themselves are equal
Pinned = frozenset[str]


@dataclass(frozen=True)
class Level:
    """A row of residency, with the seconds of all calls that are planned, those of one more, and what each loads."""

    row: Residency
    calls_s: float
    call_s: float
    loaded_bytes: int

    def beats(self, other: Level) -> bool:
        """Whether it is faster, in what is planned or else in calls beyond that, or as fast and loads less."""
        for mine_s, others_s in ((self.calls_s, other.calls_s), (self.call_s, other.call_s)):
            if abs(mine_s - others_s) > SAME * others_s:
                return mine_s < others_s
        return self.loaded_bytes < other.loaded_bytes


def levels(chain: Chain, machine: Machine, cadence: str, calls: int, tried: int = TRIED) -> list[Level]:
    """The rows from the least memory to the most, each better than the one before; a stage that runs once pins none."""
    make = _maker(chain, machine.rates, calls)
    none: Pinned = frozenset()
    best = _best(chain, machine, make, cadence, tried)
    pinned = frozenset(best.row.pinned)
    order = [] if cadence == "once" else pinning_order(chain, machine.rates, make, pinned)
    sets = [frozenset(order[:count]) for count in range(len(order) + 1)]
    found = [make(pinned, ahead, none) for pinned in sets for ahead in range(MOST_AHEAD + 1)]
    if waits := waiting(chain, none, machine.budget_bytes):
        found.append(make(none, 1, waits))
    least = make(none, 0, none)
    return _nested(least, best, found)


class Named(Protocol):
    """A stage of a program, or of a bundle."""

    @property
    def name(self) -> str:
        """Its name."""

    @property
    def variants(self) -> Mapping[str, object]:
        """What it can run."""


def count_calls(sampler: Sampler, decode: Decode, stages: Iterable[Named], stage: str, variant: str) -> int:
    """How often one video calls a variant, that of a shorter prompt as often as that of the longest; at least once."""
    merges = any(one.name == "denoiser" and "merged" in one.variants for one in stages)
    called = named_calls(sampler, decode, merges)
    return max(called.count((stage, variant.partition("-")[0])), 1)


def variant_of(
    chain: Chain,
    machine: Machine,
    cadence: str,
    calls: int,
    stage: str,
    inputs: Sequence[TensorSpec],
    outputs: Sequence[TensorSpec],
) -> Variant:
    """A variant with its levels, and the certificate of the one that the budget allows; raises BudgetError."""
    first_bytes = first_needs_bytes(chain)
    if first_bytes > machine.budget_bytes:
        raise BudgetError(
            stage,
            f"holds {first_bytes} bytes, the budget is {machine.budget_bytes}; "
            "run the pass partition, or raise memory_budget",
            first_bytes - machine.budget_bytes,
        )
    rows = [level.row for level in levels(chain, machine, cadence, calls)]
    best = [row for row in rows if row.needs_bytes <= machine.budget_bytes][-1]
    return Variant(
        inputs=tuple(inputs),
        outputs=tuple(outputs),
        order=tuple(one.name for one in chain.partitions),
        residency=tuple(rows),
        first_needs_bytes=first_bytes,
        certificate=tuple(intervals(chain, frozenset(best.pinned), best.prefetch, frozenset(best.waits))),
        peak_bytes=best.needs_bytes,
    )


def seconds_of(chain: Chain, rates: Rates, row: Residency, calls: int) -> tuple[float, float]:
    """Seconds of so many calls by one row, and of one more."""
    variant = Variant(
        inputs=(),
        outputs=(),
        order=tuple(one.name for one in chain.partitions),
        residency=(row,),
        first_needs_bytes=0,
        certificate=(),
        peak_bytes=0,
    )
    simulator = Simulator({one.name: one for one in chain.partitions}, 0, rates, row.needs_bytes)
    ends_s = [0.0]
    count = SETTLED if calls >= SETTLED else calls + 2
    for index in range(count):
        # The last call that is planned loads nothing for another one; beyond it is what more calls would take.
        simulator.run([Call("", variant, again=index + 1 != calls)])
        ends_s.append(simulator.now_s)
    call_s = ends_s[-1] - ends_s[-2]
    return (ends_s[calls] if calls <= count else ends_s[-1] + (calls - count) * call_s), call_s


def pinning_order(chain: Chain, rates: Rates, make: Make, first: Pinned = frozenset()) -> list[str]:
    """All partitions, those of a set first; then those whose staying saves the most seconds for their bytes.

    Where two save the same, the one goes first that is farthest from those that stay already.
    """
    order: list[str] = []
    for group in (first, frozenset(one.name for one in chain.partitions) - first):
        while left := group.difference(order):
            order.append(_next(chain, rates, make, order, left))
    return order


def waiting(chain: Chain, pinned: Pinned, budget_bytes: int) -> Pinned:
    """The partitions whose load does not fit beside the run before; empty if all do, or if that does not help."""
    names = [one.name for one in chain.partitions if one.name not in pinned]
    places = [one.name for one in chain.partitions]
    waits: Pinned = frozenset()
    while names:
        sizes = zip(places, run_sizes(chain, pinned, 1, waits), strict=True)
        over = [name for name, size_bytes in sizes if size_bytes > budget_bytes]
        more = waits | {_transient_after(places, names, name) for name in over}
        if more == waits:
            return waits if len(waits) < len(names) and not over else frozenset()
        waits = more
    return waits


def _transient_after(places: list[str], names: list[str], name: str) -> str:
    later = places[places.index(name) + 1 :] + places[: places.index(name) + 1]
    return next(one for one in later if one in names)


Make = Callable[[Pinned, int, Pinned], Level]


def _maker(chain: Chain, rates: Rates, calls: int) -> Make:
    in_order = [one.name for one in chain.partitions]

    @cache
    def make(pinned: Pinned, ahead: int, waits: Pinned) -> Level:
        row = Residency(
            needs_bytes=needs_bytes(chain, pinned, ahead, waits),
            prefetch=ahead,
            pinned=tuple(name for name in in_order if name in pinned),
            waits=tuple(name for name in in_order if name in waits),
        )
        loaded_bytes = sum(one.held_bytes for one in chain.partitions if one.name not in pinned)
        return Level(row, *seconds_of(chain, rates, row, calls), loaded_bytes)

    return make


def _best(chain: Chain, machine: Machine, make: Make, cadence: str, tried: int) -> Level:
    """The fastest level within the budget; the least one if none fits."""
    none: Pinned = frozenset()
    names = [one.name for one in chain.partitions]
    sets = {none}
    if cadence != "once" and len(names) <= tried:
        sets = {frozenset(some) for count in range(len(names) + 1) for some in combinations(names, count)}
    elif cadence != "once":
        order = pinning_order(chain, machine.rates, make)
        sets = {frozenset(order[:count]) for count in range(len(order) + 1)}
        for ahead in range(MOST_AHEAD + 1):
            sets |= {_filled(chain, order, ahead, machine.budget_bytes), *_even(chain, ahead, machine.budget_bytes)}
    best = make(none, 0, none)
    in_order = sorted(sets, key=lambda pinned: (len(pinned), sorted(pinned)))
    ways = [(pinned, ahead, none) for pinned in in_order for ahead in range(MOST_AHEAD + 1)]
    fitting = [pinned for pinned in in_order if needs_bytes(chain, pinned, 0, none) <= machine.budget_bytes]
    some = in_order if len(names) <= tried else [none, *fitting[-1:]]
    ways += [(pinned, 1, waiting(chain, pinned, machine.budget_bytes)) for pinned in some]
    for way in ways:
        if needs_bytes(chain, *way) <= machine.budget_bytes:
            one = make(*way)
            ties = not best.beats(one) and one.row.needs_bytes < best.row.needs_bytes
            if one.beats(best) or ties:
                best = one
    return best


def _filled(chain: Chain, order: Sequence[str], ahead: int, budget_bytes: int) -> Pinned:
    """Those of the order that fit beside all before them that do."""
    pinned: Pinned = frozenset()
    for name in order:
        if needs_bytes(chain, pinned | {name}, ahead, frozenset()) <= budget_bytes:
            pinned |= {name}
    return pinned


def _even(chain: Chain, ahead: int, budget_bytes: int) -> list[Pinned]:
    """As many evenly spread partitions as fit, begun at several places: the best there is where all are equal."""
    names = [one.name for one in chain.partitions]
    total = len(names)
    for count in range(total, 0, -1):
        places = [index * total // count for index in range(count)]
        if needs_bytes(chain, frozenset(names[place] for place in places), ahead, frozenset()) <= budget_bytes:
            return [frozenset(names[(place + turn) % total] for place in places) for turn in range(min(total, TURNS))]
    return []


def _next(chain: Chain, rates: Rates, make: Make, order: Sequence[str], left: Iterable[str]) -> str:
    """The one of those left that saves the most; of equal partitions only the farthest from the others is played."""
    count = len(chain.partitions)
    place = {one.name: index for index, one in enumerate(chain.partitions)}
    taken = [place[name] for name in order]
    now_s = make(frozenset(order), MOST_AHEAD, frozenset()).call_s

    def apart(name: str) -> tuple[int, int]:
        gaps = (abs(place[name] - other) for other in taken)
        return min((min(gap, count - gap) for gap in gaps), default=0), -place[name]

    farthest: dict[tuple[int, float], str] = {}
    for name in sorted(left, key=apart):
        one = chain.partitions[place[name]]
        farthest[one.held_bytes, rates.run_s(one)] = name

    def worth(name: str) -> tuple[float, float, tuple[int, int]]:
        one = chain.partitions[place[name]]
        size_bytes = max(one.held_bytes, 1)
        saved_s = now_s - make(frozenset([*order, name]), MOST_AHEAD, frozenset()).call_s
        load_s = rates.load_s(one)
        return round(saved_s / size_bytes * 1e12, 3), round(load_s / size_bytes * 1e12, 3), apart(name)

    return max(farthest.values(), key=worth)


def _nested(least: Level, best: Level, found: Sequence[Level]) -> list[Level]:
    """The chain of nested levels through the best one of which the seconds, over all budgets, are least."""
    needs = best.row.needs_bytes
    below = [one for one in found if one.row.needs_bytes <= needs and _leads_to(one, best)]
    above = [one for one in found if one.row.needs_bytes >= needs and _leads_to(best, one)]
    if least.row == best.row:
        return _cheapest_chain([best, *above])
    return _cheapest_chain([least, *below, best], best)[:-1] + _cheapest_chain([best, *above])


def _leads_to(one: Level, other: Level) -> bool:
    return set(one.row.pinned) <= set(other.row.pinned) and other.beats(one)


def _cheapest_chain(some: Sequence[Level], last: Level | None = None) -> list[Level]:
    """From the first of some levels to the last, or to the fastest: the least sum of seconds times bytes."""
    end = last or reduce(lambda one, other: other if other.beats(one) else one, some)
    ways: dict[int, tuple[float, list[Level]]] = {}
    ordered = sorted(some, key=lambda one: (one.row.needs_bytes, -one.calls_s, -one.call_s, -one.loaded_bytes))
    for index in reversed(range(len(ordered))):
        one = ordered[index]
        if one is end:
            ways[index] = 0.0, [one]
            continue
        offers = [
            (area + one.calls_s * (chain[0].row.needs_bytes - one.row.needs_bytes), chain)
            for later, (area, chain) in ways.items()
            if _leads_to(one, ordered[later])
        ]
        if offers:
            area, chain = min(offers, key=lambda offer: offer[0])
            ways[index] = area, [one, *chain]
    start = ordered.index(some[0])
    return ways[start][1] if start in ways else [some[0]]
