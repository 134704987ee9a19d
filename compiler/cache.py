"""The compile cache: what compiles have made, under a digest of what it was made from.

An entry is a folder KEY that holds `data`, the file, and `entry.json`, what is known of it. It is made in a folder of
work and renamed, so it is whole or not there, whatever stops a compile; the next one goes on with what is there.
Bundles share the files by link where the file system cannot clone, so an entry whose file was changed is dropped.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from movdc.compiler.errors import InternalError, MovdcError
from movdc.compiler.folders import directory, lock, sync

LIMIT_BYTES = 40 * 10**9  # three bundles of the largest pipeline so far, and some
_DATA, _RECORD, _WORK = "data", "entry.json", ".work-"


@dataclass(frozen=True)
class Entry:
    """A finished file of the cache."""

    key: str  # KIND-DIGEST
    path: Path
    size_bytes: int
    sha256: str
    note: Any  # what its maker wrote beside it, as JSON has it
    used_s: float  # when it was last made or taken, since the epoch

    @property
    def kind(self) -> str:
        """What it is: program, weights or plan."""
        return self.key.partition("-")[0]


def key_of(kind: str, *made_from: str) -> str:
    """The key of an entry, from all that its content depends on."""
    return f"{kind}-{hashlib.sha256(json.dumps(made_from).encode()).hexdigest()}"


class CompileCache:
    """A folder of entries, and a folder of work for files that are to become some."""

    def __init__(self, root: Path, work: Path) -> None:
        self.root = root
        self.work = work

    def get(self, key: str) -> Entry | None:
        """The entry of a key, which counts as used now; None if there is none, or none that is as it was made."""
        entry = _read(self.root / key)
        if entry is None:
            shutil.rmtree(self.root / key, ignore_errors=True)
            return None
        os.utime(self.root / key / _RECORD)
        return entry

    def put(self, key: str, file: Path, sha256: str, note: Any) -> Entry:
        """Move a finished file in; of two compiles that make the same one, the first keeps its own."""
        folder = Path(tempfile.mkdtemp(dir=self.work))
        os.replace(file, folder / _DATA)
        sync(folder / _DATA)
        status = (folder / _DATA).stat()
        record = {"size_bytes": status.st_size, "modified_ns": status.st_mtime_ns, "sha256": sha256, "note": note}
        (folder / _RECORD).write_text(json.dumps(record))
        with suppress(OSError):  # there already
            os.rename(folder, self.root / key)
        entry = self.get(key)
        if entry is None:
            raise InternalError(f"{self.root / key} vanished while it was made; is something else clearing the cache?")
        return entry

    def put_bytes(self, key: str, data: bytes, note: Any = None) -> Entry:
        """Keep what is in memory."""
        path = self.work / key
        path.write_bytes(data)
        return self.put(key, path, hashlib.sha256(data).hexdigest(), note)


@contextmanager
def open_cache(root: Path, limit_bytes: int = LIMIT_BYTES) -> Iterator[CompileCache]:
    """The cache at `root`, pruned to its limit in the end; raises MovdcError if it cannot be written."""
    try:
        root.mkdir(parents=True, exist_ok=True)
        with directory(root) as whole:
            fcntl.flock(whole, fcntl.LOCK_EX)  # a folder of work is not swept before its owner has locked it
            for left in root.glob(f"{_WORK}*"):
                with directory(left) as descriptor:
                    if lock(descriptor):  # of a compile that was killed
                        shutil.rmtree(left)
            work = Path(tempfile.mkdtemp(prefix=_WORK, dir=root))
            owned = os.open(work, os.O_RDONLY)
            lock(owned)
    except OSError as error:
        raise MovdcError(f"{root}: cannot be the cache ({error.strerror}); give --cache DIR, or --no-cache") from None
    try:
        yield CompileCache(root, work)
        prune(root, limit_bytes)
    finally:
        shutil.rmtree(work, ignore_errors=True)
        os.close(owned)


@contextmanager
def passing_cache(parent: Path) -> Iterator[CompileCache]:
    """A cache below a folder, which is gone in the end."""
    with tempfile.TemporaryDirectory(prefix=".cache-", dir=parent) as root, open_cache(Path(root)) as cache:
        yield cache


def entries(root: Path) -> list[Entry]:
    """Every entry, the last used first."""
    found = (_read(folder) for folder in root.glob("*-*") if not folder.name.startswith("."))
    return sorted((entry for entry in found if entry is not None), key=lambda entry: -entry.used_s)


def prune(root: Path, limit_bytes: int) -> int:
    """Remove what was used longest ago until the rest is within the limit; gives the bytes removed."""
    kept = removed = 0
    for entry in entries(root):
        if kept + entry.size_bytes <= limit_bytes:
            kept += entry.size_bytes
        else:
            removed += entry.size_bytes
            (root / entry.key / _RECORD).unlink(missing_ok=True)  # first, so that half an entry is none
            shutil.rmtree(root / entry.key, ignore_errors=True)
    return removed


def _read(folder: Path) -> Entry | None:
    """An entry whose file is the one that was recorded."""
    try:
        record = json.loads((folder / _RECORD).read_bytes())
        used_s = (folder / _RECORD).stat().st_mtime
        status = (folder / _DATA).stat()
    except (OSError, ValueError):
        return None
    if (status.st_size, status.st_mtime_ns) != (record["size_bytes"], record["modified_ns"]):
        return None
    return Entry(folder.name, folder / _DATA, status.st_size, record["sha256"], record["note"], used_s)
