"""movd.h through ctypes: its structures, its functions, and an engine behind them."""

import ctypes
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
NONE = 2**32 - 1
OK, INPUT_ERROR, FILE_ERROR, PARTITION_ERROR, BUDGET_ERROR, CANCELLED = range(6)
CRITICAL = 2


class Options(ctypes.Structure):
    _fields_ = [
        ("mode", ctypes.c_int),
        ("budget_bytes", ctypes.c_uint64),
        ("packed_cache", ctypes.c_char_p),
        ("packed_cache_limit_bytes", ctypes.c_uint64),
        ("keeps_trace", ctypes.c_bool),
    ]


class Tensor(ctypes.Structure):
    _fields_ = [
        ("name", ctypes.c_char_p),
        ("dtype", ctypes.c_int),
        ("rank", ctypes.c_uint32),
        ("shape", ctypes.POINTER(ctypes.c_int32)),
        ("size_bytes", ctypes.c_uint64),
    ]


class Stage(ctypes.Structure):
    _fields_ = [
        ("name", ctypes.c_char_p),
        ("variant", ctypes.c_char_p),
        ("input_count", ctypes.c_uint32),
        ("output_count", ctypes.c_uint32),
        ("inputs", ctypes.POINTER(Tensor)),
        ("outputs", ctypes.POINTER(Tensor)),
        ("least_bytes", ctypes.c_uint64),
    ]


class Buffer(ctypes.Structure):
    """movd_input and movd_output."""

    _fields_ = [("data", ctypes.c_void_p), ("size_bytes", ctypes.c_uint64)]


class Report(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_double) for name in ("wall_s", "load_s", "run_s", "wait_s")),
        ("peak_bytes", ctypes.c_uint64),
        ("read_bytes", ctypes.c_uint64),
        ("pinned", ctypes.c_uint32),
    ]


def load(path: Path) -> ctypes.CDLL:
    """The library, with the types of its functions."""
    library = ctypes.CDLL(str(path))
    engine, text, u32, u64 = ctypes.c_void_p, ctypes.c_char_p, ctypes.c_uint32, ctypes.c_uint64
    arguments: dict[str, Sequence[Any]] = {
        "open": [text, ctypes.POINTER(Options), ctypes.POINTER(engine)],
        "close": [engine],
        "stage_count": [engine],
        "stage_info": [engine, u32, ctypes.POINTER(Stage)],
        "compiled_budget_bytes": [engine],
        "run": [engine, u32, ctypes.POINTER(Buffer), u32, ctypes.POINTER(Buffer), u32, u32],
        "set_budget": [engine, u64],
        "relieve": [engine, ctypes.c_int],
        "cancel": [engine],
        "release": [engine],
        "last_report": [engine, u32, ctypes.POINTER(Report)],
        "trace": [engine, text],
    }
    for name, types in arguments.items():
        getattr(library, f"movd_{name}").argtypes = types
    library.movd_error.restype = text
    library.movd_compiled_budget_bytes.restype = u64
    return library


def buffers(arrays: Sequence[Array]) -> Any:
    return (Buffer * len(arrays))(*(Buffer(array.ctypes.data, array.nbytes) for array in arrays))


class Engine:
    """An engine behind the C interface, and the arrays of one of its stages."""

    def __init__(self, movd: ctypes.CDLL, root: Path, **options: Any) -> None:
        self.movd = movd
        self.handle = ctypes.c_void_p()
        status = movd.movd_open(str(root).encode(), ctypes.byref(Options(**options)), ctypes.byref(self.handle))
        assert status == OK, movd.movd_error()

    def stage(self, index: int) -> Stage:
        stage = Stage()
        assert self.movd.movd_stage_info(self.handle, index, ctypes.byref(stage)) == OK
        return stage

    def run(self, index: int, inputs: Sequence[Array], outputs: Sequence[Array], following: int = NONE) -> int:
        return int(
            self.movd.movd_run(
                self.handle, index, buffers(inputs), len(inputs), buffers(outputs), len(outputs), following
            )
        )

    def report(self, index: int) -> Report:
        report = Report()
        assert self.movd.movd_last_report(self.handle, index, ctypes.byref(report)) == OK
        return report

    def said(self) -> str:
        return str(self.movd.movd_error().decode())
