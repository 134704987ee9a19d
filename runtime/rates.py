"""Rates: what a device does in a second, from which the simulator makes the seconds of loads and runs."""

from __future__ import annotations

import math
from dataclasses import dataclass

from movdc.runtime.bundle import Partition


@dataclass(frozen=True)
class Part:
    """A part of a load: seconds where nothing runs beside it, and the bytes that it reads."""

    what: str  # verify, pack, read or init, as in a trace
    seconds: float
    read_bytes: int = 0


@dataclass(frozen=True)
class Rates:
    """A device's rates; `movdc calibrate` fits them to a trace."""

    load_bytes_per_s: float  # of weights as they are held
    compute_flops_per_s: float  # of products in floating point
    load_overhead_s: float = 0.0  # of each load
    run_overhead_s: float = 0.0  # of each run: what it does beside matrix products
    contention: float = 0.0  # while something loads, a run takes 1 + so much times as long
    load_contention: float = 0.0  # and a load while something runs
    pack_bytes_per_s: float = math.inf  # once for a device, of weights as they are stored
    verify_bytes_per_s: float = math.inf  # once in a process, of packed weights
    init_s: float = 0.0  # of a program, once until another variant runs
    int8_flops_per_s: float | None = None  # of products with int8 weights; None is as the others
    touch_bytes_per_s: float = math.inf  # of weights that were just loaded: the run behind maps their pages
    free_bytes_per_s: float = math.inf  # of weights that go when they have run

    def run_s(self, partition: Partition) -> float:
        """Seconds of a run on weights that have run before, while nothing loads."""
        int8_s = partition.int8_flops / (self.int8_flops_per_s or self.compute_flops_per_s)
        return self.run_overhead_s + (partition.flops - partition.int8_flops) / self.compute_flops_per_s + int8_s

    def touch_s(self, partition: Partition) -> float:
        """Seconds that a run takes longer when its weights were just loaded."""
        return partition.held_bytes / self.touch_bytes_per_s

    def free_s(self, partition: Partition) -> float:
        """Seconds until the weights are gone, in which nothing else runs."""
        return partition.held_bytes / self.free_bytes_per_s

    def load_s(self, partition: Partition) -> float:
        """Seconds of a load that only brings weights back, while nothing runs."""
        return self.load_overhead_s + partition.held_bytes / self.load_bytes_per_s

    def parts(self, partition: Partition, *, packs: bool, verifies: bool, initialises: bool) -> list[Part]:
        """The parts of a load, in order."""
        held_bytes = partition.held_bytes
        parts = []
        if packs:
            parts.append(Part("pack", partition.weight_bytes / self.pack_bytes_per_s))
        if verifies:
            parts.append(Part("verify", held_bytes / self.verify_bytes_per_s, held_bytes))
        parts.append(Part("read", self.load_s(partition), held_bytes))
        if initialises:
            parts.append(Part("init", self.init_s))
        return parts
