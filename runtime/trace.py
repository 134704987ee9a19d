"""What both lanes did and when: sums for the report of a run, and events for Perfetto."""

from __future__ import annotations

import json
import threading
import time
from collections import defaultdict
from typing import Any, Literal

from movdc.runtime.books import Books

What = Literal["load", "read", "init", "run", "wait", "free"]
Lane = Literal["loader", "execution"]
_LANES: dict[Lane, int] = {"loader": 1, "execution": 2}


class Trace:
    """Seconds of each kind of work, and, if they are kept, the events in Chrome's trace format."""

    def __init__(self, books: Books, keeps_events: bool) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.read_bytes = 0
        self._books = books
        self._keeps_events = keeps_events
        self._events: list[dict[str, Any]] = []
        self._start_s = time.perf_counter()
        self._lock = threading.Lock()

    def add(self, what: What, partition: str, lane: Lane, start_s: float, size_bytes: int = 0) -> None:
        """Note what has been done since a moment of `time.perf_counter`."""
        end_s = time.perf_counter()
        with self._lock:
            self.seconds[what] += end_s - start_s
            self.read_bytes += size_bytes if what == "read" else 0
            if not self._keeps_events:
                return
            span = {"ph": "X", "pid": 1, "tid": _LANES[lane], "cat": what, "name": f"{what} {partition}"}
            times = {"ts": (start_s - self._start_s) * 1e6, "dur": (end_s - start_s) * 1e6}
            self._events.append(span | times | {"args": {"bytes": size_bytes}})
            held = {"ts": (end_s - self._start_s) * 1e6, "args": {"bytes": self._books.held_bytes}}
            self._events.append({"ph": "C", "pid": 1, "name": "held bytes"} | held)

    def json(self) -> str:
        """All events so far, as a JSON that Perfetto shows."""
        named = [("process_name", None, "movdc"), *(("thread_name", tid, lane) for lane, tid in _LANES.items())]
        meta = [
            {"ph": "M", "pid": 1, "name": kind, "args": {"name": name}} | ({} if tid is None else {"tid": tid})
            for kind, tid, name in named
        ]
        with self._lock:
            return json.dumps({"traceEvents": [*meta, *self._events]})
