"""Each variant of each stage of a bundle on its own, inside the memory that the bundle was compiled for.

    python benchmarks/stages.py out/opensora

Each runs in a process of its own, which the kernel holds to what it takes when it is idle, plus the budget; page cache
counts. The first run packs weights (into --packed-cache, unless they are there), the last one is what is shown.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from cgroup import memory_group
from rich.console import Console
from rich.table import Table

from movdc.runtime.bundle import NUMPY_DTYPES, Bundle
from movdc.runtime.executor import Executor, Mode

TOKENS = 40  # of the prompt


def _run_one(root: Path, stage: str, variant: str, packed_cache: Path, mode: Mode, runs: int) -> None:
    """The arm: says that it is idle, waits for its limit, runs, and says what the runs took."""
    bundle = Bundle.read(root)
    generator = np.random.default_rng(0)
    inputs = {}
    for spec in bundle.stages[stage].variants[variant].inputs:
        values = generator.standard_normal(spec.shape)
        if spec.name == "text_mask":
            values = np.arange(spec.shape[-1])[None] < TOKENS
        elif spec.name == "timestep":
            values = np.full(spec.shape, 500)
        elif spec.dtype == "i64":  # token ids
            values = generator.integers(3, 100, spec.shape)
        inputs[spec.name] = np.asarray(values, NUMPY_DTYPES[spec.dtype])
    executor = Executor(bundle, mode=mode, packed_cache=packed_cache)
    print("idle", flush=True)
    sys.stdin.readline()
    for _ in range(runs):
        outputs = executor.run(stage, variant, inputs)
    report = executor.reports[stage][-1]
    finite = all(bool(np.isfinite(array).all()) for array in outputs.values())
    names = ("wall_s", "load_s", "run_s", "wait_s", "peak_bytes", "read_bytes")
    print(json.dumps({name: getattr(report, name) for name in names} | {"finite": finite}), flush=True)


def _measure(command: list[str], budget_bytes: int) -> dict[str, float]:
    """What the arm says, or nothing if it was killed."""
    with memory_group(f"movdc-stages-{os.getpid()}") as group:
        pipe = subprocess.PIPE
        if group:
            command = ["sh", "-c", f'echo 0 > {group.members} && exec "$@"', "sh", *command]
        with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as child:
            assert child.stdin is not None
            assert child.stdout is not None
            child.stdout.readline()
            if group:
                status = Path(f"/proc/{child.pid}/status").read_text()
                idle_bytes = int(status.split("VmRSS:")[1].split()[0]) * 1024
                group.limit(idle_bytes + budget_bytes)
            child.stdin.write("\n")
            child.stdin.flush()
            line = child.stdout.readline()
        found: dict[str, float] = json.loads(line) if line else {}
        return found


def main(
    bundle: Annotated[Path, typer.Argument(help="A bundle.")],
    packed_cache: Annotated[Path | None, typer.Option(help="Keep packed weights here.")] = None,
    mode: Annotated[Mode, typer.Option(help="As of movdc run.")] = "dynamic",
    only: Annotated[str, typer.Option(help="Stages, with commas between; all by default.")] = "",
    runs: Annotated[int, typer.Option(min=1, help="Runs of each variant.")] = 2,
    one: Annotated[str, typer.Option(hidden=True)] = "",
) -> None:
    """Measure the stages one after the other and print a table."""
    if one:
        assert packed_cache is not None
        _run_one(bundle, *one.split(":"), packed_cache, mode, runs)
        return
    read = Bundle.read(bundle)
    names = [stage.name for stage in read.manifest.stages]
    chosen = only.split(",") if only else names
    if unknown := sorted(set(chosen) - set(names)):
        raise typer.BadParameter(f"{unknown[0]!r} is none of {', '.join(names)}", param_hint="--only")
    console = Console(width=120)
    table = Table(title=f"{bundle}, budget {read.manifest.budget_bytes / 1e9:.2f} GB, {mode}")
    for column in ("stage", "wall", "loads", "runs", "waits", "hidden", "peak", "read"):
        table.add_column(column, justify="left" if column == "stage" else "right")
    with tempfile.TemporaryDirectory() as folder:
        for stage in read.manifest.stages:
            if stage.name not in chosen:
                continue
            for variant in stage.variants:
                kept = str(packed_cache or folder)
                command = [sys.executable, __file__, str(bundle), "--one", f"{stage.name}:{variant}"]
                command += ["--packed-cache", kept, "--mode", mode, "--runs", str(runs)]
                found = _measure(command, read.manifest.budget_bytes)
                name = f"{stage.name} ({variant})"
                if not found:
                    table.add_row(name, "killed or failed")
                    continue
                times = [f"{found[key]:.1f} s" for key in ("wall_s", "load_s", "run_s", "wait_s")]
                hidden = f"{max(0.0, 1 - found['wait_s'] / found['load_s']):.0%}" if found["load_s"] else "-"
                sizes = (f"{found['peak_bytes'] / 1e6:.0f} MB", f"{found['read_bytes'] / 1e6:.0f} MB")
                table.add_row(name if found["finite"] else f"{name}, not finite", *times, hidden, *sizes)
    console.print(table)


if __name__ == "__main__":
    typer.run(main)
