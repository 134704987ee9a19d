"""Residency: what a level of it holds at most, at any moment of any interleaving of the two lanes.

Two lanes run a variant: one loads partitions in the order of their runs, the other runs them. Partitions of the pinned
set stay; of the others, the transient ones, at most 1 + prefetch are there at a time. compiler/levels.py chooses.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from movdc.runtime.bundle import Interval, Partition, TensorSpec, Variant
from movdc.runtime.simulate import growing_bytes, lasting_bytes


@dataclass(frozen=True)
class Chain:
    """The partitions of a variant as they run, with the bytes of tensors before each runs and while it does.

    Before the first there may be the tensors that the end of the run before has left: they go when their reader has
    them, and meanwhile the first partition loads.
    """

    partitions: tuple[Partition, ...]
    waiting_bytes: tuple[int, ...]
    running_bytes: tuple[int, ...]
    slab_bytes: int

    @classmethod
    def of(cls, partitions: Sequence[Partition], inputs: Sequence[TensorSpec], slab_bytes: int) -> Chain:
        """A tensor lives from the run that makes it to the last that reads it; what nobody reads is an output."""
        reads = {spec.name: index for index, one in enumerate(partitions) for spec in one.inputs}
        ends = len(partitions)
        live = {spec.name: (ends, spec.size_bytes) for spec in inputs}
        waiting, running = [], []
        for index, one in enumerate(partitions):
            waiting.append(sum(size for _, size in live.values()))
            live |= {spec.name: (reads.get(spec.name, ends), spec.size_bytes) for spec in one.outputs}
            running.append(sum(size for _, size in live.values()))
            live = {name: (last, size) for name, (last, size) in live.items() if last > index}
        left_bytes = sum(size for _, size in live.values())
        waiting[0], running[0] = max(waiting[0], left_bytes), max(running[0], left_bytes)
        return cls(tuple(partitions), tuple(waiting), tuple(running), slab_bytes)


def intervals(chain: Chain, pinned: frozenset[str], prefetch: int, waits: frozenset[str]) -> list[Interval]:
    """The most that can be held in each interval, whatever the two lanes' speeds, in any run but a first one."""
    keys = ("weights_bytes", "loading_bytes", "activation_bytes", "lasting_bytes")
    return [
        Interval(partition=one.name, phase=phase, **dict(zip(keys, sizes, strict=True)))
        for one, (load, run) in zip(chain.partitions, _intervals(chain, pinned, prefetch, waits), strict=True)
        for phase, sizes in (("load", load), ("run", run))
    ]


def needs_bytes(chain: Chain, pinned: frozenset[str], prefetch: int, waits: frozenset[str]) -> int:
    """The most of all intervals."""
    return max(sum(sizes) for both in _intervals(chain, pinned, prefetch, waits) for sizes in both)


def run_sizes(chain: Chain, pinned: frozenset[str], prefetch: int, waits: frozenset[str]) -> list[int]:
    """The most that can be held while each partition runs."""
    return [sum(run) for _, run in _intervals(chain, pinned, prefetch, waits)]


def _intervals(
    chain: Chain, pinned: frozenset[str], prefetch: int, waits: frozenset[str]
) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """The four sizes of an Interval for each partition, until it has loaded and until it has run."""
    stay_bytes = sum(one.held_bytes for one in chain.partitions if one.name in pinned)
    lasting = lasting_bytes(chain.partitions)
    transient = [one for one in chain.partitions if one.name not in pinned]
    found: list[tuple[tuple[int, ...], tuple[int, ...]]] = []
    done = 0  # transient partitions that have run
    for one, waiting_bytes, running_bytes in zip(
        chain.partitions, chain.waiting_bytes, chain.running_bytes, strict=True
    ):
        is_pinned = one.name in pinned
        own_bytes = 0 if is_pinned else one.held_bytes
        ahead = _ahead(transient, done + (not is_pinned), prefetch + is_pinned, waits, alone=is_pinned)
        *before, last_bytes = [own_bytes, *(some.held_bytes for some in ahead)] if ahead else [own_bytes, 0]
        load = stay_bytes, own_bytes + chain.slab_bytes, waiting_bytes, lasting
        run = stay_bytes + sum(before), last_bytes + chain.slab_bytes, running_bytes, lasting
        found.append((load, run))
        done += not is_pinned
    return found


def _ahead(
    transient: Sequence[Partition], first: int, slots: int, waits: frozenset[str], alone: bool
) -> list[Partition]:
    """The transient partitions that may be loaded beyond those that have run; `alone` if no other one is there."""
    ahead: list[Partition] = []
    for offset in range(min(slots, len(transient) - (not alone))):  # none is there twice
        one = transient[(first + offset) % len(transient)]
        if one.name in waits and not (alone and offset == 0):
            break
        ahead.append(one)
    return ahead


def most_bytes(variant: Variant, partitions: Sequence[Partition], budget_bytes: int) -> int:
    """The most bytes that any run of a variant holds within a budget.

    In a first run the workspace grows: it packs weights by the first level, or, where they are packed already, goes by
    the best level that leaves room for that.
    """
    more_bytes = max(growing_bytes(partitions))
    first = (level.needs_bytes + more_bytes for level in variant.residency)
    return max(variant.peak_bytes, variant.first_needs_bytes, *(most for most in first if most <= budget_bytes))


def first_needs_bytes(chain: Chain) -> int:
    """The most bytes held in a first run by the first level, which packs weights and lets the workspace grow."""
    most_bytes = 0
    for one, waiting_bytes, running_bytes, more_bytes in zip(
        chain.partitions, chain.waiting_bytes, chain.running_bytes, growing_bytes(chain.partitions), strict=True
    ):
        running_bytes += one.held_bytes + more_bytes
        most_bytes = max(most_bytes, waiting_bytes + one.load_bytes, running_bytes)
    return most_bytes + chain.slab_bytes + lasting_bytes(chain.partitions)
