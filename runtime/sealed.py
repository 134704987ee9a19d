"""Arrays in a file that is there whole or not at all, and that tells when it is damaged."""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from movdc.runtime.errors import RunError

Array = np.ndarray[Any, Any]
SUFFIX = ".sealed"
PARTIAL = ".partial"  # while it is written


class DamagedError(RunError):
    """A sealed file does not hold what was written."""


def write_sealed(path: Path, arrays: Mapping[str, Array]) -> None:
    """Write a line with the SHA-256 of what follows, and an .npz; whatever stops the writer leaves the file before."""
    packed = io.BytesIO()
    np.savez(packed, allow_pickle=False, **arrays)
    partial = path.with_name(f".{path.name}.{os.getpid()}{PARTIAL}")
    try:
        with partial.open("wb") as file:
            file.write(hashlib.sha256(packed.getbuffer()).hexdigest().encode() + b"\n")
            file.write(packed.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the new name, too, outlives a loss of power
    finally:
        os.close(folder)


def read_sealed(path: Path) -> dict[str, Array] | None:
    """The arrays of a sealed file, None if there is none; raises DamagedError."""
    try:
        seal, _, packed = path.read_bytes().partition(b"\n")
    except FileNotFoundError:
        return None
    except OSError as error:
        raise DamagedError(f"{path}: cannot be read ({error.strerror})") from None
    if seal != hashlib.sha256(packed).hexdigest().encode():
        raise DamagedError(f"{path}: is damaged")
    with np.load(io.BytesIO(packed), allow_pickle=False) as arrays:
        return dict(arrays)
