"""Equal blocks cut into equal partitions: the repeats of a chain, and the plan with the fewest distinct programs.

The cheapest cuts of a chain of equal blocks drift: each block is cut a little elsewhere, for a gain that nobody can
measure, and then every partition is a program of its own. So the blocks are found from the chain itself, all blocks
are cut alike (each at one place, several together at one place, or each at several places), what lies around them is
cut as is cheapest, and of all such plans that are about as fast as the cheapest the one with the fewest programs wins.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from movdc.compiler.cut import Costs, cheapest, least_s, planned, predict

ROUNDING = 1e-6  # times that differ by less of themselves are equal
_PLACES = 3  # places in a block that are tried for each number of blocks in a partition, the quickest first
_ANY_TIME_S = 1e9  # a fee for which any time is worth saving a partition
Programs = Callable[[Sequence[int]], int]  # how many distinct programs some cuts need


@dataclass(frozen=True)
class Repeat:
    """`count` equal blocks of `period` steps that begin at position `start`."""

    start: int
    period: int
    count: int

    @property
    def stop(self) -> int:
        """The position behind the last block."""
        return self.start + self.period * self.count


def repeats(kinds: Sequence[int]) -> list[Repeat]:
    """Stretches of a sequence that repeat, the longest first, without overlap."""
    found: list[Repeat] = []
    pending = [(0, len(kinds))]
    while pending:
        low, high = pending.pop()
        best = _longest(kinds, low, high)
        if best is not None:
            found.append(best)
            pending += [(low, best.start), (best.stop, high)]
    return sorted(found, key=lambda one: (one.start - one.stop, one.start))


def _longest(kinds: Sequence[int], low: int, high: int) -> Repeat | None:
    """The repeat that covers most of low .. high, and of those the one of the shortest period."""
    numbers = np.asarray(kinds[low:high])
    best, covered = None, 0
    for period in range(1, len(numbers) // 2 + 1):
        differ = np.flatnonzero(numbers[:-period] != numbers[period:])
        bounds = np.concatenate(([-1], differ, [len(numbers) - period]))
        equal = np.diff(bounds) - 1  # lengths of the runs of places that equal the one a period later
        longest = int(equal.argmax())
        count = int(equal[longest]) // period + 1
        if count > 1 and count * period > covered:
            best, covered = Repeat(low + int(bounds[longest]) + 1, period, count), count * period
    return best


def fewest_programs(costs: Costs, kinds: Sequence[int], slack: float, programs: Programs) -> list[int] | None:
    """The cuts with the fewest programs, of those the fastest, within 1 + slack of the least time; None if none fit.

    `kinds` tells which steps between neighbouring positions are equal.
    """
    tie_s = least_s(costs) * ROUNDING / costs.end / 2
    optimum = cheapest(costs, tie_s)
    if optimum is None:
        return None
    seconds = planned(costs, optimum).seconds
    limit_s = seconds * (1 + slack + ROUNDING)
    fee_s = seconds * slack / len(optimum) / 2  # twice that for each partition is within the limit
    fees_s = (tie_s, fee_s) if fee_s > tie_s else (tie_s,)

    def rank(cuts: list[int]) -> tuple[int, int, int, int, list[int]]:
        one = planned(costs, cuts)
        return programs(cuts), round(one.seconds / seconds / ROUNDING), len(cuts), one.crossing_bytes, cuts

    best = min(map(rank, [optimum, *_fewer_and_fewer(costs, fees_s, limit_s)]))
    free, forced = set(range(costs.end + 1)), set[int]()
    for repeat in repeats(kinds):
        pattern_of_best: tuple[int, ...] = ()
        for pattern in _patterns(costs, repeat, fees_s):
            positions = sorted(_around(free, repeat, pattern))
            for fee in fees_s:
                cuts = _cheapest_at(costs, positions, fee, forced | set(pattern))
                if cuts is None or planned(costs, cuts).seconds > limit_s:
                    break
                at_least = len({tuple(kinds[start:stop]) for start, stop in pairwise(cuts)})
                if at_least <= best[0] and (ranked := rank(cuts)) < best:
                    best, pattern_of_best = ranked, pattern
        if pattern_of_best:
            free = _around(free, repeat, pattern_of_best)
            forced |= set(pattern_of_best)
    return best[-1]


def _around(free: set[int], repeat: Repeat, pattern: Sequence[int]) -> set[int]:
    """The pattern, and where to cut besides: before it and behind it, where in the last block or later."""
    inside = range(pattern[0], max(pattern[-1], repeat.stop - repeat.period))
    return free.difference(inside).union(pattern)


def _cheapest_at(costs: Costs, positions: list[int], fee_s: float, forced: set[int]) -> list[int] | None:
    """Cuts at some of the positions, and at all that are forced."""
    cuts = cheapest(costs.at(positions), fee_s, [index for index, one in enumerate(positions) if one in forced])
    return cuts and [positions[index] for index in cuts]


def _fewer_and_fewer(costs: Costs, fees_s: tuple[float, ...], limit_s: float) -> Iterator[list[int]]:
    """Plans whose partitions cost a fee, which is raised until it costs more time than the limit allows."""
    fee_s = fees_s[-1]
    while len(fees_s) > 1 and fee_s < limit_s:
        cuts = cheapest(costs, fee_s)
        if cuts is None or planned(costs, cuts).seconds > limit_s:
            return
        yield cuts
        fee_s *= 4


def _patterns(costs: Costs, repeat: Repeat, fees_s: tuple[float, ...]) -> Iterator[tuple[int, ...]]:
    """Positions that cut all blocks alike."""
    places = range(repeat.start, repeat.start + repeat.period)
    for blocks in range(1, repeat.count // 2 + 1):
        timed = []
        for place in places:
            pattern = tuple(range(place, repeat.stop + 1, repeat.period * blocks))
            one = predict(costs.at(pattern), range(len(pattern)))
            if one is not None:
                timed.append((one.seconds / len(pattern), one.crossing_bytes, pattern))
        yield from (pattern for *_, pattern in sorted(timed)[:_PLACES])
    # Several cuts in each block, as is cheapest for one from the middle.
    middle = repeat.period * ((repeat.count - 1) // 2)
    seen = set()
    for place in sorted(places, key=lambda place: (costs.before_bytes[place + middle], place))[:_PLACES]:
        for fee in (fees_s[0], *(fees_s[-1] * 4**power for power in range(6)), _ANY_TIME_S):
            inner = cheapest(costs.at(range(place + middle, place + middle + repeat.period + 1)), fee)
            if inner is not None and len(inner) > 2:
                starts = range(place, repeat.stop, repeat.period)
                pattern = tuple(s + cut for s in starts for cut in inner[:-1] if s + cut <= repeat.stop)
                if pattern not in seen:
                    seen.add(pattern)
                    yield pattern
