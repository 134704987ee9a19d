"""Weights by reference: the published layouts, what is refused, and transforms."""

import pickle
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from movdc.compiler.errors import MovdcError
from movdc.compiler.weights import INT8, INT8_SCALE, PART_BYTES, RandomSource, Transform, open_checkpoint

GOLDEN = Path(__file__).parents[1] / "golden" / "tiny"
EXAMPLE = Path(__file__).parents[2] / "examples" / "checkpoints" / "tiny"


def test_sharded_pickles_hold_what_safetensors_holds() -> None:
    sharded = open_checkpoint(GOLDEN / "text_encoder_sharded").refs()
    single = load_file(EXAMPLE / "text_encoder" / "model.safetensors")
    assert set(sharded) >= set(single)
    for key, tensor in single.items():
        assert sharded[key].shape == tuple(tensor.shape)
        assert torch.equal(sharded[key].read(), tensor.float())


class _Evil:
    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (Path("/tmp/movdc-evil"),))


def test_a_pickle_that_runs_code_is_refused(tmp_path: Path) -> None:
    torch.save({"weight": torch.ones(2)}, tmp_path / "good.bin")
    evil = tmp_path / "pytorch_model-00001-of-00001.bin"
    with zipfile.ZipFile(tmp_path / "good.bin") as good, zipfile.ZipFile(evil, "w") as bad:
        for entry in good.infolist():
            data = good.read(entry)
            bad.writestr(entry, pickle.dumps(_Evil()) if entry.filename.endswith("data.pkl") else data)
    (tmp_path / "pytorch_model.bin.index.json").write_text(f'{{"weight_map": {{"weight": "{evil.name}"}}}}')
    with pytest.raises(MovdcError, match=rf"{evil.name}: cannot be loaded as weights only"):
        open_checkpoint(tmp_path)
    assert not Path("/tmp/movdc-evil").exists()


def test_a_truncated_safetensors_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"weight": torch.ones(100)}, path)
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(MovdcError, match=r"model\.safetensors: is not a readable safetensors file.*fetch it again"):
        open_checkpoint(tmp_path)


def test_an_empty_folder_names_the_files_wanted(tmp_path: Path) -> None:
    with pytest.raises(MovdcError, match=r"holds no weights; expected \*\.safetensors or pytorch_model\.bin\.index"):
        open_checkpoint(tmp_path)


def test_halves_are_read_as_fp32(tmp_path: Path) -> None:
    save_file({"weight": torch.tensor([1.5], dtype=torch.float16)}, tmp_path / "model.safetensors")
    ref = open_checkpoint(tmp_path).refs()["weight"]
    assert ref.dtype == torch.float16
    assert ref.read().dtype == torch.float32


def test_random_weights_depend_on_seed_key_and_shape() -> None:
    def read(seed: int, key: str) -> torch.Tensor:
        return RandomSource(seed, {key: (3, 4)}).refs()[key].read()

    assert torch.equal(read(1, "a"), read(1, "a"))
    assert not torch.equal(read(1, "a"), read(2, "a"))
    assert not torch.equal(read(1, "a"), read(1, "b"))


@pytest.mark.parametrize("transforms", [(), (INT8,), (INT8_SCALE,), (Transform("permute", (1, 0)), INT8)])
def test_parts_make_up_the_whole_and_are_small(transforms: tuple[Transform, ...], tmp_path: Path) -> None:
    whole = torch.randn(4000, 1100, generator=torch.Generator().manual_seed(0))
    save_file({"w": whole}, tmp_path / "model.safetensors")
    parts = list(open_checkpoint(tmp_path).refs()["w"].then(*transforms).parts())
    for transform in transforms:
        whole = transform.apply(whole)
    assert torch.equal(torch.cat(parts), whole)
    assert len(parts) > 3
    assert max(part.nbytes for part in parts) <= PART_BYTES


@pytest.mark.parametrize("layout", ["safetensors", "pickle"])
def test_identity_tells_a_file_that_was_written_anew(layout: str, tmp_path: Path) -> None:
    def write(value: float) -> str:
        tensors = {"w": torch.full((3,), value)}
        if layout == "safetensors":
            save_file(tensors, tmp_path / "model.safetensors")
        else:
            torch.save(tensors, tmp_path / "shard.bin")
            (tmp_path / "pytorch_model.bin.index.json").write_text('{"weight_map": {"w": "shard.bin"}}')
        return open_checkpoint(tmp_path).refs()["w"].then(INT8).identity

    first = write(1.0)
    assert first.endswith("w int8")
    assert open_checkpoint(tmp_path).refs()["w"].then(INT8).identity == first
    assert open_checkpoint(tmp_path).refs()["w"].identity != first
    assert write(2.0) != first


def test_transforms_apply_in_order_and_print() -> None:
    ref = RandomSource(0, {"w": (6, 2)}).refs()["w"]
    changed = ref.then(Transform("rows", (3, 0, 2)), Transform("permute", (1, 0)))
    whole = ref.read()
    assert torch.equal(changed.read(), whole[[0, 1, 3, 4]].t())
    assert str(changed) == "random:0:w rows[3,0,2] permute[1,0]"
