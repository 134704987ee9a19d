"""The commands that list what there is: movdc passes, targets, devices."""

from __future__ import annotations

import logging
import os
import tempfile
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from movdc.compiler.device import known_profiles
from movdc.compiler.errors import MovdcError
from movdc.compiler.tables import print_devices, print_sources

console = Console()


def passes() -> None:
    """List the passes in the order in which they run: options with their defaults, exactness, paper."""
    from movdc.compiler.configured import print_options
    from movdc.passes.pipeline import DEFAULT, PASSES
    from movdc.targets.registry import TARGETS, target_class

    rewrites = {name: [one for one in TARGETS if name in target_class(one).rewrites] for name in PASSES}
    for name, one in PASSES.items():
        when = (
            "" if one in DEFAULT else f" (for {', '.join(rewrites[name])})" if rewrites[name] else " (when asked for)"
        )
        lines = [
            f"[bold]{name}[/bold]{when}: {(one.__doc__ or '').splitlines()[0]}",
            f"    options: {print_options(one)}" if one.options() else "",
            "    exact" if one.exact else f"    not exact: {one.figure}",
            f"    {one.paper}" if one.paper else "",
        ]
        console.print("\n".join(filter(None, lines)), highlight=False, soft_wrap=True)


def targets() -> None:
    """List the targets: what a spec may ask of them, the passes that they run, their options with the defaults."""
    from movdc.compiler.configured import print_options
    from movdc.targets.registry import TARGETS, target_class

    for name in TARGETS:
        one = target_class(name)
        lines = [
            f"[bold]{name}[/bold]: {(one.__doc__ or '').splitlines()[0]}",
            f"    {one.abilities}",
            f"    rewrites: {', '.join(one.rewrites)}" if one.rewrites else "",
            f"    options: {print_options(one)}" if one.options() else "",
            f"    needs: {', '.join(one.packages)}" if one.packages else "",
        ]
        console.print("\n".join(filter(None, lines)), highlight=False, soft_wrap=True)


def devices(
    name: Annotated[str | None, typer.Argument(help="One of them, to see where its numbers come from.")] = None,
    measure: Annotated[
        bool, typer.Option("--measure", help="Measure this machine; print an entry for targets/devices.toml.")
    ] = False,
) -> None:
    """List the device profiles, say where the numbers of one come from, or measure this machine."""
    if measure:
        silence_libraries()
        from movdc.compiler.device import print_profile
        from movdc.targets.measure_host import measure_host

        with tempfile.TemporaryDirectory(prefix="movdc-") as folder:
            profile = measure_host(Path(folder))
        console.print(print_profile(name or "host", profile), markup=False, highlight=False, soft_wrap=True)
        return
    profiles = known_profiles()
    if name is None:
        print_devices(console, profiles)
    elif name in profiles:
        print_sources(console, profiles[name])
    else:
        raise MovdcError(f"unknown device {name!r}; there are {', '.join(profiles)}")


def families() -> dict[str, Any]:
    """The families of models by name."""
    from movdc.models.registry import FAMILIES

    return FAMILIES


def silence_libraries() -> None:
    """Their warnings are about their own future, and would be all over the progress bars."""
    os.environ.setdefault("PYTHONWARNINGS", "ignore")
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
