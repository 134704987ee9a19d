"""The full-size checkpoint of make_checkpoint.py: layouts that are read as published ones, on few tensors."""

from pathlib import Path

import make_checkpoint
import numpy as np
import pytest
import torch
import typer
from make_checkpoint import FOLDERS, TIED, Values, config_of, size_bytes, stored_bytes, write_safetensors, write_shards

from movdc.compiler.spec import load_spec
from movdc.compiler.weights import open_checkpoint

SHAPES = {
    "shared.weight": [3000, 400],
    "encoder.embed_tokens.weight": [3000, 400],
    "norm.weight": [40],
    "large.weight": [2300, 2000],  # more values than a block has
    "last.weight": [900, 1000],
}


def _assert_values(folder: Path, keys: set[str]) -> None:
    refs = open_checkpoint(folder).refs()
    assert set(refs) == keys
    for key, ref in refs.items():
        expected = np.concatenate(list(Values(3).of(TIED.get(key, key), SHAPES[key]))).reshape(SHAPES[key])
        assert np.array_equal(ref.read().numpy(), expected), key
    assert abs(refs["norm.weight"].read().mean() - 1) < 0.1
    assert abs(refs["large.weight"].read().std() - 0.02) < 0.001
    assert not torch.equal(refs["large.weight"].read()[:10, :1000], refs["last.weight"].read()[:10])


def test_both_layouts_hold_the_same_seeded_values(tmp_path: Path) -> None:
    shards, single = tmp_path / "shards", tmp_path / "single"
    shards.mkdir()
    single.mkdir()
    write_shards(shards, SHAPES, Values(3))
    write_safetensors(single / "model.safetensors", {k: s for k, s in SHAPES.items() if k not in TIED}, Values(3))
    _assert_values(shards, set(SHAPES))
    _assert_values(single, set(SHAPES) - set(TIED))
    sizes = [path.stat().st_size for path in shards.glob("*.bin")]
    data_bytes = sum(size_bytes(shape) for key, shape in SHAPES.items() if key not in TIED)
    assert data_bytes <= sum(sizes) <= data_bytes + 10_000
    assert max(sizes) < 0.9 * sum(sizes)


def test_full_size_is_that_of_the_published_files() -> None:
    assert {folder: stored_bytes(folder) for folder in FOLDERS} == {
        "text_encoder": 19_049_242_624,
        "denoiser": 4_835_491_088,
        "vae": 1_573_364_060,
    }
    assert config_of("text_encoder")["num_layers"] == 24


def test_too_small_a_disk_is_told_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("make_checkpoint.SPARE_BYTES", 10**15)
    with pytest.raises(typer.BadParameter, match=r"GB free, and 1000025\.5 GB are needed"):
        make_checkpoint.main(tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("example", ["opensora.yaml", "opensora-192.yaml"])
def test_examples_are_pipelines_of_the_hub(example: str) -> None:
    spec = load_spec(make_checkpoint.REPOSITORY / "examples" / example).spec
    assert (spec.video.frames, spec.sampler.steps, spec.text_encoder.max_tokens) == (68, 30, 300)
    assert set(spec.passes) == {"quantize-int8", "merge-tokens", "leap"}
