"""What each pass costs and brings, on the example: one bundle a setting, the same prompts and noises through all.

    python benchmarks/passes.py --prompts 12

Clips are made in turns (prompt by prompt, every setting), so that a busy machine slows all settings alike; seconds
are medians. PSNR is against the clip of `full` from the same noise.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table
from shape_clips import ATTRIBUTES, judge, prompts

from movdc.passes.pipeline import default_pipeline
from movdc.runtime.bundle import Bundle
from movdc.runtime.executor import Executor
from movdc.runtime.generate import Generator
from movdc.runtime.video import Frames
from movdc.targets.executorch_xnnpack import ExecutorchXnnpack

EXAMPLE = Path(__file__).parents[1] / "examples" / "tiny.yaml"
INT8 = {"quantize-int8": {}}
LEAP = {"leap": {"mode": "fixed"}}
SETTINGS: dict[str, dict[str, dict[str, object]]] = {
    "full": {},
    "int8": INT8,
    "merge-tokens 15": {"merge-tokens": {"steps": 15}},
    "merge-tokens 30": {"merge-tokens": {"steps": 30}},
    "leap fixed": LEAP,
    "leap dynamic": {"leap": {"mode": "dynamic"}},
    "all": INT8 | {"merge-tokens": {"steps": 15}} | LEAP,
}


@dataclass
class Row:
    """A setting, its bundle and what was measured."""

    generator: Generator
    weight_bytes: int
    evaluations: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    psnr_db: list[float] = field(default_factory=list)
    right: int = 0  # attributes of all clips


def compiled(name: str, folder: Path) -> Row:
    """Compile one setting through the command line and open the bundle."""
    out = folder / name.replace(" ", "-")
    pipeline = ",".join(map(str, default_pipeline(SETTINGS[name], ExecutorchXnnpack())))
    movdc = Path(sys.executable).with_name("movdc")
    subprocess.run([movdc, "compile", EXAMPLE, "-o", out, "--passes", pipeline], check=True, capture_output=True)
    bundle = Bundle.read(out)
    weights = {file.path for file in bundle.manifest.weights}
    size = sum(file.size_bytes for file in bundle.manifest.files if file.path in weights)
    return Row(Generator(bundle, Executor(bundle)), size)


def psnr_db(frames: Frames, reference: Frames) -> float:
    """Peak signal-to-noise ratio of frames [N, H, W, 3] uint8, in dB; infinite where they are equal."""
    error = np.mean((frames.astype(np.float64) - reference) ** 2)
    return float(10 * np.log10(255**2 / error)) if error else float("inf")


def main(
    count: Annotated[int, typer.Option("--prompts", min=1, help="How many prompts to draw.")] = 12,
    seed: Annotated[int, typer.Option(min=0, help="Decides the prompts and the noises.")] = 0,
    out: Annotated[Path, typer.Option(help="Where the bundles go.")] = Path("out/bench-passes"),
) -> None:
    """Compile every setting, make the clips in turns, print one table."""
    console = Console(width=120)
    rows = {name: compiled(name, out) for name in track(SETTINGS, "compile", console=console)}
    for index, (prompt, named) in enumerate(track(list(prompts(count, seed)), "clips", console=console)):
        reference: Frames | None = None
        for row in rows.values():
            start = time.perf_counter()
            result = row.generator.generate(prompt, seed=seed + index)
            row.seconds.append(time.perf_counter() - start)
            row.evaluations.append(result.trajectory.evaluations)
            reference = result.frames if reference is None else reference
            row.psnr_db.append(psnr_db(result.frames, reference))
            seen = judge(result.frames)
            row.right += sum(getattr(seen, one) == getattr(named, one) for one in ATTRIBUTES)
    console.print(_table(rows, count, seed))


def _table(rows: dict[str, Row], count: int, seed: int) -> Table:
    load = os.getloadavg()[0]
    table = Table(title=f"{count} prompts, seed {seed}, {os.cpu_count()} cores, load {load:.1f}")
    for column in ("setting", "evaluations", "weights", "seconds", "of full", "PSNR mean", "PSNR worst", "adherence"):
        table.add_column(column, justify="left" if column == "setting" else "right")
    full_s = statistics.median(rows["full"].seconds)
    for name, row in rows.items():
        seconds = statistics.median(row.seconds)
        table.add_row(
            name,
            f"{statistics.mean(row.evaluations):.1f}",
            f"{row.weight_bytes / 1e6:.2f} MB",
            f"{seconds:.2f}",
            f"{seconds / full_s:.2f}",
            f"{statistics.mean(row.psnr_db):.1f} dB",
            f"{min(row.psnr_db):.1f} dB",
            f"{row.right} of {len(ATTRIBUTES) * count}",
        )
    return table


if __name__ == "__main__":
    typer.run(main)
