"""What the compile cache goes by to tell that code is the same as before: a digest of its files."""

from __future__ import annotations

import hashlib
from functools import cache
from importlib import resources


@cache
def code_identity(*names: str) -> str:
    """Digest of the Python files and built libraries of packages, or of single modules."""
    digest = hashlib.sha256()
    for name in names:
        package, _, module = name.rpartition(".")
        alone = resources.files(package).joinpath(f"{module}.py")
        files = [alone] if alone.is_file() else list(resources.files(name).iterdir())
        for file in sorted(files, key=lambda file: file.name):
            if file.name.endswith((".py", ".so")):
                digest.update(f"{name} {file.name} {hashlib.sha256(file.read_bytes()).hexdigest()}\n".encode())
    return digest.hexdigest()
