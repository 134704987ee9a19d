"""The command that checks a bundle by numbers: movdc verify."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from platformdirs import user_cache_path
from rich.console import Console

from movdc.compiler.errors import MovdcError
from movdc.compiler.list_cli import families, silence_libraries
from movdc.compiler.progress import Bars, progress_bars
from movdc.compiler.tables import print_findings
from movdc.runtime.bundle import Bundle
from movdc.runtime.executors import AnyExecutor, open_executor
from movdc.runtime.expected import Expected
from movdc.runtime.replay import Finding, Progress, replay

if TYPE_CHECKING:
    from movdc.compiler.against_eager import Source

console = Console()


def verify(
    bundle: Annotated[Path, typer.Argument(help="A bundle made by `movdc compile`.")],
    spec: Annotated[
        Path | None, typer.Option(help="The YAML it was compiled from: compare with PyTorch and the checkpoints, too.")
    ] = None,
    packed_cache: Annotated[
        Path | None, typer.Option(help="Keep packed weights here; by default in the user's cache folder.")
    ] = None,
) -> None:
    """Check by numbers that every partition and stage of a bundle, and its sampler, make what they should."""
    read = Bundle.read(bundle)
    executor = open_executor(read, packed_cache=packed_cache or user_cache_path("movdc") / "packed")
    if spec is None and read.manifest.expected == Expected():
        raise MovdcError(f"{bundle}: has no expected outputs; compile it again, or give --spec with its YAML")
    source = None if spec is None else _source(spec, read)
    with progress_bars(console) as progress:
        bars = Bars(progress)
        found = replay(read, executor, bars) if source is None else _against_eager(source, read, executor, bars)
    print_findings(console, found)
    wrong = [one for one in found if one.passed is False]
    unknown = sum(one.passed is None for one in found)
    int8_stages = {one.stage for one in read.manifest.quantization}
    for one in wrong:
        console.print(_sentence(one, wrong, int8_stages), markup=False, highlight=False, soft_wrap=True)
    left = f", {unknown} have nothing recorded: --spec checks them, too" if unknown else ""
    console.print(
        f"{bundle}: {len(found) - len(wrong) - unknown} right, {len(wrong)} wrong{left}",
        highlight=False,
        soft_wrap=True,
    )
    if wrong:
        raise typer.Exit(1)


def _against_eager(source: Source, bundle: Bundle, executor: AnyExecutor, on_progress: Progress) -> list[Finding]:
    """What PyTorch says; of a wrong partition also why."""
    from movdc.compiler.against_eager import compare_with_eager
    from movdc.compiler.diagnose import diagnose

    found = []
    for one in compare_with_eager(source, executor, on_progress):
        if one.kind == "partition" and one.passed is False and not one.note:
            one = replace(one, note=diagnose(source, one.name, bundle, executor))
        found.append(one)
    return found


def _sentence(one: Finding, wrong: Sequence[Finding], int8_stages: Collection[str]) -> str:
    """What is wrong, or why a stage is that has a wrong partition."""
    inside = [other.name for other in wrong if other.kind == "partition" and other.name.startswith(f"{one.name}.")]
    if one.kind == "stage" and inside:
        return f"wrong: {one.name}, through {', '.join(inside)}"
    if one.kind == "stage":
        loss = "int8 loses more than its pass declares, or " if one.name.split(".")[0] in int8_stages else ""
        return f"wrong: {one.name}, though each of its partitions is right: {loss}it is put together otherwise"
    return f"wrong: {one.name}{f': {one.note}' if one.note else ''}"


def _source(spec: Path, bundle: Bundle) -> Source:
    """The graphs that the bundle was made of."""
    silence_libraries()
    from movdc.compiler.spec import load_spec

    spec_file = load_spec(spec)
    from movdc.compiler.against_eager import source_of
    from movdc.compiler.device import known_profiles
    from movdc.passes.pipeline import parse_pipeline
    from movdc.targets.registry import parse_target

    manifest = bundle.manifest
    target = parse_target(str(manifest.spec.get("target", manifest.target)))
    machine = target.machine(next(iter(known_profiles().values())), manifest.budget_bytes)
    family = families()[manifest.family]()
    return source_of(spec_file, family, target, machine, parse_pipeline(manifest.pipeline), manifest)
