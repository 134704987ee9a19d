"""Executors: what runs the stages of a bundle, of which each target has its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

import numpy as np

from movdc.runtime.bundle import NUMPY_DTYPES, Bundle, TensorSpec
from movdc.runtime.errors import InputError, RunError
from movdc.runtime.timeline import Report

Array = np.ndarray[Any, Any]
Mode = Literal["sequential", "concurrent", "dynamic"]
MODES: tuple[Mode, ...] = get_args(Mode)
Pressure = Literal["warning", "critical"]


class AnyExecutor(Protocol):
    """What every executor does; runtime/executor.py says what each method means."""

    @property
    def reports(self) -> Mapping[str, Sequence[Report]]: ...
    @property
    def peak_bytes(self) -> int: ...
    def read_file(self, path: str) -> bytes: ...
    def run(
        self, stage: str, variant: str, inputs: Mapping[str, Array], then: str | None = None
    ) -> dict[str, Array]: ...
    def run_partition(self, name: str, inputs: Mapping[str, Array]) -> dict[str, Array]: ...
    def trace(self) -> str: ...
    def set_budget(self, memory_budget: int) -> None: ...
    def relieve(self, pressure: Pressure) -> None: ...
    def cancel(self) -> None: ...
    def release(self) -> None: ...


def open_executor(
    bundle: Bundle,
    *,
    mode: Mode = "dynamic",
    memory_budget: int | None = None,
    packed_cache: Path | None = None,
    keeps_trace: bool = False,
) -> AnyExecutor:
    """The executor of a bundle's target, which has checked every file; raises BundleError.

    `memory_budget` is in bytes, None is what the bundle was compiled for; `packed_cache` is for targets that pack.
    """
    if bundle.manifest.target == "onnx":
        if find_spec("onnxruntime") is None:
            raise RunError(f"{bundle.root}: ONNX Runtime runs it; install that with `pip install movdc[onnx]`")
        from movdc.runtime.onnx_executor import OnnxExecutor

        return OnnxExecutor(bundle, mode=mode, memory_budget=memory_budget, keeps_trace=keeps_trace)
    if bundle.manifest.target == "executorch-xnnpack":
        from movdc.runtime.executor import Executor

        return Executor(
            bundle, mode=mode, memory_budget=memory_budget, packed_cache=packed_cache, keeps_trace=keeps_trace
        )
    raise RunError(
        f"{bundle.root}: is for the target {bundle.manifest.target}, which this machine cannot run; "
        "compile for executorch-xnnpack or onnx"
    )


def checked_inputs(stage: str, specs: Sequence[TensorSpec], inputs: Mapping[str, Array]) -> dict[str, Array]:
    """The inputs of a stage, contiguous; raises InputError unless they are those of the specs."""
    if unknown := sorted(set(inputs) - {spec.name for spec in specs}):
        raise InputError(
            f"{stage}: has no input {unknown[0]!r}; its inputs are {', '.join(spec.name for spec in specs)}"
        )
    return {spec.name: _checked(stage, spec, inputs) for spec in specs}


def _checked(stage: str, spec: TensorSpec, inputs: Mapping[str, Array]) -> Array:
    if spec.name not in inputs:
        raise InputError(f"{stage}: input {spec.name!r} is missing")
    array = inputs[spec.name]
    if array.shape != spec.shape or array.dtype != NUMPY_DTYPES[spec.dtype]:
        raise InputError(
            f"{stage}: input {spec.name!r} is {array.dtype} {list(array.shape)}, "
            f"wanted {NUMPY_DTYPES[spec.dtype]} {list(spec.shape)}"
        )
    return np.ascontiguousarray(array)
