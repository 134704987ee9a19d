"""How long a compile takes and what memory it holds: from nothing, again, and with one option changed.

    python benchmarks/make_checkpoint.py DIR && python benchmarks/compile.py DIR/opensora.yaml --folder DIR/compiled
    python benchmarks/compile.py --growth

Each compile is the command that a user types, in a memory cgroup where the machine lets us make one. The floors are
what this machine takes for the same bytes when it does nothing else.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
import yaml
from cgroup import MemoryGroup, memory_group
from rich.console import Console
from rich.table import Table

from movdc.compiler.int8 import Loss
from movdc.compiler.spec import load_spec
from movdc.compiler.units import parse_bytes
from movdc.runtime.bundle import Bundle, Manifest

EXAMPLE = Path(__file__).parents[1] / "examples" / "tiny.yaml"
PHASES = ("trace", "passes", "lower", "weights", "expected")
_BAR = re.compile(rf"^({'|'.join(PHASES)})\s.*?(\d+)/\d+\s+(\d+):(\d+):(\d+)", re.MULTILINE)
_SAMPLE_BYTES = 1 << 28
_POLL_S = 0.1


@dataclass(frozen=True)
class Compiled:
    """What one compile took."""

    wall_s: float
    phase_s: dict[str, int]  # to the second, as the command prints it
    templates: int
    anonymous_bytes: int  # the most that its processes held beside page cache; 0 where nobody can say


def compile_in(arguments: Sequence[str], limit_bytes: int) -> Compiled:
    """Run `movdc compile` inside a memory limit; exits with what it printed if it fails or is killed."""
    command = [str(Path(sys.executable).with_name("movdc")), "compile", *arguments]
    with memory_group(f"movdc-compile-{os.getpid()}") as group, tempfile.TemporaryFile("w+") as printed:
        if group:
            group.limit(limit_bytes)
            command = ["sh", "-c", f'echo 0 > {group.members} && exec "$@"', "sh", *command]
        start = time.perf_counter()
        most_bytes = 0
        with subprocess.Popen(command, stdout=printed, stderr=subprocess.STDOUT) as child:
            while child.poll() is None:
                most_bytes = max(most_bytes, _anonymous_bytes(group) if group else 0)
                time.sleep(_POLL_S)
        wall_s = time.perf_counter() - start
        printed.seek(0)
        text = printed.read()
    if child.returncode != 0:
        raise SystemExit(f"{text}\n{' '.join(command)} ended with {child.returncode}")
    found = {name: (int(done), int(h) * 3600 + int(m) * 60 + int(s)) for name, done, h, m, s in _BAR.findall(text)}
    phase_s = {name: found[name][1] if name in found else 0 for name in PHASES}
    return Compiled(wall_s, phase_s, found.get("lower", (0, 0))[0], most_bytes)


def _anonymous_bytes(group: MemoryGroup) -> int:
    with suppress(OSError):
        stat = dict(line.split() for line in (group.folder / "memory.stat").read_text().splitlines())
        return int(stat["total_rss" if group.version == 1 else "anon"])
    return 0


def floors_s(checkpoint: Sequence[Path], manifest: Manifest, folder: Path) -> dict[str, tuple[int, float]]:
    """Bytes and seconds of each thing that has to be done, from a sample of each on the idle machine."""
    read_bytes = sum(file.stat().st_size for file in checkpoint)
    written_bytes = sum(file.size_bytes for file in manifest.files)
    int8_stages = {one.stage for one in manifest.quantization}
    int8_files = {path for one in manifest.partitions if one.name.split(".")[0] in int8_stages for path in one.weights}
    int8_bytes = sum(file.size_bytes for file in manifest.files if file.path in int8_files)
    largest = max(checkpoint, key=lambda file: file.stat().st_size)
    with largest.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        start = time.perf_counter()
        sample = file.read(_SAMPLE_BYTES)
        rates = {"read the checkpoint": (read_bytes, (time.perf_counter() - start) / len(sample))}
    start = time.perf_counter()
    hashlib.sha256(sample)
    rates["hash the bundle"] = (written_bytes, (time.perf_counter() - start) / len(sample))
    with tempfile.NamedTemporaryFile(dir=folder) as new:
        start = time.perf_counter()
        new.write(sample)
        os.fsync(new.fileno())
        rates["write the bundle"] = (written_bytes, (time.perf_counter() - start) / len(sample))
    weight = torch.rand(4096, 4096)
    start = time.perf_counter()
    Loss().to_int8(weight)
    rates["quantize"] = (int8_bytes, (time.perf_counter() - start) / weight.numel())
    return {name: (count, count * second) for name, (count, second) in rates.items()}


def full(spec: Path, folder: Path, limit_bytes: int, console: Console) -> None:
    """One spec: from nothing, again, with other steps, with another leap; then the floors."""
    folder.mkdir(parents=True, exist_ok=True)
    out, cache = folder / "bundle", folder / "cache"
    shutil.rmtree(cache, ignore_errors=True)
    settings = yaml.safe_load(spec.read_text())
    checkpoint = [
        file.resolve()
        for section in ("text_encoder", "denoiser", "vae")
        for file in sorted((spec.parent / settings[section]["weights"]).glob("*"))
        if file.suffix in (".bin", ".safetensors")
    ]
    for section in ("text_encoder", "denoiser", "vae"):
        settings[section]["weights"] = str((spec.parent / settings[section]["weights"]).resolve())
    steps = settings.get("sampler", {}).get("steps", 30)
    changed = {
        "nothing changed": settings,
        "other steps": settings | {"sampler": settings.get("sampler", {}) | {"steps": steps - 2}},
        "another leap": settings | {"passes": settings.get("passes", {}) | {"leap": {"mode": "fixed", "step": 12}}},
    }
    for file in checkpoint:  # a compile from nothing has read nothing before
        with file.open("rb") as opened:
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    table = Table(title=f"{spec} within {limit_bytes / 1e9:.1f} GB, load {os.getloadavg()[0]:.1f}, seconds")
    for column in ("compile", "wall", *PHASES, "templates", "peak without page cache"):
        table.add_column(column, justify="left" if column == "compile" else "right")
    for name, settings_now in {"from nothing": settings, **changed}.items():
        path = folder / "spec.yaml"
        path.write_text(yaml.safe_dump(settings_now))
        one = compile_in([str(path), "-o", str(out), "--cache", str(cache)], limit_bytes)
        phases = [str(one.phase_s[phase]) for phase in PHASES]
        table.add_row(name, f"{one.wall_s:.1f}", *phases, str(one.templates), f"{one.anonymous_bytes / 1e6:.0f} MB")
    console.print(table)
    manifest = Bundle.read(out).manifest
    size_bytes = sum(file.size_bytes for file in manifest.files)
    console.print(f"{size_bytes / 1e9:.2f} GB, {len(manifest.partitions)} partitions in {out}")
    for what, (count, seconds) in floors_s(checkpoint, manifest, folder).items():
        console.print(f"floor: {what}, {count / 1e9:.2f} GB, {seconds:.0f} s on one core")


def growth(blocks: Sequence[int], limit_bytes: int, console: Console) -> None:
    """Text encoders of more and more blocks, random weights, the rest of the pipeline as in the example."""
    table = Table(title=f"blocks of a text encoder, load {os.getloadavg()[0]:.1f}, seconds")
    for column in ("blocks", "wall", *PHASES, "templates", "bundle", "peak without page cache"):
        table.add_column(column, justify="right")
    settings: dict[str, Any] = yaml.safe_load(EXAMPLE.read_text())
    for section in ("text_encoder", "denoiser", "vae"):
        settings[section]["weights"] = str(EXAMPLE.parent / settings[section]["weights"])
    source = Path(settings["text_encoder"]["weights"])
    config = json.loads((source / "config.json").read_text()) | {"d_ff": 4096}
    with tempfile.TemporaryDirectory() as name:
        for count in blocks:
            encoder = {"weights": "random:0", "tokenizer": str(source), "config": config | {"num_layers": count}}
            settings["text_encoder"] = {"max_tokens": 24} | encoder
            path = Path(name) / "spec.yaml"
            path.write_text(yaml.safe_dump(settings | {"memory_budget": "24MB"}))
            one = compile_in([str(path), "-o", f"{name}/bundle", "--no-cache"], limit_bytes)
            size_bytes = sum(file.size_bytes for file in Bundle.read(Path(name) / "bundle").manifest.files)
            row = (f"{one.wall_s:.1f}", *(str(one.phase_s[phase]) for phase in PHASES), str(one.templates))
            table.add_row(str(count), *row, f"{size_bytes / 1e6:.0f} MB", f"{one.anonymous_bytes / 1e6:.0f} MB")
    console.print(table)


def main(
    spec: Annotated[Path | None, typer.Argument(help="A pipeline whose weights are folders.")] = None,
    folder: Annotated[Path, typer.Option(help="The bundle and the cache go here.")] = Path("build/compile"),
    limit: Annotated[str, typer.Option(help="Memory for a compile, page cache counted.")] = "4GB",
    grow: Annotated[bool, typer.Option("--growth", help="Text encoders of several depths instead.")] = False,
    blocks: Annotated[list[int] | None, typer.Option(help="Depths for --growth; 6, 12, 24, 48 by default.")] = None,
) -> None:
    """Compile several times and print a table."""
    limit_bytes = parse_bytes(limit)
    console = Console(width=120)
    if grow:
        growth(blocks or [6, 12, 24, 48], limit_bytes, console)
    elif spec is None:
        raise typer.BadParameter("name a pipeline YAML, or give --growth")
    else:
        load_spec(spec)
        full(spec, folder, limit_bytes, console)


if __name__ == "__main__":
    typer.run(main)
