"""The whole video autoencoder of Open-Sora 1.2 to train: the decoder that movdc compiles, and the encoder to it.

Parameter names are the published ones: `spatial_vae.module.*`, `temporal_vae.*`, `scale`, `shift`. Letters in shapes:
B clips, n frames of a chunk, t latent frames of it, N frames of a clip, T latent frames of it, h and w latent size.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor, nn

from movdc.models.temporal_vae import CausalConv3d, ResBlock, TemporalVAEConfig, TemporalVAEDecoder

SPATIAL_SCALING_FACTOR = 0.18215
CHUNK_FRAMES, CHUNK_LATENTS = 17, 5


class Downsample(nn.Module):
    """Causal convolution that halves the frames (Open-Sora 1.2)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv3d(channels, channels, 3, stride=(2, 1, 1), padding=(0, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, n, h, w] to [B, C, n / 2, h, w]; one frame of zeros in front is what the stride leaves of two."""
        halved: Tensor = self.conv(F.pad(x, (0, 0, 0, 0, 1, 0)))
        return halved


class Encoder(nn.Module):
    """Frames of one chunk to the moments of its latents (MAGVIT-v2, arXiv 2310.05737)."""

    def __init__(self, config: TemporalVAEConfig) -> None:
        super().__init__()
        widths = [config.filters * multiplier for multiplier in config.channel_multipliers]
        self.conv_in = CausalConv3d(config.in_out_channels, widths[0], 3, bias=False)
        self.block_res_blocks = nn.ModuleList(
            nn.ModuleList(
                ResBlock(before if block == 0 else width, width, config.num_groups)
                for block in range(config.num_res_blocks)
            )
            for before, width in zip([widths[0], *widths], widths, strict=False)
        )
        self.conv_blocks = nn.ModuleList(
            Downsample(width) if halved else nn.Identity()
            for width, halved in zip(widths, config.temporal_downsample, strict=False)
        )
        self.res_blocks = nn.ModuleList(
            ResBlock(widths[-1], widths[-1], config.num_groups) for _ in range(config.num_res_blocks)
        )
        self.norm1 = nn.GroupNorm(config.num_groups, widths[-1])
        self.conv2 = CausalConv3d(widths[-1], 2 * config.latent_embed_dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        """[B, in_out_channels, t * frames_per_latent, h, w] to [B, 2 * latent_embed_dim, t, h, w]."""
        x = self.conv_in(x)
        for level, blocks in enumerate(self.block_res_blocks):
            assert isinstance(blocks, nn.ModuleList)
            for block in blocks:
                x = block(x)
            if level < len(self.conv_blocks):
                x = self.conv_blocks[level](x)
        for block in self.res_blocks:
            x = block(x)
        x = self.conv2(F.silu(self.norm1(x)))
        return x


class TemporalVAE(TemporalVAEDecoder):
    """Both sides of the temporal autoencoder, for one chunk."""

    def __init__(self, config: TemporalVAEConfig) -> None:
        super().__init__(config)
        self.encoder = Encoder(config)
        self.quant_conv = CausalConv3d(2 * config.latent_embed_dim, 2 * config.embed_dim, 1)

    def moments(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Frames [B, 4, n, h, w] to mean and log variance of the latents, each [B, 4, t, h, w]."""
        x = F.pad(x, (0, 0, 0, 0, -x.shape[2] % self.frames_per_latent, 0))
        mean, log_variance = self.quant_conv(self.encoder(x)).chunk(2, dim=1)
        return mean, log_variance.clamp(-30, 20)


class VideoAutoencoder(nn.Module):
    """Clips to normalised latents and back, by two chunks of 17 frames."""

    scale: Tensor
    shift: Tensor

    def __init__(self, folder: Path) -> None:
        super().__init__()
        config = json.loads((folder / "config.json").read_text())
        sizes = json.loads((folder / "spatial" / "config.json").read_text())
        spatial = AutoencoderKL(**{key: value for key, value in sizes.items() if not key.startswith("_")})
        self.spatial_vae = nn.ModuleDict({"module": spatial})
        self.temporal_vae = TemporalVAE(TemporalVAEConfig.from_dict(config["vae_temporal"]))
        self.register_buffer("scale", torch.ones(1, 4, 1, 1, 1))
        self.register_buffer("shift", torch.zeros(1, 4, 1, 1, 1))

    def frame_moments(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        """Frames [N, 3, 8h, 8w] to mean and log variance of what the temporal side takes, each [N, 4, h, w]."""
        posterior = self.spatial_vae["module"].encode(frames).latent_dist
        return posterior.mean * SPATIAL_SCALING_FACTOR, posterior.logvar + 2 * math.log(SPATIAL_SCALING_FACTOR)

    def decode_frames(self, latents: Tensor) -> Tensor:
        """[N, 4, h, w] to frames [N, 3, 8h, 8w]."""
        frames: Tensor = self.spatial_vae["module"].decode(latents / SPATIAL_SCALING_FACTOR).sample
        return frames

    def encode(self, clips: Tensor) -> Tensor:
        """Clips [B, N, 3, 8h, 8w] to normalised latents [B, 4, T, h, w]."""
        mean, _ = self.frame_moments(clips.flatten(0, 1))
        chunks = mean.unflatten(0, clips.shape[:2]).transpose(1, 2).split(CHUNK_FRAMES, dim=2)
        latents = torch.cat([self.temporal_vae.moments(chunk)[0] for chunk in chunks], dim=2)
        return (latents - self.shift) / self.scale

    def decode(self, latents: Tensor) -> Tensor:
        """Normalised latents [B, 4, T, h, w] to clips [B, N, 3, 8h, 8w]."""
        chunks = (latents * self.scale + self.shift).split(CHUNK_LATENTS, dim=2)
        frames = torch.cat([self.temporal_vae(chunk, CHUNK_FRAMES) for chunk in chunks], dim=2).transpose(1, 2)
        return self.decode_frames(frames.flatten(0, 1)).unflatten(0, frames.shape[:2])

    @torch.no_grad()
    def normalise_frame_latents(self, mean: Tensor, deviation: Tensor) -> None:
        """Fold an affine map into the convolutions next to the frame latents, so that they get mean 0 and deviation 1.

        `mean` and `deviation` [4] are those that `frame_moments` gives so far; no decoded frame changes.
        """
        inner = self.spatial_vae["module"].quant_conv
        outer = self.spatial_vae["module"].post_quant_conv
        offset = mean / SPATIAL_SCALING_FACTOR  # of the latents as the convolutions hold them
        outer.bias += outer.weight[:, :, 0, 0] @ offset
        outer.weight *= deviation[None, :, None, None]
        inner.bias[:4] = (inner.bias[:4] - offset) / deviation
        inner.weight[:4] /= deviation[:, None, None, None]
        inner.bias[4:] -= 2 * deviation.log()
