"""The command line: compile, run, verify, inspect, package, cache; the others have files of their own."""

from __future__ import annotations

import errno
import hashlib
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import typer
from platformdirs import user_cache_path
from rich.console import Console
from rich.markup import escape

from movdc.compiler import evaluate_cli, list_cli, plan_cli, straightness_cli, verify_cli
from movdc.compiler.errors import MovdcError, RefusedError
from movdc.compiler.folders import write_output
from movdc.compiler.list_cli import families, silence_libraries
from movdc.compiler.progress import Bars, progress_bars
from movdc.compiler.tables import print_manifest, print_refusals, print_reports, print_trajectory
from movdc.compiler.units import format_bytes, parse_bytes
from movdc.runtime.bundle import Bundle
from movdc.runtime.errors import RunError

if TYPE_CHECKING:
    from movdc.runtime.journal import Journal

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)
for command in (
    verify_cli.verify,
    straightness_cli.straightness,
    plan_cli.fit,
    plan_cli.simulate,
    plan_cli.calibrate,
    evaluate_cli.evaluate,
    evaluate_cli.tune,
    list_cli.passes,
    list_cli.targets,
    list_cli.devices,
):
    app.command()(command)
console = Console()
UsageError: Any = typer.BadParameter.__base__  # typer exports no name for it
OutFolder = Annotated[Path, typer.Argument(help="A bundle made by `movdc compile`.")]


@app.command("compile")
def compile_(
    spec: Annotated[Path, typer.Argument(help="A pipeline YAML, such as examples/tiny.yaml.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="The bundle to make.")],
    memory_budget: Annotated[str | None, typer.Option(help="Memory for a run, such as 3.3GB.")] = None,
    target: Annotated[str | None, typer.Option(help="See `movdc targets`.")] = None,
    device: Annotated[str | None, typer.Option(help="See `movdc devices`.")] = None,
    passes: Annotated[
        str | None, typer.Option(help='The whole pipeline, as "canonicalize,merge-tokens{steps=15},...".')
    ] = None,
    jobs: Annotated[int | None, typer.Option(min=1, help="Processes that lower; by default one a core.")] = None,
    dump: Annotated[Path | None, typer.Option(help="Write the program before and after each phase here.")] = None,
    cache: Annotated[
        Path | None, typer.Option(help="Keep what is compiled here; by default in the user's cache folder.")
    ] = None,
    no_cache: Annotated[bool, typer.Option("--no-cache", help="Compile everything, and keep only the bundle.")] = False,
) -> None:
    """Compile a pipeline into a bundle."""
    start = time.perf_counter()
    silence_libraries()
    from movdc.compiler.spec import load_spec

    spec_file = load_spec(spec)  # before the slow imports, so that a slip of the pen is told at once
    budget_bytes = _bytes("--memory-budget", memory_budget) or spec_file.spec.memory_budget
    from movdc.compiler.device import known_profiles

    profile = _one_of(spec_file, "device", device, known_profiles())
    from movdc.compiler.compile import compile_bundle
    from movdc.passes.pipeline import default_pipeline, in_phases, parse_pipeline
    from movdc.targets.registry import parse_target

    with _said_of(spec_file, "target", target):
        chosen = parse_target(target or spec_file.spec.target)
    family = _one_of(spec_file, "family", None, families())()
    machine = chosen.machine(profile, budget_bytes)
    resolved = {"target": str(chosen), "device": device or spec_file.spec.device, "memory_budget": budget_bytes}
    spec_file.spec = spec_file.spec.model_copy(update=resolved)
    with _said_of(spec_file, "passes", passes):
        phases = in_phases(parse_pipeline(passes) if passes else default_pipeline(spec_file.spec.passes, chosen))

    def note(name: str, text: str) -> None:
        console.print(f"[bold]{name}[/bold]: {text}", highlight=False)

    with progress_bars(console) as progress:
        manifest = compile_bundle(
            spec_file,
            out,
            family,
            chosen,
            machine,
            phases,
            dump,
            Bars(progress),
            note,
            jobs or os.cpu_count() or 1,
            None if no_cache else cache or _compile_cache(),
        )
    console.print(
        f"{out}: {len(manifest.partitions)} partitions, {format_bytes(sum(f.size_bytes for f in manifest.files))}, "
        f"peak {format_bytes(manifest.peak_bytes)} of {format_bytes(machine.budget_bytes)}, "
        f"compiled in {time.perf_counter() - start:.0f} s"
    )


@app.command()
def run(
    bundle: OutFolder,
    prompt: Annotated[str, typer.Option(help="What the video shows.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="The mp4; a contact sheet is written beside it.")],
    seed: Annotated[int, typer.Option(min=0, help="Another seed gives another video.")] = 0,
    steps: Annotated[int | None, typer.Option(min=1, help="Denoising steps.")] = None,
    noise: Annotated[Path | None, typer.Option(help="Start from this .npy instead of the seed.")] = None,
    save_latents: Annotated[Path | None, typer.Option(help="Write the final latents here (.npy).")] = None,
    mode: Annotated[
        str, typer.Option(help="dynamic (what fits stays loaded), concurrent (one loads while one runs), sequential.")
    ] = "dynamic",
    memory_budget: Annotated[
        str | None, typer.Option(help="Memory for weights and tensors; by default what it was compiled for.")
    ] = None,
    packed_cache: Annotated[
        Path | None, typer.Option(help="Keep packed weights here; by default in the user's cache folder.")
    ] = None,
    trace: Annotated[Path | None, typer.Option(help="Write what both lanes did here, for Perfetto (.json).")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where a run that was stopped stood.")] = False,
    no_cache: Annotated[
        bool, typer.Option("--no-cache", help="Encode the prompt, known or not, and do not keep what comes out.")
    ] = False,
) -> None:
    """Make a video with a bundle."""
    start = time.perf_counter()
    from movdc.runtime.executors import MODES, open_executor
    from movdc.runtime.generate import Generator
    from movdc.runtime.journal import journal
    from movdc.runtime.prompt_cache import PromptCache
    from movdc.runtime.video import write_contact_sheet, write_mp4

    read = Bundle.read(bundle)
    fps = read.manifest.video.fps
    given = None if noise is None else _load_noise(noise)
    if mode not in MODES:
        raise RunError(f"--mode: unknown {mode!r}; there are {', '.join(MODES)}")
    prompts = None if no_cache else PromptCache(user_cache_path("movdc") / "prompts")
    asked = {
        "bundle": read.sha256,
        "--prompt": prompt,
        "--noise": None if given is None else hashlib.sha256(given.tobytes()).hexdigest(),
        "--seed": seed if given is None else None,
        "--steps": steps or read.manifest.sampler.units[0],
    }
    with journal(out, asked, resume=resume) as kept:
        with _says_how_to_go_on(kept), progress_bars(console) as progress:
            executor = open_executor(
                read,
                mode=mode,
                memory_budget=_bytes("--memory-budget", memory_budget),
                packed_cache=packed_cache or user_cache_path("movdc") / "packed",
                keeps_trace=trace is not None,
            )
            result = Generator(read, executor, prompts).generate(
                prompt, seed=seed, noise=given, steps=steps, journal=kept, on_progress=Bars(progress)
            )
        executor.release()  # what is loaded would stand beside the frames
        if save_latents is not None:
            np.save(save_latents, result.latents)
        write_mp4(out, result.frames, fps)
        write_contact_sheet(out.with_suffix(".png"), result.frames, fps, prompt)
        if trace is not None:
            write_output(trace, executor.trace())
    if result.dropped_tokens:
        limit = read.manifest.prompt.max_tokens
        console.print(f"the prompt is {result.dropped_tokens} tokens over {limit}: its end is left out", style="yellow")
    print_trajectory(console, result.trajectory)
    print_reports(console, executor.reports)
    parts = ", ".join(f"{stage} {seconds:.1f} s" for stage, seconds in result.seconds.items())
    console.print(f"{out} and {out.with_suffix('.png')}: {parts}; {time.perf_counter() - start:.1f} s in all")


@contextmanager
def _says_how_to_go_on(kept: Journal) -> Iterator[None]:
    try:
        yield
    except BaseException:
        if kept.is_started:
            text = f"{kept.folder} has what is done: the same command with --resume goes on from there"
            console.print(text, markup=False, highlight=False, soft_wrap=True)
        raise


@app.command()
def inspect(bundle: OutFolder) -> None:
    """Show the partitions, the schedule, the predicted peak and the predicted seconds of a bundle."""
    manifest = Bundle.read(bundle).manifest
    from movdc.compiler.device import known_profiles
    from movdc.targets.registry import parse_target

    profile = known_profiles().get(manifest.device)  # a bundle may be of a movdc that knew others
    target = parse_target(manifest.target)
    rates = None if profile is None else target.machine(profile, manifest.budget_bytes).rates
    print_manifest(console, bundle, manifest, rates)


@app.command()
def package(
    bundle: OutFolder,
    out: Annotated[
        Path, typer.Option("-o", "--out", help="The folder to make: packages, and what says when each runs.")
    ],
) -> None:
    """Make Core ML packages of a bundle, as an app loads them."""
    from movdc.targets.mlpackage import write_packages

    count = write_packages(Bundle.read(bundle), out)
    console.print(f"{out}: {count} packages", highlight=False, soft_wrap=True)


@app.command("cache")
def cache_(
    cache: Annotated[Path | None, typer.Option(help="Another folder than the one in the user's cache folder.")] = None,
    prune: Annotated[
        str | None, typer.Option(help="Keep this much, such as 10GB, of what was used last; 1B keeps nothing.")
    ] = None,
) -> None:
    """Show what compiles have left for those to come, and make it smaller."""
    from movdc.compiler.cache import entries
    from movdc.compiler.cache import prune as prune_to

    root = cache or _compile_cache()
    if root.exists() and not root.is_dir():
        raise MovdcError(f"--cache: {root} is no folder; give the one that compiles kept things in")
    limit_bytes = _bytes("--prune", prune)
    if limit_bytes is not None:
        console.print(f"{format_bytes(prune_to(root, limit_bytes))} removed")
    found = entries(root)
    for kind in dict.fromkeys(entry.kind for entry in found):
        some = [entry for entry in found if entry.kind == kind]
        used = time.strftime("%Y-%m-%d %H:%M", time.localtime(some[0].used_s))
        console.print(f"{kind}: {len(some)}, {format_bytes(sum(e.size_bytes for e in some))}, last used {used}")
    total_bytes = sum(entry.size_bytes for entry in found)
    console.print(f"{root}: {len(found)} entries, {format_bytes(total_bytes)}", highlight=False, soft_wrap=True)


def _compile_cache() -> Path:
    return user_cache_path("movdc") / "compile"


def _one_of(spec_file: Any, key: str, option: str | None, choices: dict[str, Any]) -> Any:
    """The choice that the option names, or else the YAML."""
    name = option or getattr(spec_file.spec, key)
    if name not in choices:
        message = f"unknown {key} {name!r}; there are {', '.join(choices)}"
        raise MovdcError(f"--{key}: {message}") if option else spec_file.error(key, message)
    return choices[name]


@contextmanager
def _said_of(spec_file: Any, key: str, option: str | None) -> Iterator[None]:
    """Errors name where the text that they are about was given: the option, or else the line of the YAML."""
    try:
        yield
    except MovdcError as error:
        raise (MovdcError(f"--{key}: {error}") if option else spec_file.error(key, str(error))) from None


def _bytes(option: str, text: str | None) -> int | None:
    try:
        return None if text is None else parse_bytes(text)
    except ValueError as error:
        raise MovdcError(f"{option}: {error}") from None


def _load_noise(path: Path) -> np.ndarray[Any, Any]:
    try:
        return np.asarray(np.load(path, allow_pickle=False))
    except OSError as error:
        raise RunError(f"{path}: is not a readable .npy file ({error.strerror})") from None
    except (ValueError, EOFError):  # what numpy says about them is advice to load pickles
        raise RunError(f"{path}: is not a readable .npy file; write one with numpy.save") from None


def main() -> None:
    """The console script: errors in the input are one sentence and exit code 2."""
    errors = Console(stderr=True)
    try:
        sys.exit(app(standalone_mode=False))
    except (MovdcError, RunError) as error:
        if isinstance(error, RefusedError):
            print_refusals(errors, error.refusals)
        errors.print(f"[red]error:[/red] {escape(str(error))}", highlight=False, soft_wrap=True)
        sys.exit(2)
    except UsageError as error:  # an option that does not exist, a number out of range
        if message := error.format_message():  # none where the help was shown instead
            errors.print(f"[red]error:[/red] {message}", highlight=False, soft_wrap=True)
        sys.exit(2)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        text = "[red]error:[/red] the disk is full; free some, then the same command goes on from what it kept"
        errors.print(text, soft_wrap=True)
        sys.exit(2)
    except (KeyboardInterrupt, typer.Abort):
        errors.print("stopped; nothing is half written")
        sys.exit(130)
