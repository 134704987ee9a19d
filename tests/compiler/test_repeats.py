"""Repeats are found, equal blocks become equal partitions, and no time is lost that was not given away."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from movdc.compiler.chain import Chain, Value, costs
from movdc.compiler.cut import Costs, cheapest, predict
from movdc.compiler.device import Machine
from movdc.compiler.repeats import Repeat, fewest_programs, repeats

BLOCK = "abbc"


def _chain(kinds: str) -> tuple[Chain, list[int]]:
    """A node for each letter: a reads 40 bytes of weights of its own, b computes, c reads 20 and computes."""
    weights = {"a": 40, "c": 20, "h": 90, "t": 10}
    flops = {"b": 3, "c": 2}
    readers = [index for index, kind in enumerate(kinds) if kind in weights]
    chain = Chain(
        flops=tuple(flops.get(kind, 0) for kind in kinds),
        scratch_bytes=(0,) * len(kinds),
        values=tuple(Value(index, index + 1, 8) for index in range(len(kinds))),
        reads=tuple((readers.index(index),) if index in readers else () for index in range(len(kinds))),
        weight_bytes=tuple(weights[kinds[index]] for index in readers),
        input_bytes=4,
        output_bytes=0,
    )
    return chain, [ord(kind) for kind in kinds]


def _costs(kinds: str, budget_bytes: int, load_overhead_s: float = 0.1) -> tuple[Costs, list[int]]:
    chain, numbers = _chain(kinds)
    return costs(chain, range(len(kinds) + 1), Machine(budget_bytes, 10.0, 1.0, load_overhead_s, 2.0)), numbers


def _programs(kinds: str) -> Callable[[Sequence[int]], int]:
    return lambda cuts: len({kinds[start:stop] for start, stop in pairwise(cuts)})


def test_repeats_are_the_longest_first_and_do_not_overlap() -> None:
    text = "xy" + "abcd" * 5 + "z" + "pq" * 3 + "w"
    assert repeats([ord(letter) for letter in text]) == [Repeat(2, 4, 5), Repeat(23, 2, 3)]


def test_the_period_is_the_shortest() -> None:
    assert repeats([1, 2] * 8) == [Repeat(0, 2, 8)]
    assert repeats([1, 2, 3]) == []


@settings(deadline=None, max_examples=60)
@given(st.text("ab", max_size=14))
def test_every_repeat_repeats(text: str) -> None:
    kinds = [ord(letter) for letter in text]
    found = repeats(kinds)
    for one in found:
        block = text[one.start : one.start + one.period]
        assert one.count >= 2
        assert text[one.start : one.stop] == block * one.count
    covered = [position for one in found for position in range(one.start, one.stop)]
    assert len(covered) == len(set(covered))


@pytest.mark.parametrize("budget_bytes", [260, 400, 600, 10**6])
def test_six_equal_blocks_become_equal_partitions(budget_bytes: int) -> None:
    kinds = "h" + BLOCK * 6 + "t"
    measured, numbers = _costs(kinds, budget_bytes)
    cuts = fewest_programs(measured, numbers, 0.1, _programs(kinds))
    assert cuts is not None
    one, least = predict(measured, cuts), predict(measured, cheapest(measured) or [])
    assert one is not None
    assert least is not None
    assert one.seconds <= least.seconds * 1.1001
    assert one.peak_bytes <= budget_bytes
    assert _programs(kinds)(cuts) <= 4  # what comes before, the blocks whole or in two halves, what comes after


def test_a_block_that_does_not_fit_whole_is_cut_alike_in_all() -> None:
    kinds = "h" + "abcabc"[:3] * 6 + "t"
    measured, numbers = _costs(kinds, 220)
    cuts = fewest_programs(measured, numbers, 1.0, _programs(kinds))
    assert cuts is not None
    assert predict(measured, cuts) is not None
    assert len(cuts) > 7
    assert _programs(kinds)(cuts) <= 4


@settings(deadline=None, max_examples=60)
@given(st.text("abc", min_size=1, max_size=12), st.integers(60, 700), st.sampled_from([0.0, 0.1]))
def test_without_slack_the_time_is_the_least(kinds: str, budget_bytes: int, load_overhead_s: float) -> None:
    measured, numbers = _costs(kinds, budget_bytes, load_overhead_s)
    cuts = fewest_programs(measured, numbers, 0.0, _programs(kinds))
    optimum = cheapest(measured)
    if optimum is None:
        assert cuts is None
        return
    assert cuts is not None
    one, least = predict(measured, cuts), predict(measured, optimum)
    assert one is not None
    assert least is not None
    assert one.seconds == pytest.approx(least.seconds, rel=2e-6)
    assert _programs(kinds)(cuts) <= len(optimum) - 1
