"""Timelines: what both lanes did and when, in one form whether it was predicted, simulated or measured.

On disk a timeline is Chrome's trace format as the engine writes it (`movdc run --trace`), which Perfetto shows.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from movdc.runtime.errors import RunError

LOADER, EXECUTION = 1, 2  # lanes, by their row in a trace
LANES = {"load": LOADER, "verify": LOADER, "read": LOADER, "pack": LOADER, "init": LOADER}
PAUSE_S = 1.0  # between runs that are joined
LANES |= {"run": EXECUTION, "wait": EXECUTION, "free": EXECUTION}
_NAMES = {LOADER: "loader", EXECUTION: "execution"}


@dataclass(frozen=True)
class Event:
    """Something that one lane did; verify, pack, read and init are the parts of the load that they lie in."""

    what: str  # a key of LANES
    partition: str  # STAGE.VARIANT.INDEX
    start_s: float
    duration_s: float
    bytes: int = 0  # read, or held; 0 where neither makes sense
    held_bytes: int = 0  # by the books, at the end

    @property
    def end_s(self) -> float:
        """When it was over."""
        return self.start_s + self.duration_s

    @property
    def stage(self) -> str:
        """The stage of its partition."""
        return self.partition.partition(".")[0]


@dataclass(frozen=True)
class Report:
    """What a stage did in one call or in several; loads for the call after that happened meanwhile are counted."""

    wall_s: float
    load_s: float
    run_s: float
    wait_s: float
    peak_bytes: int
    read_bytes: int
    calls: int = 1
    pinned: tuple[str, ...] | None = None  # what stays loaded; None where only events are known


def stage_times(events: Sequence[Event]) -> dict[str, Report]:
    """What each stage took, in the order in which they ran."""
    found = {}
    for stage in dict.fromkeys(event.stage for event in events):
        own = [event for event in events if event.stage == stage]
        seconds = {what: sum(one.duration_s for one in own if one.what == what) for what in ("load", "run", "wait")}
        runs = [one.partition for one in own if one.what == "run"]
        found[stage] = Report(
            wall_s=max(one.end_s for one in own) - min(one.start_s for one in own),
            load_s=seconds["load"],
            run_s=seconds["run"],
            wait_s=seconds["wait"],
            peak_bytes=max(one.held_bytes for one in own),
            read_bytes=sum(one.bytes for one in own if one.what in ("read", "verify")),
            calls=sum(name.endswith(".0") for name in runs),
        )
    return found


def joined(traces: Iterable[Sequence[Event]]) -> list[Event]:
    """Several runs one after the other, with a pause between, so that no event lies beside one of another run."""
    found: list[Event] = []
    for events in traces:
        after_s = max((one.end_s for one in found), default=-PAUSE_S) + PAUSE_S
        found += [replace(one, start_s=one.start_s + after_s) for one in events]
    return found


def to_chrome(events: Iterable[Event]) -> str:
    """The JSON that the engine would write."""
    lines: list[dict[str, Any]] = [{"ph": "M", "pid": 1, "name": "process_name", "args": {"name": "movdc"}}]
    lines += [
        {"ph": "M", "pid": 1, "tid": lane, "name": "thread_name", "args": {"name": name}}
        for lane, name in _NAMES.items()
    ]
    for one in events:
        name = f"{one.what} {one.partition}"
        times = {"ts": round(one.start_s * 1e6, 1), "dur": round(one.duration_s * 1e6, 1)}
        lines.append(
            {"ph": "X", "pid": 1, "tid": LANES[one.what], "cat": one.what, "name": name}
            | times
            | {"args": {"bytes": one.bytes}}
        )
        held = {"ts": round(one.end_s * 1e6, 1), "args": {"bytes": one.held_bytes}}
        lines.append({"ph": "C", "pid": 1, "name": "held bytes"} | held)
    return '{"traceEvents":[\n' + ",\n".join(json.dumps(line) for line in lines) + "\n]}\n"


def read_trace(path: Path) -> list[Event]:
    """The events of a trace file; raises RunError for a file that is none of ours."""
    try:
        return _from_chrome(json.loads(path.read_text())["traceEvents"])
    except OSError as error:
        raise RunError(f"{path}: cannot be read ({error.strerror}); make one with `movdc run --trace`") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise RunError(f"{path}: is no trace of movdc; make one with `movdc run --trace`") from None


def _from_chrome(lines: Sequence[dict[str, Any]]) -> list[Event]:
    events = []
    for line, held in zip(lines, [*lines[1:], {}], strict=True):
        if line["ph"] != "X":
            continue
        if line["cat"] not in LANES or held.get("name") != "held bytes":
            raise ValueError("an event of another program")
        start_s, duration_s = float(line["ts"]) / 1e6, float(line["dur"]) / 1e6
        partition = line["name"].removeprefix(f"{line['cat']} ")
        sizes = int(line["args"]["bytes"]), int(held["args"]["bytes"])
        events.append(Event(line["cat"], partition, start_s, duration_s, *sizes))
    return events
