"""Files and folders: locks that go with the process, contents that reach the disk, outputs that options name."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from movdc.compiler.errors import MovdcError

_FICLONE = 0x40049409  # Linux: a copy that shares its blocks until one of the two is changed


@contextmanager
def directory(path: Path) -> Iterator[int]:
    """A descriptor of a folder, to lock it by."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def lock(descriptor: int) -> bool:
    """Whether the lock could be had; it is held until the descriptor is closed."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def sync(path: Path) -> None:
    """Bring a file's or a folder's content to the disk."""
    with directory(path) as descriptor:
        os.fsync(descriptor)


def make_parent(path: Path) -> None:
    """Make the folder that an output goes into; raises MovdcError where that cannot be."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise MovdcError(f"{path}: its folder cannot be made ({error.strerror}); choose another path") from None


def check_output(path: Path) -> None:
    """Raise MovdcError before minutes of work for a file that cannot be written after them; makes its folder."""
    make_parent(path)
    code = errno.EISDIR if path.is_dir() else errno.EACCES
    if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise _unwritable(path, OSError(code, os.strerror(code)))


def write_output(path: Path, text: str) -> None:
    """Write a file that an option names, its folder included; raises MovdcError where that cannot be."""
    make_parent(path)
    try:
        path.write_text(text)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise
        raise _unwritable(path, error) from None


def _unwritable(path: Path, error: OSError) -> MovdcError:
    return MovdcError(f"{path}: cannot be written ({error.strerror}); give the path of a file")


def place(source: Path, destination: Path) -> None:
    """Make `destination` a file of the same content, without writing it again where the file system lets us."""
    try:
        with source.open("rb") as old, destination.open("xb") as new:
            fcntl.ioctl(new.fileno(), _FICLONE, old.fileno())
        return
    except OSError:
        destination.unlink(missing_ok=True)
    try:
        os.link(source, destination)
    except OSError:  # another file system, or one without links
        shutil.copyfile(source, destination)
