"""Waists lie between residual branches, and layers of the published models end where those of their traces do."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from movdc.compiler.waists import RISE, waists

# A residual branch: what enters it (10) is kept; within it are a low (25) and what adds nothing to it (11).
BRANCH = [10, 20, 40, 25, 40, 20]


def _reads(count: int) -> list[int]:
    return list(range(count))


def test_they_lie_between_residual_branches_and_not_within() -> None:
    sizes = [0, 4, 12, *BRANCH, *BRANCH, 10, 20, 5]
    assert [sizes[place] for place in waists(sizes, _reads(len(sizes)))] == [0, 10, 10, 5]
    assert waists(sizes, _reads(len(sizes))) == [0, 9, 15, len(sizes) - 1]


def test_one_follows_the_other_where_values_grow_from_level_to_level() -> None:
    sizes = [0, 10, 30, 10, 30, 20, 60, 20, 60, 40, 120, 40, 120, 40, 120, 3]
    assert [sizes[place] for place in waists(sizes, _reads(len(sizes)))] == [0, 10, 20, 20, 40, 40, 40, 3]


def test_what_reads_no_weights_is_no_partition() -> None:
    sizes, reads = [0, 10, 20, 10, 20, 10, 20, 5], [0, 1, 2, 2, 2, 2, 3, 3]
    assert waists(sizes, reads) == [0, 3, 7]


def test_a_chain_without_waists_has_its_ends() -> None:
    assert waists([0, 8, 8, 4], _reads(4)) == [0, 3]
    assert waists([0, 0], _reads(2)) == [0, 1]


@given(st.lists(st.integers(0, 60), min_size=2, max_size=30))
def test_between_two_of_them_more_crosses(sizes: list[int]) -> None:
    found = waists(sizes, _reads(len(sizes)))
    assert found == sorted(set(found))
    assert (found[0], found[-1]) == (0, len(sizes) - 1)
    for low, high in pairwise(found[1:-1]):
        assert max(sizes[low : high + 1]) > RISE * max(sizes[low], sizes[high])
