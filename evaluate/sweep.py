"""Clips of many cells: each is a task, done in processes of this machine or by the workers of a Dask cluster.

A task's reference comes first, so that no two workers make it. What an earlier run finished is not done again.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

from movdc.compiler.errors import MovdcError
from movdc.evaluate.cells import Cell
from movdc.evaluate.clips import Clip, Made, Measured, MetricWeights, Task, evaluate, finished, identity
from movdc.runtime.errors import RunError

CLUSTER_TASKS = 1000  # that a cluster is given at a time
ANSWER_S = 10  # that a scheduler has to answer
_LOST = "a worker was killed, perhaps for want of memory; the same command goes on with what is finished"

Progress = Callable[[str, int, int], None]
Row = dict[str, Any]


class Pool(NamedTuple):
    """Who does the work, and how many tasks it is given at a time."""

    executor: Executor
    tasks: int


@contextmanager
def open_pool(jobs: int, scheduler: str | None) -> Iterator[Pool]:
    """Processes of this machine, or the workers of the Dask scheduler at an address; raises MovdcError."""
    if scheduler is None:
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(jobs, context, initializer=_start_worker) as executor:
            try:
                yield Pool(executor, jobs)
            except BrokenProcessPool:
                raise RunError(_LOST) from None
        return
    if find_spec("distributed") is None:
        raise MovdcError("--scheduler: needs Dask; install it with `pip install movdc[sweep]`")
    from distributed import Client, KilledWorker

    try:
        client = Client(scheduler, timeout=ANSWER_S, set_as_default=False)
    except (OSError, ValueError) as error:
        raise MovdcError(
            f"--scheduler: {scheduler}: no Dask scheduler answers there ({error}); start one with `dask scheduler`"
        ) from None
    with client, client.get_executor(pure=False) as executor:
        try:
            yield Pool(executor, CLUSTER_TASKS)
        except KilledWorker:
            raise RunError(_LOST) from None


def _start_worker() -> None:
    """End with the parent, however that ends; Ctrl-C is for the parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_follow_parent, daemon=True).start()


def _follow_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None, "only a child process is initialised"
    parent.join()
    os._exit(1)


def evaluate_cells(
    cells: Sequence[Cell],
    prompts: Sequence[str],
    seeds: int,
    folder: Path,
    pool: Pool,
    progress: Progress,
    weights: MetricWeights | None = None,
) -> list[Row]:
    """A row for each cell, prompt and seed; the first cell is the reference. Results are kept in `folder`.

    Clips are made in turns, every cell with one prompt and seed, so that a busy machine slows all cells alike.
    """
    asked = list(product(dict.fromkeys(prompts), range(seeds), cells))
    code, kept = identity(), folder.resolve()

    def clip(cell: Cell, prompt: str, seed: int) -> Clip:
        return Clip(cell.bundle.root.resolve(), cell.bundle.sha256, prompt, seed)

    tasks = [
        Task(clip(cell, prompt, seed), clip(cells[0], prompt, seed), kept, code, weights)
        for prompt, seed, cell in asked
    ]
    results = _run(tasks, pool, progress)
    rows = []
    for (prompt, seed, cell), done in zip(asked, tasks, strict=True):
        made, measured = results[done]
        rows.append(cell.description | {"prompt": prompt, "seed": seed} | asdict(measured) | asdict(made))
    return rows


def _run(tasks: Sequence[Task], pool: Pool, progress: Progress) -> dict[Task, tuple[Made, Measured]]:
    unique = list(dict.fromkeys(tasks))
    found = {task: finished(task) for task in unique}
    results = {task: result for task, result in found.items() if result is not None}
    references = {task.clip for task in unique if task.clip == task.reference and task not in results}
    ready: deque[Task] = deque()
    waiting: dict[Clip, list[Task]] = {}  # by the reference that is not there yet
    for task in unique:
        if task in results:
            continue
        if task.clip != task.reference and task.reference in references:
            waiting.setdefault(task.reference, []).append(task)
        else:
            ready.append(task)
    running: dict[Future[tuple[Made, Measured]], Task] = {}
    progress("clips", len(results), len(unique))
    while ready or running:
        while ready and len(running) < pool.tasks:
            task = ready.popleft()
            running[pool.executor.submit(evaluate, task)] = task
        for future in wait(running, return_when=FIRST_COMPLETED).done:
            task = running.pop(future)
            results[task] = future.result()
            ready.extendleft(reversed(waiting.pop(task.clip, [])))
            progress("clips", len(results), len(unique))
    return results
