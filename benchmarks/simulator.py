"""The simulator beside the engine: seconds a step and peak memory of a denoiser, over budgets and what loads take.

    python benchmarks/simulator.py                      # loads of 0.3, 1 and 3 times the runs: half an hour
    python benchmarks/simulator.py --ratio 1            # one of them
    python benchmarks/simulator.py --bundle out/tiny    # another bundle

The engine runs every budget in turns, and three ways that tell the rates (`movdc calibrate`): all of it loaded one
after the other, loaded beside what runs, and all of it staying; each turn in another order, so that none always comes
when the machine is at its slowest. Then the simulator plays them by the rates that fit all turns; what is shown are
medians of settled steps. Weights are packed before; what has been freed is dropped from the page cache after each step,
so that it is read from the disk again, as on a phone that has no memory left. Bundles are kept in build/streaming.
"""

from __future__ import annotations

import os
import random
import statistics
import tempfile
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.table import Table
from streaming_case import Case

from movdc.runtime.bundle import NUMPY_DTYPES, Bundle, Partition
from movdc.runtime.calibrate import calibrate
from movdc.runtime.executor import Executor
from movdc.runtime.rates import Rates
from movdc.runtime.simulate import Call, Mode, Simulator
from movdc.runtime.timeline import Event, joined, read_trace

STAGE, VARIANT = "denoiser", "plain"
SHARES = (0.2, 0.4, 0.6, 0.8)  # of the weights
CLOSE_S, CLOSE_BYTES = 0.1, 0.05  # what the simulator is held to
# Frames and side of the video for which loads from a disk of 1.3 GB/s take about so many times the runs of two cores.
VIDEOS = {"0.3": (51, 96), "1": (34, 64), "3": (1, 48)}
HIDDEN, DEPTH, COMPILE_SHARE = 512, 8, 0.4


Way = tuple[Mode, int]  # and its budget in bytes


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
        os.sync()  # what is not yet on the disk cannot be dropped
        self.calibrate([self.measure(*way)[0] for way in self.calibrating])

    @property
    def calibrating(self) -> tuple[Way, ...]:
        """Runs that tell the rates: loads one after the other, loads beside what runs, and none."""
        return (("sequential", self.most_bytes), ("concurrent", self.most_bytes), ("dynamic", self.most_bytes))

    def calibrate(self, traces: list[list[Event]]) -> None:
        """Fit the rates to runs."""
        self.rates = calibrate(joined(traces), self.bundle.partitions)

    @property
    def ratio(self) -> float:
        """Of the seconds of all loads to those of all runs."""
        loads_s, runs_s = (sum(of(one) for one in self.named.values()) for of in (self.rates.load_s, self.rates.run_s))
        return loads_s / runs_s

    @property
    def weights_bytes(self) -> int:
        """Of all partitions, as they are held."""
        return sum(one.held_bytes for one in self.named.values())

    @property
    def most_bytes(self) -> int:
        """The budget in which everything stays loaded."""
        return self.variant.residency[-1].needs_bytes

    def measure(self, mode: Mode, budget_bytes: int) -> tuple[list[Event], float, int]:
        """The engine's events, seconds of a settled step, and peak."""
        executor = Executor(
            self.bundle, mode=mode, memory_budget=budget_bytes, packed_cache=self._packed, keeps_trace=True
        )
        for index in range(self._steps):
            drop_cached(self._packed)
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


def drop_cached(folder: Path) -> None:
    """Drop files from the page cache, as far as nothing has mapped them."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


@dataclass(frozen=True)
class Compared:
    """A mode at a budget: seconds of a settled step and peak bytes of the engine and of the simulator."""

    mode: Mode
    budget_bytes: int
    engine: tuple[float, int]
    simulated: tuple[float, int]

    @property
    def off(self) -> tuple[float, float]:
        """How far the simulator is off, of the engine's figures."""
        seconds, peak_bytes = (mine / its - 1 for mine, its in zip(self.simulated, self.engine, strict=True))
        return seconds, peak_bytes

    @property
    def is_close(self) -> bool:
        """Whether that is within what it is held to."""
        seconds, peak_bytes = self.off
        return abs(seconds) <= CLOSE_S and abs(peak_bytes) <= CLOSE_BYTES


def compare(arms: Arms, rounds: int) -> list[Compared]:
    """The runs that tell the rates, and each budget; the engine in turns, because its machine's pace varies."""
    least_bytes = arms.variant.first_needs_bytes  # a first run must fit, too
    budgets = [max(round(share * arms.weights_bytes), least_bytes) for share in SHARES]
    ways: list[Way] = [*arms.calibrating, *(("dynamic", budget_bytes) for budget_bytes in budgets)]
    measured: dict[Way, list[tuple[float, int]]] = {way: [] for way in ways}
    traces, turns = [], random.Random(0)
    for _ in range(rounds):
        for way in turns.sample(ways, len(ways)):
            events, seconds, peak_bytes = arms.measure(*way)
            measured[way].append((seconds, peak_bytes))
            if way in arms.calibrating:
                traces.append(events)
    arms.calibrate(traces)
    return [
        Compared(*way, (statistics.median(s for s, _ in found), max(b for _, b in found)), arms.simulate(*way)[1:])
        for way, found in measured.items()
    ]


def print_table(console: Console, title: str, arms: Arms, found: list[Compared]) -> None:
    """One row for each mode and budget."""
    table = Table(title=f"{title}: a settled step of the denoiser, loads / runs = {arms.ratio:.2f}")
    for column in ("mode", "budget", "of weights", "engine", "simulated", "", "engine peak", "simulated peak", "", ""):
        table.add_column(column, justify="left" if column == "mode" else "right")
    for one in found:
        (engine_s, engine_bytes), (simulated_s, simulated_bytes) = one.engine, one.simulated
        off_s, off_bytes = one.off
        table.add_row(
            one.mode,
            f"{one.budget_bytes / 1e6:.1f} MB",
            f"{one.budget_bytes / arms.weights_bytes:.0%}",
            f"{engine_s:.4f} s",
            f"{simulated_s:.4f} s",
            f"{off_s:+.1%}",
            f"{engine_bytes / 1e6:.1f} MB",
            f"{simulated_bytes / 1e6:.1f} MB",
            f"{off_bytes:+.1%}",
            "" if one.is_close else "off",
        )
    console.print(table)
    console.print(f"rates: {arms.rates}", highlight=False)


def main(
    ratio: Annotated[str, typer.Option(help=f"Which of {', '.join(VIDEOS)}; commas between.")] = ",".join(VIDEOS),
    bundle: Annotated[Path | None, typer.Option(help="A bundle of your own, in place of those.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Turns over the budgets.")] = 15,
    steps: Annotated[int, typer.Option(min=4, help="Steps of a run.")] = 6,
    hidden: Annotated[int, typer.Option(min=64, help="Channels; a block has 64 bytes a channel squared.")] = HIDDEN,
    depth: Annotated[int, typer.Option(min=1, help="Layers of two blocks.")] = DEPTH,
) -> None:
    """Print a table for each ratio as soon as it is measured."""
    console = Console(width=120)
    if unknown := sorted(set(ratio.split(",")) - set(VIDEOS)):
        raise typer.BadParameter(f"{unknown[0]!r} is none of {', '.join(VIDEOS)}", param_hint="--ratio")
    bundles = {} if bundle is None else {str(bundle): bundle}
    cases = {} if bundle else {one: Case(hidden, depth, *VIDEOS[one], COMPILE_SHARE) for one in ratio.split(",")}
    for one, case in cases.items():
        case.folder.mkdir(parents=True, exist_ok=True)
        case.compile()
        bundles[f"about {one}"] = case.folder / "bundle"
    console.print(f"load before the first run: {os.getloadavg()[0]:.1f} of {os.cpu_count()} cores", highlight=False)
    close = True
    for title, path in bundles.items():
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:  # on a disk, which /tmp need not be
            arms = Arms(Bundle.read(path), Path(folder), steps)
            found = compare(arms, rounds)
        print_table(console, title, arms, found)
        close = close and all(one.is_close for one in found)
    held_to = f"seconds within {CLOSE_S:.0%} and peak within {CLOSE_BYTES:.0%} of the engine's"
    console.print(f"{'all' if close else 'not all'} {held_to}")


if __name__ == "__main__":
    typer.run(main)
