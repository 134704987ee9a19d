"""Fit: whether a pipeline fits a device and how long a video takes, told from its configs, without weights or a trace.

Layers (compiler/layers.py) stand in for the nodes of a graph. They are cut by the planner of every compile, get levels
of residency as every bundle does, and are played by the simulator. What no config tells, how much a target's kernels
take, comes from the same figures by which a compile plans before it measures.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from itertools import pairwise

import numpy as np

from movdc.compiler.bounds import calls_bound_s
from movdc.compiler.cut import Costs, cheapest, largest, planned, smallest_budget
from movdc.compiler.device import Machine
from movdc.compiler.errors import BudgetError
from movdc.compiler.layers import Layer, StageLayers, most_working_bytes, shared_bytes
from movdc.compiler.levels import variant_of
from movdc.compiler.repeats import fewest_programs
from movdc.compiler.residency import Chain, first_needs_bytes, most_bytes
from movdc.compiler.units import format_bytes
from movdc.runtime.bundle import FORWARD, Partition, TensorSpec
from movdc.runtime.simulate import Call, Simulator
from movdc.runtime.timeline import Report, stage_times

SLACK, MOST_WEIGHT_BYTES = 0.1, 512 * 10**6  # the defaults of the pass partition
NODES = 32  # of a layer, about
PLANS = 3  # that are tried before the least one, each with more in reserve than the one before


@dataclass(frozen=True)
class Choice:
    """What a user may change about a video, or give up."""

    frames: int
    height: int
    width: int
    steps: int
    merged_steps: int = 0
    leap_step: int | None = None  # the step that goes straight to the end
    int8: tuple[str, ...] = ()  # patterns of stages
    embeddings: bool = False  # also the rows that are looked up
    batch: int = 4  # frames that are decoded at once

    @property
    def evaluations(self) -> int:
        """How often the denoiser is called."""
        return self.steps if self.leap_step is None else min(self.leap_step + 1, self.steps)


@dataclass(frozen=True)
class StageFit:
    """How one stage is cut, and what it takes."""

    partitions: int  # of all variants
    programs: int
    weight_bytes: int
    peak_bytes: int
    times: Report
    bound_s: float  # of all calls, that no plan can beat


@dataclass(frozen=True)
class Fit:
    """What a pipeline takes on a device; nothing of it where some stage does not fit."""

    stages: Mapping[str, StageFit]
    needs_bytes: int  # about the least budget that every stage can be cut for, between layers
    bundle_bytes: int
    refusal: str = ""  # why it does not fit

    @property
    def fits(self) -> bool:
        """Whether there is a plan."""
        return not self.refusal

    @property
    def seconds(self) -> float:
        """Of one video; infinite where it does not fit."""
        return sum(one.times.wall_s for one in self.stages.values()) if self.fits else math.inf

    @property
    def bound_s(self) -> float:
        """Of one video: what no plan of these partitions can beat."""
        return sum(one.bound_s for one in self.stages.values())

    @property
    def peak_bytes(self) -> int:
        """The most that is held at any moment."""
        return max((one.peak_bytes for one in self.stages.values()), default=0)


StagesOf = Callable[[Choice], Sequence[StageLayers]]
BATCHES = (4, 2, 1)  # frames that are decoded at once, best first


def fit(stages_of: StagesOf, choice: Choice, machine: Machine) -> Fit:
    """Plan and play every stage, with the largest batch of the decoder that fits."""
    for batch in BATCHES:
        chosen = replace(choice, batch=batch)
        found = _fit(stages_of(chosen), chosen, machine)
        if found.fits or not found.refusal.startswith("vae_spatial") or batch == BATCHES[-1]:
            break
    last = replace(choice, batch=BATCHES[-1])
    return replace(found, needs_bytes=max(_Stage.of(one, last, machine).least()[0] for one in stages_of(last)))


def _fit(stages: Sequence[StageLayers], choice: Choice, machine: Machine) -> Fit:
    found, bundle_bytes, refusal = {}, 0, ""
    for layers in stages:
        stage = _Stage.of(layers, choice, machine)
        bundle_bytes += stage.weight_bytes
        try:
            if not refusal:
                found[layers.name] = stage.planned()
        except BudgetError as error:
            refusal = str(error)
    return Fit({} if refusal else found, 0, bundle_bytes, refusal)


@dataclass(frozen=True)
class _Stage:
    """A stage for a choice on a machine: bytes of the weights of each layer, by variant, and what stretches cost."""

    layers: StageLayers
    choice: Choice
    machine: Machine
    stored: Mapping[str, Sequence[int]]
    costs: Costs  # at most, of all variants

    @classmethod
    def of(cls, layers: StageLayers, choice: Choice, machine: Machine) -> _Stage:
        int8 = any(fnmatchcase(layers.name, pattern) for pattern in choice.int8)
        stored = {
            name: [one.stored_bytes(int8 and (choice.embeddings or not one.looks_up)) for one in own]
            for name, own in layers.variants.items()
        }
        each = [_costs(layers, own, stored[name], machine) for name, own in layers.variants.items()]
        return cls(layers, choice, machine, stored, largest(each))

    @property
    def weight_bytes(self) -> int:
        """Of the weights that all variants share."""
        return sum(next(iter(self.stored.values()))) + shared_bytes(next(iter(self.layers.variants.values())))

    def least(self) -> tuple[int, list[int]]:
        """The cuts that need the least by the planner's estimate, and what a first run of them holds."""
        needs_bytes = smallest_budget(self.costs)[0]
        cuts = cheapest(replace(self.costs, machine=replace(self.machine, budget_bytes=needs_bytes)))
        assert cuts is not None, "the least budget has cuts"
        first = (first_needs_bytes(self.chain(self.partitions(name, cuts))) for name in self.layers.variants)
        return max(needs_bytes, *first), cuts

    def planned(self) -> StageFit:
        """A plan that keeps in reserve what the estimate of the one before missed, as a compile makes it.

        What fits some budget fits every larger one: where none of the plans does, the least one is taken.
        """
        name, budget_bytes = self.layers.name, self.machine.budget_bytes
        needs_bytes, least = self.least()
        if needs_bytes > budget_bytes:
            raise BudgetError(
                name,
                f"takes about {format_bytes(needs_bytes)} at least, cut between layers; "
                f"the budget is {format_bytes(budget_bytes)}; --exact cuts within layers, too, as a compile does",
            )
        reserved_bytes = 0
        for _ in range(PLANS):
            costs = replace(self.costs, machine=replace(self.machine, budget_bytes=budget_bytes - reserved_bytes))
            cuts = fewest_programs(costs, self._kinds(), SLACK, self._programs)
            if cuts is None:
                break
            try:
                return self._played(cuts)
            except BudgetError as error:
                missed_bytes = budget_bytes + error.excess_bytes - planned(costs, cuts).peak_bytes
                reserved_bytes = max(missed_bytes, reserved_bytes + error.excess_bytes)
        return self._played(least)

    def _kinds(self) -> list[int]:
        """A number for each layer, equal where layers have equal programs."""
        numbers: dict[str, int] = {}
        return [numbers.setdefault(one.kind, len(numbers)) for one in next(iter(self.layers.variants.values()))]

    def _programs(self, cuts: Sequence[int]) -> int:
        kinds = self._kinds()
        return len({tuple(kinds[start:stop]) for start, stop in pairwise(cuts)}) * len(self.layers.variants)

    def _played(self, cuts: Sequence[int]) -> StageFit:
        """The calls of a video by the best levels of some cuts; raises BudgetError where they need more."""
        stage, machine = self.layers, self.machine
        calls = _calls(stage, self.choice)
        chains = {name: self.chain(self.partitions(name, cuts)) for name in stage.variants}
        variants = {}
        for name, chain in chains.items():
            outputs = chain.partitions[-1].outputs
            count = max(calls.count(name), 1)
            variants[name] = variant_of(chain, machine, stage.cadence, count, stage.name, self._inputs, outputs)
        named = {one.name: one for chain in chains.values() for one in chain.partitions}
        simulator = Simulator(named, machine.slab_bytes, machine.rates, machine.budget_bytes)
        again = [name == after for name, after in zip(calls, [*calls[1:], ""], strict=True)]
        simulator.run(Call(stage.name, variants[name], more) for name, more in zip(calls, again, strict=True))
        orders = [(one, [named[name] for name in one.order]) for one in variants.values()]
        counts = [(chains[name], calls.count(name)) for name in dict.fromkeys(calls)]
        return StageFit(
            partitions=len(named),
            programs=self._programs(cuts),
            weight_bytes=self.weight_bytes,
            peak_bytes=max(most_bytes(one, order, machine.budget_bytes) for one, order in orders),
            times=stage_times(simulator.events)[stage.name],
            bound_s=sum(calls_bound_s(chain, machine.rates, machine.budget_bytes, count) for chain, count in counts),
        )

    @property
    def _inputs(self) -> tuple[TensorSpec]:
        return (_tensor("x", self.layers.input_bytes),)

    def chain(self, partitions: Sequence[Partition]) -> Chain:
        """Partitions of a variant, as they run."""
        return Chain.of(partitions, self._inputs, self.machine.slab_bytes)

    def partitions(self, variant: str, cuts: Sequence[int]) -> list[Partition]:
        """The records that a bundle would have of them."""
        layers, stored = self.layers.variants[variant], self.stored[variant]
        return _partitions(self.layers, variant, layers, stored, cuts, self.machine)


def _calls(stage: StageLayers, choice: Choice) -> list[str]:
    """The variants that one video calls."""
    if stage.cadence == "once":
        return ["plain"]
    if stage.cadence == "per_step":
        merged = min(choice.merged_steps if "merged" in stage.variants else 0, choice.evaluations)
        return ["merged"] * merged + ["plain"] * (choice.evaluations - merged)
    if stage.name == "vae_temporal":
        shown = [int(name.removeprefix("frames")) for name in stage.variants]
        whole, rest = divmod(choice.frames, shown[0])
        return [f"frames{shown[0]}"] * whole + ([f"frames{rest}"] if rest else [])
    return ["plain"] * math.ceil(choice.frames / choice.batch)


def _costs(stage: StageLayers, layers: Sequence[Layer], stored: Sequence[int], machine: Machine) -> Costs:
    """What every stretch of layers costs, as chain.py has it of nodes."""
    count = len(layers)
    behind = np.cumsum([0, *stored])
    tables = np.cumsum([0, *(one.shared > 0 for one in layers)])
    held = np.maximum(behind[None, :] - behind[:, None], 0)
    held += shared_bytes(layers) * (tables[None, :] > tables[:, None])
    before = np.array([0, *(layer.live_bytes for layer in layers)], np.int64)
    before[0] = max(stage.input_bytes, stage.output_bytes)
    working = np.zeros((count + 1, count + 1), np.int64)
    for start in range(count):
        first, *others = layers[start:]
        inner = [first.working_bytes, *(layer.working_bytes + layer.kept_bytes for layer in others)]
        working[start, start + 1 :] = machine.value_copies * np.maximum.accumulate(inner)
    lasting_bytes = stage.input_bytes + machine.slab_bytes + machine.node_bytes * NODES * count
    running = before[:, None] + before[None, :] + held + working + lasting_bytes
    running[held > MOST_WEIGHT_BYTES] = 1 << 60
    for index in range(count):  # a single layer fits whatever it weighs
        running[index, index + 1] = before[index] + before[index + 1] + held[index, index + 1]
        running[index, index + 1] += working[index, index + 1] + lasting_bytes
    each_s = [machine.run_s(one.flops, one.int8_flops(size)) for one, size in zip(layers, stored, strict=True)]
    done = np.cumsum([0, *each_s])
    run_s = np.maximum(done[None, :] - done[:, None], 0)
    return Costs(machine, lasting_bytes + before, held, working, running, run_s)


def _partitions(
    stage: StageLayers,
    variant: str,
    layers: Sequence[Layer],
    stored: Sequence[int],
    cuts: Sequence[int],
    machine: Machine,
) -> list[Partition]:
    """The records that a bundle would have of them."""
    found: list[Partition] = []
    for index, (start, stop) in enumerate(pairwise(cuts)):
        own = layers[start:stop]
        held_bytes = sum(stored[start:stop]) + shared_bytes(own)
        out_bytes = stage.output_bytes if stop == len(layers) else own[-1].live_bytes
        inputs = (_tensor("x", stage.input_bytes) if index == 0 else found[-1].outputs[0],)
        found.append(
            Partition(
                name=f"{stage.name}.{variant}.{index}",
                program="programs/p.pte",
                method=FORWARD,
                weights=(f"weights/{stage.name}-{index}",),
                inputs=inputs,
                outputs=(_tensor(f"h{index}", out_bytes),),
                weight_bytes=held_bytes,
                held_bytes=held_bytes,
                load_bytes=round(machine.load_copies * held_bytes),
                program_bytes=machine.node_bytes * NODES * len(own),
                workspace_bytes=round(machine.value_copies * most_working_bytes(own)),
                planned_bytes=0,
                flops=sum(layer.flops for layer in own),
                int8_flops=sum(layer.int8_flops(size) for layer, size in zip(own, stored[start:stop], strict=True)),
            )
        )
    return found


def _tensor(name: str, size_bytes: int) -> TensorSpec:
    return TensorSpec(name=name, dtype="u8", shape=(size_bytes,))
