"""Drawings of the report: lanes, lines and bars as inline SVG, which needs no script and no network."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from movdc.runtime.timeline import EXECUTION, LANES, Event

WIDTH, LANE_HEIGHT = 1000, 26
Points = Sequence[tuple[float, float]]
_SHOWN = ("load", "run", "wait")


def lanes(rows: Sequence[tuple[str, Sequence[Event]]], start_s: float, end_s: float) -> str:
    """Both lanes of each row (predicted, measured) between two moments."""
    scale = WIDTH / max(end_s - start_s, 1e-9)
    drawn = []
    for index, (name, events) in enumerate(rows):
        top = index * (2 * LANE_HEIGHT + 22)
        drawn.append(f'<text x="0" y="{top + 12}">{escape(name)}: loads above, runs below</text>')
        for event in events:
            if event.what not in _SHOWN or event.end_s < start_s or event.start_s > end_s:
                continue
            left = (max(event.start_s, start_s) - start_s) * scale
            width = max((min(event.end_s, end_s) - max(event.start_s, start_s)) * scale, 0.5)
            y = top + 18 + (LANE_HEIGHT if LANES[event.what] == EXECUTION else 0)
            title = f"{event.what} {event.partition}: {event.duration_s:.4g} s from {event.start_s:.4g} s"
            drawn.append(
                f'<rect class="{event.what}" x="{left:.1f}" y="{y}" width="{width:.1f}" height="{LANE_HEIGHT - 4}">'
                f"<title>{escape(title)}</title></rect>"
            )
    height = len(rows) * (2 * LANE_HEIGHT + 22) + 16
    drawn.append(_axis(height, start_s, end_s))
    return _svg(drawn, height)


def lines(
    curves: Sequence[tuple[str, Points]], unit_x: str, unit_y: str, limit: tuple[str, float] | None = None
) -> str:
    """Curves from zero upwards, the first ones drawn below the others, with a dashed limit."""
    height, bottom, left = 220, 190, 70
    points = [point for _, some in curves for point in some]
    low, high = min(x for x, _ in points), max(x for x, _ in points)
    top = max([y for _, y in points] + ([limit[1]] if limit else [])) * 1.05 or 1.0

    def at(x: float, y: float) -> str:
        return f"{left + (x - low) / max(high - low, 1e-12) * (WIDTH - left - 10):.1f},{bottom - y / top * 170:.1f}"

    drawn = [f'<line class="axis" x1="{left}" x2="{WIDTH}" y1="{bottom}" y2="{bottom}"/>']
    for part in (0.0, 0.5, 1.0):
        value = top / 1.05 * part
        drawn.append(f'<text x="0" y="{float(at(low, value).split(",")[1]) + 4:.0f}">{value:.4g} {unit_y}</text>')
        x = low + (high - low) * part
        anchor = ("start", "middle", "end")[round(part * 2)]
        drawn.append(
            f'<text x="{at(x, 0).split(",")[0]}" y="{bottom + 18}" text-anchor="{anchor}">{x:.4g} {unit_x}</text>'
        )
    if limit:
        y = at(low, limit[1]).split(",")[1]
        drawn.append(f'<line class="limit" x1="{left}" x2="{WIDTH}" y1="{y}" y2="{y}"/>')
        drawn.append(f'<text x="{WIDTH}" y="{float(y) - 4:.1f}" text-anchor="end">{escape(limit[0])}</text>')
    for index, (name, some) in enumerate(curves):
        drawn.append(f'<polyline class="curve{index}" points="{" ".join(at(x, y) for x, y in some)}"/>')
        drawn.append(f'<text class="name{index}" x="{left + 10 + 160 * index}" y="12">{escape(name)}</text>')
    return _svg(drawn, height)


def bars(parts: Sequence[tuple[str, float, str]]) -> str:
    """Boxes side by side, each as wide as its share: name, size, class."""
    total = sum(size for _, size, _ in parts) or 1.0
    drawn, left = [], 0.0
    for name, size, kind in parts:
        width = max(size / total * (WIDTH - 2 * len(parts)), 0.5)
        box = f'<rect class="{kind}" x="{left:.1f}" y="0" width="{width:.1f}" height="30">'
        drawn.append(f"{box}<title>{escape(name)}</title></rect>")
        left += width + 2
    return _svg(drawn, 32)


def _axis(y: float, start_s: float, end_s: float) -> str:
    places = ((start_s, 0, "start"), ((start_s + end_s) / 2, WIDTH / 2, "middle"), (end_s, WIDTH, "end"))
    return "".join(f'<text x="{x}" y="{y - 2}" text-anchor="{anchor}">{s:.4g} s</text>' for s, x, anchor in places)


def _svg(drawn: Sequence[str], height: float) -> str:
    return f'<div class="wide"><svg viewBox="0 0 {WIDTH} {height}" role="img">{"".join(drawn)}</svg></div>'
