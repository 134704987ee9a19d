"""The temporal decoder against tensors recorded from Open-Sora 1.2, and its configurations."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from movdc.models.temporal_vae import CausalConv3d, TemporalVAEConfig, TemporalVAEDecoder, depth_to_time


@pytest.mark.parametrize("case", ["d1_T5", "d2_T10", "d3_T7", "d4_T7_pad", "d5_T1"])
def test_matches_the_reference_at_every_recorded_place(
    case: str,
    golden: Callable[[str], Any],
    record_calls: Callable[..., Any],
    assert_parity: Callable[[Tensor, Tensor, str], None],
) -> None:
    meta, tensors = golden(f"vae_{case}")
    sizes, weights = golden("vae_weights")
    vae = TemporalVAEDecoder(TemporalVAEConfig.from_dict({"type": "VAE_Temporal", **sizes["temporal_config"]})).eval()
    prefix = "temporal_vae."
    vae.load_state_dict({k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)})
    places = ["conv1", "res_blocks.3", "block_res_blocks.3.3", "conv_blocks.2"]
    calls = record_calls(vae, ["decoder", *(f"decoder.{place}" for place in places)])

    frames, start, decoded = meta["num_frames"], 0, []
    for z in tensors["mid.z_denorm"].split(5, dim=2):
        with torch.no_grad():
            decoded.append(vae(z, min(17, frames - start)))
        start += 17

    for chunk, (_, raw) in enumerate(calls["decoder"]):
        assert_parity(raw, tensors[f"mid.temporal_chunk{chunk}.raw"], f"chunk{chunk}.raw")
    for place, name in zip(places, ("conv1", "res_blocks", "block3", "conv_block2"), strict=True):
        assert_parity(calls[f"decoder.{place}"][0][1], tensors[f"mid.temporal_chunk0.{name}"], f"chunk0.{name}")
    assert_parity(torch.cat(decoded, dim=2), tensors["mid.after_temporal"], "after_temporal")


def test_causal_convolution_sees_no_later_frame() -> None:
    convolution = CausalConv3d(2, 3, 3)
    x = torch.randn(1, 2, 6, 4, 4)
    later = x.clone()
    later[:, :, 4:] += 1.0
    with torch.no_grad():
        assert torch.equal(convolution(x)[:, :, :4], convolution(later)[:, :, :4])


def test_depth_to_time_takes_the_stride_from_the_fast_part_of_the_channels() -> None:
    x = torch.arange(2 * 6 * 3 * 2 * 2).view(2, 6, 3, 2, 2)
    out = depth_to_time(x, 2)
    assert out.shape == (2, 3, 6, 2, 2)
    for channel in range(3):
        for phase in range(2):
            assert torch.equal(out[:, channel, phase::2], x[:, channel * 2 + phase])


def test_a_wrong_number_of_frames_is_refused() -> None:
    with torch.device("meta"):
        vae = TemporalVAEDecoder(TemporalVAEConfig(filters=8, num_res_blocks=1, num_groups=4))
    with pytest.raises(ValueError, match="5 latent frames do not decode to 16 frames"):
        vae(torch.zeros(1, 4, 5, 2, 2, device="meta"), 16)


def test_both_published_types_of_configuration() -> None:
    large = TemporalVAEConfig.from_dict({"type": "VAE_Temporal_SD", "from_pretrained": None})
    assert large == TemporalVAEConfig(filters=128, num_res_blocks=4, num_groups=32)
    assert large.frames_per_latent == 4
    with pytest.raises(ValueError, match=r"lacks .*filters"):
        TemporalVAEConfig.from_dict({"type": "VAE_Temporal", "embed_dim": 4})
    with pytest.raises(ValueError, match="VideoAutoencoderKL"):
        TemporalVAEConfig.from_dict({"type": "VideoAutoencoderKL"})
    with pytest.raises(ValueError, match="temporal_downsample has 2 entries"):
        TemporalVAEConfig(temporal_downsample=(True, True))
