from collections.abc import Mapping, Sequence
from enum import Enum
from typing import Any

import numpy as np

class FileError(RuntimeError): ...
class PartitionError(RuntimeError): ...
class ScheduleError(RuntimeError): ...
class BudgetError(RuntimeError): ...
class CancelledError(RuntimeError): ...

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

class ResidencyRecord:
    def __init__(self, needs_bytes: int, prefetch: int, pinned: Sequence[str], waits: Sequence[str], /) -> None: ...

class VariantRecord:
    def __init__(
        self,
        stage: str,
        name: str,
        inputs: Sequence[TensorRecord],
        outputs: Sequence[TensorRecord],
        order: Sequence[str],
        residency: Sequence[ResidencyRecord],
        /,
    ) -> None: ...

class Mode(Enum):
    sequential = 0
    concurrent = 1
    dynamic = 2

class Pressure(Enum):
    warning = 1
    critical = 2

class Options:
    def __init__(
        self,
        mode: Mode,
        budget_bytes: int,
        packed_cache: str,
        packed_cache_limit_bytes: int,
        keeps_trace: bool,
    ) -> None: ...

class RunReport:
    """What the last run of a stage did; loads for the next run that happened meanwhile are counted here."""

    @property
    def wall_s(self) -> float: ...
    @property
    def load_s(self) -> float: ...
    @property
    def run_s(self) -> float: ...
    @property
    def wait_s(self) -> float: ...
    @property
    def peak_bytes(self) -> int: ...
    @property
    def read_bytes(self) -> int: ...
    @property
    def pinned(self) -> list[str]: ...

class Engine:
    def __init__(
        self,
        root: str,
        files: Sequence[FileRecord],
        partitions: Sequence[PartitionRecord],
        variants: Sequence[VariantRecord],
        slab_bytes: int,
        options: Options,
        /,
    ) -> None: ...
    def read_file(self, path: str, /) -> bytes: ...
    def run(
        self,
        stage: str,
        variant: str,
        inputs: Mapping[str, np.ndarray[Any, Any]],
        outputs: Mapping[str, np.ndarray[Any, Any]],
        next: str,
    ) -> None: ...
    def set_budget(self, bytes: int, /) -> None: ...
    def relieve(self, level: Pressure, /) -> None: ...
    def cancel(self) -> None: ...
    def release(self) -> None: ...
    def report(self, stage: str, /) -> RunReport: ...
    def trace(self) -> str: ...
    @property
    def peak_bytes(self) -> int: ...
