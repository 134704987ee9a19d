"""Where to cut a chain of nodes, so that loading overlaps running and nothing exceeds the memory budget.

While a partition runs, the next one is loaded, if both fit into the budget together; else it is loaded when the other
is gone. With partitions 1 .. b that load in l and run in e seconds, and with everything overlapped, a stage takes

    l_1 + sum of max(e_i, l_{i+1}) + e_b .

`cheapest` finds the cuts of least predicted time by dynamic programming over the last partition (j, k):

    ready[j, k] = min over i < j of ready[i, j] + (max(e_ij, l_jk) if both fit, else e_ij + l_jk)

For one j, the k whose load fits beside a running (i, j) are a prefix, and so are the k that load faster than it runs,
because weights only grow with k. So (i, j) offers e_ij on a prefix of the k and l_jk on an interval of them, and the
whole takes O(n^2 log n) for n positions.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from movdc.compiler.device import Machine

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
NEVER = 1 << 60  # bytes that no budget has


@dataclass(frozen=True)
class Costs:
    """What the stretch between positions a < b of a chain costs; arrays are indexed [a] or [a, b]."""

    machine: Machine
    before_bytes: Ints  # [a]: lives across position a
    held_bytes: Ints  # [a, b]: weights
    working_bytes: Ints  # [a, b]: what its program computes in, before it runs and behind
    running_bytes: Ints  # [a, b]: held while it runs, weights and what it computes in included
    run_s: Floats  # [a, b]

    @property
    def end(self) -> int:
        """The last position."""
        return len(self.before_bytes) - 1

    def load_bytes(self, start: int) -> Ints:
        """[b]: bytes held while the weights from `start` to b are loaded for the first time; later it is held_bytes."""
        loading: Ints = (self.machine.load_copies * self.held_bytes[start]).astype(np.int64)
        return loading

    def load_s(self, start: int) -> Floats:
        """[b]: seconds to load the weights from `start` to b."""
        seconds: Floats = self.machine.load_overhead_s + self.held_bytes[start] / self.machine.load_bytes_per_s
        return seconds

    def need_bytes(self, start: int) -> Ints:
        """[b]: bytes to load and run the stretch from `start` to b on its own; means nothing for b <= start."""
        loading = self.before_bytes[start] + self.load_bytes(start) + self.working_bytes[start]
        need: Ints = np.maximum(loading, self.running_bytes[start])
        return need

    def at(self, positions: Sequence[int]) -> Costs:
        """The same chain with fewer positions."""
        chosen = np.asarray(positions)
        square = np.ix_(chosen, chosen)
        held, working, running = self.held_bytes[square], self.working_bytes[square], self.running_bytes[square]
        return Costs(self.machine, self.before_bytes[chosen], held, working, running, self.run_s[square])


def largest(several: Iterable[Costs]) -> Costs:
    """What variants that are cut alike cost at most, in the arrays of the first: each may be hundreds of megabytes."""
    others = iter(several)
    first = next(others)
    for other in others:
        for name in ("before_bytes", "held_bytes", "working_bytes", "running_bytes", "run_s"):
            np.maximum(getattr(first, name), getattr(other, name), out=getattr(first, name))
    return first


@dataclass(frozen=True)
class Prediction:
    """What a stage does when it is cut at some positions."""

    seconds: float
    peak_bytes: int
    overlapped: int  # loads that overlap with the run before them
    crossing_bytes: int  # of all cuts


def predict(costs: Costs, cuts: Sequence[int]) -> Prediction | None:
    """Replay the partitions between neighbouring cuts, the ends of the chain included; None if they do not fit."""
    budget_bytes = costs.machine.budget_bytes
    seconds, peak_bytes, overlapped = 0.0, 0, 0
    run_s, running_bytes = 0.0, 0  # of the partition before
    for start, stop in pairwise(cuts):
        need_bytes = int(costs.need_bytes(start)[stop])
        both_bytes = running_bytes + int(costs.held_bytes[start, stop])
        if start > 0 and both_bytes <= budget_bytes:
            load_s = costs.load_s(start)[stop]
            seconds += max(run_s + costs.machine.lost_s * load_s, load_s)
            need_bytes = max(need_bytes, both_bytes)
            overlapped += 1
        else:
            seconds += run_s + costs.load_s(start)[stop]
        run_s, running_bytes = costs.run_s[start, stop], int(costs.running_bytes[start, stop])
        peak_bytes = max(peak_bytes, need_bytes)
    if peak_bytes > budget_bytes:
        return None
    return Prediction(float(seconds + run_s), peak_bytes, overlapped, int(costs.before_bytes[list(cuts[1:-1])].sum()))


def planned(costs: Costs, cuts: Sequence[int]) -> Prediction:
    """The prediction of cuts that fit."""
    prediction = predict(costs, cuts)
    assert prediction is not None, "planned cuts fit"
    return prediction


def least_s(costs: Costs) -> float:
    """A time that no cutting can beat, whatever the budget: all of the loads, or the runs behind a first load."""
    all_loads_s = float(costs.load_s(0)[costs.end])
    return max(all_loads_s, costs.machine.load_overhead_s + float(costs.run_s[0, costs.end]))


def cheapest(costs: Costs, fee_s: float = 0.0, forced: Sequence[int] = ()) -> list[int] | None:
    """The cuts of least predicted time, the ends of the chain included; None if none fit the budget.

    No partition spans a forced position. `fee_s` is added to the time for each partition, and up to as much again for
    the bytes across its cut: a tiny fee breaks ties, a larger one trades time for fewer partitions.
    """
    end = costs.end
    budget_bytes = costs.machine.budget_bytes
    fees_s = fee_s * (1 + costs.before_bytes / (1 + costs.before_bytes.sum()))
    ready = np.full((end, end + 1), np.inf)  # [j, k]: seconds until (j, k) is loaded and what is before it has run
    limits = [*sorted(forced), end]
    for j in range(end):
        limit = next(limit for limit in limits if limit > j)
        fits = costs.need_bytes(j)[: limit + 1] <= budget_bytes
        fits[: j + 1] = False
        before = np.flatnonzero(np.isfinite(ready[:j, j]))
        if not fits.any() or (j > 0 and len(before) == 0):
            continue
        reach = slice(j + 1, int(np.flatnonzero(fits)[-1]) + 1)
        found = costs.load_s(j)[reach]
        if j > 0:
            room_bytes = budget_bytes - costs.running_bytes[before, j]
            slots = np.searchsorted(costs.held_bytes[j, reach], room_bytes, side="right")
            # max(run + lost load, load) is lost load + max(run, the rest of the load), and run + load is so likewise.
            lost_s = costs.machine.lost_s * found
            found = lost_s + _earliest(ready[before, j], costs.run_s[before, j], found - lost_s, slots)
        ready[j, reach] = np.where(fits[reach], found + fees_s[j], np.inf)
    total_s = ready[:, end] + costs.run_s[:end, end]
    if np.isinf(total_s).all():
        return None
    cuts = [end, int(total_s.argmin())]
    while cuts[-1] > 0:
        k, j = cuts[-2:]
        run_s, load_s = costs.run_s[:j, j], costs.load_s(j)[k]
        both = costs.running_bytes[:j, j] + costs.held_bytes[j, k] <= budget_bytes
        together_s = np.maximum(run_s + costs.machine.lost_s * load_s, load_s)
        cuts.append(int((ready[:j, j] + np.where(both, together_s, run_s + load_s)).argmin()))
    return cuts[::-1]


def _earliest(ready_s: Floats, run_s: Floats, load_s: Floats, slots: Ints) -> Floats:
    """[k]: the least ready_s[i] + (max(run_s[i], load_s[k]) if k < slots[i], else run_s[i] + load_s[k]) over i."""
    count = len(load_s)
    # For k < slower[i] running lasts longer, from there to slots[i] loading does, and then they do not fit together.
    slower = np.minimum(np.searchsorted(load_s, run_s, side="right"), slots)
    run = np.full(count + 1, np.inf)
    np.minimum.at(run, slower, ready_s + run_s)
    run = np.minimum.accumulate(run[::-1])[::-1][1:]
    load = _least_over_intervals(slower, slots, ready_s, count) + load_s
    found: Floats = np.minimum(np.minimum(run, load), (ready_s + run_s).min() + load_s)
    return found


def _least_over_intervals(low: Ints, high: Ints, offers: Floats, count: int) -> Floats:
    """[k]: the least of the offers whose interval low .. high - 1 has k in it."""
    some = low < high
    low, high, offers = low[some], high[some], offers[some]
    levels = count.bit_length()
    best = np.full((levels, count), np.inf)  # [level, k]: the least for k .. k + 2**level - 1
    # An interval is two of the largest power of two that it holds, which may overlap.
    level = np.frexp(high - low)[1] - 1
    np.minimum.at(best, (level, low), offers)
    np.minimum.at(best, (level, high - (1 << level)), offers)
    for upper in range(levels - 1, 0, -1):
        half = 1 << (upper - 1)
        np.minimum(best[upper - 1], best[upper], out=best[upper - 1])
        np.minimum(best[upper - 1, half:], best[upper, : count - half], out=best[upper - 1, half:])
    least: Floats = best[0]
    return least


def smallest_budget(costs: Costs) -> tuple[int, int]:
    """The least bytes that some cutting fits into, and the start of the single step that needs the most of it."""
    best = np.full(costs.end + 1, NEVER)
    best[0] = 0
    previous = np.zeros(costs.end + 1, np.int64)
    for start in range(costs.end):
        offer = np.maximum(best[start], costs.need_bytes(start)[start + 1 :])
        better = offer < best[start + 1 :]
        best[start + 1 :][better] = offer[better]
        previous[start + 1 :][better] = start
    smallest = int(best[costs.end])
    stop = costs.end
    while costs.need_bytes(int(previous[stop]))[stop] < smallest:
        stop = int(previous[stop])
    steps = range(int(previous[stop]), stop)
    return smallest, max(steps, key=lambda step: int(costs.need_bytes(step)[step + 1]))
