"""The loader lane of executors in Python: what a level of residency allows is never exceeded, and nothing is lost."""

import threading
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from movdc.runtime.bundle import Residency
from movdc.runtime.errors import CancelledError
from movdc.runtime.loader import Loader

NAMES = tuple("abcdef")
WATCHDOG_S = 20


class Memory:
    """What is loaded, and the most transient partitions that were at once."""

    def __init__(self, fails_at: str | None = None) -> None:
        self.loaded: set[str] = set()
        self.loads: list[str] = []
        self.pinned: frozenset[str] = frozenset()
        self.most_transient = 0
        self._fails_at = fails_at
        self._lock = threading.Lock()

    def load(self, name: str) -> None:
        if name == self._fails_at:
            raise ValueError(f"{name} cannot be loaded")
        with self._lock:
            assert name not in self.loaded, "loaded twice"
            self.loaded.add(name)
            self.loads.append(name)
            self.most_transient = max(self.most_transient, len(self.loaded - self.pinned))

    def free(self, name: str) -> None:
        with self._lock:
            self.loaded.remove(name)


def _level(pinned: frozenset[str], prefetch: int, waits: frozenset[str]) -> Residency:
    return Residency(needs_bytes=0, prefetch=prefetch, pinned=tuple(sorted(pinned)), waits=tuple(sorted(waits)))


def _in_time(work: Callable[[], None]) -> None:
    """Run it; a lane that hangs fails the test."""
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(WATCHDOG_S)
    assert not thread.is_alive(), "the loader hangs"


@settings(max_examples=60, deadline=None)
@given(
    st.frozensets(st.sampled_from(NAMES)), st.integers(0, 3), st.frozensets(st.sampled_from(NAMES)), st.integers(1, 3)
)
def test_runs_find_their_partition_and_no_more_than_the_level_is_loaded(
    pinned: frozenset[str], prefetch: int, waits: frozenset[str], cycles: int
) -> None:
    memory = Memory()
    memory.pinned = pinned
    loader = Loader(memory.load, memory.free)
    ran = []

    def work() -> None:
        for cycle in range(cycles):
            loader.begin()
            loader.plan(NAMES * (2 if cycle + 1 < cycles else 1), _level(pinned, prefetch, waits))
            for name in NAMES:
                loader.wait_for(name)
                assert name in memory.loaded
                ran.append(name)
                loader.done(name)

    _in_time(work)
    assert ran == list(NAMES) * cycles
    assert memory.most_transient <= prefetch + 1
    assert memory.loaded == pinned
    assert all(memory.loads.count(name) == 1 for name in pinned)
    _in_time(loader.clear)
    assert not memory.loaded


def test_another_level_frees_what_does_not_stay() -> None:
    memory = Memory()
    memory.pinned = frozenset(NAMES)
    loader = Loader(memory.load, memory.free)
    loader.begin()
    loader.plan(NAMES, _level(memory.pinned, 1, frozenset()))
    for name in NAMES:
        loader.wait_for(name)
        loader.done(name)
    loader.plan((), _level(frozenset("ac"), 0, frozenset()))
    assert memory.loaded == {"a", "c"}


def test_what_goes_wrong_while_loading_is_raised_where_it_is_waited_for() -> None:
    memory = Memory(fails_at="b")
    loader = Loader(memory.load, memory.free)
    loader.begin()
    loader.plan(NAMES, _level(frozenset(), 1, frozenset()))
    loader.wait_for("a")
    loader.done("a")
    with pytest.raises(ValueError, match="b cannot be loaded"):
        loader.wait_for("b")
    loader.clear()
    assert not memory.loaded


def test_a_cancelled_run_ends_where_it_waits_and_the_next_begins_anew() -> None:
    memory = Memory()
    loader = Loader(memory.load, memory.free)
    loader.begin()
    loader.plan(NAMES, _level(frozenset(), 0, frozenset()))
    loader.wait_for("a")
    loader.cancel()
    loader.done("a")
    with pytest.raises(CancelledError):
        loader.wait_for("b")
    loader.clear()
    loader.begin()
    loader.plan(("b",), _level(frozenset(), 0, frozenset()))
    assert loader.wait_for("b") in (True, False)
    loader.done("b")
    assert not memory.loaded
