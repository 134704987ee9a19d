"""Whether ONNX Runtime holds the interpreter's lock while it runs: the pace that a thread keeps that counts beside it.

    python benchmarks/onnx_lock.py

The lock is all that a thread of the same process and a process of its own differ in: the products take the same
processor from the count either way. A thread that runs Python, which shares the lock, gives the scale.
"""

from __future__ import annotations

import multiprocessing
import statistics
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper

SIDE, ROUNDS, SECONDS = 1536, 5, 1.0


def session() -> ort.InferenceSession:
    """A product of two matrices that takes some tenths of a second, on one thread."""
    kinds = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [SIDE, SIDE]) for name in "xyz"]
    graph = helper.make_graph([helper.make_node("MatMul", ["x", "y"], ["z"])], "product", kinds[:2], kinds[2:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.checker.check_model(model)
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def multiply(stop: Any, started: Any) -> None:
    """Multiply until told to stop."""
    product, x = session(), np.ones((SIDE, SIDE), np.float32)
    started.set()
    while not stop.is_set():
        product.run(None, {"x": x, "y": x})


def hold(stop: Any, started: Any) -> None:
    """Hold the lock in Python."""
    started.set()
    while not stop.is_set():
        sum(range(1000))


def counted() -> int:
    """How far a loop counts in the time of a round."""
    count, end_s = 0, time.perf_counter() + SECONDS
    while time.perf_counter() < end_s:
        count += 1
    return count


def beside(work: Callable[[Any, Any], None], kind: Any) -> int:
    """The count while a thread or a process works."""
    made = multiprocessing if kind is multiprocessing.Process else threading
    stop, started = made.Event(), made.Event()
    other = kind(target=work, args=(stop, started))
    other.start()
    started.wait()
    count = counted()
    stop.set()
    other.join()
    return count


def main() -> None:
    """Print the medians of the rounds, each of which takes all of them in turn."""
    cases: dict[str, tuple[Callable[[Any, Any], None], Any]] = {
        "products in a thread": (multiply, threading.Thread),
        "Python in a thread": (hold, threading.Thread),
    }
    shares: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(ROUNDS):
        for name, (work, kind) in cases.items():
            apart = beside(work, multiprocessing.Process)
            shares[name].append(beside(work, kind) / apart)
    for name, some in shares.items():
        print(f"{name}: {statistics.median(some):.0%} of the count beside the same in a process of its own")


if __name__ == "__main__":
    multiprocessing.set_start_method("spawn")
    main()
