"""Writing a bundle: into a temporary sibling that is renamed, so that it exists whole or not at all."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from movdc.compiler.errors import MovdcError
from movdc.runtime.bundle import MANIFEST, SEAL, Constant, File, Manifest, WeightsFile, seal_of


class BundleWriter:
    """Collects content-addressed files below a folder that is not yet the bundle."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.files: dict[str, File] = {}
        self.weights: dict[str, WeightsFile] = {}

    def add_program(self, program: Path) -> str:
        """Move a lowered program in; returns its path in the bundle."""
        return self._add(program, "programs", program.suffix)

    def add_weights(self, weights: Path, constants: tuple[Constant, ...]) -> str:
        """Move a file of weights in, unless one of the same content is there; returns its path in the bundle."""
        path = self._add(weights, "weights", weights.suffix)
        self.weights[path] = WeightsFile(path=path, constants=constants)
        return path

    def add_bytes(self, path: str, data: bytes) -> None:
        """Write a file under a given name."""
        (self.root / path).parent.mkdir(parents=True, exist_ok=True)
        (self.root / path).write_bytes(data)
        self.files[path] = File(path=path, size_bytes=len(data), sha256=hashlib.sha256(data).hexdigest())

    def finish(self, manifest: Manifest) -> None:
        """Write the manifest and its seal."""
        text = (json.dumps(manifest.model_dump(mode="json"), indent=1) + "\n").encode()
        (self.root / MANIFEST).write_bytes(text)
        (self.root / SEAL).write_text(seal_of(text))

    def _add(self, source: Path, folder: str, suffix: str) -> str:
        with source.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        path = f"{folder}/{digest[:16]}{suffix}"
        (self.root / folder).mkdir(exist_ok=True)
        self.files[path] = File(path=path, size_bytes=source.stat().st_size, sha256=digest)
        os.replace(source, self.root / path)
        return path


@contextmanager
def new_bundle(out: Path) -> Iterator[BundleWriter]:
    """A writer whose files become `out` when the block ends well, and vanish when it does not.

    Raises MovdcError if `out` is something else than a bundle, or if another process is writing it.
    """
    if out.exists() and not (out / MANIFEST).is_file():
        raise MovdcError(f"{out}: exists and is no bundle; choose another -o, or remove it")
    out.parent.mkdir(parents=True, exist_ok=True)
    for left in out.parent.glob(f".{out.name}.partial-*"):  # of a compile that was killed
        if left.suffix == ".old" and not out.exists():  # between its two renames
            os.rename(left, out)
            continue
        with _directory(left) as descriptor:
            if not _lock(descriptor):
                raise MovdcError(f"{out}: another compile is writing it; wait for it, or choose another -o")
            shutil.rmtree(left)
    root = Path(tempfile.mkdtemp(prefix=f".{out.name}.partial-", dir=out.parent))
    old = root.with_name(root.name + ".old")
    with _directory(root) as descriptor:
        _lock(descriptor)  # goes with the process, however it ends
        try:
            yield BundleWriter(root)
            root.chmod(0o755)
            for path in [*root.rglob("*"), root]:
                _sync(path)
            if out.exists():
                os.rename(out, old)
            os.rename(root, out)
            _sync(out.parent)
            shutil.rmtree(old, ignore_errors=True)
        except BaseException:
            if old.exists() and not out.exists():  # stopped between the two renames
                os.rename(old, out)
            shutil.rmtree(root, ignore_errors=True)
            raise


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _directory(path: Path) -> Iterator[int]:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _lock(descriptor: int) -> bool:
    """Whether the lock could be had; it is held until the descriptor is closed."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
