"""What the text encoder made of a prompt, kept in files, so that no prompt is encoded twice."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from movdc.runtime.bundle import Bundle
from movdc.runtime.errors import RunError
from movdc.runtime.sealed import SUFFIX, DamagedError, read_sealed, write_sealed

Array = np.ndarray[Any, Any]
LIMIT_BYTES = 10**9  # 100 prompts or more of the full size


class PromptCache:
    """Keeps the outputs of text encoders in a folder; what was used least is deleted beyond `limit_bytes`.

    A file is named after the encoder's programs and weights and after what went in: bundles with one encoder share it,
    and no option of a run counts. One that is damaged is as good as none. Raises RunError where the folder cannot be
    written.
    """

    def __init__(self, folder: Path, limit_bytes: int = LIMIT_BYTES) -> None:
        self._folder = folder
        self._limit_bytes = limit_bytes
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise self._cannot("made", error) from None

    def find(self, bundle: Bundle, variant: str, inputs: Mapping[str, Array]) -> dict[str, Array] | None:
        """What a variant of the encoder of a bundle makes of these inputs, if that is known."""
        path = self._path(bundle, variant, inputs)
        try:
            outputs = read_sealed(path)
        except DamagedError:
            return None
        if outputs is not None:
            with suppress(OSError):  # somebody has deleted it meanwhile
                os.utime(path)  # the time of change tells what was used last
        return outputs

    def keep(self, bundle: Bundle, variant: str, inputs: Mapping[str, Array], outputs: Mapping[str, Array]) -> None:
        """Keep what a variant of the encoder of a bundle has made of these inputs."""
        try:
            write_sealed(self._path(bundle, variant, inputs), outputs)
        except OSError as error:
            raise self._cannot("written", error) from None
        self._trim()

    def _path(self, bundle: Bundle, variant: str, inputs: Mapping[str, Array]) -> Path:
        digests = {file.path: file.sha256 for file in bundle.manifest.files}
        parts: list[object] = []
        for name in bundle.stages["text_encoder"].variants[variant].order:
            one = bundle.partitions[name]
            files = [digests[path] for path in (one.program, *one.weights)]
            parts.append([files, [spec.name for spec in one.inputs], [spec.name for spec in one.outputs]])
        parts += [[name, hashlib.sha256(array.tobytes()).hexdigest()] for name, array in sorted(inputs.items())]
        return self._folder / (hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32] + SUFFIX)

    def _trim(self) -> None:
        kept = []
        for path in self._folder.iterdir():  # what a writer left that was stopped goes in its turn
            with suppress(FileNotFoundError):
                kept.append((path.stat().st_mtime_ns, path.stat().st_size, path))
        total_bytes = sum(size_bytes for _, size_bytes, _ in kept)
        for _, size_bytes, path in sorted(kept):
            if total_bytes <= self._limit_bytes:
                return
            path.unlink(missing_ok=True)
            total_bytes -= size_bytes

    def _cannot(self, what: str, error: OSError) -> RunError:
        return RunError(f"{self._folder}: cannot be {what} ({error.strerror}); mend that, or give --no-cache")
