"""The commands that need no device: movdc fit, simulate, calibrate."""

from __future__ import annotations

import math
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from pydantic import ValidationError
from rich.console import Console

from movdc.compiler.bounds import stage_bounds_s
from movdc.compiler.device import DeviceProfile, known_profiles, print_profile, read_profiles
from movdc.compiler.errors import MovdcError
from movdc.compiler.folders import write_output
from movdc.compiler.list_cli import silence_libraries
from movdc.compiler.tables import print_fit, print_offers, print_reports
from movdc.compiler.units import format_bytes, parse_bytes
from movdc.runtime.bundle import Bundle
from movdc.runtime.calibrate import calibrate as fit_rates
from movdc.runtime.rates import Rates
from movdc.runtime.simulate import MODES, Mode, Simulator, calls_of
from movdc.runtime.timeline import joined, read_trace, stage_times, to_chrome

if TYPE_CHECKING:
    from movdc.compiler.fit import Fit
    from movdc.compiler.spec import SpecFile

_MOST_FLOPS_PER_S, _MOST_BYTES_PER_S = 1e15, 1e12  # where a fit finds that something takes no time at all
console = Console()
Device = Annotated[
    str | None, typer.Option(help="A name of `movdc devices`, or a TOML file that `movdc calibrate` made.")
]
Budget = Annotated[str | None, typer.Option(help="Memory for a run, such as 3.3GB.")]


def fit(
    spec: Annotated[Path, typer.Argument(help="A pipeline YAML, or a folder with the models' configs.")],
    device: Device = None,
    memory_budget: Budget = None,
    offers: Annotated[bool, typer.Option("--offers", help="What could be given up, also where it fits.")] = False,
    exact: Annotated[bool, typer.Option("--exact", help="Trace and cut as a compile does; takes minutes.")] = False,
) -> None:
    """Tell whether a pipeline fits a device, how fast it is and what to give up, from configs alone."""
    from movdc.compiler import offers as choices
    from movdc.compiler.fit import fit as plan
    from movdc.models.opensora_layers import PUBLISHED, stages

    spec_file = choices.read(spec)
    known = {"opensora-1.2": choices.FamilyLayers(stages, PUBLISHED)}
    if spec_file.spec.family not in known:
        raise spec_file.error("family", f"unknown family {spec_file.spec.family!r}; there are {', '.join(known)}")
    profile = profile_of(device or spec_file.spec.device)
    budget_bytes = budget_of(memory_budget) or spec_file.spec.memory_budget
    family = known[spec_file.spec.family]
    machine = choices.machine_of(profile, budget_bytes)
    layers, choice = choices.stages_of(spec_file, family), choices.choice_of(spec_file.spec)
    found = plan(layers, choice, machine)
    if exact:
        of_trace = _exact(choices.without_weights(spec_file, family), profile, budget_bytes)
        found = replace(of_trace, needs_bytes=found.needs_bytes)
    how = "cut as a compile cuts it" if exact else "planned from configs alone"
    print_fit(console, f"{spec}, {how}", found, choice, machine)
    if offers or not found.fits:
        print_offers(console, choices.offers(layers, choice, machine), found)


def _exact(spec_file: SpecFile, profile: DeviceProfile, budget_bytes: int | None) -> Fit:
    silence_libraries()
    from movdc.compiler.exact_fit import exact_fit
    from movdc.models.opensora import OpenSora
    from movdc.passes.pipeline import default_pipeline, in_phases
    from movdc.targets.registry import parse_target

    def note(name: str, text: str) -> None:
        console.print(f"[bold]{name}[/bold]: {text}", highlight=False)

    target = parse_target(spec_file.spec.target)
    phases = in_phases(default_pipeline(spec_file.spec.passes, target))
    machine = target.machine(profile, budget_bytes)
    return exact_fit(spec_file, OpenSora(), target, machine, phases, lambda *_: None, note)


def simulate(
    bundle: Annotated[Path, typer.Argument(help="A bundle made by `movdc compile`.")],
    device: Device = None,
    memory_budget: Budget = None,
    mode: Annotated[str, typer.Option(help=f"As of movdc run: {', '.join(MODES)}.")] = "dynamic",
    steps: Annotated[int | None, typer.Option(min=1, help="Denoising steps.")] = None,
    first: Annotated[bool, typer.Option("--first", help="The first run of a device, which packs weights.")] = False,
    trace: Annotated[Path | None, typer.Option(help="Write the simulated trace here, for Perfetto (.json).")] = None,
    measured: Annotated[Path | None, typer.Option(help="A trace of `movdc run --trace`, to compare.")] = None,
    report: Annotated[Path | None, typer.Option(help="Write the report here (.html).")] = None,
) -> None:
    """Play a bundle's schedule on a device: seconds of each stage, memory, what waits for what."""
    manifest = Bundle.read(bundle).manifest
    if mode not in MODES:
        raise MovdcError(f"--mode: unknown {mode!r}; there are {', '.join(MODES)}")
    chosen: Mode = mode
    profile = profile_of(device or manifest.device)
    events_of = None if measured is None else read_trace(measured)
    budget_bytes = budget_of(memory_budget) or manifest.budget_bytes
    from movdc.targets.registry import parse_target

    rates = parse_target(manifest.target).machine(profile, budget_bytes).rates
    calls = calls_of(manifest, steps)
    simulator = Simulator.of(manifest, rates, budget_bytes=budget_bytes, mode=chosen, packed=not first)
    events = simulator.run(calls)
    print_reports(console, {stage: [times] for stage, times in stage_times(events).items()})
    if events_of is not None:
        console.print("measured:")
        print_reports(console, {stage: [times] for stage, times in stage_times(events_of).items()})
    bound_s = sum(stage_bounds_s(manifest, rates, budget_bytes, calls).values())
    console.print(
        f"plan {simulator.now_s:.2f} s on {device or manifest.device}, bound {bound_s:.2f} s, "
        f"peak {format_bytes(simulator.books.peak_bytes)} of "
        f"{format_bytes(budget_bytes)}"
    )
    if trace is not None:
        write_output(trace, to_chrome(events))
    if report is not None:
        from movdc.compiler.report import render

        write_output(report, render(manifest, rates, budget_bytes, events_of))


def calibrate(
    bundle: Annotated[Path, typer.Argument(help="The bundle that was run.")],
    trace: Annotated[
        list[Path],
        typer.Option(help="A trace of `movdc run --trace`, of this machine or of a phone; more of them tell more."),
    ],
    name: Annotated[str, typer.Option(help="What to call the device.")] = "measured",
    out: Annotated[Path | None, typer.Option("-o", "--out", help="Write the profile here (.toml).")] = None,
) -> None:
    """Fit a device profile to measured traces."""
    manifest = Bundle.read(bundle).manifest
    rates = fit_rates(joined(map(read_trace, trace)), {one.name: one for one in manifest.partitions})
    names = " ".join(one.name for one in trace)
    text = print_profile(name, _measured(rates, manifest.budget_bytes, names)) + "\n"
    console.print(text, markup=False, highlight=False, end="")
    packed = "" if math.isinf(rates.pack_bytes_per_s) else f"; packs {format_bytes(rates.pack_bytes_per_s)}/s, once"
    console.print(f"# initialises a program in {rates.init_s:.4g} s{packed}", markup=False, highlight=False)
    if out is not None:
        write_output(out, text)


def _measured(rates: Rates, budget_bytes: int, traces: str) -> DeviceProfile:
    """The profile that traces tell; what it shows no end of is taken as very fast."""
    floating = min(rates.compute_flops_per_s, _MOST_FLOPS_PER_S)
    int8 = floating if rates.int8_flops_per_s is None else min(rates.int8_flops_per_s, _MOST_FLOPS_PER_S)
    numbers = {
        "load_rate": max(round(min(rates.load_bytes_per_s, _MOST_BYTES_PER_S)), 1),
        "load_overhead_s": rates.load_overhead_s,
        "fp32_flops_per_s": floating,
        "fp16_flops_per_s": floating,
        "int8_flops_per_s": int8,
        "contention": rates.contention,
        "load_contention": rates.load_contention,
        "run_overhead_s": rates.run_overhead_s,
    }
    rates_of_pages = {"touch_rate": rates.touch_bytes_per_s, "free_rate": rates.free_bytes_per_s}
    numbers |= {name: round(rate) for name, rate in rates_of_pages.items() if rate < _MOST_BYTES_PER_S}
    source = dict.fromkeys(numbers, f"movdc calibrate {traces}") | {
        "usable_memory": "estimate: the budget that the bundle was compiled for; a trace does not tell",
        "fp16_flops_per_s": "estimate: as fp32; a trace has one of the two",
    }
    if rates.int8_flops_per_s is None:
        source["int8_flops_per_s"] = "estimate: as fp32; the trace has no products with int8 weights"
    return DeviceProfile.model_validate({"usable_memory": budget_bytes, **numbers, "source": source})


def profile_of(device: str) -> DeviceProfile:
    """A profile of devices.toml by its name, or the one that a TOML file has."""
    if not device.endswith(".toml"):
        known = known_profiles()
        if device not in known:
            raise MovdcError(f"--device: unknown device {device!r}; there are {', '.join(known)}, or a .toml file")
        return known[device]
    try:
        found = read_profiles(Path(device))
    except OSError as error:
        raise MovdcError(f"{device}: cannot be read ({error.strerror}); make one with `movdc calibrate -o`") from None
    except (tomllib.TOMLDecodeError, ValidationError, UnicodeDecodeError) as error:
        reason = _reason(error)
        raise MovdcError(f"{device}: is no device profile ({reason}); make one with `movdc calibrate -o`") from None
    if len(found) != 1:
        raise MovdcError(f"{device}: has {len(found)} profiles; keep one")
    return next(iter(found.values()))


def _reason(error: ValueError) -> str:
    """What is wrong with a profile, the key first where it is one."""
    if not isinstance(error, ValidationError):
        return str(error)
    first = error.errors()[0]
    return ": ".join([*map(str, first["loc"]), first["msg"].removeprefix("Value error, ")])


def budget_of(text: str | None) -> int | None:
    """The bytes of --memory-budget, if it was given."""
    try:
        return None if text is None else parse_bytes(text)
    except ValueError as error:
        raise MovdcError(f"--memory-budget: {error}") from None
