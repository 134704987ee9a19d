"""The paper's measurement sets as chains of equal blocks, and its rule for loading ahead, for paper.py."""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

from movdc.compiler.device import Machine
from movdc.compiler.residency import Chain
from movdc.runtime.bundle import Partition, Residency, Variant
from movdc.runtime.rates import Rates
from movdc.runtime.simulate import Call, Simulator
from movdc.runtime.simulated_loader import Loader

BLOCK_BYTES = 170 * 10**6  # of a denoiser's block in fp32: what the reference counts a load as
WORKING_BYTES = 900 * 10**6  # what the app and a running block take: the same example of the paper
USABLE_BYTES = 3_300_000_000
SETTLED = 6  # passes after which each takes as long as the one before


@dataclass(frozen=True)
class Profile:
    """One measurement set."""

    blocks: int
    load_s: float
    run_s: float
    overhead_s: float | str
    pinned: int
    source: str

    def chain(self, block_bytes: int = BLOCK_BYTES) -> Chain:
        """The blocks as partitions; a second is so many bytes or FLOPs that the rates below give it back."""
        return Chain.of([_block(index, block_bytes) for index in range(self.blocks)], (), 0)

    def rates(self, block_bytes: int = BLOCK_BYTES) -> Rates:
        """Rates that reproduce its seconds; runs are slowed by what a pass of loads costs them in all."""
        plain = Rates(block_bytes / self.load_s, block_bytes / self.run_s)
        if isinstance(self.overhead_s, str):
            return replace(plain, contention=self._fitted(plain, float(self.overhead_s)))
        # A load beside a run slows it: of `load_s` seconds the run loses contention / (1 + contention) of them.
        lost = self.overhead_s / (self.blocks * self.load_s)
        return replace(plain, contention=lost / (1 - lost))

    def _fitted(self, plain: Rates, wanted_s: float) -> float:
        """The contention of both lanes with which a concurrent pass takes so long."""
        low, high = 0.0, 20.0
        for _ in range(40):
            middle = (low + high) / 2
            slower = pass_s(self, replace(plain, contention=middle), 0) > wanted_s
            low, high = (low, middle) if slower else (middle, high)
        return high

    def machine(self, budget_bytes: int = USABLE_BYTES) -> Machine:
        """What a plan of ours is made for."""
        rates = self.rates()
        return Machine(
            budget_bytes, rates.load_bytes_per_s, rates.compute_flops_per_s, 0.0, 1.0, contention=rates.contention
        )


def profiles() -> dict[str, Profile]:
    """All of paper.toml by name."""
    text = (Path(__file__).parent / "paper.toml").read_text()
    return {name: Profile(**entry) for name, entry in tomllib.loads(text).items()}


def _block(index: int, block_bytes: int) -> Partition:
    return Partition(
        name=f"blocks.plain.{index}",
        program="programs/p.pte",
        method="forward",
        weights=(f"weights/{index}.ptd",),
        inputs=(),
        outputs=(),
        weight_bytes=block_bytes,
        held_bytes=block_bytes,
        load_bytes=block_bytes,
        program_bytes=0,
        workspace_bytes=WORKING_BYTES,
        planned_bytes=0,
        flops=block_bytes,
    )


class _OneAhead(Loader):
    """The paper's rule: the load of a block begins when the block before it begins to run, and not earlier."""

    def may_start(self, name: str) -> bool:
        """See above; the very first load has nothing before it."""
        names = list(self.partitions)
        before = self.held.get(names[names.index(name) - 1])
        return name not in self.held and (not self.held or (before is not None and before.state == "running"))


def variant_with(chain: Chain, row: Residency) -> Variant:
    """A variant of one level."""
    order = tuple(one.name for one in chain.partitions)
    return Variant(
        inputs=(),
        outputs=(),
        order=order,
        residency=(row,),
        first_needs_bytes=0,
        certificate=(),
        peak_bytes=row.needs_bytes,
    )


def passes(chain: Chain, rates: Rates, row: Residency, count: int, one_ahead: bool = False) -> list[float]:
    """Seconds of each of so many passes, each of which loads ahead for the next."""
    named = {one.name: one for one in chain.partitions}
    simulator = Simulator(named, 0, rates, row.needs_bytes)
    if one_ahead:
        simulator.loader = _OneAhead(named, rates, simulator.books, simulator.events.append, simulator.loader.packed)
    variant = variant_with(chain, row)
    ends_s = [0.0]
    for index in range(count):
        simulator.run([Call("blocks", variant, again=index + 1 < count)])
        ends_s.append(simulator.now_s)
    return [after - before for before, after in pairwise(ends_s)]


def pass_s(profile: Profile, rates: Rates, pinned: int, run_share: float = 1.0) -> float:
    """A settled pass by the paper's rule, its first blocks pinned; runs may take a share of their seconds."""
    chain = profile.chain()
    if run_share != 1.0:
        rates = replace(rates, compute_flops_per_s=rates.compute_flops_per_s / run_share)
    names = tuple(one.name for one in chain.partitions)
    row = Residency(needs_bytes=10**12, prefetch=1, pinned=names[:pinned])
    return passes(chain, rates, row, SETTLED, one_ahead=True)[-2]


def sequential_s(profile: Profile, run_share: float = 1.0) -> float:
    """A pass of one load and one run after the other."""
    return profile.blocks * (profile.load_s + profile.run_s * run_share)


def pair_fit(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """a and b of a + b x through two points."""
    (x0, y0), (x1, y1) = points
    slope = (y1 - y0) / (x1 - x0)
    return y0 - slope * x0, slope
