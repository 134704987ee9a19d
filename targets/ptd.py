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
from movdc.compiler.pieces import Piece
from movdc.compiler.program import DTYPES
from movdc.compiler.target import Slot
from movdc.compiler.weights import WeightRef
from movdc.runtime.bundle import Constant

# ExecuTorch's ScalarType numbers, which are PyTorch's.
_TORCH_DTYPES = {
    0: torch.uint8, 1: torch.int8, 3: torch.int32, 4: torch.int64, 5: torch.float16, 6: torch.float32, 11: torch.bool,
    15: torch.bfloat16,
}  # fmt: skip
_SCALAR_TYPES = {DTYPES[dtype]: number for number, dtype in _TORCH_DTYPES.items()}


def recognise(piece: Piece, stand_ins: bytes) -> tuple[Slot, ...]:
    """The slot of each key in a .ptd file that was lowered from the piece's stand-ins."""
    known: dict[bytes, tuple[str, Literal["plain", "channels-last"]]] = {}
    for weight in piece.weights:
        data = weight.stand_in()
        if data.dim() == 4:
            known.setdefault(_digest(data.permute(0, 2, 3, 1)), (weight.name, "channels-last"))
        known[_digest(data)] = (weight.name, "plain")
    slots = []
    for constant, layout in _entries(stand_ins):
        data_digest = hashlib.sha256(
            stand_ins[constant.offset_bytes : constant.offset_bytes + constant.size_bytes]
        ).digest()
        if data_digest not in known:
            raise InternalError(f"constant {constant.key} of a lowered partition is none of its weights")
        slots.append(
            Slot(constant.key, *known[data_digest], constant.dtype if layout is not None else None, constant.shape)
        )
    return tuple(slots)


def write_ptd(slots: Sequence[Slot], refs: Mapping[str, WeightRef], path: Path) -> tuple[Constant, ...]:
    """Write the data of the slots under their keys, in the order of the keys."""
    from executorch.exir._serialize.data_serializer import DataEntry, DataPayload
    from executorch.exir.scalar_type import ScalarType
    from executorch.exir.tensor_layout import TensorLayout
    from executorch.extension.flat_tensor.serialize.serialize import FlatTensorSerializer

    buffers = []
    named = {}
    for index, slot in enumerate(sorted(slots, key=lambda slot: slot.key)):
        buffers.append(slot.fill(refs[slot.weight]).numpy().tobytes())
        layout = None
        if slot.dtype is not None:
            layout = TensorLayout(ScalarType(_SCALAR_TYPES[slot.dtype]), list(slot.shape), list(range(len(slot.shape))))
        named[slot.key] = DataEntry(buffer_index=index, alignment=16, tensor_layout=layout)
    data = bytes(FlatTensorSerializer().serialize(DataPayload(buffers=buffers, named_data=named)))
    path.write_bytes(data)
    return constants_of(data)


def constants_of(ptd: bytes) -> tuple[Constant, ...]:
    """Where each tensor of a .ptd file lies, in the order of the keys."""
    return tuple(constant for constant, _ in _entries(ptd))


def _digest(tensor: torch.Tensor) -> bytes:
    return hashlib.sha256(tensor.contiguous().numpy().tobytes()).digest()


def _entries(ptd: bytes) -> list[tuple[Constant, Any]]:
    """Where each named tensor lies in a .ptd file, with its layout; data without one, of a delegate, is bytes."""
    from executorch.extension.flat_tensor.serialize.serialize import (
        _deserialize_to_flat_tensor,
        _get_extended_header,
    )

    header: Any = _get_extended_header(ptd)
    table = _deserialize_to_flat_tensor(ptd[: header.flatbuffer_offset + header.flatbuffer_size])
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
