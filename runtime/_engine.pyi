from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

class FileError(RuntimeError): ...
class PartitionError(RuntimeError): ...
class ScheduleError(RuntimeError): ...

class FileRecord:
    def __init__(self, path: str, size_bytes: int, sha256: str, /) -> None: ...

class TensorRecord:
    def __init__(self, name: str, dtype: str, shape: Sequence[int], /) -> None: ...

class ConstantRecord:
    def __init__(self, key: str, offset_bytes: int, size_bytes: int, dtype: str, shape: Sequence[int], /) -> None: ...

class WeightsRecord:
    def __init__(self, path: str, constants: Sequence[ConstantRecord], /) -> None: ...

class PartitionRecord:
    def __init__(
        self,
        name: str,
        program: str,
        weights: Sequence[WeightsRecord],
        inputs: Sequence[TensorRecord],
        outputs: Sequence[TensorRecord],
        held_bytes: int,
        load_bytes: int,
        working_bytes: int,
        /,
    ) -> None: ...

class Engine:
    def __init__(self, root: str, files: Sequence[FileRecord], partitions: Sequence[PartitionRecord], /) -> None: ...
    def read_file(self, path: str, /) -> bytes: ...
    def run(
        self,
        schedule: Sequence[tuple[str, str]],
        inputs: Mapping[str, np.ndarray[Any, Any]],
        outputs: Mapping[str, np.ndarray[Any, Any]],
        after: Callable[[int], None],
    ) -> None: ...
    @property
    def peak_bytes(self) -> int: ...
