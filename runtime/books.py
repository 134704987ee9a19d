"""The books of memory: every byte that a run holds is written down before it is taken."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from movdc.runtime.errors import BudgetError


class Books:
    """Bytes held now and at most, within a limit; any thread may take and give."""

    def __init__(self) -> None:
        self.limit_bytes: int | None = None
        self.held_bytes = 0
        self.peak_bytes = 0  # since the last restart
        self._lock = threading.Lock()

    def take(self, size_bytes: int, what: str) -> None:
        """Write bytes down; raises BudgetError, and takes nothing, if the limit would be exceeded."""
        with self._lock:
            wanted_bytes = self.held_bytes + size_bytes
            if self.limit_bytes is not None and wanted_bytes > self.limit_bytes:
                raise BudgetError(
                    f"{what} needs {size_bytes} bytes; with {self.held_bytes} held that is more than the "
                    f"{self.limit_bytes} allowed; raise the memory budget, or free memory"
                )
            self.held_bytes = wanted_bytes
            self.peak_bytes = max(self.peak_bytes, wanted_bytes)

    def give(self, size_bytes: int) -> None:
        """Cross bytes out."""
        with self._lock:
            self.held_bytes -= size_bytes

    def restart_peak(self) -> None:
        """Start a new peak at what is held now."""
        with self._lock:
            self.peak_bytes = self.held_bytes

    @contextmanager
    def taken(self, size_bytes: int, what: str) -> Iterator[None]:
        """Bytes that are taken for as long as a block runs."""
        self.take(size_bytes, what)
        try:
            yield
        finally:
            self.give(size_bytes)
