"""The loader lane: loads partitions in order, ahead of the execution lane, by a level of residency (docs/bundle.md)."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from movdc.runtime.bundle import Residency
from movdc.runtime.errors import CancelledError

_NOTHING = Residency(needs_bytes=0, prefetch=0)


@dataclass
class _Held:
    """A partition that is loaded, or is about to be."""

    slot: bool  # whether it takes one of the 1 + prefetch places of transient partitions
    is_ready: bool = False
    is_running: bool = False
    is_doomed: bool = False  # to be freed as soon as it has loaded


class Loader:
    """What is loaded, and one thread that loads: `load` and `free` get the name of a partition, and may take long.

    One lock is over all of it, and is never held while something loads or is freed.
    """

    def __init__(self, load: Callable[[str], None], free: Callable[[str], None]) -> None:
        self._load = load
        self._free = free
        self._changed = threading.Condition()
        self._held: dict[str, _Held] = {}
        self._queue: deque[str] = deque()
        self._level = _NOTHING
        self._error: BaseException | None = None
        self._is_cancelled = False
        self._is_loading = False
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="movdc-loader")

    def begin(self) -> None:
        """A run begins: forget what was cancelled and what went wrong before."""
        with self._changed:
            self._error = None
            self._is_cancelled = False

    def plan(self, upcoming: Sequence[str], level: Residency) -> None:
        """Go on by a level: `upcoming` are the runs to come, in order.

        What is loaded and neither stays nor comes first is freed, now or as soon as it has loaded.
        """
        freed = []
        with self._changed:
            self._level = level
            transient = list(dict.fromkeys(name for name in upcoming if name not in level.pinned))
            first = transient[: level.prefetch + 1]  # those that may be there already
            for name, held in list(self._held.items()):
                is_pinned = name in level.pinned
                held.slot = not is_pinned
                if is_pinned or held.is_running or name in first:
                    continue
                held.is_doomed = True
                if held.is_ready:
                    freed.append(name)
            there = {
                name
                for name, held in self._held.items()
                if not held.is_doomed and (name in level.pinned or not held.is_running)
            }
            self._queue.clear()
            for name in upcoming:
                if name not in there:
                    self._queue.append(name)
                if name in level.pinned:
                    there.add(name)
                else:
                    there.discard(name)  # its first run frees it
        for name in freed:
            self._let_go(name)
        with self._changed:
            self._advance()

    def settle(self) -> None:
        """Wait until nothing is loading that is to be freed at once."""
        with self._changed:
            self._changed.wait_for(lambda: not any(held.is_doomed for held in self._held.values()))

    def wait_for(self, name: str) -> bool:
        """Wait until a partition is loaded and mark it as running; raises what went wrong while loading.

        True if it was not there at once.
        """
        with self._changed:
            has_waited = not self._is_there(name)
            self._changed.wait_for(lambda: self._is_cancelled or self._error is not None or self._is_there(name))
            if self._is_cancelled:
                raise CancelledError("the run was cancelled")
            if not self._is_there(name):
                assert self._error is not None
                raise self._error
            self._held[name].is_running = True
            return has_waited

    def done(self, name: str) -> None:
        """The run of a partition is over: it is freed unless it stays."""
        with self._changed:
            if name in self._level.pinned:
                self._held[name].is_running = False
                return
        self._let_go(name)

    def cancel(self) -> None:
        """Make `wait_for` raise CancelledError until the next `begin`."""
        with self._changed:
            self._is_cancelled = True
            self._queue.clear()
            self._changed.notify_all()

    def clear(self) -> None:
        """Free everything, after the load in progress; nothing is planned any more."""
        with self._changed:
            self._queue.clear()
            self._changed.wait_for(lambda: not self._is_loading)
            names = list(self._held)
        for name in names:
            self._let_go(name)

    def _is_there(self, name: str) -> bool:
        held = self._held.get(name)
        return held is not None and held.is_ready and not held.is_doomed

    def _let_go(self, name: str) -> None:
        """Free a partition, which takes its place until its memory is free."""
        self._free(name)
        with self._changed:
            del self._held[name]
            self._advance()

    def _advance(self) -> None:
        """Start the next load, if it may start; the lock is held."""
        if self._queue and not self._is_loading and self._error is None and self._may_start(self._queue[0]):
            name = self._queue.popleft()
            self._held[name] = _Held(slot=name not in self._level.pinned)
            self._is_loading = True
            self._thread.submit(self._load_one, name)
        self._changed.notify_all()

    def _may_start(self, name: str) -> bool:
        if name in self._held:  # its last run is not over
            return False
        if name in self._level.pinned:
            return True
        transient = sum(held.slot for held in self._held.values())
        return transient == 0 if name in self._level.waits else transient <= self._level.prefetch

    def _load_one(self, name: str) -> None:
        error: BaseException | None = None
        try:
            self._load(name)
        except BaseException as caught:  # noqa: BLE001  # of whatever kind, it is for the lane that waits
            error = caught
        with self._changed:
            held = self._held[name]
            held.is_ready = True
            is_freed = held.is_doomed and error is None
            if error is not None:
                del self._held[name]
                self._error = error
                self._queue.clear()
        if is_freed:
            self._free(name)
        with self._changed:
            if is_freed:
                del self._held[name]
            self._is_loading = False
            self._advance()
