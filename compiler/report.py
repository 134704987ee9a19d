"""report.html: a bundle on one page, for people: what it is, what happens when, what it holds, and why it waits.

Self-contained: style, drawings and the one script, which sorts tables, are in the page. The same manifest and rates
give the same bytes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

from movdc.compiler import svg
from movdc.compiler.bounds import stage_bounds_s
from movdc.compiler.bubbles import bubbles
from movdc.compiler.units import format_bytes
from movdc.runtime.bundle import Manifest, Residency, Variant
from movdc.runtime.rates import Rates
from movdc.runtime.simulate import Simulator, calls_of, growing_bytes, least_packed_bytes
from movdc.runtime.timeline import Event, stage_times

BUDGETS = 12  # points of the curve of time against budget
MOST_POINTS = 2000  # of the curve of memory
SHOWN_CALLS = 2  # of each stage, on the timeline
MOST_ROWS = 40  # of bubbles and of int8 weights
LONG = 36  # characters of a text from which it takes several lines

_STYLE = """
:root{color-scheme:light dark;--ink:#1c2430;--soft:#5c6878;--line:#d5dbe3;--page:#fff;--run:#2f7d4f;--load:#2b62b5;
--wait:#d3452f;--pinned:#8a5fb8}
@media(prefers-color-scheme:dark){:root{--ink:#e4e9f0;--soft:#9aa6b5;--line:#39424e;--page:#14181d}}
body{font:16px/1.5 system-ui,sans-serif;color:var(--ink);background:var(--page);max-width:72rem;margin:auto;
padding:1rem}
h1{font-size:1.4rem}h2{font-size:1.1rem;margin-top:2.2rem;border-bottom:1px solid var(--line)}
h3{font-size:1rem;margin-bottom:.3rem}p{max-width:46rem}.soft{color:var(--soft)}
.wide{overflow-x:auto}svg{width:100%;min-width:640px;font:13px system-ui,sans-serif}svg text{fill:var(--soft)}
.run{fill:var(--run)}.load,.transient{fill:var(--load)}.wait{fill:var(--wait)}.pinned{fill:var(--pinned)}
polyline{fill:none;stroke-width:2;stroke:var(--load)}.curve1{stroke:var(--wait)}.axis{stroke:var(--line)}
.limit{stroke:var(--wait);stroke-dasharray:6 4}svg .name1{fill:var(--wait)}
table{border-collapse:collapse;font-size:.9rem}th,td{padding:.2rem .6rem;text-align:right;white-space:nowrap;
border-bottom:1px solid var(--line)}.text{text-align:left}td{vertical-align:top}
td.long{white-space:normal;min-width:15rem;max-width:26rem}
th{cursor:pointer;user-select:none}th[data-order]::after{content:" \\25B4"}
th[data-order="-1"]::after{content:" \\25BE"}
"""
_SCRIPT = """
for (const head of document.querySelectorAll("th")) head.addEventListener("click", () => {
  const table = head.closest("table"), order = head.dataset.order === "1" ? -1 : 1;
  const key = row => row.cells[head.cellIndex].dataset.value ?? row.cells[head.cellIndex].textContent;
  const less = (a, b) => isNaN(key(a)) || isNaN(key(b)) ? key(a).localeCompare(key(b)) : key(a) - key(b);
  for (const other of table.querySelectorAll("th")) delete other.dataset.order;
  head.dataset.order = order;
  table.tBodies[0].append(...[...table.tBodies[0].rows].sort((a, b) => order * less(a, b)));
});
"""
Cell = tuple[str, float | str]  # as it is shown, and as it sorts


def render(manifest: Manifest, rates: Rates, budget_bytes: int, measured: Sequence[Event] | None = None) -> str:
    """The page of a bundle on a device within a budget; events of a real run are laid beside what is predicted."""
    simulator = Simulator.of(manifest, rates, budget_bytes=budget_bytes)
    events = simulator.run(calls_of(manifest))
    peak_bytes = simulator.books.peak_bytes
    bounds_s = stage_bounds_s(manifest, rates, budget_bytes)
    parts = [
        f"<h1>{escape(manifest.family)} for {escape(manifest.target)} on {escape(manifest.device)}</h1>",
        f"<p>{manifest.video.frames} frames of {manifest.video.height}x{manifest.video.width}. Predicted: "
        f"<b>{simulator.now_s:.1f} s</b> a video, which no plan of these partitions can make in less than "
        f"{sum(bounds_s.values()):.1f} s, at most <b>{format_bytes(peak_bytes)}</b> held within a budget of "
        f"{format_bytes(budget_bytes)}; {len(manifest.partitions)} partitions, "
        f"{format_bytes(sum(file.size_bytes for file in manifest.files))} on disk.</p>",
        _stages(events, measured, bounds_s),
        _pipeline(manifest, budget_bytes),
        _timelines(events, measured),
        _memory(events, measured, budget_bytes),
        _budgets(manifest, rates, budget_bytes),
        _bubbles(manifest, rates, budget_bytes),
        _partitions(manifest, rates, budget_bytes),
        _refusals(manifest),
        _quantization(manifest),
        f'<p class="soft">Passes: {escape(manifest.pipeline)}</p>',
    ]
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">'
    title = f"{manifest.family} on {manifest.device}"
    return (
        f'<!doctype html><html lang="en"><head>{head}<title>{escape(title)}</title><style>{_STYLE}</style></head>'
        f"<body>{''.join(parts)}<script>{_SCRIPT}</script></body></html>\n"
    )


def _stages(events: Sequence[Event], measured: Sequence[Event] | None, bounds_s: Mapping[str, float]) -> str:
    rows = []
    kinds = [("predicted", events)] if measured is None else [("predicted", events), ("measured", measured)]
    for kind, some in kinds:
        for stage, one in stage_times(some).items():
            bound_s = bounds_s[stage]
            seconds = [_seconds(value) for value in (one.wall_s, bound_s, one.load_s, one.run_s, one.wait_s)]
            hidden = max(0.0, 1 - one.wait_s / one.load_s) if one.load_s else 1.0
            rows.append(
                [
                    _text(stage),
                    _text(kind),
                    _count(one.calls),
                    *seconds,
                    (f"{hidden:.0%}", hidden),
                    _size(one.peak_bytes),
                ]
            )
    return _table(("stage", "", "calls", "seconds", "bound", "loads", "runs", "waits", "loads hidden", "peak"), rows)


def _pipeline(manifest: Manifest, budget_bytes: int) -> str:
    named = {one.name: one for one in manifest.partitions}
    drawn = ["<h2>Pipeline</h2><p>Partitions in the order of their runs, as wide as their weights; those that stay "
             'loaded from call to call are <span style="color:var(--pinned)">violet</span>.</p>']  # fmt: skip
    for stage in manifest.stages:
        for name, variant in stage.variants.items():
            level = _level(variant, budget_bytes)
            boxes = [
                (
                    f"{one}: {format_bytes(named[one].held_bytes)}, {named[one].flops / 1e9:.4g} GFLOP",
                    float(max(named[one].held_bytes, 1)),
                    "pinned" if one in level.pinned else "transient",
                )
                for one in variant.order
            ]
            drawn.append(
                f"<h3>{escape(stage.name)} ({escape(name)}), {stage.cadence.replace('_', ' ')}</h3>"
                f'<p class="soft">{len(level.pinned)} of {len(variant.order)} stay, {level.prefetch} ahead</p>'
                + svg.bars(boxes)
            )
    return "".join(drawn)


def _timelines(events: Sequence[Event], measured: Sequence[Event] | None) -> str:
    drawn = [f"<h2>Timeline</h2><p>The first {SHOWN_CALLS} calls of each stage; red is waiting.</p>"]
    for stage in dict.fromkeys(event.stage for event in events):
        rows = [("predicted", _first_calls(events, stage))]
        if measured is not None:
            rows.append(("measured", _first_calls(measured, stage)))
        end_s = max((event.end_s for _, some in rows for event in some), default=1.0)
        drawn.append(f"<h3>{escape(stage)}</h3>" + svg.lanes(rows, 0.0, end_s))
    return "".join(drawn)


def _first_calls(events: Sequence[Event], stage: str) -> list[Event]:
    """The events of a stage's first calls, from 0 s on."""
    own = [event for event in events if event.stage == stage]
    starts = [event.start_s for event in own if event.what == "run" and event.partition.endswith(".0")]
    end_s = starts[SHOWN_CALLS] if len(starts) > SHOWN_CALLS else float("inf")
    begin_s = min((event.start_s for event in own), default=0.0)
    return [
        Event(one.what, one.partition, one.start_s - begin_s, one.duration_s, one.bytes, one.held_bytes)
        for one in own
        if one.start_s < end_s
    ]


def _memory(events: Sequence[Event], measured: Sequence[Event] | None, budget_bytes: int) -> str:
    curves = [("predicted", _held(events))]
    if measured:
        curves.append(("measured", _held(measured)))
    drawn = svg.lines(curves, "s", "MB", ("budget", budget_bytes / 1e6))
    return "<h2>Memory</h2><p>What the books say is held, over a whole video.</p>" + drawn


def _held(events: Sequence[Event]) -> list[tuple[float, float]]:
    ordered = [(event.end_s, event.held_bytes / 1e6) for event in sorted(events, key=lambda one: one.end_s)]
    bunch = -(-len(ordered) // MOST_POINTS)
    # Of each bunch of neighbours the highest: a peak is never left out.
    return [max(ordered[index : index + bunch], key=lambda one: one[1]) for index in range(0, len(ordered), bunch)]


def _budgets(manifest: Manifest, rates: Rates, budget_bytes: int) -> str:
    variants = [variant for stage in manifest.stages for variant in stage.variants.values()]
    named = {one.name: one for one in manifest.partitions}
    growing = (max(growing_bytes([named[name] for name in variant.order])) for variant in variants)
    low = max(least_packed_bytes(variant, more_bytes) for variant, more_bytes in zip(variants, growing, strict=True))
    high = max(max(variant.residency[-1].needs_bytes for variant in variants), budget_bytes)
    points = []
    for index in range(BUDGETS):
        one = low + (high - low) * index // (BUDGETS - 1)
        simulator = Simulator.of(manifest, rates, budget_bytes=one)
        simulator.run(calls_of(manifest))
        points.append((one / 1e6, simulator.now_s))
    return (
        "<h2>Time against budget</h2><p>Seconds of a video at other budgets, with this bundle as it is: its levels of "
        "residency take what memory there is.</p>" + svg.lines([("seconds", points)], "MB", "s")
    )


def _bubbles(manifest: Manifest, rates: Rates, budget_bytes: int) -> str:
    named = {one.name: one for one in manifest.partitions}
    found = [
        bubble
        for stage in manifest.stages
        for variant in stage.variants.values()
        for bubble in bubbles(stage, variant, named, manifest.slab_bytes, rates, budget_bytes)
    ]
    rows = [
        [_text(one.partition), _seconds(one.wait_s), _text(one.when), _text(one.why), _text(one.remedy)]
        for one in found[:MOST_ROWS]
    ]
    said = "Every moment that the execution lane waits." if rows else "The execution lane never waits."
    return f"<h2>Bubbles</h2><p>{said}</p>" + _table(("waits for", "seconds", "when", "why", "what removes it"), rows)


def _partitions(manifest: Manifest, rates: Rates, budget_bytes: int) -> str:
    pinned = {
        name
        for stage in manifest.stages
        for variant in stage.variants.values()
        for name in _level(variant, budget_bytes).pinned
    }
    rows = [
        [
            _text(one.name),
            _size(one.held_bytes),
            _size(one.workspace_bytes + one.planned_bytes),
            (f"{one.flops / 1e9:.4g}", one.flops),
            _seconds(rates.load_s(one)),
            _seconds(rates.run_s(one)),
            _text("stays" if one.name in pinned else ""),
        ]
        for one in manifest.partitions
    ]
    heads = ("partition", "weights", "computes in", "GFLOP", "load", "run", "")
    return "<h2>Partitions</h2>" + _table(heads, rows)


def _refusals(manifest: Manifest) -> str:
    rows = [
        [_text(one.name), _count(one.delegated_nodes), _text(node), _count(count)]
        for one in manifest.partitions
        for node, count in one.fallback.items()
    ]
    if not rows:
        return "<h2>Refusals</h2><p>The target's own kernels run every operator.</p>"
    said = "<h2>Refusals</h2><p>Operators that the target's own kernels do not take, and that run elsewhere.</p>"
    return said + _table(("partition", "delegated operators", "operator", "of them elsewhere"), rows)


def _quantization(manifest: Manifest) -> str:
    if not manifest.quantization:
        return ""
    rows = [
        [_text(one.key), _text(one.stage), (f"{one.sqnr_db:.1f} dB", one.sqnr_db)]
        for one in manifest.quantization[:MOST_ROWS]
    ]
    said = f"<h2>int8</h2><p>{len(manifest.quantization)} weights, those that lost the most first.</p>"
    return said + _table(("weight", "stage", "signal to error"), rows)


def _level(variant: Variant, budget_bytes: int) -> Residency:
    fitting = [row for row in variant.residency if row.needs_bytes <= budget_bytes]
    return fitting[-1] if fitting else variant.residency[0]


def _table(heads: Sequence[str], rows: Sequence[Sequence[Cell]]) -> str:
    if not rows:
        return ""
    kinds = ["text" if isinstance(value, str) else "number" for _, value in rows[0]]
    head = "".join(f'<th class="{kind}">{escape(one)}</th>' for one, kind in zip(heads, kinds, strict=True))
    body = "".join(
        "<tr>"
        + "".join(
            f'<td class="text{" long" if len(shown) > LONG else ""}">{escape(shown)}</td>'
            if isinstance(value, str)
            else f'<td data-value="{value:.9g}">{escape(shown)}</td>'
            for shown, value in row
        )
        + "</tr>"
        for row in rows
    )
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _text(text: str) -> Cell:
    return text, text


def _count(count: int) -> Cell:
    return str(count), float(count)


def _seconds(seconds: float) -> Cell:
    return f"{seconds:.3g} s", seconds


def _size(size_bytes: int) -> Cell:
    return format_bytes(size_bytes), float(size_bytes)
