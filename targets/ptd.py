"""ExecuTorch's .ptd weight files: which weight fills which key of a program, and files with another piece's weights.

A delegate names its constants by a hash of their content, so a template is lowered with stand-ins that differ from
each other. What the target made of them tells which weight each key stands for, and in which layout.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from movdc.compiler.errors import InternalError
from movdc.compiler.hashed_file import HashedFile
from movdc.compiler.int8 import Loss
from movdc.compiler.pieces import Piece
from movdc.compiler.program import DTYPES
from movdc.compiler.target import Slot, Written
from movdc.compiler.weights import INT8, WeightRef
from movdc.runtime.bundle import Constant

# ExecuTorch's ScalarType numbers, which are PyTorch's.
_TORCH_DTYPES = {
    0: torch.uint8, 1: torch.int8, 3: torch.int32, 4: torch.int64, 5: torch.float16, 6: torch.float32, 11: torch.bool,
    15: torch.bfloat16,
}  # fmt: skip
_SCALAR_TYPES = {DTYPES[dtype]: number for number, dtype in _TORCH_DTYPES.items()}
# Of the data of each tensor, and of the table behind the header; those of ExecuTorch's own serializer.
_ALIGNMENT_BYTES, _TABLE_ALIGNMENT_BYTES = 128, 16
_HEADER_BYTES = 64  # more than the header of a .ptd file has


def recognise(piece: Piece, stand_ins: memoryview) -> tuple[Slot, ...]:
    """The slot of each key in a .ptd file that was lowered from the piece's stand-ins."""
    known: dict[bytes, tuple[str, Literal["plain", "channels-last"]]] = {}
    for weight in piece.weights:
        data = weight.stand_in()
        if data.dim() == 4:
            known.setdefault(_digest(data.permute(0, 2, 3, 1)), (weight.name, "channels-last"))
        known[_digest(data)] = (weight.name, "plain")
    slots = []
    for constant, layout in _entries(stand_ins):
        end = constant.offset_bytes + constant.size_bytes
        data_digest = hashlib.sha256(stand_ins[constant.offset_bytes : end]).digest()
        if data_digest not in known:
            raise InternalError(f"constant {constant.key} of a lowered partition is none of its weights")
        slots.append(
            Slot(constant.key, *known[data_digest], constant.dtype if layout is not None else None, constant.shape)
        )
    return tuple(slots)


def write_ptd(slots: Sequence[Slot], refs: Mapping[str, WeightRef], path: Path) -> Written:
    """Write the data of the slots, part by part, in the order of the refs: what is read twice is read in a row.

    What no delegate packs comes first: it is small, read from the file at every load, and so at one place.
    """
    order = {name: index for index, name in enumerate(refs)}
    slots = sorted(slots, key=lambda slot: (slot.dtype is None, order[slot.weight], slot.key))
    head, constants = _head(slots)
    losses: dict[str, Loss] = {slot.weight: Loss() for slot in slots if INT8 in refs[slot.weight].transforms}
    with HashedFile(path) as file:
        file.write(head)
        for slot, constant in zip(slots, constants, strict=True):
            file.pad_to(constant.offset_bytes)
            for part in slot.parts(refs[slot.weight], losses.get(slot.weight)):
                file.write_tensor(part)
            if file.size_bytes != constant.offset_bytes + constant.size_bytes:
                raise InternalError(f"{refs[slot.weight]} does not have the {constant.size_bytes} bytes of its slot")
    return Written(
        constants=tuple(sorted(constants, key=lambda constant: constant.key)),
        sha256=file.sha256,
        sqnr_db={name: loss.sqnr_db for name, loss in losses.items()},
    )


def _head(slots: Sequence[Slot]) -> tuple[bytes, list[Constant]]:
    """All of a .ptd file that comes before its data, and where the data of each slot lies, in their order."""
    from executorch.exir._serialize._program import _insert_flatbuffer_header
    from executorch.exir._serialize.padding import aligned_size, pad_to
    from executorch.exir.scalar_type import ScalarType
    from executorch.exir.tensor_layout import TensorLayout
    from executorch.extension.flat_tensor.serialize.flat_tensor_schema import DataSegment, FlatTensor, NamedData
    from executorch.extension.flat_tensor.serialize.serialize import FlatTensorHeader, _serialize_to_flatbuffer

    segments: list[Any] = []
    named = []
    end = 0
    for index, slot in enumerate(slots):
        segments.append(DataSegment(offset=aligned_size(end, _ALIGNMENT_BYTES), size=slot.size_bytes))
        end = segments[-1].offset + slot.size_bytes
        layout = None
        if slot.dtype is not None:
            layout = TensorLayout(ScalarType(_SCALAR_TYPES[slot.dtype]), list(slot.shape), list(range(len(slot.shape))))
        named.append(NamedData(slot.key, index, layout))
    table = bytes(_serialize_to_flatbuffer(FlatTensor(version=0, segments=segments, named_data=named)))
    table_offset = aligned_size(FlatTensorHeader.EXPECTED_LENGTH, _TABLE_ALIGNMENT_BYTES)
    data_offset = aligned_size(table_offset + len(table), _ALIGNMENT_BYTES)
    header = FlatTensorHeader(table_offset, len(table), data_offset, end).to_bytes()
    inserted = _insert_flatbuffer_header(table, r"FT[0-9a-zA-Z][0-9a-zA-Z]", pad_to(header, table_offset))
    constants = [
        Constant(
            key=slot.key,
            offset_bytes=data_offset + segment.offset,
            size_bytes=slot.size_bytes,
            dtype=slot.dtype or "u8",
            shape=slot.shape,
        )
        for slot, segment in zip(slots, segments, strict=True)
    ]
    return pad_to(inserted, data_offset), constants


def constants_of(ptd: memoryview) -> tuple[Constant, ...]:
    """Where each tensor of a .ptd file lies, in the order of the keys."""
    return tuple(constant for constant, _ in _entries(ptd))


def _digest(tensor: torch.Tensor) -> bytes:
    return hashlib.sha256(tensor.contiguous().numpy().data).digest()


def _entries(ptd: memoryview) -> list[tuple[Constant, Any]]:
    """Where each named tensor lies in a .ptd file, with its layout; data without one, of a delegate, is bytes."""
    from executorch.extension.flat_tensor.serialize.serialize import (
        _deserialize_to_flat_tensor,
        _get_extended_header,
    )

    header: Any = _get_extended_header(bytes(ptd[:_HEADER_BYTES]))
    table = _deserialize_to_flat_tensor(bytes(ptd[: header.flatbuffer_offset + header.flatbuffer_size]))
    entries = []
    for entry in table.named_data:
        segment = table.segments[entry.segment_index]
        layout = entry.tensor_layout
        constant = Constant(
            key=entry.key,
            offset_bytes=header.segment_base_offset + segment.offset,
            size_bytes=segment.size,
            dtype=DTYPES[_TORCH_DTYPES[int(layout.scalar_type)]] if layout else "u8",
            shape=tuple(layout.sizes) if layout else (segment.size,),
        )
        entries.append((constant, layout))
    return sorted(entries, key=lambda pair: pair[0].key)
