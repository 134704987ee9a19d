"""The video decoder of Open-Sora 1.2 as two stages: latents to frames in time, then each frame to pixels.

Letters in shapes: t latent frames of a chunk, n video frames of it, N frames of a batch, h and w latent height and
width. `state_dict()` keys of both stages are keys of the published file (its encoder keys are left over).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from diffusers.models.autoencoders.vae import Decoder
from torch import Tensor, nn

from movdc.models.temporal_vae import TemporalVAEConfig, TemporalVAEDecoder

FRAMES_PER_LATENT = 4
SPATIAL_SCALING_FACTOR = 0.18215  # Open-Sora 1.2 uses this one, not the 0.13025 of the SDXL VAE it started from


@dataclass(frozen=True)
class SpatialVAEConfig:
    """Sizes of the diffusers AutoencoderKL; the defaults are the SDXL VAE's, which Open-Sora 1.2 names by its hub."""

    out_channels: int = 3
    latent_channels: int = 4
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    norm_num_groups: int = 32

    @classmethod
    def from_dict(cls, config_json: Mapping[str, Any]) -> SpatialVAEConfig:
        """Take the sizes from a diffusers AutoencoderKL config.json."""
        if other := set(config_json.get("up_block_types", ())) - {"UpDecoderBlock2D"}:
            raise ValueError(f"up_block_types {', '.join(sorted(other))}: only UpDecoderBlock2D is supported")
        if config_json.get("act_fn", "silu") != "silu":
            raise ValueError(f"act_fn {config_json['act_fn']!r}: only silu is supported")
        known = {entry.name: config_json[entry.name] for entry in fields(cls) if entry.name in config_json}
        if "block_out_channels" in known:
            known["block_out_channels"] = tuple(known["block_out_channels"])
        return cls(**known)


@dataclass(frozen=True)
class OpenSoraVAEConfig:
    """Sizes of the video autoencoder of Open-Sora 1.2 (arXiv 2412.20404)."""

    temporal: TemporalVAEConfig = field(default_factory=TemporalVAEConfig)
    spatial: SpatialVAEConfig = field(default_factory=SpatialVAEConfig)
    micro_frame_size: int = 17
    micro_batch_size: int = 4

    @classmethod
    def from_dict(
        cls, config_json: Mapping[str, Any], spatial_config_json: Mapping[str, Any] | None = None
    ) -> OpenSoraVAEConfig:
        """Take the sizes from the published config.json and, where there is one, the spatial autoencoder's own."""
        temporal = TemporalVAEConfig.from_dict(config_json["vae_temporal"])
        if temporal.frames_per_latent != FRAMES_PER_LATENT:
            raise ValueError(f"temporal_downsample gives {temporal.frames_per_latent} frames per latent frame, not 4")
        return cls(
            temporal=temporal,
            spatial=SpatialVAEConfig.from_dict(spatial_config_json or {}),
            micro_frame_size=config_json.get("micro_frame_size", cls.micro_frame_size),
            micro_batch_size=config_json.get("vae_2d", {}).get("micro_batch_size", cls.micro_batch_size),
        )

    @classmethod
    def from_folder(cls, folder: Path) -> OpenSoraVAEConfig:
        """Read `config.json` and, if it exists, `spatial/config.json` of a checkpoint folder.

        The published config.json names a hub repository for the spatial sizes; without the local file they are the
        SDXL VAE's, which is what that repository holds.
        """
        spatial = folder / "spatial" / "config.json"
        return cls.from_dict(
            json.loads((folder / "config.json").read_text()),
            json.loads(spatial.read_text()) if spatial.is_file() else None,
        )


def decode_chunks(frames: int, micro_frame_size: int = 17) -> tuple[tuple[int, int], ...]:
    """Chunks that decode on their own, as (latent frames, video frames): 40 frames are ((5, 17), (5, 17), (2, 6))."""
    starts = range(0, frames, micro_frame_size)
    sizes = [min(micro_frame_size, frames - start) for start in starts]
    return tuple((math.ceil(size / FRAMES_PER_LATENT), size) for size in sizes)


def latent_frames(frames: int, micro_frame_size: int = 17) -> int:
    """Latent frames of a video of that many frames: 34 frames are 10."""
    return sum(latents for latents, _ in decode_chunks(frames, micro_frame_size))


class TemporalDecode(nn.Module):
    """Stage: one chunk of sampled latents to frames for the spatial decoder (Open-Sora 1.2)."""

    scale: Tensor
    shift: Tensor

    def __init__(self, config: OpenSoraVAEConfig, num_frames: int) -> None:
        super().__init__()
        self.num_frames = num_frames
        channels = config.temporal.embed_dim
        self.register_buffer("scale", torch.ones(1, channels, 1, 1, 1))
        self.register_buffer("shift", torch.zeros(1, channels, 1, 1, 1))
        self.temporal_vae = TemporalVAEDecoder(config.temporal)

    def forward(self, z: Tensor) -> Tensor:
        """Normalised latents z [1, 4, t, h, w] to frames [1, 4, n, h, w] fp32."""
        frames: Tensor = self.temporal_vae(z * self.scale + self.shift, self.num_frames)
        return frames


class SpatialAutoencoder(nn.Module):
    """Decoder side of the diffusers AutoencoderKL, under its parameter names."""

    def __init__(self, config: SpatialVAEConfig) -> None:
        super().__init__()
        self.post_quant_conv = nn.Conv2d(config.latent_channels, config.latent_channels, 1)
        self.decoder = Decoder(
            in_channels=config.latent_channels,
            out_channels=config.out_channels,
            up_block_types=("UpDecoderBlock2D",) * len(config.block_out_channels),
            block_out_channels=config.block_out_channels,
            layers_per_block=config.layers_per_block,
            norm_num_groups=config.norm_num_groups,
        )
        # Left to itself diffusers picks a processor by what is installed; tracing needs the same graph everywhere.
        for module in self.decoder.modules():
            if isinstance(module, Attention):
                module.set_processor(AttnProcessor2_0())  # type: ignore[no-untyped-call, arg-type]  # as annotated there

    def forward(self, latents: Tensor) -> Tensor:
        """[N, 4, h, w] to [N, 3, 8h, 8w]."""
        pixels: Tensor = self.decoder(self.post_quant_conv(latents))
        return pixels


class SpatialDecode(nn.Module):
    """Stage: a batch of frames from the temporal decoder to pixels (Open-Sora 1.2)."""

    def __init__(self, config: OpenSoraVAEConfig) -> None:
        super().__init__()
        # The published keys have a wrapper's level: `spatial_vae.module.decoder...`.
        self.spatial_vae = nn.ModuleDict({"module": SpatialAutoencoder(config.spatial)})

    def forward(self, frames: Tensor) -> Tensor:
        """Frames [N, 4, h, w] to pixels [N, 3, 8h, 8w] fp32, about -1 (black) to 1 (white), not clamped."""
        pixels: Tensor = self.spatial_vae["module"](frames / SPATIAL_SCALING_FACTOR)
        return pixels
