"""The simulator beside the engine: seconds a step and peak memory of a bundle's denoiser, over modes and budgets.

    python benchmarks/simulator.py out/tiny
    python benchmarks/simulator.py build/streaming/SIZES/bundle     # of benchmarks/streaming.py

Rates are fitted to two runs of the engine (`movdc calibrate`): all of it loaded one after the other, and one that loads
beside what runs. Then the engine and the simulator run every budget, in turns; what is shown are medians of settled
steps. Weights are packed before, and the page cache is as the runs leave it.
"""

from __future__ import annotations

import statistics
import tempfile
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from movdc.runtime.bundle import NUMPY_DTYPES, Bundle, Partition
from movdc.runtime.calibrate import calibrate
from movdc.runtime.executor import Executor
from movdc.runtime.rates import Rates
from movdc.runtime.simulate import Call, Mode, Simulator
from movdc.runtime.timeline import Event, read_trace

STAGE, VARIANT = "denoiser", "plain"
SHARES = (0.2, 0.4, 0.6, 0.8, 1.0)  # of the way from the least level to all of it loaded


class Arms:
    """The engine and the simulator on one bundle."""

    def __init__(self, bundle: Bundle, packed: Path, steps: int) -> None:
        self.bundle = bundle
        self.variant = bundle.stages[STAGE].variants[VARIANT]
        self.named: dict[str, Partition] = {name: bundle.partitions[name] for name in self.variant.order}
        self._packed = packed
        self._steps = steps
        generator = np.random.default_rng(0)
        self._inputs: dict[str, np.ndarray[Any, Any]] = {
            spec.name: generator.standard_normal(spec.shape).astype(NUMPY_DTYPES[spec.dtype])
            for spec in self.variant.inputs
        }
        self._inputs["text_mask"] = np.ones_like(self._inputs["text_mask"])
        self.measure("dynamic", self.variant.residency[-1].needs_bytes + 10**8)  # packs
        self.rates = self._calibrated()

    def measure(self, mode: Mode, budget_bytes: int) -> tuple[list[Event], float, int]:
        """The engine's events, seconds of a settled step, and peak."""
        executor = Executor(
            self.bundle, mode=mode, memory_budget=budget_bytes, packed_cache=self._packed, keeps_trace=True
        )
        for index in range(self._steps):
            executor.run(STAGE, VARIANT, self._inputs, VARIANT if index + 1 < self._steps else None)
        reports = executor.reports[STAGE]
        path = self._packed / "trace.json"
        path.write_text(executor.trace())
        settled = [one.wall_s for one in reports[1:-1]]
        return read_trace(path), statistics.median(settled), max(one.peak_bytes for one in reports[1:])

    def simulate(self, mode: Mode, budget_bytes: int, rates: Rates | None = None) -> tuple[list[Event], float, int]:
        """The same of the simulator."""
        slab_bytes = self.bundle.manifest.slab_bytes
        simulator = Simulator(self.named, slab_bytes, rates or self.rates, budget_bytes, mode=mode)
        ends_s, peak_bytes = [0.0], 0
        for index in range(self._steps):
            simulator.books.peak_bytes = 0
            simulator.run([Call(STAGE, self.variant, index + 1 < self._steps)])
            ends_s.append(simulator.now_s)
            peak_bytes = max(peak_bytes, simulator.books.peak_bytes if index else 0)
        seconds = [after - before for before, after in pairwise(ends_s[1:-1])]
        return simulator.events, statistics.median(seconds), peak_bytes

    def _calibrated(self) -> Rates:
        least = self.variant.residency[0].needs_bytes
        concurrent = [row.needs_bytes for row in self.variant.residency if not row.pinned][-1]
        alone, _, _ = self.measure("sequential", max(least, self.variant.first_needs_bytes))
        beside, _, _ = self.measure("concurrent", concurrent + 10**8)
        after_s = max(event.end_s for event in alone) + 1
        shifted = [
            Event(one.what, one.partition, one.start_s + after_s, one.duration_s, one.bytes, one.held_bytes)
            for one in beside
        ]
        return calibrate([*alone, *shifted], self.bundle.partitions)


def main(
    bundle: Annotated[Path, typer.Argument(help="A bundle.")],
    rounds: Annotated[int, typer.Option(min=1, help="Turns over the budgets.")] = 3,
    steps: Annotated[int, typer.Option(min=4, help="Steps of a run.")] = 6,
) -> None:
    """Print one table."""
    console = Console(width=120)
    with tempfile.TemporaryDirectory() as folder:
        arms = Arms(Bundle.read(bundle), Path(folder), steps)
        rows = arms.variant.residency
        low, high = arms.variant.first_needs_bytes, rows[-1].needs_bytes  # a first run must fit, too
        ways: list[tuple[Mode, int]] = [("sequential", high), ("concurrent", high)]
        ways += [("dynamic", low + round(share * (high - low))) for share in SHARES]
        measured: dict[tuple[Mode, int], list[tuple[float, int]]] = {way: [] for way in ways}
        for _ in range(rounds):
            for way in ways:
                measured[way].append(arms.measure(*way)[1:])
        table = Table(title=f"{bundle}: a settled step of the denoiser; {arms.rates}")
        for column in ("mode", "budget", "engine", "simulated", "", "engine peak", "simulated peak", ""):
            table.add_column(column, justify="left" if column == "mode" else "right")
        for (mode, budget_bytes), found in measured.items():
            seconds = statistics.median(one for one, _ in found)
            peak_bytes = max(one for _, one in found)
            _, simulated_s, simulated_bytes = arms.simulate(mode, budget_bytes)
            table.add_row(
                mode,
                f"{budget_bytes / 1e6:.1f} MB",
                f"{seconds:.4f} s",
                f"{simulated_s:.4f} s",
                f"{simulated_s / seconds - 1:+.1%}",
                f"{peak_bytes / 1e6:.1f} MB",
                f"{simulated_bytes / 1e6:.1f} MB",
                f"{simulated_bytes / peak_bytes - 1:+.1%}",
            )
        console.print(table)


if __name__ == "__main__":
    typer.run(main)
