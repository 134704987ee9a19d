"""The loader lane of the simulator: the rules of runtime/engine/loader.cpp, with a clock that is told how time goes."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from movdc.runtime.bundle import Partition, Residency
from movdc.runtime.rates import Part, Rates
from movdc.runtime.timeline import Event


@dataclass
class Books:
    """The bytes that are held."""

    held_bytes: int = 0
    peak_bytes: int = 0

    def take(self, size_bytes: int) -> None:
        """Hold so much more."""
        self.held_bytes += size_bytes
        self.peak_bytes = max(self.peak_bytes, self.held_bytes)

    def free(self, size_bytes: int) -> None:
        """Hold so much less."""
        self.held_bytes -= size_bytes


@dataclass
class _Held:
    slot: bool  # whether it takes one of the places of transient partitions
    state: str = "loading"  # then ready, running
    doomed: bool = False  # to be freed as soon as it has loaded
    has_run: bool = False  # since it was loaded


@dataclass
class _Load:
    """The load that is going on."""

    partition: Partition
    start_s: float
    parts: list[Part]
    part_start_s: float
    left_s: float  # of the first part, where nothing runs beside it
    packing_bytes: int = 0


@dataclass
class Loader:
    """Loads partitions in order, ahead of the execution lane."""

    partitions: Mapping[str, Partition]
    rates: Rates
    books: Books
    emit: Callable[[Event], None]
    packed: set[tuple[str, ...]]  # the files of weights that are packed
    verified: set[tuple[str, ...]] = field(default_factory=set)
    held: dict[str, _Held] = field(default_factory=dict)
    initialised: set[str] = field(default_factory=set)
    level: Residency = field(default_factory=lambda: Residency(needs_bytes=0, prefetch=0))
    load: _Load | None = None
    _queue: deque[str] = field(default_factory=deque)

    def plan(self, upcoming: Sequence[str], level: Residency, now_s: float) -> None:
        """Go on by a level: what is loaded and neither stays nor comes first goes."""
        self.level = level
        transient = [name for name in upcoming if name not in level.pinned]
        first = set(transient[: level.prefetch + 1])
        for name, held in list(self.held.items()):
            stays = name in level.pinned or held.state == "running" or name in first
            if not stays and held.state == "ready":
                self.free(name, now_s, now_s)
                continue
            held.doomed = held.doomed or not stays
            held.slot = name not in level.pinned
        there = {
            name
            for name, held in self.held.items()
            if not held.doomed and (held.state != "running" or name in level.pinned)
        }
        self._queue.clear()
        for name in upcoming:
            if name in there:
                if name not in level.pinned:
                    there.discard(name)  # its first run frees it
                continue
            if name in level.pinned:
                there.add(name)
            self._queue.append(name)

    def may_start(self, name: str) -> bool:
        """Whether the load that comes next may begin."""
        if name in self.held:
            return False  # its last run is not over
        if name in self.level.pinned:
            return True
        transient = sum(held.slot for held in self.held.values())
        return transient == 0 if name in self.level.waits else transient <= self.level.prefetch

    def start(self, now_s: float) -> None:
        """Begin the next load if the lane is free and the rules allow it."""
        if self.load is not None or not self._queue or not self.may_start(self._queue[0]):
            return
        one = self.partitions[self._queue.popleft()]
        self.held[one.name] = _Held(slot=one.name not in self.level.pinned)
        self.books.take(one.held_bytes)
        parts = self.rates.parts(
            one,
            packs=self.is_unpacked(one.name),
            verifies=one.weights not in self.verified and bool(one.weight_bytes),
            initialises=one.name not in self.initialised,
        )
        self.packed.add(one.weights)
        self.verified.add(one.weights)
        self.initialised.add(one.name)
        self.load = _Load(one, now_s, parts, now_s, parts[0].seconds)
        self._take_for_packing(self.load)

    def end_part(self, now_s: float) -> None:
        """The part of the load that is going on is over, and with the last one the load."""
        load = self.load
        assert load is not None
        part = load.parts.pop(0)
        one = load.partition
        self.books.free(load.packing_bytes)
        load.packing_bytes = 0
        held_bytes = self.books.held_bytes
        took_s = now_s - load.part_start_s
        self.emit(Event(part.what, one.name, load.part_start_s, took_s, part.read_bytes, held_bytes))
        if load.parts:
            load.part_start_s, load.left_s = now_s, load.parts[0].seconds
            self._take_for_packing(load)
            return
        self.load = None
        self.emit(Event("load", one.name, load.start_s, now_s - load.start_s, one.held_bytes, held_bytes))
        self.held[one.name].state = "ready"
        if self.held[one.name].doomed:
            self.free(one.name, now_s, now_s)

    def is_unpacked(self, name: str) -> bool:
        """Whether the weights of a partition are still to be packed."""
        one = self.partitions[name]
        return one.weight_bytes > 0 and one.weights not in self.packed

    def is_ready(self, name: str) -> bool:
        """Whether a partition can run."""
        held = self.held.get(name)
        return held is not None and held.state == "ready" and not held.doomed

    def runs(self, name: str) -> bool:
        """A partition begins to run; gives whether it has run before, since it was loaded."""
        held = self.held[name]
        held.state = "running"
        had_run, held.has_run = held.has_run, True
        return had_run

    def stays(self, name: str) -> bool:
        """Whether a partition stays when its run is over; else it takes its place until it is freed."""
        if name in self.level.pinned:
            self.held[name].state = "ready"
        return name in self.level.pinned

    def free(self, name: str, start_s: float, now_s: float) -> None:
        """A partition has gone."""
        del self.held[name]
        self.books.free(self.partitions[name].held_bytes)
        self.emit(Event("free", name, start_s, now_s - start_s, 0, self.books.held_bytes))

    def clear(self, now_s: float) -> None:
        """Everything goes, programs included; no load is going on."""
        self._queue.clear()
        for name in list(self.held):
            self.free(name, now_s, now_s)
        self.initialised.clear()

    def _take_for_packing(self, load: _Load) -> None:
        if load.parts[0].what == "pack":
            load.packing_bytes = load.partition.load_bytes - load.partition.held_bytes
            self.books.take(load.packing_bytes)
