"""Bubbles: where a plan lets the execution lane wait, why, and what would remove each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from movdc.runtime.bundle import Partition, Stage, Variant
from movdc.runtime.rates import Rates
from movdc.runtime.simulate import Call, Simulator
from movdc.runtime.timeline import Event

SETTLED = 3  # calls after which each is as the one before
SHORT_S = 1e-6


@dataclass(frozen=True)
class Bubble:
    """A wait of a settled call, or of the first one of a variant."""

    partition: str
    wait_s: float
    when: str  # "first call" or "each call"
    why: str
    remedy: str


def bubbles(
    stage: Stage,
    variant: Variant,
    partitions: Mapping[str, Partition],
    slab_bytes: int,
    rates: Rates,
    budget_bytes: int,
) -> list[Bubble]:
    """The waits of a variant in its first call and in one that has settled, the longest first.

    A stage that runs once has a first call only, whose waits all count.
    """

    def played(one: Variant) -> tuple[list[Event], list[Event], float]:
        simulator = Simulator(partitions, slab_bytes, rates, budget_bytes)
        parts, ends_s = [0], [0.0]
        for _ in range(SETTLED):
            simulator.run([Call(stage.name, one, again=stage.cadence != "once")])
            parts.append(len(simulator.events))
            ends_s.append(simulator.now_s)
        return simulator.events[: parts[1]], simulator.events[parts[-2] :], ends_s[-1] - ends_s[-2]

    first, settled, call_s = played(variant)
    level = [row for row in variant.residency if row.needs_bytes <= budget_bytes][-1]
    found = []
    least_bytes = variant.residency[0].needs_bytes
    for event in settled if stage.cadence != "once" else ():
        if event.what == "wait" and event.duration_s > SHORT_S:
            name = event.partition
            pinned = tuple(one for one in variant.order if one in {*level.pinned, name})
            # Whatever level there is, the question is what this one partition would bring.
            row = level.model_copy(update={"pinned": pinned, "needs_bytes": least_bytes})
            gain_s = call_s - played(variant.model_copy(update={"residency": (row,)}))[-1]
            remedy = f"keep it loaded: {partitions[name].held_bytes / 1e6:.1f} MB more, {gain_s:.3f} s less a call"
            found.append(Bubble(name, event.duration_s, "each call", _why(event, settled, level.prefetch), remedy))
    for event in first:
        is_first = event.partition == variant.order[0]
        if event.what == "wait" and event.duration_s > SHORT_S and (is_first or stage.cadence == "once"):
            why = "nothing runs yet that its load could hide behind"
            why = why if is_first else _why(event, first, level.prefetch)
            remedy = "a smaller first partition, or faster loads" if is_first else "faster loads, or int8 weights"
            found.append(Bubble(event.partition, event.duration_s, "first call", why, remedy))
    return sorted(found, key=lambda one: (-one.wait_s, one.partition))


def _why(wait: Event, events: Sequence[Event], prefetch: int) -> str:
    loads = [event for event in events if event.what == "load" and event.partition == wait.partition]
    if not loads:
        return "it was loading when the call before ended"
    load = min(loads, key=lambda one: abs(one.end_s - wait.end_s))
    before = [event for event in events if event.what == "load" and event.end_s <= load.start_s + SHORT_S]
    if before and load.start_s - max(one.end_s for one in before) < SHORT_S:
        return "the loader was busy until its load began: loads are longer than the runs beside them"
    return f"its load began late: {1 + prefetch} partitions that come and go are all that this level holds"
