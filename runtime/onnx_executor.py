"""The executor of onnx bundles: the same lanes, levels and books as the engine's, on ONNX Runtime."""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Mapping
from contextlib import ExitStack

import numpy as np

from movdc.runtime.available import available_bytes
from movdc.runtime.books import Books
from movdc.runtime.bundle import NUMPY_DTYPES, Bundle, Residency, Variant
from movdc.runtime.checked_files import CheckedFiles
from movdc.runtime.errors import BudgetError
from movdc.runtime.executors import Array, Mode, Pressure, checked_inputs
from movdc.runtime.loader import Loader
from movdc.runtime.onnx_partition import OnnxPartition
from movdc.runtime.timeline import Report
from movdc.runtime.trace import Trace

_M_MMAP_THRESHOLD = -3  # of glibc's malloc.h
_MAPPED_BYTES = 64 << 10  # as in the engine (engine/partition.cpp)
_SAFETY = 0.05  # of the memory that is left, which no level but the first counts on: others take some meanwhile


class OnnxExecutor:
    """Runs the stages of one bundle; every file is checked when it is made (BundleError).

    `memory_budget` is for everything that is held, in bytes; None is what the bundle was compiled for. One thread runs
    stages; `cancel` and `relieve` may come from any thread.
    """

    def __init__(
        self, bundle: Bundle, *, mode: Mode = "dynamic", memory_budget: int | None = None, keeps_trace: bool = False
    ) -> None:
        _return_freed_memory()
        manifest = bundle.manifest
        self._bundle = bundle
        self._mode = mode
        self._budget_bytes = manifest.budget_bytes if memory_budget is None else memory_budget  # as it was last set
        self._run_budget_bytes = self._budget_bytes  # of the run in progress, or the last one
        self._files = CheckedFiles(bundle.root, manifest.files)
        self._constants = {file.path: file.constants for file in manifest.weights}
        self._slab = bytearray(manifest.slab_bytes)  # only the loader uses it
        self._books = Books()
        self._books.take(manifest.slab_bytes, "the slab")
        self._trace = Trace(self._books, keeps_trace)
        self._partitions: dict[str, OnnxPartition] = {}  # of the variant that runs: they stay prepared
        self._loader = Loader(self._load, self._free)
        self._run_lock = threading.Lock()  # one run at a time
        self._planned_for: tuple[str, str] | None = None  # stage and variant
        self._lasting_bytes = 0  # taken from the books for that variant
        self._level = Residency(needs_bytes=0, prefetch=0)
        self._ceiling_bytes: int | None = None  # levels that need more are out of reach since pressure
        self._drops_from_page_cache = False
        self._relieved = threading.Event()  # pressure that has not been acted on
        self._is_running = False
        self.peak_bytes = 0  # the most bytes held by the books in any run so far
        self.reports: dict[str, list[Report]] = {}  # of every run, by stage

    def read_file(self, path: str) -> bytes:
        """The checked bytes of a file of the bundle."""
        return self._files.read(path)

    def run(self, stage: str, variant: str, inputs: Mapping[str, Array], then: str | None = None) -> dict[str, Array]:
        """Run one stage; raises InputError, BundleError, PartitionError, BudgetError or CancelledError.

        `then` is the variant of the same stage that runs next, if one does: its first partitions load meanwhile.
        """
        plan = self._bundle.stages[stage].variants[variant]
        prepared = checked_inputs(stage, plan.inputs, inputs)
        outputs = {spec.name: np.empty(spec.shape, NUMPY_DTYPES[spec.dtype]) for spec in plan.outputs}
        with self._run_lock:
            before, read_bytes = dict(self._trace.seconds), self._trace.read_bytes
            start_s = time.perf_counter()
            self._is_running = True
            try:
                self._loader.begin()
                if self._planned_for is not None and self._planned_for[0] != stage:
                    self._clear()  # what a stage held does not help the next one
                self._run_budget_bytes = self._budget_bytes  # once: it may be set again meanwhile
                self._books.limit_bytes = max(self._run_budget_bytes, self._books.limit_bytes or 0)
                self._regain(plan)
                self._execute((stage, variant), plan, prepared, outputs, again=then == variant)
            except BaseException:
                self._clear()
                raise
            finally:
                self._is_running = False
            self.peak_bytes = max(self.peak_bytes, self._books.peak_bytes)
            load_s, run_s, wait_s = (
                self._trace.seconds[what] - before.get(what, 0.0) for what in ("load", "run", "wait")
            )
            report = Report(
                wall_s=time.perf_counter() - start_s,
                load_s=load_s,
                run_s=run_s,
                wait_s=wait_s,
                peak_bytes=self._books.peak_bytes,
                read_bytes=self._trace.read_bytes - read_bytes,
                pinned=self._level.pinned,
            )
            self.reports.setdefault(stage, []).append(report)
        self._relieve_idle()  # what came while this was about to end
        return outputs

    def run_partition(self, name: str, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Run one partition by itself, on its own inputs; raises what `run` does."""
        record = self._bundle.partitions[name]
        prepared = checked_inputs(name, record.inputs, inputs)
        outputs = {spec.name: np.empty(spec.shape, NUMPY_DTYPES[spec.dtype]) for spec in record.outputs}
        with self._run_lock:
            self._clear()
            one = OnnxPartition(record, self._constants, self._files)
            one.run([prepared[spec.name] for spec in record.inputs], [outputs[spec.name] for spec in record.outputs])
        return outputs

    def trace(self) -> str:
        """All events so far in Chrome's trace format, if they are kept: a JSON that Perfetto shows."""
        return self._trace.json()

    def set_budget(self, memory_budget: int) -> None:
        """Run by another budget in bytes, from the next run on."""
        self._budget_bytes = memory_budget

    def relieve(self, pressure: Pressure) -> None:
        """Free half of what stays loaded, or all of it, at once or after the partition that runs now."""
        if self._planned_for is None:
            return
        levels = self._bundle.stages[self._planned_for[0]].variants[self._planned_for[1]].residency
        half_bytes = self._pinned_bytes(self._level) / 2 if pressure == "warning" else -1
        kept = [one for one in levels[1:] if self._pinned_bytes(one) <= half_bytes]
        self._ceiling_bytes = max([levels[0].needs_bytes, *(one.needs_bytes for one in kept)])
        self._relieved.set()
        self._relieve_idle()

    def cancel(self) -> None:
        """Make the run in progress raise CancelledError after the partition that runs now."""
        if self._is_running:
            self._loader.cancel()

    def release(self) -> None:
        """Free everything that is loaded."""
        with self._run_lock:
            self._clear()

    def _execute(
        self,
        place: tuple[str, str],
        plan: Variant,
        inputs: Mapping[str, Array],
        outputs: Mapping[str, Array],
        again: bool,
    ) -> None:
        last_read = {spec.name: name for name in plan.order for spec in self._bundle.partitions[name].inputs}
        tensors = dict(inputs)
        self._relieved.clear()
        self._plan(place, plan, [*plan.order, *(plan.order if again else ())])
        self._loader.settle()  # under the limit of before: what the run before left loading may be beyond the new one
        self._books.limit_bytes = self._run_budget_bytes
        self.peak_bytes = max(self.peak_bytes, self._books.peak_bytes)
        self._books.restart_peak()
        with ExitStack() as callers, ExitStack() as between:
            leaving: dict[str, ExitStack] = {}  # gives back the bytes of a tensor that its last reader has read
            for name, array in inputs.items():
                callers.enter_context(self._books.taken(array.nbytes, f"input {name}"))
            for index, name in enumerate(plan.order):
                if self._relieved.is_set():
                    self._relieved.clear()
                    self._plan(place, plan, [*plan.order[index:], *(plan.order if again else ())])
                record = self._bundle.partitions[name]
                start_s = time.perf_counter()
                if self._loader.wait_for(name):
                    self._trace.add("wait", name, "execution", start_s)
                for spec in record.outputs:
                    leaving[spec.name] = between.enter_context(ExitStack())
                    leaving[spec.name].enter_context(self._books.taken(spec.size_bytes, f"tensor {spec.name}"))
                    made = outputs.get(spec.name)
                    tensors[spec.name] = np.empty(spec.shape, NUMPY_DTYPES[spec.dtype]) if made is None else made
                start_s = time.perf_counter()
                self._partitions[name].run(
                    [tensors[spec.name] for spec in record.inputs], [tensors[spec.name] for spec in record.outputs]
                )
                self._trace.add("run", name, "execution", start_s)
                for spec in record.inputs:
                    if last_read[spec.name] == name and spec.name not in inputs and spec.name not in outputs:
                        del tensors[spec.name]
                        leaving.pop(spec.name).close()
                self._loader.done(name)

    def _plan(self, place: tuple[str, str], plan: Variant, upcoming: list[str]) -> None:
        self._level = self._choose(place[0], plan)
        if self._planned_for != place:
            self._clear()
            records = [self._bundle.partitions[name] for name in plan.order]
            lasting_bytes = sum(one.program_bytes for one in records)
            lasting_bytes += max(one.workspace_bytes for one in records) + max(one.planned_bytes for one in records)
            self._books.take(lasting_bytes, f"programs of {place[0]}")
            self._lasting_bytes = lasting_bytes
            self._planned_for = place
        # Transient partitions come round in a cycle: a page cache that cannot hold them drops each before its turn.
        transient_bytes = sum(self._bundle.partitions[one].held_bytes for one in {*plan.order} - {*self._level.pinned})
        self._drops_from_page_cache = transient_bytes > available_bytes()
        self._loader.plan(upcoming, self._level)

    def _choose(self, stage: str, plan: Variant) -> Residency:
        """The last level that fits what is left of the memory, as far as the mode allows."""
        left_bytes = available_bytes()
        had_bytes = min(self._run_budget_bytes, self._books.held_bytes + left_bytes)
        allowed_bytes = min(self._run_budget_bytes, self._books.held_bytes + int(left_bytes * (1 - _SAFETY)))
        best, *others = plan.residency
        if best.needs_bytes > had_bytes:
            raise BudgetError(
                f"{stage} needs {best.needs_bytes} bytes at least; the budget is {self._run_budget_bytes}, and "
                f"{had_bytes} of it can be had now; raise the memory budget, or free memory"
            )
        ceiling_bytes = allowed_bytes if self._ceiling_bytes is None else min(self._ceiling_bytes, allowed_bytes)
        for one in others if self._mode != "sequential" else ():
            if one.needs_bytes <= ceiling_bytes and (self._mode == "dynamic" or not one.pinned):
                best = one
        return best

    def _load(self, name: str) -> None:
        """Bring the weights of a partition in, and prepare its program where that has not been done."""
        record = self._bundle.partitions[name]
        self._books.take(record.held_bytes, f"loading {name}")
        load_s = time.perf_counter()
        try:
            if name not in self._partitions:
                start_s = time.perf_counter()
                self._partitions[name] = OnnxPartition(record, self._constants, self._files)
                self._trace.add("init", name, "loader", start_s)
            start_s = time.perf_counter()
            read_bytes = self._partitions[name].fetch(self._slab)
            self._trace.add("read", name, "loader", start_s, read_bytes)
        except BaseException:
            self._books.give(record.held_bytes)
            raise
        self._trace.add("load", name, "loader", load_s, record.held_bytes)

    def _free(self, name: str) -> None:
        start_s = time.perf_counter()
        self._partitions[name].let_go(self._drops_from_page_cache)
        self._books.give(self._bundle.partitions[name].held_bytes)
        self._trace.add("free", name, "execution", start_s)

    def _regain(self, plan: Variant) -> None:
        """Take back one level of what pressure took."""
        if self._ceiling_bytes is not None:
            above = [one.needs_bytes for one in plan.residency if one.needs_bytes > self._ceiling_bytes]
            self._ceiling_bytes = above[0] if above else None

    def _relieve_idle(self) -> None:
        """Act on pressure where no run does: a run in progress sees it after the partition that runs now."""
        while self._relieved.is_set() and self._run_lock.acquire(blocking=False):
            try:
                if self._planned_for is not None:
                    stage, variant = self._planned_for
                    self._plan(self._planned_for, self._bundle.stages[stage].variants[variant], [])
                self._relieved.clear()
            finally:
                self._run_lock.release()

    def _pinned_bytes(self, level: Residency) -> int:
        return sum(self._bundle.partitions[name].held_bytes for name in level.pinned)

    def _clear(self) -> None:
        self._loader.clear()
        self._partitions.clear()
        self._books.give(self._lasting_bytes)
        self._lasting_bytes = 0
        self._planned_for = None


def _return_freed_memory() -> None:
    """Have glibc give what is freed back to the system: it kept half of what this executor's books say in its heap."""
    if hasattr(library := ctypes.CDLL(None), "mallopt"):
        library.mallopt(_M_MMAP_THRESHOLD, _MAPPED_BYTES)
