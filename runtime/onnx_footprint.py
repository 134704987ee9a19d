"""What an .onnx program takes in memory: the process that prepares and runs it, for targets/onnx_footprint.py.

With one thread, so that the figures do not depend on the machine; each further one takes some buffers of its own.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from movdc.runtime.bundle import NUMPY_DTYPES, Constant, File, Partition
from movdc.runtime.checked_files import CheckedFiles
from movdc.runtime.onnx_partition import OnnxPartition


def _measure(request: dict[str, Any]) -> dict[str, int]:
    """Bytes of the files of weights, of the program while it is prepared, and of what a run takes and gives back."""
    counter = ctypes.CDLL(None)
    for function in (counter.movd_allocated_bytes, counter.movd_peak_bytes):
        function.restype = ctypes.c_uint64
    record = Partition.model_validate(request["record"])
    constants = {path: [Constant.model_validate(one) for one in some] for path, some in request["constants"].items()}
    files = CheckedFiles(Path(), tuple(_file(path) for path in (record.program, *record.weights)))
    arrays = [
        [np.zeros(spec.shape, NUMPY_DTYPES[spec.dtype]) for spec in specs] for specs in (record.inputs, record.outputs)
    ]
    first = OnnxPartition(record, constants, files, threads=1)  # and with it what ONNX Runtime makes once
    before_bytes = counter.movd_allocated_bytes()
    second = OnnxPartition(record, constants, files, threads=1)
    counter.movd_peak_bytes()
    second.run(*arrays)
    most_bytes, after_bytes = counter.movd_peak_bytes(), counter.movd_allocated_bytes()
    del first
    return {
        "held_bytes": sum(Path(path).stat().st_size for path in record.weights),
        "program_bytes": after_bytes - before_bytes,  # kernels keep some of what a first run takes
        "workspace_bytes": most_bytes - after_bytes,
        "planned_bytes": 0,
    }


def _file(path: str) -> File:
    """A record of a file as it is: weights are zeros here, and there is nothing to compare them with."""
    with Path(path).open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return File(path=path, size_bytes=Path(path).stat().st_size, sha256=digest)


if __name__ == "__main__":
    print(json.dumps(_measure(json.load(sys.stdin))))
