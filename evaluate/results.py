"""The results of an evaluation: the table of clips (Parquet), and one row a setting for people."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import polars as pl
from rich import box
from rich.console import Console
from rich.table import Table

from movdc.compiler.folders import make_parent
from movdc.evaluate.vbench import DIMENSIONS, quality_official, quality_paper

if TYPE_CHECKING:
    from movdc.evaluate.tune import Trial

SCHEMA: dict[str, Any] = {
    "setting": pl.String,
    "steps": pl.Int64,
    "leap": pl.String,
    "merge_steps": pl.Int64,
    "int8": pl.String,
    "weight_bytes": pl.Int64,
    "bundle_sha256": pl.String,
    "prompt": pl.String,
    "seed": pl.Int64,
    "evaluations": pl.Int64,
    "leap_step": pl.Int64,
    "psnr_db": pl.Float64,
    "ssim": pl.Float64,
    "temporal_flickering": pl.Float64,
    "dynamics": pl.Float64,
    "colour": pl.Boolean,
    "background": pl.Boolean,
    "shape": pl.Boolean,
    "direction": pl.Boolean,
    "frames_sha256": pl.String,
    "subject_consistency": pl.Float64,
    "background_consistency": pl.Float64,
    "motion_smoothness": pl.Float64,
    "dynamic_degree": pl.Float64,
    "aesthetic_quality": pl.Float64,
    "imaging_quality": pl.Float64,
    # What another run of the same clips measures anew; all other columns are the same to the last bit.
    "seconds": pl.Float64,
    "denoiser_s": pl.Float64,
    "vae_s": pl.Float64,
    "read_bytes": pl.Int64,
    "peak_bytes": pl.Int64,
}
MEASURED = ("seconds", "denoiser_s", "vae_s", "read_bytes", "peak_bytes")
QUALITIES = {"quality_official": pl.Float64, "quality_paper": pl.Float64}
_COLUMNS = 132  # of a terminal, at least: nothing in the table may be cut off


def frame_of(rows: Sequence[Mapping[str, Any]]) -> pl.DataFrame:
    """One row a clip: settings in their order, prompts and seeds in theirs."""
    table = pl.DataFrame(rows, schema=SCHEMA)
    names = {name: index for index, name in enumerate(table["setting"].unique(maintain_order=True))}
    order = pl.col("setting").replace_strict(names, return_dtype=pl.Int64)
    return table.sort(order, maintain_order=True)


def write_parquet(path: Path, clips: pl.DataFrame) -> None:
    """Write the table of clips."""
    make_parent(path)
    clips.write_parquet(path)


def summary_of(clips: pl.DataFrame) -> pl.DataFrame:
    """One row a setting, in their order; adherence is the share of right attributes, null without captions."""
    adherence = pl.mean_horizontal("colour", "background", "shape", "direction", ignore_nulls=False)
    table = clips.group_by("setting", maintain_order=True).agg(
        pl.len().alias("clips"),
        pl.col("weight_bytes").first(),
        pl.col("evaluations").mean(),
        adherence.mean().alias("adherence"),
        pl.col("psnr_db").median(),
        pl.col("psnr_db").min().alias("worst_psnr_db"),
        pl.col("ssim").mean(),
        pl.col("ssim").min().alias("worst_ssim"),
        pl.col("dynamics").mean(),
        pl.col(*DIMENSIONS).mean(),
        pl.col("seconds", "denoiser_s", "read_bytes").median(),
    )
    qualities = [_qualities(row) for row in table.iter_rows(named=True)]
    table = table.hstack(pl.DataFrame(qualities, schema=QUALITIES, orient="row"))
    return table.with_columns((pl.col("denoiser_s").first() / pl.col("denoiser_s")).alias("denoiser_faster"))


def _qualities(row: Mapping[str, Any]) -> tuple[float | None, float | None]:
    """VBench's official quality score and the paper's, of a setting's mean scores."""
    if any(row[name] is None for name in DIMENSIONS):
        return None, None
    return quality_official(row), quality_paper(row)


def _or_dash(text: Callable[[Any], str]) -> Callable[[Any], str]:
    return lambda value: "-" if value is None else text(value)


_VBENCH = (*(name for name in DIMENSIONS if name != "temporal_flickering"), *QUALITIES)
# Header, column of the summary, how it is written.
_SHOWN: tuple[tuple[str, str, Callable[[Any], str]], ...] = (
    ("setting", "setting", str),
    ("adherence", "adherence", _or_dash(lambda value: f"{value:.1%}")),
    ("PSNR", "psnr_db", _or_dash(lambda value: f"{value:.1f} dB")),
    ("worst", "worst_psnr_db", _or_dash(lambda value: f"{value:.1f} dB")),
    ("SSIM", "ssim", _or_dash(lambda value: f"{value:.3f}")),
    ("flickering", "temporal_flickering", _or_dash(lambda value: f"{value:.4f}")),
    ("dynamics", "dynamics", _or_dash(lambda value: f"{value:.3f}")),
    *((name.replace("_", " "), name, _or_dash(lambda value: f"{value:.3f}")) for name in _VBENCH),
    ("evaluations", "evaluations", lambda value: f"{value:.1f}"),
    ("DiT", "denoiser_s", lambda value: f"{value:.2f} s"),
    ("faster", "denoiser_faster", lambda value: f"{value:.2f}x"),
    ("clip", "seconds", lambda value: f"{value:.2f} s"),
    ("read", "read_bytes", lambda value: f"{value / 1e6:.1f} MB"),
    ("weights", "weight_bytes", lambda value: f"{value / 1e6:.2f} MB"),
)


def _shown(summary: pl.DataFrame) -> list[tuple[str, str, Callable[[Any], str]]]:
    """The columns of the table, without those of VBench that have no values."""
    return [one for one in _SHOWN if one[1] not in _VBENCH or summary[one[1]].null_count() < len(summary)]


def pareto_front(costs: Sequence[float], values: Sequence[float]) -> list[int]:
    """Indices of the points that none beats, the least cost first; of equal points, the first."""
    front: list[int] = []
    for index in sorted(range(len(costs)), key=lambda one: (costs[one], -values[one])):
        if not front or values[index] > values[front[-1]]:
            front.append(index)
    return front


def print_summary(console: Console, summary: pl.DataFrame) -> None:
    """The table of settings."""
    clips = summary["clips"][0]
    table = Table(
        box=box.SIMPLE,
        padding=(0, 1, 0, 0),
        caption=f"{clips} clips each; PSNR and seconds are medians, the reference is {summary['setting'][0]}",
    )
    shown = _shown(summary)
    for header, *_ in shown:
        table.add_column(header, justify="left" if header == "setting" else "right", no_wrap=True)
    for row in summary.iter_rows(named=True):
        table.add_row(*(write(row[column]) for _, column, write in shown))
    Console(file=console.file, width=max(console.width, _COLUMNS)).print(table)


def print_trials(console: Console, trials: Sequence[Trial]) -> None:
    """What tuning measured, the fastest by prediction first, and which of it is within the limits."""
    table = Table(box=box.SIMPLE, padding=(0, 1, 0, 0), caption="* the front of predicted time and worst PSNR")
    front = pareto_front(
        [one.predicted_s for one in trials], [one.summary["worst_psnr_db"] or math.inf for one in trials]
    )
    for header in ("setting", "predicted", "worst PSNR", "worst SSIM", "adherence", "evaluations", "within"):
        table.add_column(header, justify="left" if header == "setting" else "right", no_wrap=True)
    for index in sorted(range(len(trials)), key=lambda one: trials[one].predicted_s):
        one = trials[index]
        table.add_row(
            f"{'*' if index in front else ' '} {one.setting}",
            f"{one.predicted_s:.2f} s",
            _or_dash(lambda value: f"{value:.1f} dB")(one.summary["worst_psnr_db"]),
            _or_dash(lambda value: f"{value:.3f}")(one.summary["worst_ssim"]),
            _or_dash(lambda value: f"{value:.1%}")(one.summary["adherence"]),
            f"{one.summary['evaluations']:.1f}",
            "chosen" if index == len(trials) - 1 else "yes" if one.within else "no",
        )
    Console(file=console.file, width=max(console.width, _COLUMNS)).print(table)


def markdown(summary: pl.DataFrame) -> str:
    """The table of settings, for a page."""
    shown = _shown(summary)
    lines = [[header for header, *_ in shown], ["---"] * len(shown)]
    lines += [[write(row[column]) for _, column, write in shown] for row in summary.iter_rows(named=True)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
