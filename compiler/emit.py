"""Emitting templates, each in a process of its own, as many at a time as are asked for and as their weights allow."""

from __future__ import annotations

import ctypes
import errno
import gc
import multiprocessing
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch

from movdc.compiler.errors import InternalError, MovdcError
from movdc.compiler.heap import give_back_memory
from movdc.compiler.methods import Methods
from movdc.compiler.target import Artifact, Target
from movdc.runtime.bundle import FORWARD

# Of weights and of values that are lowered at the same time, where more than one template is. An SDK holds copies of
# weights, and measuring runs the program: lowering takes half a gigabyte and twice the two.
TOGETHER_BYTES = 900_000_000
_PR_SET_PDEATHSIG = 1


Emitted = dict[str, Artifact]  # of each method of one program


def emit_all(
    templates: Mapping[str, Methods], target: Target, folder: Path, jobs: int, done: Callable[[str, Emitted], None]
) -> None:
    """Lower each template; `done` gets its name and its artifacts, whose program lies below `folder`, when it is made.

    Most of the work is Python of the target's SDK, which threads would do one after the other. Processes are forked,
    which spares them the SDK's imports, and end with their template, which gives back the memory that the SDK keeps;
    where forking is unsafe (macOS) everything is done here.
    """
    if not templates:
        return
    # The smallest first, here, because the first fills the SDK's caches for all; then the largest first.
    smallest, *others = sorted(templates, key=lambda template: templates[template].nodes)
    order = [smallest, *reversed(others)]
    here = order if jobs == 1 or sys.platform != "linux" else order[:1]
    for template in here:
        done(template, _emit(templates[template], target, folder))
    give_back_memory()
    gc.freeze()  # a child's collections would write to, and so copy, each object that is there before the fork
    waiting = order[len(here) :]
    sizes = {name: methods.lowering_bytes for name, methods in templates.items()}
    running: dict[Connection, tuple[str, BaseProcess]] = {}
    try:
        while waiting or running:
            together_bytes = sum(sizes[template] for template, _ in running.values())
            fitting = (one for one in waiting if together_bytes + sizes[one] <= TOGETHER_BYTES)
            following = next(fitting, None) if running else waiting[0]
            if following is not None and len(running) < jobs:
                waiting.remove(following)
                connection, process = _start(templates[following], target, folder)
                running[connection] = following, process
                continue
            for ready in wait(list(running)):
                assert isinstance(ready, Connection)
                template, process = running.pop(ready)
                done(template, _result(template, ready, process))
    finally:
        gc.unfreeze()
        for _, process in running.values():
            process.kill()


def _emit(methods: Methods, target: Target, folder: Path) -> Emitted:
    directory = Path(tempfile.mkdtemp(dir=folder))
    if len(methods.pieces) > 1:
        return target.emit_methods(methods.pieces, directory)
    return {FORWARD: target.emit(methods.pieces[FORWARD], directory)}


def _start(methods: Methods, target: Target, folder: Path) -> tuple[Connection, BaseProcess]:
    """Fork a process that emits a program; what it sends are the artifacts, or the error that stopped it."""
    receiver, sender = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=_emit_there, args=(methods, target, folder, sender))
    process.start()
    sender.close()  # so that the end of the process is the end of the connection
    return receiver, process


def _emit_there(methods: Methods, target: Target, folder: Path, sender: Connection) -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # no child outlives a compile that is killed
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # it is for the parent, which ends its children
    torch.set_num_threads(1)  # threads of OpenMP do not survive a fork
    try:
        sender.send(_emit(methods, target, folder))
    except MovdcError as error:
        sender.send(error)
    except OSError as error:
        sender.send(error if error.errno == errno.ENOSPC else InternalError(traceback.format_exc()))
    except Exception:  # noqa: BLE001  # a bug, of whatever kind, is the parent's to report, with where it is
        sender.send(InternalError(traceback.format_exc()))


def _result(template: str, connection: Connection, process: BaseProcess) -> Emitted:
    try:
        result = connection.recv()
    except EOFError:
        process.join()
        raise InternalError(
            f"lowering {template} ended with {process.exitcode}; was there too little memory?"
        ) from None
    process.join()
    if isinstance(result, Exception):
        raise result
    assert isinstance(result, dict)
    return result
