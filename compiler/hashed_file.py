"""Writing a file once and knowing its SHA-256, without reading it again."""

from __future__ import annotations

import hashlib
from pathlib import Path
from types import TracebackType
from typing import Self

from torch import Tensor


class HashedFile:
    """A new file that is written from its start to its end."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("xb")
        self._digest = hashlib.sha256()
        self.size_bytes = 0

    def write(self, data: bytes | memoryview) -> None:
        """Append bytes."""
        self._file.write(data)
        self._digest.update(data)
        self.size_bytes += len(data)

    def write_tensor(self, tensor: Tensor) -> None:
        """Append a contiguous tensor's data, little-endian and row-major."""
        if tensor.numel():
            self.write(tensor.numpy().data.cast("B"))

    def pad_to(self, size_bytes: int) -> None:
        """Append zeros up to a size."""
        self.write(bytes(size_bytes - self.size_bytes))

    @property
    def sha256(self) -> str:
        """64 hex digits, of what has been written so far."""
        return self._digest.hexdigest()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
