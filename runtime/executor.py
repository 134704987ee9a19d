"""The executor: a bundle's stages run by the C++ engine, numpy arrays in and out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from movdc.runtime import _engine
from movdc.runtime.bundle import NUMPY_DTYPES, Bundle, Instruction, TensorSpec
from movdc.runtime.errors import BundleError, InputError, PartitionError

Array = np.ndarray[Any, Any]


class Executor:
    """Runs the stages of one bundle; every file is checked when it is made (BundleError)."""

    def __init__(self, bundle: Bundle) -> None:
        self._bundle = bundle
        manifest = bundle.manifest
        weights = {
            file.path: _engine.WeightsRecord(
                file.path,
                [_engine.ConstantRecord(c.key, c.offset_bytes, c.size_bytes, c.dtype, c.shape) for c in file.constants],
            )
            for file in manifest.weights
        }
        partitions = [
            _engine.PartitionRecord(
                p.name,
                p.program,
                [weights[path] for path in p.weights],
                [_record(spec) for spec in p.inputs],
                [_record(spec) for spec in p.outputs],
                p.held_bytes,
                p.load_bytes,
                p.working_bytes,
            )
            for p in manifest.partitions
        ]
        files = [_engine.FileRecord(file.path, file.size_bytes, file.sha256) for file in manifest.files]
        try:
            self._engine = _engine.Engine(str(bundle.root), files, partitions)
        except _engine.FileError as error:
            raise BundleError(f"{bundle.root}: {error}") from None

    @property
    def peak_bytes(self) -> int:
        """The most bytes held by the engine's books during the last run."""
        return self._engine.peak_bytes

    def read_file(self, path: str) -> bytes:
        """The checked bytes of a file of the bundle."""
        try:
            return self._engine.read_file(path)
        except _engine.FileError as error:
            raise BundleError(f"{self._bundle.root}: {error}") from None

    def run(
        self,
        stage: str,
        variant: str,
        inputs: Mapping[str, Array],
        on_instruction: Callable[[Instruction], None] | None = None,
    ) -> dict[str, Array]:
        """Run one stage; raises InputError, BundleError or PartitionError, and passes on what the callback raises."""
        plan = self._bundle.stages[stage].variants[variant]
        prepared = {spec.name: _checked(stage, spec, inputs) for spec in plan.inputs}
        if unknown := sorted(set(inputs) - set(prepared)):
            raise InputError(f"{stage}: has no input {unknown[0]!r}; its inputs are {', '.join(prepared)}")
        outputs = {spec.name: np.empty(spec.shape, NUMPY_DTYPES[spec.dtype]) for spec in plan.outputs}

        def after(index: int) -> None:
            if on_instruction is not None:
                on_instruction(plan.schedule[index])

        try:
            self._engine.run([(step.op, step.partition) for step in plan.schedule], prepared, outputs, after)
        except _engine.FileError as error:
            raise BundleError(f"{self._bundle.root}: {error}") from None
        except (_engine.PartitionError, _engine.ScheduleError) as error:
            raise PartitionError(f"{error}; compile the bundle again, on the versions it names") from None
        return outputs


def _record(spec: TensorSpec) -> _engine.TensorRecord:
    return _engine.TensorRecord(spec.name, spec.dtype, spec.shape)


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
