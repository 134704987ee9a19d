"""Quality against time, one point a setting: a page to look into (HTML) and a picture (PNG).

A setting is on the front if none is as fast and as good, and better in one of the two.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import polars as pl

from movdc.compiler.folders import make_parent, write_output
from movdc.evaluate.results import pareto_front

FRONT, OTHER, LINE = "#2b62b5", "#8a94a3", "#9db8dd"
TITLE = "Quality against time, one point a setting"
_SAME_HEIGHT = 0.1  # of the panel's
TIME = "seconds in the denoiser, median"


class Panel(NamedTuple):
    """A measure of quality that has values, as an axis; more is better."""

    column: str
    label: str
    scale: float


_PANELS = (
    Panel("adherence", "adherence to the prompt, %", 100.0),
    Panel("psnr_db", "PSNR against the reference, dB, median", 1.0),
)


class Points(NamedTuple):
    """The settings that have a value: x, y, names, and which of them are on the front, the fastest first."""

    seconds: list[float]
    quality: list[float]
    names: list[str]
    front: list[int]


def write_plots(folder: Path, summary: pl.DataFrame) -> list[Path]:
    """Write pareto.html and pareto.png; nothing where no measure of quality has two points."""
    panels = [(panel, points) for panel in _PANELS if len((points := _points(summary, panel)).names) > 1]
    if not panels:
        return []
    make_parent(folder / "pareto.html")
    write_output(folder / "pareto.html", _page(panels))
    _draw(folder / "pareto.png", panels)
    return [folder / "pareto.html", folder / "pareto.png"]


def _points(summary: pl.DataFrame, panel: Panel) -> Points:
    some = summary.filter(pl.col(panel.column).is_not_null() & pl.col(panel.column).is_finite())
    seconds = some["denoiser_s"].to_list()
    quality = [value * panel.scale for value in some[panel.column].to_list()]
    return Points(seconds, quality, some["setting"].to_list(), pareto_front(seconds, quality))


def _page(panels: Sequence[tuple[Panel, Points]]) -> str:
    from plotly.graph_objects import Figure, Scatter
    from plotly.subplots import make_subplots

    figure: Figure = make_subplots(rows=1, cols=len(panels))
    for column, (panel, points) in enumerate(panels, 1):
        line = [[values[index] for index in points.front] for values in (points.seconds, points.quality)]
        figure.add_trace(Scatter(x=line[0], y=line[1], mode="lines", line={"color": LINE}, hoverinfo="skip"), 1, column)
        figure.add_trace(
            Scatter(
                x=points.seconds,
                y=points.quality,
                text=points.names,
                mode="markers+text",
                textposition=[
                    "top center" if _is_above(points, index) else "bottom center" for index in range(len(points.names))
                ],
                marker={"size": 11, "color": _colours(points)},
                hovertemplate="%{text}<br>%{x:.2f} s<br>%{y:.2f}<extra></extra>",
            ),
            1,
            column,
        )
        figure.update_xaxes(title=TIME, rangemode="tozero", row=1, col=column)
        figure.update_yaxes(title=panel.label, row=1, col=column)
    figure.update_layout(title=TITLE, showlegend=False, template="plotly_white")
    page: str = figure.to_html(include_plotlyjs=True, div_id="pareto")
    return page


def _draw(path: Path, panels: Sequence[tuple[Panel, Points]]) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6 * len(panels), 4.6), layout="constrained")
    figure.suptitle(TITLE)
    for axes, (panel, points) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        line = [[values[index] for index in points.front] for values in (points.seconds, points.quality)]
        axes.plot(*line, color=LINE, zorder=1)
        axes.scatter(points.seconds, points.quality, c=_colours(points), s=46, zorder=2)
        for index, name in enumerate(points.names):
            where, offset = ("bottom", 6) if _is_above(points, index) else ("top", -6)
            place = (points.seconds[index], points.quality[index])
            style = {"textcoords": "offset points", "ha": "center", "va": where, "fontsize": 8}
            axes.annotate(name, place, xytext=(0, offset), **style)
        axes.set(xlabel=TIME, ylabel=panel.label)
        axes.set_xlim(0, max(points.seconds) * 1.15)
        axes.margins(y=0.15)
        axes.grid(color="#e6e9ee")
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)


def _is_above(points: Points, index: int) -> bool:
    """Where a point's name goes: the best of those of about its height above, then in turns, so that few overlap."""
    near = (max(points.quality) - min(points.quality)) * _SAME_HEIGHT
    row = [one for one, quality in enumerate(points.quality) if abs(quality - points.quality[index]) <= near]
    return sorted(row, key=lambda one: (-points.quality[one], points.seconds[one], one)).index(index) % 2 == 0


def _colours(points: Points) -> list[str]:
    return [FRONT if index in points.front else OTHER for index in range(len(points.names))]
