"""What the command line prints of runs and bundles."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.table import Table

from movdc.compiler.bounds import stage_bounds_s
from movdc.compiler.errors import Refusal
from movdc.compiler.units import format_bytes
from movdc.runtime.bundle import LayerError, Manifest, Variant
from movdc.runtime.sampler import Trajectory
from movdc.runtime.simulate import Simulator, calls_of
from movdc.runtime.timeline import Report

if TYPE_CHECKING:
    from movdc.compiler.device import DeviceProfile, Machine
    from movdc.compiler.fit import Choice, Fit
    from movdc.compiler.offers import Offer
    from movdc.runtime.rates import Rates
    from movdc.runtime.replay import Finding
    from movdc.runtime.straightness import Straightness

_WORST_SHOWN = 10
_COLUMNS = 116  # wider than a pipe's 80, for nothing in a table may be cut off


def print_trajectory(console: Console, trajectory: Trajectory) -> None:
    """How many evaluations the sampler made, where it leapt, and how straight its way was at each step."""
    leap = ""
    if trajectory.leap_step is not None and trajectory.sigma is not None:
        leap = f"; a leap at step {trajectory.leap_step} with {trajectory.sigma:.3f} of the time left"
    console.print(f"{trajectory.evaluations} evaluations{leap}", highlight=False)
    if trajectory.refusal:
        console.print(f"no leap: {trajectory.refusal}", style="yellow", highlight=False, soft_wrap=True)
    cosines = " ".join("-" if math.isnan(cosine) else f"{cosine:.4f}" for cosine in trajectory.cosines)
    console.print(f"cosine of the drift with the one before, by step: {cosines}", highlight=False, soft_wrap=True)


def print_reports(console: Console, reports: Mapping[str, Sequence[Report]]) -> None:
    """What each stage took on both lanes, and what it held."""
    table = Table(box=box.SIMPLE, padding=(0, 1, 0, 0))
    for column in ("stage", "calls", "wall", "loads", "runs", "waits", "hidden", "peak", "stay", "read"):
        table.add_column(column, justify="left" if column == "stage" else "right", no_wrap=True)
    for stage, some in reports.items():
        wall_s, load_s, run_s, wait_s = (
            sum(getattr(one, name) for one in some) for name in ("wall_s", "load_s", "run_s", "wait_s")
        )
        hidden = f"{max(0.0, 1 - wait_s / load_s):.0%}" if load_s > 0 else "-"  # of loading, behind running
        times = (f"{seconds:.2f} s" for seconds in (wall_s, load_s, run_s, wait_s))
        peak, read = max(one.peak_bytes for one in some), sum(one.read_bytes for one in some)
        calls, pinned = str(sum(one.calls for one in some)), some[-1].pinned
        stay = "-" if pinned is None else str(len(pinned))
        table.add_row(stage, calls, *times, hidden, format_bytes(peak), stay, format_bytes(read))
    Console(width=max(console.width, _COLUMNS)).print(table)


def print_devices(console: Console, profiles: Mapping[str, DeviceProfile]) -> None:
    """The figures of every device, rates in billions a second."""
    table = Table(box=box.SIMPLE, padding=(0, 1, 0, 0), caption="`movdc devices NAME` says where the numbers come from")
    for column in ("device", "memory", "loads", "a load", "fp32", "fp16", "int8", "contention"):
        table.add_column(column, justify="left" if column == "device" else "right", no_wrap=True)
    for name, one in profiles.items():
        rates = (one.fp32_flops_per_s, one.fp16_flops_per_s, one.int8_flops_per_s)
        table.add_row(
            name,
            f"{one.usable_memory / 1e9:.1f} GB",
            f"{one.load_rate / 1e9:.2f} GB/s",
            f"{one.load_overhead_s * 1000:.1f} ms",
            *(f"{rate / 1e9:.0f} GFLOP/s" for rate in rates),
            f"{one.contention:.0%}",
        )
    Console(width=max(console.width, _COLUMNS)).print(table)


def print_sources(console: Console, profile: DeviceProfile) -> None:
    """Each figure of a device with its source."""
    table = Table(box=box.SIMPLE, padding=(0, 1, 0, 0))
    for column in ("figure", "value", "source"):
        table.add_column(column, overflow="fold")
    for name, value in profile.numbers.items():
        table.add_row(name, f"{value:.4g}", profile.source[name])
    Console(width=max(console.width, _COLUMNS)).print(table)


def print_refusals(console: Console, refusals: Sequence[Refusal]) -> None:
    """What a target cannot run, where it comes from, and why."""
    table = Table(box=box.SIMPLE, padding=(0, 1, 0, 0))
    for column in ("stage", "nodes", "first node", "operator", "module", "reason"):
        table.add_column(column, justify="right" if column == "nodes" else "left", overflow="fold")
    for one in refusals:
        table.add_row(one.stage, str(one.count), f"%{one.node}", one.operator, one.module or "-", one.reason)
    Console(file=console.file, width=max(console.width, _COLUMNS)).print(table)


def print_fit(console: Console, name: str, found: Fit, choice: Choice, machine: Machine) -> None:
    """Whether it fits, and what each stage takes."""
    size = f"{choice.frames} frames of {choice.height}x{choice.width}, {choice.evaluations} evaluations"
    if not found.fits:
        console.print(f"{name}: {size}: does not fit: {found.refusal}", highlight=False, soft_wrap=True)
        console.print(
            f"the least budget that it can be cut for is about {format_bytes(found.needs_bytes)}", highlight=False
        )
        return
    table = Table(title=f"{name}: {size}", box=box.SIMPLE, padding=(0, 1, 0, 0))
    counts, seconds_of = ("calls", "partitions", "programs"), ("plan", "bound", "loads", "runs", "waits")
    for column in ("stage", *counts, "weights", "peak", *seconds_of):
        table.add_column(column, justify="left" if column == "stage" else "right", no_wrap=True)
    for stage, one in found.stages.items():
        times = one.times
        seconds = (f"{value:.1f} s" for value in (times.wall_s, one.bound_s, times.load_s, times.run_s, times.wait_s))
        sizes = (format_bytes(one.weight_bytes), format_bytes(one.peak_bytes))
        table.add_row(stage, str(one.times.calls), str(one.partitions), str(one.programs), *sizes, *seconds)
    Console(width=max(console.width, _COLUMNS)).print(table)
    console.print(
        f"fits: plan {found.seconds:.1f} s a video, bound {found.bound_s:.1f} s, "
        f"peak {format_bytes(found.peak_bytes)} of {format_bytes(machine.budget_bytes)}, "
        f"least budget about {format_bytes(found.needs_bytes)}, bundle {format_bytes(found.bundle_bytes)}",
        highlight=False,
        soft_wrap=True,
    )


def print_offers(console: Console, offers: Sequence[Offer], now: Fit) -> None:
    """What could be given up, each by itself."""
    table = Table(title="to give up, one at a time", box=box.SIMPLE, padding=(0, 1, 0, 0))
    for column in ("give up", "fits", "seconds", "gain", "least budget", "bundle"):
        table.add_column(column, justify="left" if column == "give up" else "right", no_wrap=True)
    for one in offers:
        fits, seconds = ("yes", f"{one.fit.seconds:.1f} s") if one.fit.fits else ("no", "-")
        both = one.fit.fits and now.fits
        gain = f"{now.seconds - one.fit.seconds:.1f} s" if both else format_bytes(now.needs_bytes - one.fit.needs_bytes)
        table.add_row(
            one.what, fits, seconds, gain, format_bytes(one.fit.needs_bytes), format_bytes(one.fit.bundle_bytes)
        )
    console.print(table)


def print_manifest(console: Console, bundle: Path, manifest: Manifest, rates: Rates | None) -> None:
    """The partitions, the levels of each stage, what int8 loses, the predicted peak, and seconds beside their bound."""
    title = f"{bundle}: {manifest.family} for {manifest.target} on {manifest.device}; sizes in KiB"
    table = Table(title=title, box=box.SIMPLE, padding=(0, 1, 0, 0))
    text = ("partition", "program", "weight files")
    for column in ("partition", "weights", "working", "in", "out", "MFLOP", "nodes", "others", *text[1:]):
        table.add_column(column, justify="left" if column in text else "right", no_wrap=True)
    table.caption = "files by the first 8 digits of their names; others: nodes that the target's own kernels leave out"
    for one in manifest.partitions:
        tensors = [sum(spec.size_bytes for spec in specs) for specs in (one.inputs, one.outputs)]
        sizes = (f"{size / 1024:.0f}" for size in (one.weight_bytes, one.workspace_bytes + one.planned_bytes, *tensors))
        files = (Path(path).stem[:8] for path in (one.program, *one.weights))
        nodes = (one.delegated_nodes, sum(one.fallback.values()))
        table.add_row(one.name, *sizes, f"{one.flops / 1e6:.0f}", *map(str, nodes), next(files), " ".join(files) or "-")
    Console(width=max(console.width, _COLUMNS)).print(table)
    for stage in manifest.stages:
        for name, variant in stage.variants.items():
            console.print(
                f"{stage.name} ({name}), {stage.cadence}: {len(variant.order)} partitions, "
                f"peak {format_bytes(variant.peak_bytes)}, {_kept(variant, manifest.budget_bytes)}"
            )
    others = Counter[str]()
    for one in manifest.partitions:
        others.update(one.fallback)
    if others:
        console.print(f"others: {', '.join(f'{count} {name}' for name, count in others.most_common())}")
    if manifest.quantization:
        console.print(_quantization_table(manifest.quantization))
    console.print(f"predicted peak {manifest.peak_bytes} bytes, budget {manifest.budget_bytes} bytes")
    if rates is None:
        return
    simulator = Simulator.of(manifest, rates)
    simulator.run(calls_of(manifest))
    bound_s = sum(stage_bounds_s(manifest, rates, manifest.budget_bytes).values())
    console.print(f"plan {simulator.now_s:.2f} s a video on {manifest.device}, bound {bound_s:.2f} s", highlight=False)


def _kept(variant: Variant, budget_bytes: int) -> str:
    """What the budget lets stay loaded, and what would let everything stay."""
    level = [level for level in variant.residency if level.needs_bytes <= budget_bytes][-1]
    waiting = f", {len(level.waits)} wait" if level.waits else ""
    return (
        f"{len(level.pinned)} stay, {level.prefetch} ahead{waiting}; levels of residency from "
        f"{format_bytes(variant.residency[0].needs_bytes)} to {format_bytes(variant.residency[-1].needs_bytes)}"
    )


def _quantization_table(errors: Sequence[LayerError]) -> Table:
    """The worst of the quantized weights, each with the ratio of signal to error."""
    table = Table(title=f"{len(errors)} int8 weights, the worst first")
    for column in ("stage", "weight", "SQNR"):
        table.add_column(column, justify="right" if column == "SQNR" else "left")
    for error in errors[:_WORST_SHOWN]:
        table.add_row(error.stage, error.key, f"{error.sqnr_db:.1f} dB")
    if len(errors) > _WORST_SHOWN:
        table.caption = f"{len(errors) - _WORST_SHOWN} more are in bundle.json"
    return table


def print_findings(console: Console, findings: Sequence[Finding]) -> None:
    """How far each partition and stage is from what is right, and what it is held to."""
    table = Table(box=box.SIMPLE, padding=(0, 1, 0, 0))
    for column in ("", "checked", "relative L2", "max error", "PSNR", "SQNR", "at least", "tensor"):
        table.add_column(column, justify="left" if column in ("", "checked", "tensor") else "right", no_wrap=True)
    for one in findings:
        mark = {True: "right", False: "WRONG", None: "-"}[one.passed]
        figures = ["-"] * 4
        if one.error is not None:
            most = "-" if one.error.max_abs is None else f"{one.error.max_abs:.2g}"
            decibels = (f"{db:.1f} dB" for db in (one.error.psnr_db, one.error.sqnr_db))
            figures = [f"{one.error.relative_l2:.1e}", most, *decibels]
        least = "-" if one.min_sqnr_db is None else f"{one.min_sqnr_db:.0f} dB"
        table.add_row(mark, one.name, *figures, least, "-" if one.error is None else one.error.tensor)
    Console(width=max(console.width, _COLUMNS)).print(table)


def print_straightness(console: Console, found: Straightness) -> None:
    """The cosine of each step's drift with the one before, over all prompts."""
    table = Table(title=f"{len(found.prompts)} prompts", box=box.SIMPLE, padding=(0, 1, 0, 0))
    for column in ("step", "least", "5 %", "median", "95 %"):
        table.add_column(column, justify="right")
    for step, cosines in enumerate(found.quantiles(0.0, 0.05, 0.5, 0.95), start=1):
        table.add_row(str(step), *("-" if math.isnan(one) else f"{one:.4f}" for one in cosines))
    console.print(table)
