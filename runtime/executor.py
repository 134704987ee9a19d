"""The executor: a bundle's stages run by the C++ engine, numpy arrays in and out."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from movdc.runtime import _engine
from movdc.runtime.bundle import NUMPY_DTYPES, Bundle
from movdc.runtime.errors import BudgetError, BundleError, CancelledError, InputError, PartitionError
from movdc.runtime.executors import Array, Mode, Pressure, checked_inputs
from movdc.runtime.timeline import Report

_MODES: dict[Mode, _engine.Mode] = {
    "sequential": _engine.Mode.sequential,
    "concurrent": _engine.Mode.concurrent,
    "dynamic": _engine.Mode.dynamic,
}
PACKED_LIMIT_BYTES = 64 * 10**9  # of the packed weights that are kept, of all bundles together


class Executor:
    """Runs the stages of one bundle; every file is checked when it is made (BundleError).

    `memory_budget` is for everything the engine holds, in bytes; None is what the bundle was compiled for. Packed
    weights are kept in the folder `packed_cache`, from one load to the next and from one process to the next; None
    is a temporary folder, for as long as this lives. One thread runs stages; `cancel` and `relieve` may come from any
    thread.
    """

    def __init__(
        self,
        bundle: Bundle,
        *,
        mode: Mode = "dynamic",
        memory_budget: int | None = None,
        packed_cache: Path | None = None,
        keeps_trace: bool = False,
    ) -> None:
        self._bundle = bundle
        self._own_folder = tempfile.TemporaryDirectory(prefix="movdc-") if packed_cache is None else None
        self.reports: dict[str, list[Report]] = {}  # of every run, by stage
        options = _engine.Options(
            mode=_MODES[mode],
            budget_bytes=bundle.manifest.budget_bytes if memory_budget is None else memory_budget,
            packed_cache=str(packed_cache) if self._own_folder is None else self._own_folder.name,
            packed_cache_limit_bytes=PACKED_LIMIT_BYTES,
            keeps_trace=keeps_trace,
        )
        with self._errors():
            self._engine = _engine.Engine(str(bundle.root), options)

    @property
    def peak_bytes(self) -> int:
        """The most bytes held by the engine's books in any run so far."""
        return self._engine.peak_bytes

    def read_file(self, path: str) -> bytes:
        """The checked bytes of a file of the bundle."""
        with self._errors():
            return self._engine.read_file(path)

    def run(self, stage: str, variant: str, inputs: Mapping[str, Array], then: str | None = None) -> dict[str, Array]:
        """Run one stage; raises InputError, BundleError, PartitionError, BudgetError or CancelledError.

        `then` is the variant of the same stage that runs next, if one does: its first partitions load meanwhile.
        """
        plan = self._bundle.stages[stage].variants[variant]
        prepared = checked_inputs(stage, plan.inputs, inputs)
        outputs = {spec.name: np.empty(spec.shape, NUMPY_DTYPES[spec.dtype]) for spec in plan.outputs}
        with self._errors():
            self._engine.run(stage, variant, prepared, outputs, then or "")
            made = self._engine.report(stage)
        report = Report(
            wall_s=made.wall_s,
            load_s=made.load_s,
            run_s=made.run_s,
            wait_s=made.wait_s,
            peak_bytes=made.peak_bytes,
            read_bytes=made.read_bytes,
            pinned=tuple(made.pinned),
        )
        self.reports.setdefault(stage, []).append(report)
        return outputs

    def run_partition(self, name: str, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Run one partition by itself, on its own inputs; raises what `run` does."""
        record = self._bundle.partitions[name]
        prepared = checked_inputs(name, record.inputs, inputs)
        outputs = {spec.name: np.empty(spec.shape, NUMPY_DTYPES[spec.dtype]) for spec in record.outputs}
        with self._errors():
            self._engine.run_partition(name, prepared, outputs)
        return outputs

    def trace(self) -> str:
        """All events so far in Chrome's trace format, if they are kept: a JSON that Perfetto shows."""
        return self._engine.trace()

    def set_budget(self, memory_budget: int) -> None:
        """Give the engine another budget in bytes, from the next run on."""
        self._engine.set_budget(memory_budget)

    def relieve(self, pressure: Pressure) -> None:
        """Free half of what stays loaded, or all of it, at once or after the partition that runs now."""
        self._engine.relieve(_engine.Pressure.warning if pressure == "warning" else _engine.Pressure.critical)

    def cancel(self) -> None:
        """Make the run in progress raise CancelledError after the partition that runs now."""
        self._engine.cancel()

    def release(self) -> None:
        """Free everything that is loaded."""
        self._engine.release()

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except _engine.FileError as error:
            raise BundleError(f"{self._bundle.root}: {error}") from None
        except _engine.BudgetError as error:
            raise BudgetError(f"{error}; raise the memory budget, or free memory") from None
        except _engine.CancelledError as error:
            raise CancelledError(str(error)) from None
        except _engine.InputError as error:
            raise InputError(str(error)) from None
        except _engine.PartitionError as error:
            raise PartitionError(f"{error}; compile the bundle again, on the versions it names") from None
