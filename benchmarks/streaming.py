"""Streaming a denoiser within half of its weights: the engine's modes beside other runtimes, one evaluation at a time.

    pip install -c constraints.txt -r benchmarks/requirements.txt
    python benchmarks/streaming.py                      # every arm, 5 rounds
    python benchmarks/streaming.py --budget-sweep       # seconds against budget, docs/streaming-budget.png

Each arm is a process (streaming_arms.py). Those that stream are held by a cgroup to what the process takes once its
imports are done, plus the budget, plus 5 % of the weights; page cache that a process fills itself counts. A *warm*
pass finds the arm's files in the page cache, read before by this process, so that they count for no arm; a *cold* one
finds the page cache dropped. Passes are made in turns over the arms, and figures are medians.

Loads and runs of one pass are sums: of what the engine reports; of the hooks that bring weights in and out, and the
rest (accelerate, diffusers); of making and dropping sessions, and running them (ONNX Runtime). diffusers maps its
files, our engine its packed weights, and ONNX Runtime may, so that part of their reading is in their runs. Peak RSS is
of the timed passes and counts mapped files. What is made is kept in build/streaming; remove it to start afresh.
"""

from __future__ import annotations

import json
import math
import os
import platform
import statistics
import subprocess
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import matplotlib
import numpy as np
import typer
from cgroup import memory_group
from rich.console import Console
from rich.progress import track
from rich.table import Table
from streaming_arms import ARMS, DROP_CACHES, Answer, Request
from streaming_case import REPOSITORY, Case, command

from movdc.runtime.bundle import Bundle

CHART = REPOSITORY / "docs" / "streaming-budget.png"
REFERENCE = "torch resident"
SLACK = 0.05  # of the weights, on top of the budget
# Frames and side in pixels of the video for which reading all packed weights takes about so many times the runs, on two
# cores and a disk that reads 1.3 GB/s.
VIDEOS = {"0.3": (68, 64), "1": (34, 48), "3": (17, 32)}
SWEEP = [share / 10 for share in range(1, 11)]


class ArmError(Exception):
    """An arm ended before its answer, with the reason."""


class Process:
    """One arm in its process, in a cgroup where it streams and the machine lets us make one."""

    def __init__(self, case: Case, arm: str, budget_bytes: int, stack: ExitStack) -> None:
        self.warm_files = case.files(arm)
        streamed = ARMS[arm].streamed
        name = f"movdc-{os.getpid()}-{arm.replace(' ', '-')}"
        group = stack.enter_context(memory_group(name)) if streamed else None
        self.limit_bytes = 0
        job = replace(
            case.job(arm),
            output=str(case.output(arm)),
            budget_bytes=budget_bytes if streamed else 0,
            members=str(group.members) if group else "",
        )
        self._log = case.log(arm)
        log = stack.enter_context(self._log.open("w"))
        pipe = subprocess.PIPE
        self._child = subprocess.Popen(command(job), stdin=pipe, stdout=pipe, stderr=log, text=True)
        stack.callback(self._end)
        idle_bytes = int(self._line()["idle_bytes"])
        if group:
            self.limit_bytes = idle_bytes + budget_bytes + round(SLACK * case.weights_bytes)
            group.limit(self.limit_bytes)

    def ask(self, request: Request) -> Answer:
        """Have some passes run."""
        if not request.cold:
            for file in self.warm_files:
                _read(file)
        assert self._child.stdin is not None
        try:
            self._child.stdin.write(json.dumps(asdict(request)) + "\n")
            self._child.stdin.flush()
        except BrokenPipeError:
            pass  # the reason is in what it last said
        return Answer(**self._line())

    def _line(self) -> dict[str, Any]:
        assert self._child.stdout is not None
        line = self._child.stdout.readline()
        if not line:
            code = self._child.wait()
            said = self._log.read_text().strip().splitlines()
            raise ArmError("killed at its memory limit" if code == -9 else said[-1] if said else f"ended with {code}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _end(self) -> None:
        self._child.kill()
        self._child.communicate()


def _read(file: Path) -> None:
    with file.open("rb", buffering=0) as data:
        while data.read(16 << 20):
            pass


@dataclass
class Row:
    """What the passes of one arm took in one state of the page cache."""

    answers: list[Answer] = field(default_factory=list)

    def all(self, name: str) -> list[float]:
        """One figure of every pass."""
        return [value for answer in self.answers for value in getattr(answer, name)]

    def median(self, name: str) -> float:
        """The median of one figure."""
        return statistics.median(self.all(name))


Rows = dict[tuple[str, bool], Row]  # by arm and whether the page cache is cold


def measure(case: Case, arms: list[str], rounds: int, passes: int, colds: list[bool], console: Console) -> Rows:
    """Run the arms in turns; an arm that ends early is left out from then on."""
    rows: Rows = {(arm, cold): Row() for cold in colds for arm in arms}
    with ExitStack() as stack:
        running: dict[str, Process] = {}
        for arm in arms:
            try:
                running[arm] = Process(case, arm, case.weights_bytes // 2, stack)
            except ArmError as error:
                console.print(f"[red]{arm}: {error}[/]")
        limits = [f"{arm} {one.limit_bytes / 1e6:.0f} MB" for arm, one in running.items() if one.limit_bytes]
        console.print(f"limits: {', '.join(limits) or 'none, as no arm streams or no cgroup could be made here'}")
        for _ in track(range(rounds), "rounds", console=console):
            for cold in colds:
                for arm in list(running):
                    try:
                        rows[arm, cold].answers.append(running[arm].ask(Request(passes, cold)))
                    except ArmError as error:
                        console.print(f"[red]{arm}: {error}[/]")
                        del running[arm]
    return rows


def _relative_l2(case: Case, arm: str) -> float:
    """How far the arm's output is from that of PyTorch, of its norm; nan where that was not run."""
    if not case.output(REFERENCE).exists():
        return math.nan
    made, reference = np.load(case.output(arm)), np.load(case.output(REFERENCE))
    return float(np.linalg.norm(made - reference) / np.linalg.norm(reference))


def _machine() -> str:
    models = [
        line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    name = models[0] if models else platform.machine()
    return f"{name}, {os.cpu_count()} cores, {memory_bytes / 1e9:.0f} GB, load {os.getloadavg()[0]:.1f}"


def _table(case: Case, rows: Rows, cold: bool) -> Table:
    table = Table(title=f"page cache {'cold' if cold else 'warm'}; {_machine()}")
    columns = ("seconds a pass", "min", "max", "of resident", "loads", "runs", "peak RSS", "relative L2")
    table.add_column("arm")
    for column in columns:
        table.add_column(column, justify="right")
    resident = rows.get((REFERENCE, cold))
    for (arm, row_cold), row in rows.items():
        if row_cold != cold:
            continue
        if not row.answers:
            table.add_row(arm, "left out")
            continue
        seconds, error = row.all("seconds"), _relative_l2(case, arm)
        table.add_row(
            arm,
            f"{statistics.median(seconds):.2f}",
            f"{min(seconds):.2f}",
            f"{max(seconds):.2f}",
            f"{statistics.median(seconds) / resident.median('seconds'):.2f}" if resident and resident.answers else "-",
            f"{row.median('load_s'):.2f}",
            f"{row.median('run_s'):.2f}",
            f"{max(answer.peak_rss_bytes for answer in row.answers) / 1e6:.0f} MB",
            f"{error:.1e}",
        )
    return table


def sweep(case: Case, rounds: int, passes: int, console: Console) -> None:
    """Time the dynamic mode at budgets from a tenth of the weights to all of them, and draw it."""
    rows = {share: Row() for share in SWEEP}
    sequential = Row()
    for _ in track(range(rounds), "rounds", console=console):
        for share, row in [(0.5, sequential), *rows.items()]:
            arm = "movdc sequential" if row is sequential else "movdc dynamic"
            with ExitStack() as stack:
                try:
                    process = Process(case, arm, round(share * case.weights_bytes), stack)
                    row.answers.append(process.ask(Request(passes, cold=False)))
                except ArmError as error:
                    console.print(f"[red]{arm} at {share:.0%} of the weights: {error}[/]")
    if not sequential.answers:
        raise typer.Exit(1)
    measured = {share: row for share, row in rows.items() if row.answers}
    bounds = [_bound_s(case, sequential, row.answers[-1].pinned) for row in measured.values()]
    table = Table(title=f"page cache warm; {_machine()}")
    for column in ("budget", "seconds a pass", "min", "max", "line", "pinned"):
        table.add_column(column, justify="right")
    for (share, row), bound_s in zip(measured.items(), bounds, strict=True):
        seconds = row.all("seconds")
        figures = (statistics.median(seconds), min(seconds), max(seconds), bound_s)
        table.add_row(f"{share:.0%}", *(f"{figure:.2f}" for figure in figures), str(len(row.answers[-1].pinned)))
    console.print(table)
    _draw(case, measured, bounds)
    console.print(f"drawn in {CHART.relative_to(REPOSITORY)}")


def _bound_s(case: Case, sequential: Row, pinned: list[str]) -> float:
    """max(loads of what is not pinned, runs) + the first load, from the loads and runs of sequential passes."""
    bundle = Bundle.read(case.folder / "bundle")
    order = bundle.stages["denoiser"].variants["plain"].order
    held_bytes = {name: bundle.partitions[name].held_bytes for name in order}
    loaded = set(order) - set(sequential.answers[-1].pinned)
    s_per_byte = sequential.median("load_s") / sum(held_bytes[name] for name in loaded)
    streamed = [held_bytes[name] for name in order if name not in pinned]
    first_bytes = streamed[0] if streamed else 0
    return max(s_per_byte * sum(streamed), sequential.median("run_s")) + s_per_byte * first_bytes


def _draw(case: Case, rows: dict[float, Row], bounds: list[float]) -> None:
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    shares = [100 * share for share in rows]
    medians = [row.median("seconds") for row in rows.values()]
    below = [median - min(row.all("seconds")) for median, row in zip(medians, rows.values(), strict=True)]
    above = [max(row.all("seconds")) - median for median, row in zip(medians, rows.values(), strict=True)]
    axes.errorbar(shares, medians, [below, above], marker="o", capsize=3, label="movdc dynamic: median, min, max")
    axes.plot(shares, bounds, "--", label="max(loads of what is not pinned, runs) + first load")
    axes.set(xlabel="budget, % of the weights", ylabel="seconds a pass", xlim=(0, 105), ylim=(0, None))
    axes.set_title(f"{case.weights_bytes / 1e9:.1f} GB of weights, {_machine()}", fontsize=9)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(CHART, dpi=120)


def main(
    arms: Annotated[str, typer.Option(help=f"Which of {', '.join(ARMS)}; commas between.")] = ",".join(ARMS),
    rounds: Annotated[int, typer.Option(min=1, help="Turns over the arms.")] = 5,
    passes: Annotated[int, typer.Option(min=1, help="Timed passes of a turn.")] = 1,
    ratio: Annotated[str, typer.Option(help="About how long loads from the disk take, of runs: 0.3, 1 or 3.")] = "1",
    frames: Annotated[int, typer.Option(min=0, help="Frames of the video, in place of the ratio's.")] = 0,
    side: Annotated[int, typer.Option(min=0, help="Side of the video in pixels, in place of the ratio's.")] = 0,
    hidden: Annotated[int, typer.Option(min=64, help="Channels; a block has 64 bytes a channel squared.")] = 1152,
    depth: Annotated[int, typer.Option(min=1, help="Layers of two blocks.")] = 12,
    cache: Annotated[str, typer.Option(help="State of the page cache: warm, cold or both.")] = "both",
    compile_share: Annotated[float, typer.Option(help="Budget to compile for, of the weights.")] = 0.1,
    budget_sweep: Annotated[bool, typer.Option("--budget-sweep", help="Draw seconds against budget.")] = False,
) -> None:
    """Measure the arms in turns and print one table for each state of the page cache."""
    console = Console(width=120)
    names = [name.strip() for name in arms.split(",")]
    if unknown := sorted(set(names) - set(ARMS)):
        raise typer.BadParameter(f"{unknown[0]!r} is none of {', '.join(ARMS)}", param_hint="--arms")
    if ratio not in VIDEOS or cache not in ("warm", "cold", "both"):
        raise typer.BadParameter("a ratio is 0.3, 1 or 3; a cache is warm, cold or both")
    video = frames or VIDEOS[ratio][0], side or VIDEOS[ratio][1]
    case = Case(hidden, depth, *video, compile_share)
    case.folder.mkdir(parents=True, exist_ok=True)
    case.write_inputs()
    for name in ["movdc sequential", "movdc dynamic"] if budget_sweep else names:
        console.print(f"preparing {name}")
        try:
            case.prepare(name)
        except subprocess.CalledProcessError:
            console.print(f"[red]failed; what was printed is above or in {case.log(name)}[/]")
            raise typer.Exit(1) from None
    os.sync()
    console.print(f"{case.weights_bytes / 1e9:.2f} GB of weights, {case.frames} frames of {case.side_pixels} pixels")
    console.print(f"load before the first round: {os.getloadavg()[0]:.1f}")
    if budget_sweep:
        sweep(case, rounds, passes, console)
        return
    colds = {"warm": [False], "cold": [True], "both": [False, True]}[cache]
    if True in colds and not os.access(DROP_CACHES, os.W_OK):
        console.print("[yellow]Only root can drop the page cache: cold passes are left out.[/]")
        colds.remove(True)
    rows = measure(case, names, rounds, passes, colds, console)
    for cold in colds:
        console.print(_table(case, rows, cold))
        row = rows.get(("movdc sequential", cold))
        if row and row.answers:
            console.print(f"loads / runs of movdc sequential: {row.median('load_s') / row.median('run_s'):.2f}")


if __name__ == "__main__":
    typer.run(main)
