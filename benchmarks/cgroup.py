"""A memory limit that the kernel enforces on one child process: a cgroup of version 1 or version 2."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

LIMIT_FILES = {1: ("memory.limit_in_bytes", "memory.memsw.limit_in_bytes"), 2: ("memory.max",)}
UNREMOVED_S = 5.0  # a cgroup stays busy for a moment after its last process ended


@dataclass(frozen=True)
class MemoryGroup:
    """A cgroup without a limit as yet; a process enters it by writing its id to `members`."""

    folder: Path
    version: int

    @property
    def members(self) -> Path:
        """The file that takes the ids of processes (0 is the one that writes)."""
        return self.folder / "cgroup.procs"

    def limit(self, limit_bytes: int) -> None:
        """Hold all processes of the group, with the page cache that they fill, to so many bytes, and off the swap."""
        for name in LIMIT_FILES[self.version]:
            if (file := self.folder / name).exists():
                file.write_text(str(limit_bytes))
        if (swap := self.folder / "memory.swap.max").exists():
            swap.write_text("0")


@contextmanager
def memory_group(name: str) -> Iterator[MemoryGroup | None]:
    """Make a cgroup for a block of code; None where the machine lets us make none."""
    group = _make(name)
    try:
        yield group
    finally:
        deadline = time.monotonic() + UNREMOVED_S
        while group is not None and group.folder.exists():
            try:
                group.folder.rmdir()
            except OSError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.05)


def _make(name: str) -> MemoryGroup | None:
    parent, version = _parent()
    if parent is None:
        return None
    folder = parent / name
    try:
        folder.mkdir()
    except OSError:
        return None
    return MemoryGroup(folder, version)


def _parent() -> tuple[Path | None, int]:
    """The folder that new groups go into, and the version of its interface."""
    own = dict(line.split(":", 2)[1:] for line in Path("/proc/self/cgroup").read_text().splitlines())
    for line in Path("/proc/mounts").read_text().splitlines():
        _, mount, kind, options = line.split()[:4]
        if kind == "cgroup" and "memory" in options.split(","):
            inside = next(path for controllers, path in own.items() if "memory" in controllers.split(","))
            # In a container the path may be the host's, and the mount already the container's own group.
            folder = Path(mount + inside)
            return (folder if folder.is_dir() else Path(mount)), 1
        if kind == "cgroup2" and "memory" in (Path(mount) / "cgroup.controllers").read_text().split():
            return _delegated(Path(mount), Path(mount + own.get("", "/"))), 2
    return None, 0


def _delegated(mount: Path, own: Path) -> Path | None:
    """The nearest group, from our own upwards, whose children have a memory limit (version 2)."""
    for folder in (own, *own.parents):
        control = folder / "cgroup.subtree_control"
        if control.is_file() and "memory" in control.read_text().split():
            return folder
        if folder == mount:
            break
    return None
