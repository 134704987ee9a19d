"""Weights inside of programs: found in a template's program by their stand-ins, and written in their place."""

from __future__ import annotations

import hashlib
import mmap
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from movdc.compiler.cost import size_bytes
from movdc.compiler.errors import InternalError
from movdc.compiler.int8 import Loss
from movdc.compiler.pieces import Piece
from movdc.compiler.program import DTYPES
from movdc.compiler.target import Artifact, Slot, Target, Written
from movdc.compiler.weights import INT8, WeightRef


def write_program(
    target: Target,
    pieces: Mapping[str, Piece],
    data: bytearray,
    delegation: Mapping[str, tuple[int, Mapping[str, int]]],
    directory: Path,
) -> dict[str, Artifact]:
    """Write the program of some methods, of each of which the delegated and the fallback nodes are known."""
    path = directory / "program.pte"
    path.write_bytes(data)
    sha256 = hashlib.sha256(data).hexdigest()
    slots = tuple(find_weights(pieces.values(), data))
    return {
        method: Artifact(path, sha256, slots, target.estimate(piece), *delegation[method])
        for method, piece in pieces.items()
    }


def find_weights(pieces: Iterable[Piece], data: bytearray) -> Iterator[Slot]:
    """Where each weight lies in the program of some pieces: its key is the offset. What is found is wiped.

    The largest comes first, so that the few bytes of a small weight are not found by chance within a large one.
    """
    weights = {weight.name: weight for piece in pieces for weight in piece.weights if not weight.is_read_by_lowering}
    for weight in sorted(weights.values(), key=lambda weight: -size_bytes(weight.node)):
        tensor = weight.stand_in()
        found = False
        for form in (tensor, tensor.half()) if tensor.dtype == torch.float32 else (tensor,):
            raw = _raw(form)
            offset_bytes = data.find(raw)
            while raw and offset_bytes >= 0:
                found = True
                data[offset_bytes : offset_bytes + len(raw)] = bytes(len(raw))
                yield Slot(str(offset_bytes), weight.name, "plain", DTYPES[form.dtype], tuple(tensor.shape))
                offset_bytes = data.find(raw, offset_bytes + len(raw))
        if not found:
            raise InternalError(f"weight {weight.name} ({weight.ref}) of a lowered partition is not in its program")


def fill_weights(
    program: Path,
    slots: Sequence[Slot],
    refs: Mapping[str, WeightRef],
    path: Path,
    finish: Callable[[Any, bytes], None] = lambda _data, _digest: None,
) -> Written:
    """Copy a template's program with weights in the place of its stand-ins; `finish` gets it, and their SHA-256."""
    shutil.copyfile(program, path)
    losses: dict[str, Loss] = {slot.weight: Loss() for slot in slots if INT8 in refs[slot.weight].transforms}
    content = hashlib.sha256()
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as data:
        for slot in slots:
            offset_bytes = int(slot.key)
            for part in slot.parts(refs[slot.weight], losses.get(slot.weight)):
                raw = _raw(part)
                data[offset_bytes : offset_bytes + len(raw)] = raw
                content.update(raw)
                offset_bytes += len(raw)
            if offset_bytes != int(slot.key) + slot.size_bytes:
                raise InternalError(f"{refs[slot.weight]} does not have the {slot.size_bytes} bytes of its slot")
        finish(data, content.digest())
        sha256 = hashlib.sha256(data).hexdigest()
    return Written((), sha256, {name: loss.sqnr_db for name, loss in losses.items()})


def _raw(tensor: Tensor) -> bytes:
    return np.ascontiguousarray(tensor.numpy()).tobytes()
