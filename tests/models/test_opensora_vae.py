"""The two decoding stages against tensors recorded from Open-Sora 1.2, the published keys, and torch.export."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor, nn

from movdc.models.opensora_vae import (
    OpenSoraVAEConfig,
    SpatialDecode,
    SpatialVAEConfig,
    TemporalDecode,
    decode_chunks,
    latent_frames,
)


def load_stage(stage: nn.Module, checkpoint: dict[str, Tensor]) -> nn.Module:
    """Give a stage its part of the checkpoint, whose keys are the stage's own."""
    stage.load_state_dict({key: checkpoint[key] for key in stage.state_dict()})
    return stage.eval()


def decode(config: OpenSoraVAEConfig, checkpoint: dict[str, Tensor], z: Tensor, frames: int) -> tuple[Tensor, Tensor]:
    """Latents z [B, 4, T, h, w] to frames [B, 4, F, h, w] and pixels [B, 3, F, 8h, 8w], chunk by chunk."""
    chunks = decode_chunks(frames)
    spatial = load_stage(SpatialDecode(config), checkpoint)
    parts = z.split([latents for latents, _ in chunks], dim=2)
    with torch.no_grad():
        decoded = torch.cat(
            [
                load_stage(TemporalDecode(config, count), checkpoint)(part)
                for part, (_, count) in zip(parts, chunks, strict=True)
            ],
            dim=2,
        )
        pixels = torch.cat([spatial(batch) for batch in decoded.transpose(1, 2).flatten(0, 1).split(4)])
    return decoded, pixels.unflatten(0, (z.shape[0], frames)).transpose(1, 2)


@pytest.mark.parametrize("case", ["d1_T5", "d2_T10", "d3_T7", "d4_T7_pad", "d5_T1"])
def test_matches_the_reference(
    case: str,
    golden: Callable[[str], Any],
    record_calls: Callable[..., Any],
    assert_parity: Callable[[Tensor, Tensor, str], None],
) -> None:
    meta, tensors = golden(f"vae_{case}")
    sizes, checkpoint = golden("vae_weights")
    config = OpenSoraVAEConfig.from_dict(
        {"vae_temporal": {"type": "VAE_Temporal", **sizes["temporal_config"]}}, sizes["spatial_config"]
    )
    assert tensors["in.z"].shape[2] == latent_frames(meta["num_frames"])
    frames, pixels = decode(config, checkpoint, tensors["in.z"], meta["num_frames"])
    assert_parity(frames, tensors["mid.after_temporal"], "after_temporal")
    assert_parity(pixels, tensors["out"], "out")

    first_frames = tensors["mid.after_temporal"].transpose(1, 2).flatten(0, 1)[:4]
    spatial = load_stage(SpatialDecode(config), checkpoint)
    places = ("conv_in", "mid_block")
    calls = record_calls(spatial, [f"spatial_vae.module.decoder.{place}" for place in places])
    with torch.no_grad():
        spatial(first_frames)
    for place in places:
        ((_, ours),) = calls[f"spatial_vae.module.decoder.{place}"]
        assert_parity(ours, tensors[f"mid.spatial_frames0_3.{place}"], place)

    chunk = decode_chunks(meta["num_frames"])[0]
    temporal = load_stage(TemporalDecode(config, chunk[1]), checkpoint)
    calls = record_calls(temporal, ["temporal_vae"])
    with torch.no_grad():
        temporal(tensors["in.z"][:, :, : chunk[0]])
    assert_parity(calls["temporal_vae"][0][0][0], tensors["mid.z_denorm"][:, :, : chunk[0]], "z_denorm")


@pytest.mark.parametrize("item", [0, 1])
def test_tiny_checkpoint_decodes_to_its_recorded_frames(item: int, tiny_checkpoint: Path, golden_folder: Path) -> None:
    recorded = load_file(golden_folder / "tiny" / f"golden_{item}.safetensors")
    config = OpenSoraVAEConfig.from_folder(tiny_checkpoint / "vae")
    checkpoint = load_file(tiny_checkpoint / "vae" / "model.safetensors")
    _, pixels = decode(config, checkpoint, recorded["final_latents"][None], 34)
    grey = (pixels.clamp(-1, 1) * 127.5 + 127.5).round()[0].permute(1, 2, 3, 0)
    # The recorded frames are rounded: a value next to a half may fall to either side.
    difference = (grey - recorded["frames"].float()).abs()
    assert difference.max() <= 1
    assert difference.mean() < 1e-3


def test_full_size_has_the_published_keys_and_shapes(golden_folder: Path) -> None:
    published = json.loads((golden_folder / "fullsize_keys.json").read_text())
    config = OpenSoraVAEConfig()
    with torch.device("meta"):
        temporal, spatial = TemporalDecode(config, 17), SpatialDecode(config)

    def decoder_side(keys: dict[str, list[int]]) -> dict[str, list[int]]:
        return {key: shape for key, shape in keys.items() if "encoder" not in key and ".quant_conv" not in key}

    normalisation = {"scale": [1, 4, 1, 1, 1], "shift": [1, 4, 1, 1, 1]}
    for stage, expected, more in (
        (temporal, published["vae_temporal"], normalisation),
        (spatial, published["vae_spatial"], {}),
    ):
        shapes = {key: list(tensor.shape) for key, tensor in stage.state_dict().items()}
        assert shapes == decoder_side(expected["keys"]) | more
        assert sum(parameter.numel() for parameter in stage.parameters()) == expected["param_count_decoder_side"]


def test_spatial_sizes_come_from_a_local_file_or_are_those_of_sdxl(tiny_checkpoint: Path, tmp_path: Path) -> None:
    assert OpenSoraVAEConfig.from_folder(tiny_checkpoint / "vae").spatial.block_out_channels == (16, 16, 32, 64)
    hub = {"type": "VideoAutoencoderKL", "from_pretrained": "PixArt-alpha/pixart_sigma_sdxlvae_T5_diffusers"}
    config_json = {"vae_2d": {**hub, "micro_batch_size": 4}, "vae_temporal": {"type": "VAE_Temporal_SD"}}
    (tmp_path / "config.json").write_text(json.dumps(config_json))
    assert OpenSoraVAEConfig.from_folder(tmp_path) == OpenSoraVAEConfig()


@pytest.mark.parametrize("other", [{"act_fn": "gelu"}, {"up_block_types": ["AttnUpDecoderBlock2D"]}])
def test_other_spatial_architectures_are_refused(other: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="only"):
        SpatialVAEConfig.from_dict(other)


def test_decode_chunks_of_known_lengths() -> None:
    assert decode_chunks(34) == ((5, 17), (5, 17))
    assert decode_chunks(16) == ((4, 16),)
    assert decode_chunks(40) == ((5, 17), (5, 17), (2, 6))
    assert decode_chunks(1) == ((1, 1),)
    assert latent_frames(68) == 20


@given(st.integers(1, 1000))
def test_decode_chunks_cover_every_frame_once(frames: int) -> None:
    chunks = decode_chunks(frames)
    assert sum(count for _, count in chunks) == frames
    assert latent_frames(frames) == 5 * (frames // 17) + math.ceil(frames % 17 / 4)


@pytest.mark.parametrize("num_frames", [17, 6])
def test_temporal_stage_exports_from_fake_tensors(
    num_frames: int, tiny_checkpoint: Path, check_export: Callable[..., None]
) -> None:
    config = OpenSoraVAEConfig.from_folder(tiny_checkpoint / "vae")
    z = torch.randn(1, 4, math.ceil(num_frames / 4), 8, 8, generator=torch.Generator().manual_seed(0))
    checkpoint = load_file(tiny_checkpoint / "vae" / "model.safetensors")
    weights = {key: checkpoint[key] for key in TemporalDecode(config, num_frames).state_dict()}
    check_export(lambda: TemporalDecode(config, num_frames), weights, {"z": z})


def test_spatial_stage_exports_from_fake_tensors(tiny_checkpoint: Path, check_export: Callable[..., None]) -> None:
    config = OpenSoraVAEConfig.from_folder(tiny_checkpoint / "vae")
    frames = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    checkpoint = load_file(tiny_checkpoint / "vae" / "model.safetensors")
    weights = {key: checkpoint[key] for key in SpatialDecode(config).state_dict()}
    check_export(lambda: SpatialDecode(config), weights, {"frames": frames})
