"""The journal of a run: what it has done so far, so that a run that was stopped can go on with the same bits.

It is the folder OUT.journal beside the output OUT: that disk has room for the output, keeps it when the machine starts
anew, and whoever looks for the output sees that it is not finished. A run that ends well removes it.

    point.sealed        the sampler's point after the last step, and what the run was asked for
    vae_temporal-N.sealed, vae_spatial-N.sealed     what these stages made of the latents, call by call

The seed's generator makes the first noise and nothing else, so there is no state of it to keep.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from movdc.runtime.errors import RunError
from movdc.runtime.sampler import Point
from movdc.runtime.sealed import PARTIAL, SUFFIX, DamagedError, read_sealed, write_sealed

Array = np.ndarray[Any, Any]
Asked = Mapping[str, str | int | None]
VERSION = 1
POINT = f"point{SUFFIX}"


class JournalError(RunError):
    """The journal is damaged, of another run, in use, or cannot be written."""


@contextmanager
def journal(out: Path, asked: Asked, *, resume: bool) -> Iterator[Journal]:
    """The journal of a run that makes the file `out`; it is removed when the block ends well.

    `asked` names everything that decides what comes out. With `resume` the run goes on from what is there, if anything
    is; raises JournalError where that is of another run or damaged. Nothing is written before the first step is done.
    """
    one = Journal(out.with_name(f"{out.name}.journal"), asked)
    try:
        one.open(resume=resume)
        yield one
        one.remove()
    finally:
        one.close()


class Journal:
    """What a run has done, in a folder; see `journal`."""

    def __init__(self, folder: Path, asked: Asked) -> None:
        self.folder = folder
        self.point: Point | None = None  # where the run that was stopped stood
        self._asked = {"version": VERSION, **asked}
        self._lock: int | None = None
        self._is_mine = False  # whether what is in the folder belongs to this run

    def open(self, *, resume: bool) -> None:
        """Lock the folder if there is one, and read where the run stood."""
        if not self.folder.is_dir():
            return
        self._take()
        arrays = self._read(POINT) if resume else None
        if arrays is None:
            return
        theirs = json.loads(str(arrays["asked"]))
        for name, ours in self._asked.items():
            if theirs.get(name) != ours:
                raise JournalError(
                    f"{self.folder}: the run that was stopped had {name} {theirs.get(name)!r}, this one has {ours!r}; "
                    "give what it had, or leave --resume out to start over"
                )
        self._is_mine = True
        self.point = Point(arrays["latents"], arrays["drift"], tuple(arrays["cosines"].tolist()))

    def remove(self) -> None:
        """Remove what this run has written."""
        if self._is_mine:
            self._clear()
            with suppress(OSError):  # somebody has put something else there
                self.folder.rmdir()

    def close(self) -> None:
        """Unlock the folder."""
        if self._lock is not None:
            os.close(self._lock)

    @property
    def is_started(self) -> bool:
        """Whether there is something for a later run to go on from."""
        return self._is_mine

    def keep_point(self, point: Point) -> None:
        """Keep where the run stands; what another run has left goes."""
        if not self._is_mine:
            self._begin()
        assert point.drift is not None  # for a step has been taken
        arrays = {"asked": np.array(json.dumps(self._asked)), "cosines": np.array(point.cosines, np.float64)}
        self._write(POINT, {**arrays, "latents": point.latents, "drift": point.drift})

    def kept(self, stage: str, index: int) -> Array | None:
        """What a call of a stage gave, if the run that was stopped has come so far."""
        if not self._is_mine:
            return None
        arrays = self._read(f"{stage}-{index}{SUFFIX}")
        return None if arrays is None else arrays["made"]

    def keep(self, stage: str, index: int, made: Array) -> None:
        """Keep what a call of a stage gave."""
        self._write(f"{stage}-{index}{SUFFIX}", {"made": made})

    def _begin(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise JournalError(f"{self.folder}: cannot be made ({error.strerror})") from None
        if self._lock is None:
            self._take()
        self._clear()
        self._is_mine = True

    def _take(self) -> None:
        """Lock the folder, so that no other run writes there; the lock goes with the process, however that ends."""
        try:
            self._lock = os.open(self.folder, os.O_RDONLY)
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise JournalError(f"{self.folder}: another run is making this video; wait for its end") from None
        except OSError as error:
            raise JournalError(f"{self.folder}: cannot be locked ({error.strerror})") from None

    def _clear(self) -> None:
        """Remove what runs wrote; the point first, for without it the others mean nothing."""
        (self.folder / POINT).unlink(missing_ok=True)
        for path in (*self.folder.glob(f"*{SUFFIX}"), *self.folder.glob(f".*{PARTIAL}")):
            path.unlink()

    def _read(self, name: str) -> dict[str, Array] | None:
        try:
            return read_sealed(self.folder / name)
        except DamagedError as error:
            raise JournalError(f"{error}; leave --resume out to start over") from None

    def _write(self, name: str, arrays: Mapping[str, Array]) -> None:
        try:
            write_sealed(self.folder / name, arrays)
        except OSError as error:
            raise JournalError(f"{self.folder}: cannot be written ({error.strerror})") from None
