"""Files of weights: what is written part by part is what ExecuTorch's own serializer reads."""

import hashlib
from pathlib import Path

import pytest
import torch
from executorch.extension.flat_tensor.serialize.serialize import FlatTensorSerializer
from safetensors.torch import save_file
from torch import Tensor

from movdc.compiler.errors import InternalError
from movdc.compiler.int8 import channel_scales, to_int8
from movdc.compiler.target import Slot, Written
from movdc.compiler.weights import INT8, INT8_SCALE, PART_BYTES, WeightRef, open_checkpoint
from movdc.targets.ptd import write_ptd

TENSORS = {
    "large": torch.randn(1000, 3000, generator=torch.Generator().manual_seed(0)),
    "norm": torch.randn(7, generator=torch.Generator().manual_seed(1)),
    "kernel": torch.randn(8, 4, 3, 3, generator=torch.Generator().manual_seed(2)),
}


@pytest.fixture
def refs(tmp_path: Path) -> dict[str, WeightRef]:
    """The tensors in a checkpoint, as the weights of one piece."""
    save_file(TENSORS, tmp_path / "model.safetensors")
    stored = open_checkpoint(tmp_path).refs()
    return {
        "weights_0": stored["large"].then(INT8_SCALE),
        "weights_1": stored["large"].then(INT8),
        "weights_2": stored["norm"],
        "weights_3": stored["kernel"],
        "weights_4": stored["large"],
    }


def _slots() -> list[Slot]:
    return [
        Slot("a-kernel", "weights_3", "channels-last", None, (8 * 4 * 9 * 4,)),
        Slot("b-values", "weights_1", "plain", None, (3_000_000,)),
        Slot("c-scales", "weights_0", "plain", None, (4000,)),
        Slot("d-norm", "weights_2", "plain", "f32", (7,)),
        Slot("e-large", "weights_4", "plain", "f32", (1000, 3000)),
    ]


def _raw(tensor: Tensor) -> bytes:
    return tensor.contiguous().numpy().tobytes()


def test_executorch_reads_what_is_written(refs: dict[str, WeightRef], tmp_path: Path) -> None:
    assert TENSORS["large"].nbytes > 2 * PART_BYTES, "more than one part"
    path = tmp_path / "weights.ptd"
    written = write_ptd(_slots(), refs, path)
    data = path.read_bytes()
    payload = FlatTensorSerializer().deserialize(data)
    read = {key: payload.buffers[entry.buffer_index] for key, entry in payload.named_data.items()}
    assert read == {
        "a-kernel": _raw(TENSORS["kernel"].permute(0, 2, 3, 1)),
        "b-values": _raw(to_int8(TENSORS["large"])),
        "c-scales": _raw(channel_scales(TENSORS["large"])),
        "d-norm": _raw(TENSORS["norm"]),
        "e-large": _raw(TENSORS["large"]),
    }
    layout = payload.named_data["e-large"].tensor_layout
    assert (list(layout.sizes), payload.named_data["b-values"].tensor_layout) == ([1000, 3000], None)

    assert [constant.key for constant in written.constants] == sorted(read)
    for constant in written.constants:
        assert data[constant.offset_bytes : constant.offset_bytes + constant.size_bytes] == read[constant.key]
        assert constant.offset_bytes % 128 == 0
    _assert_figures(written, data)


def _assert_figures(written: Written, data: bytes) -> None:
    """The digest and the loss that were gathered on the way."""
    assert written.sha256 == hashlib.sha256(data).hexdigest()
    weight = TENSORS["large"].double()
    restored = to_int8(TENSORS["large"]).double() * channel_scales(TENSORS["large"])[:, None].double()
    by_hand = 10 * torch.log10(weight.square().sum() / (weight - restored).square().sum())
    assert written.sqnr_db == {"weights_1": pytest.approx(float(by_hand), abs=1e-3)}


def test_a_slot_of_another_size_is_an_error(refs: dict[str, WeightRef], tmp_path: Path) -> None:
    slot = Slot("d-norm", "weights_2", "plain", "f32", (6,))
    with pytest.raises(InternalError, match=r"norm does not have the 24 bytes of its slot"):
        write_ptd([slot], refs, tmp_path / "weights.ptd")
