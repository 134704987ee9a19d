"""The files of a bundle: each is checked before anything parses it, and again for identity whenever it is opened."""

from __future__ import annotations

import hashlib
import mmap
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from movdc.runtime.bundle import File
from movdc.runtime.errors import BundleError

_STEP_BYTES = 1 << 20  # that are hashed at a time
_DIRECTORY = os.O_RDONLY | os.O_NOFOLLOW | os.O_DIRECTORY
_PLAIN = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK  # a pipe would block


class Mapped:
    """A file in the address space, of which the page cache holds what `fetch` has read and nobody has let go."""

    def __init__(self, descriptor: int, path: str) -> None:
        self._path = path
        self._descriptor = descriptor
        self._identity = _identity(descriptor)
        self._map = mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ)
        self.data: np.ndarray[Any, np.dtype[np.uint8]] = np.frombuffer(self._map, np.uint8)

    def __del__(self) -> None:
        os.close(self._descriptor)

    def fetch(self, slab: bytearray) -> int:
        """Read all of it into the page cache through a buffer, without the lock of the interpreter; the bytes read."""
        self.check_unchanged()
        done_bytes = 0
        while done_bytes < len(self.data):
            got_bytes = os.preadv(self._descriptor, [slab], done_bytes)
            if got_bytes == 0:
                raise BundleError(f"{self._path}: became shorter while the bundle was in use; start the run again")
            done_bytes += got_bytes
        return done_bytes

    def let_go(self, from_page_cache: bool) -> None:
        """Give the pages back to the system; they come back from the file when they are read again."""
        self._map.madvise(mmap.MADV_DONTNEED)
        if from_page_cache and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._descriptor, 0, 0, os.POSIX_FADV_DONTNEED)

    def check_unchanged(self) -> None:
        """Raise BundleError if the file has changed since it was mapped: what lies behind its end cannot be read."""
        now = _identity(self._descriptor)
        if now[:4] != self._identity[:4]:  # one that was unlinked, or linked elsewhere, is whole all the same
            raise BundleError(f"{self._path}: changed while the bundle was in use; start the run again")


class CheckedFiles:
    """Files of one folder; raises BundleError that names the one that is missing, damaged or foreign."""

    def __init__(self, root: Path, files: tuple[File, ...]) -> None:
        self.root = root
        self._records = {file.path: file for file in files}
        self._checked: dict[str, tuple[int, ...]] = {}  # what tells that a file is still the one that was checked
        for file in files:
            with self._opened(file.path) as descriptor:
                self._checked[file.path] = self._check(descriptor, file)

    def read(self, path: str) -> bytes:
        """All bytes of a checked file."""
        with self._open_checked(path) as descriptor, os.fdopen(os.dup(descriptor), "rb") as file:
            return file.read()

    def map(self, path: str) -> Mapped:
        """A checked file, mapped."""
        with self._open_checked(path) as descriptor:
            return Mapped(os.dup(descriptor), str(self.root / path))

    @contextmanager
    def _open_checked(self, path: str) -> Iterator[int]:
        with self._opened(path) as descriptor:
            now, before = _identity(descriptor), self._checked[path]
            if now[:4] != before[:4]:
                raise BundleError(f"{self.root / path}: changed while the bundle was in use; start the run again")
            if now != before:  # compiles link the files of bundles to their cache, which changes no byte
                self._checked[path] = self._check(descriptor, self._records[path])
            yield descriptor

    @contextmanager
    def _opened(self, path: str) -> Iterator[int]:
        """A plain file below the folder, reached through no link."""
        *folders, name = PurePosixPath(path).parts
        opened: list[int] = []
        try:
            opened.append(os.open(self.root, os.O_RDONLY | os.O_DIRECTORY))
            for folder in folders:
                opened.append(os.open(folder, _DIRECTORY, dir_fd=opened[-1]))
            opened.append(os.open(name, _PLAIN, dir_fd=opened[-1]))
            if not stat.S_ISREG(os.fstat(opened[-1]).st_mode):
                raise BundleError(f"{self.root / path}: not a plain file")
            yield opened[-1]
        except FileNotFoundError:
            raise BundleError(f"{self.root / path}: missing; compile the bundle again") from None
        except OSError as error:
            raise BundleError(f"{self.root / path}: cannot be opened as a plain file ({error.strerror})") from None
        finally:
            for descriptor in opened:
                os.close(descriptor)

    def _check(self, descriptor: int, file: File) -> tuple[int, ...]:
        identity = _identity(descriptor)
        where = self.root / file.path
        size_bytes = os.fstat(descriptor).st_size
        if size_bytes != file.size_bytes:
            raise BundleError(f"{where}: has {size_bytes} bytes, {file.size_bytes} expected; compile the bundle again")
        digest = hashlib.sha256()
        for offset in range(0, size_bytes, _STEP_BYTES):
            digest.update(os.pread(descriptor, _STEP_BYTES, offset))
        if digest.hexdigest() != file.sha256:
            raise BundleError(f"{where}: is damaged; compile the bundle again")
        return identity


def _identity(descriptor: int) -> tuple[int, ...]:
    """Device, inode, size, time of modification; and last the time of change, which a link changes too."""
    status = os.fstat(descriptor)
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns
