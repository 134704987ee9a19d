"""The simulator: plays a bundle's schedule on two lanes, as the engine would on a device of given rates.

It follows runtime/engine/engine.cpp: the level of residency that it picks before each call, the first call that packs
weights and lets the workspace grow, loads that go on with the first partitions of the next call, everything that goes
when another variant or stage runs, pressure after the partition that runs. Nothing is loaded or computed; what comes
out are the events of a trace. While both lanes are busy, each goes slower by the rates' contention.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal

from movdc.runtime.bundle import Decode, Manifest, Partition, Residency, Sampler, Variant
from movdc.runtime.errors import BudgetError
from movdc.runtime.rates import Rates
from movdc.runtime.simulated_loader import Books, Loader
from movdc.runtime.timeline import Event

Mode = Literal["sequential", "concurrent", "dynamic"]
MODES: tuple[Mode, ...] = ("sequential", "concurrent", "dynamic")
INSTANT_S = 1e-12  # what is left of an event that is over


@dataclass(frozen=True)
class Call:
    """One call of a stage; `again` if the next one is of the same variant."""

    stage: str
    variant: Variant
    again: bool


@dataclass(frozen=True)
class Pressure:
    """The system asks for memory at a moment: half of what stays (warning), or all of it (critical)."""

    at_s: float
    level: Literal["warning", "critical"]


def calls_of(manifest: Manifest, steps: int | None = None) -> list[Call]:
    """What one video calls, for a prompt of the longest length."""
    stages = {stage.name: stage.variants for stage in manifest.stages}
    named = named_calls(manifest.sampler, manifest.decode, "merged" in stages["denoiser"], steps)
    return [
        Call(stage, stages[stage][variant], (stage, variant) == after)
        for (stage, variant), after in zip(named, [*named[1:], None], strict=True)
    ]


def named_calls(sampler: Sampler, decode: Decode, merges: bool, steps: int | None = None) -> list[tuple[str, str]]:
    """The stages and variants that one video calls, in order; a dynamic leap is taken as late as it may come."""
    named = [("text_encoder", "plain")]
    for step in range(evaluations(sampler, steps)):
        named.append(("denoiser", "merged" if merges and step < sampler.merged_steps else "plain"))
    named += [("vae_temporal", chunk.variant) for chunk in decode.chunks]
    frames = sum(chunk.frames for chunk in decode.chunks)
    return named + [("vae_spatial", "plain")] * math.ceil(frames / decode.micro_batch_frames)


def evaluations(sampler: Sampler, steps: int | None = None) -> int:
    """How often a run of so many steps (the plan's by default) calls the denoiser, at most."""
    count = sampler.units[0] if steps is None else steps
    rule = sampler.leap
    return min(rule.fixed_step(count) + 1, count) if rule and rule.mode == "fixed" else count


@dataclass(frozen=True)
class _Sizes:
    """The bytes of a variant's tensors: of its inputs, and what each run makes and is the last to read."""

    input_bytes: int
    made_bytes: list[int]  # by each partition, outputs of the stage included
    output_bytes: list[int]  # those of them that are outputs of the stage, which stay to its end
    dropped_bytes: list[int]
    growing_bytes: list[int]  # of the workspace, in a first run
    lasting_bytes: int

    @classmethod
    def of(cls, variant: Variant, partitions: Mapping[str, Partition]) -> _Sizes:
        order = [partitions[name] for name in variant.order]
        last = {spec.name: index for index, one in enumerate(order) for spec in one.inputs}
        outputs = {spec.name for spec in variant.outputs}
        made, results, dropped = ([0] * len(order) for _ in range(3))
        for index, one in enumerate(order):
            for spec in one.outputs:
                made[index] += spec.size_bytes
                stays = spec.name in outputs or spec.name not in last
                (results if stays else dropped)[index if stays else last[spec.name]] += spec.size_bytes
        input_bytes = sum(spec.size_bytes for spec in variant.inputs)
        return cls(input_bytes, made, results, dropped, growing_bytes(order), lasting_bytes(order))


class Simulator:
    """Plays calls one after the other; `events` is what happened so far."""

    def __init__(
        self,
        partitions: Mapping[str, Partition],
        slab_bytes: int,
        rates: Rates,
        budget_bytes: int,
        *,
        mode: Mode = "dynamic",
        packed: bool = True,
        pressures: Iterable[Pressure] = (),
    ) -> None:
        self.partitions = partitions
        self.rates = rates
        self.budget_bytes = budget_bytes
        self.mode = mode
        self.events: list[Event] = []
        self.now_s = 0.0
        self.books = Books()
        self.books.take(slab_bytes)
        done = {one.weights for one in partitions.values()} if packed else set()
        self.loader = Loader(partitions, rates, self.books, self.events.append, done)
        self._pressures = sorted(pressures, key=lambda one: one.at_s)
        self._ceiling_bytes: float = math.inf  # levels that need more are out of reach since pressure
        self._relieves = False
        self._planned_for: Variant | None = None
        self._has_run: Variant | None = None
        self._stage = ""
        self._row = 0
        self._lasting_bytes = 0
        self._sizes: dict[int, _Sizes] = {}  # by the identity of the variant

    @classmethod
    def of(
        cls,
        manifest: Manifest,
        rates: Rates,
        *,
        budget_bytes: int | None = None,
        mode: Mode = "dynamic",
        packed: bool = True,
        pressures: Iterable[Pressure] = (),
    ) -> Simulator:
        """The simulator of a bundle; without a budget it has the one that it was compiled for."""
        named = {one.name: one for one in manifest.partitions}
        budget_bytes = manifest.budget_bytes if budget_bytes is None else budget_bytes
        slab_bytes = manifest.slab_bytes
        return cls(named, slab_bytes, rates, budget_bytes, mode=mode, packed=packed, pressures=pressures)

    def run(self, calls: Iterable[Call]) -> list[Event]:
        """Play calls; raises BudgetError where a stage's least level does not fit."""
        for call in calls:
            self._run(call)
        return self.events

    def _run(self, call: Call) -> None:
        variant = call.variant
        if self._stage and self._stage != call.stage:
            self._clear()
        self._stage = call.stage
        self._grow(variant)
        names = variant.order
        sizes = self._sizes.get(id(variant)) or self._sizes.setdefault(id(variant), _Sizes.of(variant, self.partitions))
        callers_bytes = sizes.input_bytes
        self._relieves = False
        self._plan(call, names)
        self.books.take(callers_bytes)
        for index, name in enumerate(names):
            if self._relieves:
                self._plan(call, names[index:])
            self._await(name)
            growing_bytes = sizes.growing_bytes[index] if self._has_run is not variant else 0
            self.books.take(growing_bytes + sizes.made_bytes[index])
            callers_bytes += sizes.output_bytes[index]
            self._execute(self.partitions[name])
            self.books.free(growing_bytes + sizes.dropped_bytes[index])
            if not self.loader.stays(name):
                start_s = self.now_s
                self._pass(self.rates.free_s(self.partitions[name]))
                self.loader.free(name, start_s, self.now_s)
        self.books.free(callers_bytes)
        self._has_run = variant
        while self._pressures and self._pressures[0].at_s <= self.now_s:
            self._relieve(self._pressures.pop(0))

    def _await(self, name: str) -> None:
        start_s = self.now_s
        while not self.loader.is_ready(name):
            self._advance(None)
        if self.now_s > start_s:
            self.events.append(Event("wait", name, start_s, self.now_s - start_s, 0, self.books.held_bytes))

    def _execute(self, one: Partition) -> None:
        start_s = self.now_s
        touch_s = 0.0 if self.loader.runs(one.name) else self.rates.touch_s(one)
        self._pass(self.rates.run_s(one) + touch_s)
        self.events.append(Event("run", one.name, start_s, self.now_s - start_s, 0, self.books.held_bytes))

    def _pass(self, left_s: float) -> None:
        """The execution lane is busy for seconds, or longer while something loads."""
        while left_s > INSTANT_S:
            left_s = self._advance(left_s)

    def _advance(self, run_left_s: float | None) -> float:
        """Go to the next end of a run or of a part of a load, or to pressure; gives what is left of the run."""
        self.loader.start(self.now_s)
        load, runs = self.loader.load, run_left_s is not None
        run_pace = 1 + self.rates.contention if load else 1.0
        load_pace = 1 + self.rates.load_contention if runs else 1.0
        ends = [] if run_left_s is None else [run_left_s * run_pace]
        ends += [load.left_s * load_pace] if load else []
        assert ends, "neither lane can go on"
        passed_s = min(ends)
        if self._pressures:
            passed_s = min(passed_s, max(self._pressures[0].at_s - self.now_s, 0.0))
        self.now_s += passed_s
        if load:
            load.left_s -= passed_s / load_pace
            if load.left_s <= INSTANT_S:
                self.loader.end_part(self.now_s)
        if self._pressures and self._pressures[0].at_s <= self.now_s:
            self._relieve(self._pressures.pop(0))
        return 0.0 if run_left_s is None else run_left_s - passed_s / run_pace

    def _plan(self, call: Call, upcoming: Sequence[str]) -> None:
        variant = call.variant
        self._row = self._choose(call)
        if self._planned_for is not variant:
            self._clear()
            self._lasting_bytes = self._sizes[id(variant)].lasting_bytes
            self.books.take(self._lasting_bytes)
            self._planned_for = variant
        names = [*upcoming, *(variant.order if call.again else ())]
        self.loader.plan(names, variant.residency[self._row], self.now_s)
        self._relieves = False

    def _choose(self, call: Call) -> int:
        """The last level that fits, as far as the mode and pressure allow."""
        variant, rows = call.variant, call.variant.residency
        first = self._has_run is not variant
        packs = first and any(self.loader.is_unpacked(name) for name in variant.order)
        more_bytes = max(self._sizes[id(variant)].growing_bytes) if first else 0
        packed_bytes = least_packed_bytes(variant, more_bytes)
        least_bytes = variant.first_needs_bytes if packs else packed_bytes if first else rows[0].needs_bytes
        if least_bytes > self.budget_bytes:
            raise BudgetError(f"{call.stage} needs {least_bytes} bytes at least; the budget is {self.budget_bytes}")
        best = 0
        for index, row in enumerate(rows[1:], 1):
            fits = row.needs_bytes + more_bytes <= self.budget_bytes and row.needs_bytes <= self._ceiling_bytes
            if fits and not packs and (self.mode == "dynamic" or (self.mode == "concurrent" and not row.pinned)):
                best = index
        return best

    def _clear(self) -> None:
        while self.loader.load is not None:
            self._advance(None)
        self.loader.clear(self.now_s)
        self.books.free(self._lasting_bytes)
        self._lasting_bytes = 0
        self._planned_for = self._has_run = None

    def _relieve(self, pressure: Pressure) -> None:
        """Bar the levels that need too much; the next partition runs by one of the others."""
        if self._planned_for is None:
            return
        rows = self._planned_for.residency

        def pinned_bytes(row: Residency) -> int:
            return sum(self.partitions[name].held_bytes for name in row.pinned)

        keep = 0
        for index in range(1, self._row if pressure.level == "warning" else 0):
            if 2 * pinned_bytes(rows[index]) <= pinned_bytes(rows[self._row]):
                keep = index
        self._ceiling_bytes = rows[keep].needs_bytes
        self._relieves = True

    def _grow(self, variant: Variant) -> None:
        """Take back one level of what pressure took."""
        above = [row.needs_bytes for row in variant.residency if row.needs_bytes > self._ceiling_bytes]
        self._ceiling_bytes = above[0] if above else math.inf


def lasting_bytes(partitions: Sequence[Partition]) -> int:
    """What is held as long as a variant runs: programs, and the workspace and planned memory that they share."""
    shared = max((one.workspace_bytes for one in partitions), default=0)
    planned = max((one.planned_bytes for one in partitions), default=0)
    return sum(one.program_bytes for one in partitions) + shared + planned


def least_packed_bytes(variant: Variant, more_bytes: int) -> int:
    """The least budget of a first run without packing: it needs the largest growth at the worst moment, or less."""
    return min(variant.first_needs_bytes, variant.residency[0].needs_bytes + more_bytes)


def growing_bytes(partitions: Sequence[Partition]) -> list[int]:
    """What the workspace takes beyond its largest size when it grows for each: the one before is there meanwhile."""
    largest_bytes = max(one.workspace_bytes for one in partitions)
    before = [0, *accumulate((one.workspace_bytes for one in partitions), max)]
    return [
        max(before_bytes + one.workspace_bytes - largest_bytes, 0) if one.workspace_bytes > before_bytes else 0
        for one, before_bytes in zip(partitions, before, strict=False)
    ]
