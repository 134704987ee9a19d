"""STDiT3 against tensors recorded from Open-Sora 1.2, the published keys, and torch.export."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from movdc.models import stdit3

Parity = Callable[[Tensor, Tensor, str], None]


def load_case(golden: Callable[[str], Any], name: str) -> tuple[stdit3.STDiT3, dict[str, Any], dict[str, Tensor]]:
    """Model with the recorded weights, keyword inputs, and all recorded tensors."""
    meta, tensors = golden(name)
    _, weights = golden(meta["weights_file"].removesuffix(".safetensors"))
    model = stdit3.STDiT3(stdit3.STDiT3Config.from_dict(meta["model_config"])).eval()
    model.load_state_dict(weights)
    inputs: dict[str, Any] = {key.removeprefix("in."): value for key, value in tensors.items() if key.startswith("in.")}
    inputs |= {axis: inputs[axis].tolist()[0] for axis in ("height", "width")}
    return model, inputs, tensors


def load_tiny(folder: Path) -> tuple[stdit3.STDiT3Config, dict[str, Tensor]]:
    config = stdit3.STDiT3Config.from_dict(json.loads((folder / "denoiser" / "config.json").read_text()))
    return config, load_file(folder / "denoiser" / "model.safetensors")


@pytest.mark.parametrize("case", ["a1", "a2", "a3", "a4_cfg", "a5_image"])
def test_matches_the_reference_at_every_recorded_place(
    case: str, golden: Callable[[str], Any], record_calls: Callable[..., Any], assert_parity: Parity
) -> None:
    model, inputs, tensors = load_case(golden, f"stdit3_{case}")
    places = ["t_block", "y_embedder", "final_layer"]
    for index in range(model.config.depth):
        for group in ("spatial_blocks", "temporal_blocks"):
            places += [f"{group}.{index}"] + [f"{group}.{index}.{part}" for part in ("attn", "cross_attn", "mlp")]
    calls = record_calls(model, places)
    with torch.no_grad():
        out = model(**inputs)

    (t,), t_mlp = calls["t_block"][0]
    ours = {"t": t, "t_mlp": t_mlp}
    if "x_mask" in inputs:
        (ours["t0"],), ours["t0_mlp"] = calls["t_block"][1]
    ours["x_embed"] = calls["spatial_blocks.0"][0][0][0].flatten(1, 2)
    ours["y_embed"] = calls["y_embedder"][0][1]
    batch, _, length, _ = inputs["y"].shape
    mask = inputs.get("mask", torch.ones(batch, length))
    mask = mask.repeat(batch // mask.shape[0], 1).bool()
    ours["y_packed"] = ours["y_embed"][:, 0][mask][None]
    ours["y_lens"] = mask.sum(1)
    ours["final"] = calls["final_layer"][0][1].flatten(1, 2)
    for group in ("spatial", "temporal"):
        for part in ("attn", "cross_attn"):
            ours[f"{group}.0.{part}"] = calls[f"{group}_blocks.0.{part}"][0][1]
        ours[f"{group}.0.mlp"] = calls[f"{group}_blocks.0.mlp"][0][1].flatten(1, 2)
        for index in range(model.config.depth):
            ours[f"{group}.{index}.out"] = calls[f"{group}_blocks.{index}"][0][1].flatten(1, 2)

    assert {f"mid.{name}" for name in ours} == {name for name in tensors if name.startswith("mid.")}
    for name, value in ours.items():
        assert_parity(value.float(), tensors[f"mid.{name}"].float(), name)
    assert_parity(out, tensors["out"], "out")
    assert out.dtype == torch.float32


def test_position_embedding_2d_matches(golden: Callable[[str], Any], assert_parity: Parity) -> None:
    meta, tensors = golden("pos_embed_2d")
    for case in meta["cases"]:
        table = stdit3.position_embedding_2d(case["h"], case["w"], case["dim"], case["scale"], case["base_size"])
        assert_parity(table, tensors[case["tensor"]], case["tensor"])


def test_rotary_embedding_matches(golden: Callable[[str], Any], assert_parity: Parity) -> None:
    meta, tensors = golden("rope")
    for index, case in enumerate(meta["cases"]):
        rope = stdit3.RotaryEmbedding(case["head_dim"])
        assert_parity(rope.freqs, tensors[f"case{index}.freqs"], f"case{index}.freqs")
        rotated = stdit3.apply_rotary(tensors[f"case{index}.in"], *rope(case["shape"][2]))
        assert_parity(rotated.detach(), tensors[f"case{index}.out"], f"case{index}.out")


def test_timestep_and_fps_embeddings_match(golden: Callable[[str], Any], assert_parity: Parity) -> None:
    meta, tensors = golden("t_fps_embed")

    def embedding(prefix: str) -> stdit3.ScalarEmbedding:
        module = stdit3.ScalarEmbedding(meta["hidden_size"])
        start = f"w.{prefix}."
        module.load_state_dict({k.removeprefix(start): v for k, v in tensors.items() if k.startswith(start)})
        return module

    assert_parity(stdit3.timestep_sinusoid(tensors["in.t"]), tensors["sinusoid"], "sinusoid")
    with torch.no_grad():
        assert_parity(embedding("t_emb")(tensors["in.t"]), tensors["t_out"], "t_out")
        fps_embedder = embedding("fps_emb")
        assert_parity(fps_embedder(tensors["in.fps_a"]), tensors["fps_a_out"], "fps_a_out")
        assert_parity(fps_embedder(tensors["in.fps_b"]).expand(3, -1), tensors["fps_b_out"], "fps_b_out")


def test_text_behind_the_mask_has_no_influence(golden: Callable[[str], Any]) -> None:
    model, inputs, _ = load_case(golden, "stdit3_a1")
    noisy = inputs["y"] + 100.0 * (1 - inputs["mask"])[:, None, :, None]
    with torch.no_grad():
        assert torch.equal(model(**inputs), model(**inputs | {"y": noisy}))


def test_fps_may_be_a_number(golden: Callable[[str], Any]) -> None:
    model, inputs, _ = load_case(golden, "stdit3_a1")
    with torch.no_grad():
        as_tensor, as_number = (model(**inputs | {"fps": fps}) for fps in (torch.tensor([24.0]), 24.0))
    assert torch.equal(as_number, as_tensor)


@pytest.mark.parametrize("item", [0, 1])
def test_tiny_checkpoint_repeats_its_recorded_sampling(
    item: int, tiny_checkpoint: Path, golden_folder: Path, assert_parity: Parity
) -> None:
    config, weights = load_tiny(tiny_checkpoint)
    model = stdit3.STDiT3(config).eval()
    model.load_state_dict(weights)
    settings = json.loads((golden_folder / "tiny" / "golden.json").read_text())
    recorded = load_file(golden_folder / "tiny" / f"golden_{item}.safetensors")
    assert torch.equal(recorded["null_embedding"], model.y_embedder.y_embedding)

    guidance = settings["items"][item]["cfg_scale"]
    timesteps = recorded["timesteps"]
    y = torch.stack((recorded["text_embedding"], recorded["null_embedding"]))[:, None]
    z = recorded["noise"]
    for step in range(21):
        with torch.no_grad():
            out = model(
                torch.stack((z, z)),
                timesteps[step].expand(2),
                y,
                recorded["attention_mask"][None],
                fps=torch.tensor([float(settings["fps"])]),
                height=settings["height"],
                width=settings["width"],
            )
        if f"model_output_{step:02}" in recorded:
            assert_parity(out, recorded[f"model_output_{step:02}"], f"model_output_{step:02}")
        conditional, unconditional = out[:, :4]
        velocity = unconditional + guidance * (conditional - unconditional)
        z = z + velocity * (timesteps[step] - timesteps[step + 1]) / 1000


def test_full_size_has_the_published_keys_and_shapes(golden_folder: Path) -> None:
    published = json.loads((golden_folder / "fullsize_keys.json").read_text())["stdit3_xl_2"]
    with torch.device("meta"):
        model = stdit3.STDiT3(stdit3.STDiT3Config.from_dict(published["config"]))
    assert {key: list(tensor.shape) for key, tensor in model.state_dict().items()} == published["keys"]
    assert sum(parameter.numel() for parameter in model.parameters()) == published["param_count"]
    block_parameters = sum(parameter.numel() for parameter in model.spatial_blocks[0].parameters())
    assert block_parameters == published["param_count_one_block"]
    assert stdit3.STDiT3Config() == model.config


def test_config_ignores_training_keys_and_refuses_other_architectures(tiny_checkpoint: Path) -> None:
    config, _ = load_tiny(tiny_checkpoint)
    assert (config.depth, config.hidden_size, config.patch_size) == (4, 128, (1, 2, 2))
    for unsupported in (
        {"skip_y_embedder": True},
        {"qk_norm_legacy": True},
        {"patch_size": [2, 2, 2]},
        {"hidden_size": 100, "num_heads": 4, "qk_norm": False},
    ):
        with pytest.raises(ValueError, match=r"architecture|patch_size|hidden_size"):
            stdit3.STDiT3Config.from_dict(unsupported)


@pytest.mark.parametrize("x_mask", [None, torch.tensor([[True] * 7 + [False] * 3]).expand(2, 10)])
def test_exports_from_fake_tensors(
    x_mask: Tensor | None, tiny_checkpoint: Path, check_export: Callable[..., None]
) -> None:
    config, weights = load_tiny(tiny_checkpoint)
    generator = torch.Generator().manual_seed(0)
    inputs: dict[str, Any] = {
        "x": torch.randn(2, 4, 10, 7, 8, generator=generator),
        "timestep": torch.full((2,), 719.8),
        "y": torch.randn(2, 1, 24, 128, generator=generator),
        "mask": (torch.arange(24) < 9).long()[None],
        "x_mask": x_mask,
        "fps": torch.tensor([12.0]),
        "height": 56,
        "width": 64,
    }
    check_export(lambda: stdit3.STDiT3(config), weights, inputs)
