"""Files of weights for Core ML: byte for byte what coremltools' own writer makes."""

from pathlib import Path

import numpy as np
import pytest
import torch
from coremltools.libmilstoragepython import _BlobStorageReader as BlobReader
from coremltools.libmilstoragepython import _BlobStorageWriter as BlobWriter
from safetensors.torch import save_file

from movdc.compiler.errors import InternalError
from movdc.compiler.int8 import to_int8
from movdc.compiler.target import Slot
from movdc.compiler.weights import INT8, PART_BYTES, WeightRef, open_checkpoint
from movdc.targets.mil_blobs import RECORD_BYTES, write_blobs

LARGE = torch.randn(1000, 1500, generator=torch.Generator().manual_seed(0))
SMALL = torch.tensor([1.0, -2.0, 3.0])
SLOTS = (
    Slot("weights_0", "weights_0", "plain", "f32", (1000, 1500)),
    Slot("weights_0:f16", "weights_0", "plain", "f16", (1000, 1500)),
    Slot("weights_1", "weights_1", "plain", "i8", (1000, 1500)),
    Slot("weights_2", "weights_2", "plain", "f32", (3,)),
)


@pytest.fixture
def refs(tmp_path: Path) -> dict[str, WeightRef]:
    """The tensors in a checkpoint, as the weights of one piece."""
    save_file({"large": LARGE, "small": SMALL}, tmp_path / "model.safetensors")
    stored = open_checkpoint(tmp_path).refs()
    return {"weights_0": stored["large"], "weights_1": stored["large"].then(INT8), "weights_2": stored["small"]}


def test_is_what_coremltools_writes(refs: dict[str, WeightRef], tmp_path: Path) -> None:
    assert LARGE.nbytes > PART_BYTES, "more than one part"
    written = write_blobs(SLOTS, refs, tmp_path / "ours.bin")
    theirs = BlobWriter(str(tmp_path / "theirs.bin"))
    offsets = [
        theirs.write_float_data(LARGE.numpy().ravel()),
        theirs.write_fp16_data(LARGE.half().numpy().ravel().view(np.uint16)),
        theirs.write_int8_data(to_int8(LARGE).numpy().ravel()),
        theirs.write_float_data(SMALL.numpy()),
    ]
    del theirs
    assert [one.offset_bytes - RECORD_BYTES for one in written.constants] == offsets
    assert (tmp_path / "ours.bin").read_bytes() == (tmp_path / "theirs.bin").read_bytes()
    assert BlobReader(str(tmp_path / "ours.bin")).read_float_data(offsets[3]).tolist() == SMALL.tolist()
    assert written.sqnr_db["weights_1"] > 30


def test_a_tensor_of_another_size_is_a_bug(refs: dict[str, WeightRef], tmp_path: Path) -> None:
    with pytest.raises(InternalError, match="does not have the 16 bytes"):
        write_blobs([Slot("weights_2", "weights_2", "plain", "f32", (4,))], refs, tmp_path / "weights.bin")
