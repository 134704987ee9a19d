"""The checkpoints that a pipeline names: every tensor of the model and no other, told before anything is traced."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import T5Config

from movdc.compiler.checkpoints import checkpoint_of
from movdc.compiler.device import Machine
from movdc.compiler.errors import MovdcError
from movdc.compiler.spec import SpecFile, load_spec
from movdc.models.opensora import OpenSora, TextEncoder

EXAMPLE = Path(__file__).parents[2] / "examples" / "tiny.yaml"
MACHINE = Machine(10**9, 1e9, 1e9, 0.0, 2.0)
Change = Callable[[dict[str, torch.Tensor]], None]


@pytest.fixture
def spec_with(tmp_path: Path, tiny_checkpoint: Path) -> Callable[[str, Change], SpecFile]:
    """The example with one model's tensors changed."""

    def write(section: str, change: Change) -> SpecFile:
        shutil.copytree(tiny_checkpoint, tmp_path / "checkpoints" / "tiny")
        path = tmp_path / "checkpoints" / "tiny" / section / "model.safetensors"
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path)
        shutil.copy(EXAMPLE, tmp_path / "changed.yaml")
        return load_spec(tmp_path / "changed.yaml")

    return write


def _without(key: str) -> Change:
    return lambda tensors: tensors.pop(key)


def _with(key: str, *shape: int) -> Change:
    return lambda tensors: tensors.update({key: torch.zeros(shape)})


@pytest.mark.parametrize(
    ("section", "change", "says"),
    [
        (
            "text_encoder",
            _without("encoder.block.1.layer.1.DenseReluDense.wo.weight"),
            r"encoder\.block\.1\.layer\.1\.DenseReluDense\.wo\.weight is missing",
        ),
        (
            "denoiser",
            _with("spatial_blocks.3.attn.proj.weight", 128, 127),
            r"spatial_blocks\.3\.attn\.proj\.weight has shape \[128, 127\], the config asks for \[128, 128\]",
        ),
        (
            "denoiser",
            _with("spatial_blocks.4.attn.proj.weight", 128, 128),
            r"spatial_blocks\.4\.attn\.proj\.weight is none of the model that config\.json describes",
        ),
        ("vae", _without("scale"), "scale is missing"),
        ("vae", _with("temporal_vae.decoder.more.weight", 3), r"temporal_vae\.decoder\.more\.weight is none of"),
    ],
    ids=["missing", "shape", "extra", "missing-buffer", "extra-of-two-stages"],
)
def test_a_checkpoint_of_another_model_is_refused_before_the_first_trace(
    spec_with: Callable[[str, Change], SpecFile],
    monkeypatch: pytest.MonkeyPatch,
    section: str,
    change: Change,
    says: str,
) -> None:
    def traced(*_: object) -> None:
        raise AssertionError("traced")

    monkeypatch.setattr("movdc.models.opensora.trace", traced)
    with pytest.raises(MovdcError, match=rf"changed\.yaml:\d+: {section}\.weights: tensor {says}"):
        OpenSora().trace(spec_with(section, change), MACHINE, 4)


def test_what_published_files_hold_beside_the_model_is_left_unread(
    spec_with: Callable[[str, Change], SpecFile], monkeypatch: pytest.MonkeyPatch
) -> None:
    class TracedError(Exception):
        pass

    def traced(*_: object) -> None:
        raise TracedError

    monkeypatch.setattr("movdc.models.opensora.trace", traced)
    more = _with("spatial_vae.module.quant_conv.weight", 8, 8, 1, 1)
    with pytest.raises(TracedError):
        OpenSora().trace(spec_with("vae", more), MACHINE, 4)


def test_full_size_text_encoder_has_the_published_keys_and_shapes(golden_folder: Path) -> None:
    published = json.loads((golden_folder / "fullsize_keys.json").read_text())["t5_xxl_encoder"]
    with torch.device("meta"):
        model = TextEncoder(T5Config(**published["config"]))
    shapes = {key.removeprefix("t5."): list(tensor.shape) for key, tensor in model.state_dict().items()}
    assert shapes == published["keys"]
    assert sum(parameter.numel() for parameter in model.parameters()) == published["param_count"]


def _spec(tmp_path: Path, **denoiser: object) -> SpecFile:
    spec = yaml.safe_load(EXAMPLE.read_text()) | {"denoiser": denoiser}
    path = tmp_path / "hub.yaml"
    path.write_text(yaml.safe_dump(spec))
    return load_spec(path)


def _fill_hub_cache(root: Path, commit: str, branch: str, licence: str) -> Path:
    """A commit of someone/some-model, as the hub client keeps it."""
    repository = root / "models--someone--some-model"
    folder = repository / "snapshots" / commit
    folder.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / branch).write_text(commit)
    (folder / "config.json").write_text("{}")
    (folder / "README.md").write_text(f"---\nlicense: {licence}\n---\n# Some model\n")
    return folder


def test_a_hub_id_is_a_commit_with_a_licence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    folder = _fill_hub_cache(tmp_path / "hub", commit, "main", "apache-2.0")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for revision in ({}, {"revision": "main"}, {"revision": commit}):
        found = checkpoint_of(_spec(tmp_path, weights="someone/some-model", **revision), "denoiser")
        assert (found.folder, found.commit, found.licence) == (folder, commit, "apache-2.0")
    with pytest.raises(MovdcError, match=r"the hub did not give 'someone/some-model' at v2 .*write that folder's path"):
        checkpoint_of(_spec(tmp_path, weights="someone/some-model", revision="v2"), "denoiser")


def test_a_revision_is_of_the_hub(tmp_path: Path) -> None:
    for weights in (str(tmp_path), "random:0"):
        with pytest.raises(MovdcError, match=r"denoiser\.revision: .* is no repository of the hub; leave it out"):
            checkpoint_of(_spec(tmp_path, weights=weights, revision="main"), "denoiser")
