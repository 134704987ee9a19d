"""The commands that measure what a bundle gives up: movdc evaluate, movdc tune."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from platformdirs import user_cache_path
from rich.console import Console

from movdc.compiler.errors import MovdcError
from movdc.compiler.folders import check_output, write_output
from movdc.compiler.list_cli import silence_libraries
from movdc.compiler.progress import Bars, progress_bars
from movdc.runtime.bundle import Bundle

if TYPE_CHECKING:
    from movdc.evaluate.cells import Cell
    from movdc.evaluate.clips import MetricWeights
    from movdc.evaluate.settings import Sweep

console = Console()
Jobs = Annotated[int, typer.Option(min=1, help="Clips made at a time on this machine; more make each slower.")]
Scheduler = Annotated[str | None, typer.Option(help="Make them on the Dask cluster at this address, tcp://...")]
Cache = Annotated[Path | None, typer.Option(help="As of movdc compile.")]


def evaluate(
    given: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="[BUNDLE|SPEC]...",
            help="Bundles, or pipeline YAMLs, which are compiled; the first is the reference.",
        ),
    ] = None,
    sweep: Annotated[
        Path | None, typer.Option(help="A YAML that says which settings of a pipeline to compare.")
    ] = None,
    prompts: Annotated[Path | None, typer.Option(help="A text file with one prompt a line.")] = None,
    seeds: Annotated[int | None, typer.Option(min=1, help="Clips of each prompt: seeds 0, 1, ...")] = None,
    out: Annotated[Path, typer.Option("-o", "--out", help="The folder for tables, plots and finished clips.")] = Path(
        "out/evaluate"
    ),
    jobs: Jobs = 1,
    scheduler: Scheduler = None,
    metric_weights: Annotated[
        Path | None, typer.Option(help="A folder with the networks of VBench's dimensions (docs/evaluate.md).")
    ] = None,
    cache: Cache = None,
) -> None:
    """Make clips with several settings and measure them: a table, Parquet, and quality against time."""
    _needs_packages()
    silence_libraries()
    from movdc.evaluate.results import frame_of, markdown, print_summary, summary_of, write_parquet
    from movdc.evaluate.settings import load_prompts, load_sweep
    from movdc.evaluate.sweep import evaluate_cells, open_pool

    if (sweep is None) == (not given):
        raise MovdcError("evaluate: give bundles or pipelines, or --sweep YAML; one of the two")
    asked = None if sweep is None else load_sweep(sweep)
    if prompts is None:
        if sweep is None or asked is None:
            raise MovdcError("--prompts: is missing; give a text file with one prompt a line")
        prompts = sweep.parent / asked.prompts
    texts = load_prompts(prompts)
    weights = None if metric_weights is None else _weights(metric_weights)
    count = seeds or (1 if asked is None else asked.seeds)
    kept = cache or user_cache_path("movdc") / "compile"
    with progress_bars(console) as progress:
        bars = Bars(progress)
        if sweep is not None and asked is not None:
            cells = _swept(sweep, asked, out, kept, bars)
        else:
            cells = [_cell(path, out, kept, bars) for path in given or ()]
        _check_names(cells)
        with open_pool(jobs, scheduler) as pool:
            rows = evaluate_cells(cells, texts, count, out, pool, bars, weights)
    clips = frame_of(rows)
    write_parquet(out / "clips.parquet", clips)
    summary = summary_of(clips)
    print_summary(console, summary)
    write_output(out / "settings.md", markdown(summary))
    from movdc.evaluate.plots import write_plots

    written = [out / "clips.parquet", out / "settings.md", *write_plots(out, summary)]
    console.print(f"written: {', '.join(map(str, written))}", highlight=False, soft_wrap=True)


def _swept(path: Path, sweep: Sweep, out: Path, cache: Path, bars: Bars) -> list[Cell]:
    from movdc.compiler.spec import load_spec
    from movdc.evaluate.compiled import compile_cells

    return compile_cells(load_spec(path.parent / sweep.spec), sweep.named_settings(), out / "bundles", cache, bars)


def _cell(path: Path, out: Path, cache: Path, bars: Bars) -> Cell:
    """A bundle as it is, or a pipeline compiled as it is."""
    from movdc.evaluate.cells import Cell

    if path.suffix not in (".yaml", ".yml"):
        return Cell(path.resolve().name, Bundle.read(path))
    from movdc.compiler.spec import load_spec
    from movdc.evaluate.compiled import compile_spec

    folder = out / "bundles" / path.stem
    bars("compile", 0, 1)
    compile_spec(load_spec(path), folder, cache)
    bars("compile", 1, 1)
    return Cell(path.stem, Bundle.read(folder))


def _weights(folder: Path) -> MetricWeights:
    from movdc.evaluate.clips import MetricWeights
    from movdc.evaluate.vbench_networks import check_weights

    return MetricWeights(folder.resolve(), check_weights(folder))


def _check_names(cells: list[Cell]) -> None:
    names = [cell.name for cell in cells]
    for name in names:
        if names.count(name) > 1:
            raise MovdcError(f"evaluate: {name} comes twice; give folders of different names")


def _needs_packages() -> None:
    missing = [name for name in ("polars", "skimage", "plotly", "matplotlib") if find_spec(name) is None]
    if missing:
        raise MovdcError(f"{missing[0]} is missing; install it with `pip install movdc[evaluate]`")


def tune(
    spec: Annotated[Path, typer.Argument(help="A pipeline YAML.")],
    prompts: Annotated[Path, typer.Option(help="A text file with one prompt a line, to measure the loss by.")],
    max_loss: Annotated[
        list[str], typer.Option(help='What must hold, such as "psnr>=30dB" (worst clip), ssim>=0.95, adherence>=98%.')
    ],
    out: Annotated[Path, typer.Option("-o", "--out", help="The pipeline YAML to write.")],
    seeds: Annotated[int, typer.Option(min=1, help="Clips of each prompt: seeds 0, 1, ...")] = 1,
    memory_budget: Annotated[str | None, typer.Option(help="Memory for a run, such as 3.3GB.")] = None,
    device: Annotated[str | None, typer.Option(help="Predict seconds for this one; see `movdc devices`.")] = None,
    folder: Annotated[Path, typer.Option(help="The folder for bundles and finished clips.")] = Path("out/tune"),
    jobs: Jobs = 1,
    scheduler: Scheduler = None,
    cache: Cache = None,
) -> None:
    """Find the fastest setting of a pipeline within a loss: int8 stages, merged steps, leap, steps."""
    _needs_packages()
    silence_libraries()
    from movdc.compiler.plan_cli import budget_of, profile_of
    from movdc.compiler.spec import load_spec
    from movdc.evaluate.chosen import write_chosen
    from movdc.evaluate.results import print_trials
    from movdc.evaluate.settings import load_prompts
    from movdc.evaluate.sweep import open_pool
    from movdc.evaluate.trials import Trials
    from movdc.evaluate.tune import Limit, search

    limits = [Limit.parse(text) for text in max_loss]
    texts = load_prompts(prompts)
    spec_file = load_spec(spec)
    budget_bytes = budget_of(memory_budget) or spec_file.spec.memory_budget
    spec_file = spec_file.with_spec(spec_file.spec.model_copy(update={"memory_budget": budget_bytes}))
    profile = profile_of(device or spec_file.spec.device)
    check_output(out)
    with progress_bars(console) as progress, open_pool(jobs, scheduler) as pool:
        kept = cache or user_cache_path("movdc") / "compile"
        trials = Trials(spec_file, profile, texts, seeds, folder, kept, pool, Bars(progress))
        found = search(spec_file.spec.sampler.steps, limits, trials.measure, trials.predict)
    print_trials(console, found)
    write_chosen(out, spec_file, found[-1].setting)
    console.print(f"{out}: {found[-1].setting}", highlight=False, soft_wrap=True)
