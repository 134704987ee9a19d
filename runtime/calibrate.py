"""Calibration: the rates of a device from a trace that was measured on it, a host or a phone.

A load takes a + b bytes seconds, and c of each second that something runs meanwhile. A run takes a + b FLOPs + d FLOPs
with int8 weights, e bytes if these were just loaded, and c of each second that something loads. Least squares find
these, none of them below 0; e only where weights of some runs were just loaded and of others were not. A first load
also packs, checks and initialises: those parts are averages, as freeing is. What it reads and the run behind it are
left out, for checking has brought its pages, and that run touches new ones.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from movdc.runtime.bundle import Partition
from movdc.runtime.errors import RunError
from movdc.runtime.rates import Rates
from movdc.runtime.timeline import Event

Columns = npt.NDArray[np.float64]
_MOST_SHARE = 0.95  # of a second that contention may cost
_ROUNDS = 20  # of weighing events by what the round before expects of them
_USUAL = 0.2  # of an event's seconds: an error that says something of the rates
_ALONE = 1e-3  # of an event's seconds: what may lie beside another lane's and be of no account


def calibrate(events: Sequence[Event], partitions: Mapping[str, Partition]) -> Rates:
    """Fit rates to events of a bundle's partitions; raises RunError where they are of another or too few."""
    loads = [one for one in events if one.what == "load"]
    runs = [one for one in events if one.what == "run"]
    if unknown := sorted({one.partition for one in loads + runs} - set(partitions)):
        raise RunError(f"the trace has {unknown[0]}, which this bundle has not; give the bundle that was traced")
    if not loads or not runs:
        raise RunError("the trace has no load or no run; trace a whole run with `movdc run --trace`")
    firsts = [one for one in events if one.what in ("pack", "verify", "init")]
    reads = _later([one for one in events if one.what == "read"], firsts)
    load = _fit(reads, [[partitions[one.partition].held_bytes for one in reads]], runs)
    settled = _later(runs, firsts)
    products = [partitions[one.partition] for one in settled]
    int8_flops = [one.int8_flops for one in products]
    touched = _touched_bytes(events, settled, partitions)
    run = _fit(settled, [[one.flops - one.int8_flops for one in products], int8_flops, touched], loads)
    frees = _later([one for one in events if one.what == "free" and one.duration_s > 0], firsts)
    packs = [one for one in events if one.what == "pack"]
    packed_bytes = sum(partitions[one.partition].weight_bytes for one in packs)
    checks = [one for one in events if one.what == "verify"]
    inits = [one.duration_s for one in events if one.what == "init"]
    return Rates(
        load_bytes_per_s=_inverse(load[1]),
        compute_flops_per_s=_inverse(run[1] or run[2]),
        int8_flops_per_s=_inverse(run[2]) if any(int8_flops) else None,
        load_overhead_s=load[0],
        run_overhead_s=run[0],
        contention=run[4] / (1 - run[4]),
        load_contention=load[2] / (1 - load[2]),
        pack_bytes_per_s=_rate(packed_bytes, packs),
        verify_bytes_per_s=_rate(sum(one.bytes for one in checks), checks),
        init_s=sum(inits) / len(inits) if inits else 0.0,
        touch_bytes_per_s=_inverse(run[3]),
        free_bytes_per_s=_rate(sum(partitions[one.partition].held_bytes for one in frees), frees),
    )


def _touched_bytes(events: Sequence[Event], runs: Sequence[Event], partitions: Mapping[str, Partition]) -> list[int]:
    """The bytes of each run that were loaded behind the run before of its partition; 0 where that is so of all runs."""
    just_loaded: dict[str, bool] = {}
    touched = {}
    for event in sorted(events, key=lambda one: one.start_s):
        if event.what == "run":
            is_new = just_loaded.pop(event.partition, False)
            touched[id(event)] = partitions[event.partition].held_bytes if is_new else 0
        elif event.what == "load":
            just_loaded[event.partition] = True
    found = [touched[id(one)] for one in runs]
    return found if 0 in found else [0] * len(found)


def _later(events: Sequence[Event], firsts: Sequence[Event]) -> list[Event]:
    """All but those that come next after a first load's own parts, where there are more."""
    before: dict[str, bool] = {}  # by partition, whether what came before was such a part
    later = []
    for event, is_first in sorted([(one, True) for one in firsts] + [(one, False) for one in events], key=_start_s):
        if not is_first and not before.get(event.partition, True):
            later.append(event)
        before[event.partition] = is_first
    return later if later else list(events)


def _start_s(event: tuple[Event, bool]) -> float:
    return event[0].start_s


def _fit(events: Sequence[Event], sizes: Sequence[Sequence[int]], others: Sequence[Event]) -> list[float]:
    """Seconds of an event: fixed, for each of its sizes, and the share of its overlap with the other lane it loses.

    An overlap is as long as an event happens to last, so least squares would take any delay for contention. Where
    some events lie beside nothing, these tell the first figures, and the share is what the others take beyond them.
    """
    starts = np.array([one.start_s for one in others])
    ends = np.array([one.end_s for one in others])
    seconds = np.array([one.duration_s for one in events])
    overlaps = np.array(
        [float(np.clip(np.minimum(ends, one.end_s) - np.maximum(starts, one.start_s), 0, None).sum()) for one in events]
    )
    columns = np.stack([np.ones(len(events)), *(np.array(one, float) for one in sizes)], axis=1)
    alone = overlaps <= _ALONE * seconds
    if not alone.any():
        *found, share = _least_squares(np.column_stack([columns, overlaps]), seconds)
        return [*found, min(share, _MOST_SHARE)]
    found = _least_squares(columns[alone], seconds[alone])
    beyond_s = float((seconds - columns @ np.array(found))[~alone].sum())
    overlap_s = float(overlaps[~alone].sum())
    return [*found, min(max(beyond_s / overlap_s, 0.0), _MOST_SHARE) if overlap_s else 0.0]


def _least_squares(columns: Columns, seconds: Columns) -> list[float]:
    """The coefficients of columns, none of them below 0."""
    expected = np.full(len(seconds), seconds.mean())
    doubts = np.ones(len(seconds))
    for _ in range(_ROUNDS):
        # An error counts by what an event should take, so that small partitions weigh something; by what it did take,
        # the quick ones among equal events would outweigh the slow ones. Of larger errors the size counts, not the
        # square (Huber's loss): a system that does something else for a while makes some events much longer.
        scale = np.maximum(expected, seconds.mean() / 10 + 1e-9)
        found = _not_negative(columns, seconds, 1 / (scale * np.sqrt(doubts)))
        expected = columns @ found
        doubts = np.maximum(np.abs(seconds - expected) / scale, _USUAL)
    return [float(one) for one in found]


def _not_negative(columns: Columns, seconds: Columns, weights: Columns) -> Columns:
    scale = np.maximum(columns.max(axis=0), 1e-30)
    kept = [index for index in range(columns.shape[1]) if columns[:, index].any()]
    while True:
        solved, *_ = np.linalg.lstsq(columns[:, kept] / scale[kept] * weights[:, None], seconds * weights, rcond=None)
        if (solved >= 0).all():
            break
        kept.remove(kept[int(solved.argmin())])
    found = np.zeros(columns.shape[1])
    found[kept] = solved / scale[kept]
    return found


def _inverse(seconds: float) -> float:
    return 1 / seconds if seconds > 0 else math.inf


def _rate(size_bytes: int, events: Sequence[Event]) -> float:
    seconds = sum(one.duration_s for one in events)
    return size_bytes / seconds if seconds > 0 and size_bytes > 0 else math.inf
