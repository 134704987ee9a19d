"""One partition in memory: its program as ONNX Runtime has prepared it, on weights that are mapped from their files."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import onnxruntime as ort

from movdc.runtime.bundle import ITEM_BYTES, NUMPY_DTYPES, Constant, DType, Partition, TensorSpec
from movdc.runtime.checked_files import CheckedFiles
from movdc.runtime.errors import BundleError, PartitionError
from movdc.runtime.onnx_location import group_of, with_files

Array = np.ndarray[Any, Any]
_TYPES: dict[DType, str] = {
    "f32": "tensor(float)", "f16": "tensor(float16)", "bf16": "tensor(bfloat16)", "i64": "tensor(int64)",
    "i32": "tensor(int32)", "i8": "tensor(int8)", "u8": "tensor(uint8)", "bool": "tensor(bool)",
}  # fmt: skip


class OnnxPartition:
    """A program that stays prepared while the pages of its weights come and go.

    Weights are used where they are mapped: nothing copies or packs them, and no arena keeps what a run takes.
    `constants` are those of each weights file; 0 threads are one a core. Raises BundleError or PartitionError.
    """

    def __init__(
        self,
        record: Partition,
        constants: Mapping[str, Sequence[Constant]],
        files: CheckedFiles,
        threads: int = 0,
    ) -> None:
        self._record = record
        self._weights = [files.map(path) for path in record.weights]
        self._values: list[ort.OrtValue] = []  # ONNX Runtime keeps addresses of them, and not the values
        options = _options(threads)
        for path, mapped in zip(record.weights, self._weights, strict=True):
            for one in constants[path]:
                end_bytes = one.offset_bytes + one.size_bytes
                wanted_bytes = math.prod(one.shape) * ITEM_BYTES[one.dtype]
                if end_bytes > len(mapped.data) or one.size_bytes != wanted_bytes:
                    raise BundleError(f"{files.root / path}: does not hold its constant {one.key}; compile again")
                data = mapped.data[one.offset_bytes : end_bytes].view(NUMPY_DTYPES[one.dtype]).reshape(one.shape)
                self._values.append(ort.OrtValue.ortvalue_from_numpy(data))
                options.add_initializer(one.key, self._values[-1])
        groups = {group_of(constants[path][0].key): PurePosixPath(path) for path in record.weights}
        for folder in {str(files.root / path.parent) for path in groups.values()}:  # what is folded is read from there
            options.add_session_config_entry("session.model_external_initializers_file_folder_path", folder)
        program = files.read(record.program)
        try:
            program = with_files(program, {group: path.name for group, path in groups.items()})
            self._session = ort.InferenceSession(program, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # noqa: BLE001  # ONNX Runtime's exceptions share no base but this
            raise self._failed("preparing the program", error) from None
        for path in record.weights:
            files.map(path)  # it is still the file that was checked
        self._inputs = [one.name for one in self._session.get_inputs()]
        self._outputs = [one.name for one in self._session.get_outputs()]
        self._check(record.inputs, self._session.get_inputs())
        self._check(record.outputs, self._session.get_outputs())

    def fetch(self, slab: bytearray) -> int:
        """Read the weights into the page cache; the bytes read."""
        return sum(one.fetch(slab) for one in self._weights)

    def let_go(self, from_page_cache: bool) -> None:
        """Give the pages of the weights back to the system, which may keep them in its cache or not."""
        for one in self._weights:
            one.let_go(from_page_cache)

    def run(self, inputs: Sequence[Array], outputs: Sequence[Array]) -> None:
        """Run on contiguous arrays in the order of the record's inputs and outputs; raises PartitionError."""
        for one in self._weights:
            one.check_unchanged()
        binding = self._session.io_binding()
        for name, array in zip(self._inputs, inputs, strict=True):
            binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(array))
        for name, array in zip(self._outputs, outputs, strict=True):
            binding.bind_ortvalue_output(name, ort.OrtValue.ortvalue_from_numpy(array))
        try:
            self._session.run_with_iobinding(binding)
        except Exception as error:  # noqa: BLE001  # as above
            raise self._failed("running", error) from None

    def _check(self, specs: Sequence[TensorSpec], arguments: Sequence[Any]) -> None:
        """Raise PartitionError unless the program takes, or makes, the tensors that the partition lists."""
        wanted = [(_TYPES[spec.dtype], list(spec.shape)) for spec in specs]
        if [(one.type, list(one.shape)) for one in arguments] != wanted:
            raise PartitionError(
                f"{self._record.name}: its program does not take and make the tensors of the manifest; "
                "compile the bundle again"
            )

    def _failed(self, what: str, error: Exception) -> PartitionError:
        reason = " ".join(str(error).split())
        return PartitionError(
            f"{self._record.name}: {what} failed ({reason}); compile the bundle again, on the versions it names"
        )


def _options(threads: int) -> ort.SessionOptions:
    """Options of a session that copies no weights, and keeps neither memory nor a processor busy between runs."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.enable_cpu_mem_arena = False  # it would keep what the largest run took, for each program
    options.log_severity_level = 3  # errors
    # The level above lays kernels of convolutions out anew for this processor, in copies that stay.
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.add_session_config_entry("session.disable_prepacking", "1")  # which copies every matrix
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # another partition runs meanwhile
    return options
