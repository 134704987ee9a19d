"""What the compile cache goes by to tell that code is the same as before: a digest of its files."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from functools import cache
from importlib import resources
from importlib.resources.abc import Traversable


@cache
def code_identity(*names: str) -> str:
    """Digest of the Python files of packages, or of single modules."""
    files = []
    for name in names:
        package, _, module = name.rpartition(".")
        alone = resources.files(package).joinpath(f"{module}.py")
        files += [alone] if alone.is_file() else _with_suffix(name, ".py")
    return _digest(files)


@cache
def library_identity(package: str) -> str:
    """Digest of the built libraries of a package."""
    return _digest(_with_suffix(package, ".so"))


def _with_suffix(package: str, suffix: str) -> list[Traversable]:
    files = [file for file in resources.files(package).iterdir() if file.name.endswith(suffix)]
    return sorted(files, key=lambda file: file.name)


def _digest(files: Iterable[Traversable]) -> str:
    lines = (f"{file.name} {hashlib.sha256(file.read_bytes()).hexdigest()}\n" for file in files)
    return hashlib.sha256("".join(lines).encode()).hexdigest()
