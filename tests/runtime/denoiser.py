"""The example's denoiser for the tests of both executors, a watchdog for what they do, and damage to their files."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from movdc.runtime.bundle import NUMPY_DTYPES, Bundle
from movdc.runtime.errors import RunError
from movdc.runtime.executors import AnyExecutor, Array, open_executor

WATCHDOG_S = 60


@dataclass(frozen=True)
class Denoiser:
    """The denoiser of a bundle with inputs that do not matter, and what it makes of them."""

    bundle: Bundle
    inputs: dict[str, Array]
    expected: Array

    @classmethod
    def of(cls, root: Path) -> Denoiser:
        """That of a bundle of the example; what is expected is what the sequential mode makes."""
        bundle = Bundle.read(root)
        generator = np.random.default_rng(0)
        inputs = {
            spec.name: generator.standard_normal(spec.shape).astype(NUMPY_DTYPES[spec.dtype])
            for spec in bundle.stages["denoiser"].variants["plain"].inputs
        }
        inputs["text_mask"] = np.ones_like(inputs["text_mask"])
        expected = open_executor(bundle, mode="sequential").run("denoiser", "plain", inputs)["velocity"]
        assert np.isfinite(expected).all()
        return cls(bundle, inputs, expected)

    def runs(self, executor: AnyExecutor, count: int) -> list[bool]:
        """Whether each of so many runs gives the expected bits."""
        made = []
        for index in range(count):
            then = "plain" if index + 1 < count else None
            made.append(executor.run("denoiser", "plain", self.inputs, then)["velocity"])
        return [np.array_equal(one, self.expected) for one in made]


def in_time(work: Callable[[], Any]) -> Any:
    """What `work` returns or raises; a run that hangs fails the test."""
    ended: list[Any] = []

    def attempt() -> None:
        try:
            ended.append(work())
        except RunError as error:
            ended.append(error)

    thread = threading.Thread(target=attempt, daemon=True)
    thread.start()
    thread.join(WATCHDOG_S)
    assert ended, "the executor hangs, or failed without a typed error"
    return ended[0]


def damage(path: Path, how: str) -> None:
    """A file that disappears, shrinks or changes in its middle."""
    data = path.read_bytes()
    if how == "disappears":
        path.unlink()
    elif how == "shrinks":
        with path.open("r+b") as file:
            file.truncate(len(data) // 2)
    else:
        with path.open("r+b") as file:
            file.seek(len(data) // 2)
            file.write(bytes(255 - byte for byte in data[len(data) // 2 : len(data) // 2 + 64]))
