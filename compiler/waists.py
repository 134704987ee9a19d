"""Waists: places of a chain where less crosses than nearby, such as between the residual branches of a model.

A cut costs what crosses it, so the best cuts are at waists wherever the budget allows partitions as large as what lies
between two of them. There are few, they are alike in all blocks, and they follow from a model's config, which is what
`movdc fit` goes by (models/opensora_layers.py): it cuts at the same places without a trace.
"""

from __future__ import annotations

from collections.abc import Sequence

RISE = 1.25  # between two waists, some position has so many times the bytes of either


def waists(crossing_bytes: Sequence[int], reads: Sequence[int]) -> list[int]:
    """The places of waists in a list of positions, both ends included.

    At each position, `crossing_bytes` live across it and `reads` weights have been read before it: what reads none
    needs no partition of its own, and ends with the one before.
    """
    found = _lows(crossing_bytes)
    while humps := _humps(found, crossing_bytes):
        found = [place for place in found if place not in humps]
    kept = [0]
    for place in found[1:-1]:
        if reads[place] > reads[kept[-1]]:
            kept.append(place)
    return [*kept, found[-1]]


def _lows(sizes: Sequence[int]) -> list[int]:
    """The first of the lowest places between two rises, both ends included."""
    found, low, high = [0], 0, 0
    for place, size in enumerate(sizes[:-1]):
        high = max(high, size)
        if low and size > RISE * sizes[low]:
            found.append(low)
            low, high = 0, size
        elif RISE * size < high and (not low or size < sizes[low]):
            low = place
    return [*found, len(sizes) - 1]


def _humps(found: Sequence[int], sizes: Sequence[int]) -> set[int]:
    """Those that more crosses than their neighbours on both sides: lows within a branch."""
    around = zip(found, found[1:], found[2:], strict=False)
    return {place for before, place, after in around if sizes[place] > RISE * max(sizes[before], sizes[after])}
