"""Emitting templates, each on its own, in as many processes as are asked for."""

from __future__ import annotations

import ctypes
import multiprocessing
import signal
import sys
import tempfile
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import torch

from movdc.compiler.pieces import Piece
from movdc.compiler.target import Artifact, Target

_PR_SET_PDEATHSIG = 1
_shared: tuple[Mapping[str, Piece], Target] | None = None  # what forked processes find in place: it does not pickle


def emit_all(
    templates: Mapping[str, Piece], target: Target, folder: Path, jobs: int, done: Callable[[str, Artifact], None]
) -> None:
    """Lower each template; `done` gets its name and its artifact, whose program lies below `folder`, when it is made.

    Most of the work is Python of the target's SDK, which threads would do one after the other. Processes are forked,
    which spares them the SDK's imports; where forking is unsafe (macOS) everything is done here.
    """
    global _shared
    if not templates:
        return
    # The smallest first, here, because the first fills the SDK's caches for all; then the largest first.
    smallest, *others = sorted(templates, key=lambda template: len(templates[template].nodes))
    order = [smallest, *reversed(others)]
    here = order if jobs == 1 or sys.platform != "linux" else order[:1]
    for template in here:
        done(template, _emit(templates[template], target, folder))
    rest = order[len(here) :]
    if rest:
        _shared = templates, target
        context = multiprocessing.get_context("fork")
        with ProcessPoolExecutor(min(jobs, len(rest)), context, initializer=_start_child) as pool:
            try:
                futures = {pool.submit(_emit_shared, template, folder): template for template in rest}
                for future in as_completed(futures):
                    done(futures[future], future.result())
            except BaseException:
                pool.shutdown(wait=True, cancel_futures=True)
                raise
            finally:
                _shared = None


def _emit(piece: Piece, target: Target, folder: Path) -> Artifact:
    return target.emit(piece, Path(tempfile.mkdtemp(dir=folder)))


def _emit_shared(template: str, folder: Path) -> Artifact:
    assert _shared is not None
    templates, target = _shared
    return _emit(templates[template], target, folder)


def _start_child() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # no child outlives a compile that is killed
    torch.set_num_threads(1)  # threads of OpenMP do not survive a fork
