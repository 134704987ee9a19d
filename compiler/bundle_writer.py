"""Writing a bundle: into a temporary sibling that is renamed, so that it exists whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from movdc.compiler.cache import Entry
from movdc.compiler.errors import MovdcError
from movdc.compiler.folders import directory, lock, make_parent, place, sync
from movdc.runtime.bundle import MANIFEST, SEAL, Constant, File, Manifest, WeightsFile, seal_of


class BundleWriter:
    """Collects content-addressed files below a folder that is not yet the bundle."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.files: dict[str, File] = {}
        self.entries: dict[str, str] = {}  # the key of the cache that each file came from
        self.weights: dict[str, WeightsFile] = {}

    @staticmethod
    def program_path(entry: Entry, suffix: str) -> str:
        """Where a lowered program goes in the bundle."""
        return _path("programs", entry, suffix)

    def add_program(self, entry: Entry, suffix: str) -> str:
        """Take a lowered program in; returns its path in the bundle."""
        return self._add("programs", entry, suffix)

    def add_weights(self, entry: Entry, suffix: str, constants: tuple[Constant, ...]) -> str:
        """Take a file of weights in, unless one of the same content is there; returns its path in the bundle."""
        path = self._add("weights", entry, suffix)
        self.weights[path] = WeightsFile(path=path, constants=constants)
        return path

    def add_text(self, path: str, text: str) -> File:
        """Write a text file that comes from no cache."""
        data = text.encode()
        (self.root / path).write_bytes(data)
        return File(path=path, size_bytes=len(data), sha256=hashlib.sha256(data).hexdigest())

    def finish(self, manifest: Manifest) -> None:
        """Write the manifest and its seal."""
        text = (json.dumps(manifest.model_dump(mode="json"), indent=1) + "\n").encode()
        (self.root / MANIFEST).write_bytes(text)
        (self.root / SEAL).write_text(seal_of(text))

    def add_entry(self, path: str, entry: Entry) -> None:
        """Take a file of the cache in under a given name."""
        (self.root / path).parent.mkdir(parents=True, exist_ok=True)
        place(entry.path, self.root / path)
        self.files[path] = File(path=path, size_bytes=entry.size_bytes, sha256=entry.sha256)
        self.entries[path] = entry.key

    def _add(self, folder: str, entry: Entry, suffix: str) -> str:
        path = _path(folder, entry, suffix)
        if path not in self.files:
            self.add_entry(path, entry)
        return path


def _path(folder: str, entry: Entry, suffix: str) -> str:
    return f"{folder}/{entry.sha256[:16]}{suffix}"


@contextmanager
def new_bundle(out: Path) -> Iterator[BundleWriter]:
    """A writer whose files become `out` when the block ends well, and vanish when it does not.

    Raises MovdcError if `out` is something else than a bundle, or if another process is writing it.
    """
    if out.exists() and not (out / MANIFEST).is_file():
        raise MovdcError(f"{out}: exists and is no bundle; choose another -o, or remove it")
    make_parent(out)
    for left in out.parent.glob(f".{out.name}.partial-*"):  # of a compile that was killed
        if left.suffix == ".old" and not out.exists():  # between its two renames
            os.rename(left, out)
            continue
        with directory(left) as descriptor:
            if not lock(descriptor):
                raise MovdcError(f"{out}: another compile is writing it; wait for it, or choose another -o")
            shutil.rmtree(left)
    root = Path(tempfile.mkdtemp(prefix=f".{out.name}.partial-", dir=out.parent))
    old = root.with_name(root.name + ".old")
    with directory(root) as descriptor:
        lock(descriptor)  # goes with the process, however it ends
        try:
            yield BundleWriter(root)
            root.chmod(0o755)
            for path in [*root.rglob("*"), root]:
                sync(path)
            if out.exists():
                os.rename(out, old)
            os.rename(root, out)
            sync(out.parent)
            shutil.rmtree(old, ignore_errors=True)
        except BaseException:
            if old.exists() and not out.exists():  # stopped between the two renames
                os.rename(old, out)
            shutil.rmtree(root, ignore_errors=True)
            raise
