"""Core ML's weight.bin: a header of 64 bytes, then for each tensor 64 bytes that describe it, and its data.

The format is that of coremltools' MILBlob storage, version 2; everything begins at a multiple of 64 bytes.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from pathlib import Path

from movdc.compiler.errors import InternalError
from movdc.compiler.hashed_file import HashedFile
from movdc.compiler.int8 import Loss
from movdc.compiler.target import Slot, Written
from movdc.compiler.weights import INT8, WeightRef
from movdc.runtime.bundle import Constant, DType

ALIGNMENT_BYTES = 64
HEADER_BYTES = RECORD_BYTES = 64
_VERSION, _SENTINEL = 2, 0xDEADBEEF
_NUMBERS: dict[DType, int] = {"f16": 1, "f32": 2, "u8": 3, "i8": 4, "i32": 14}  # MILBlob::Blob::BlobDataType


def constants_of(slots: Sequence[Slot]) -> tuple[Constant, ...]:
    """Where each slot's data lies in a file of these slots, in their order; its record is the 64 bytes before."""
    constants = []
    end_bytes = HEADER_BYTES
    for slot in slots:
        assert slot.dtype is not None, "Core ML's constants have types"
        offset_bytes = aligned(end_bytes) + RECORD_BYTES
        constants.append(
            Constant(
                key=slot.key,
                offset_bytes=offset_bytes,
                size_bytes=slot.size_bytes,
                dtype=slot.dtype,
                shape=slot.shape,
            )
        )
        end_bytes = offset_bytes + slot.size_bytes
    return tuple(constants)


def write_blobs(slots: Sequence[Slot], refs: Mapping[str, WeightRef], path: Path) -> Written:
    """Write the data of the slots, part by part, in their order."""
    losses: dict[str, Loss] = {slot.weight: Loss() for slot in slots if INT8 in refs[slot.weight].transforms}
    constants = constants_of(slots)
    with HashedFile(path) as file:
        file.write(header(len(slots)))
        for slot, constant in zip(slots, constants, strict=True):
            file.pad_to(constant.offset_bytes - RECORD_BYTES)
            file.write(record(constant, constant.offset_bytes))
            for part in slot.parts(refs[slot.weight], losses.get(slot.weight)):
                file.write_tensor(part)
            if file.size_bytes != constant.offset_bytes + constant.size_bytes:
                raise InternalError(f"{refs[slot.weight]} does not have the {constant.size_bytes} bytes of its slot")
    return Written(constants, file.sha256, {name: loss.sqnr_db for name, loss in losses.items()})


def header(count: int) -> bytes:
    """The first bytes of a file of so many tensors."""
    return struct.pack("<II56x", count, _VERSION)


def record(constant: Constant, offset_bytes: int) -> bytes:
    """What describes a tensor whose data lies at an offset."""
    number = _NUMBERS[constant.dtype]
    return struct.pack("<IIQQ40x", _SENTINEL, number, constant.size_bytes, offset_bytes)


def aligned(size_bytes: int) -> int:
    """The next multiple of the alignment."""
    return -(-size_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
