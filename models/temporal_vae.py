"""The temporal autoencoder of Open-Sora 1.2, decoder side (arXiv 2412.20404; after MAGVIT-v2, arXiv 2310.05737).

Letters in shapes: B batch rows, C channels, t latent frames of a chunk, n video frames of it, h and w latent height
and width. Parameter names and shapes are those of the published checkpoint below `temporal_vae.`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class TemporalVAEConfig:
    """Sizes of the temporal autoencoder; the defaults are those of the published type `VAE_Temporal_SD`."""

    in_out_channels: int = 4
    latent_embed_dim: int = 4
    embed_dim: int = 4
    filters: int = 128
    num_res_blocks: int = 4
    channel_multipliers: tuple[int, ...] = (1, 2, 2, 4)
    temporal_downsample: tuple[bool, ...] = (False, True, True)
    num_groups: int = 32

    def __post_init__(self) -> None:
        if len(self.temporal_downsample) != len(self.channel_multipliers) - 1:
            raise ValueError(
                f"temporal_downsample has {len(self.temporal_downsample)} entries, "
                f"expected one less than the {len(self.channel_multipliers)} channel_multipliers"
            )

    @classmethod
    def from_dict(cls, vae_temporal: Mapping[str, Any]) -> TemporalVAEConfig:
        """Take the sizes from the `vae_temporal` section of a published config.json.

        The type `VAE_Temporal_SD` fixes every size and `VAE_Temporal` spells each one out.
        """
        kind = vae_temporal.get("type")
        if kind == "VAE_Temporal_SD":
            return cls()
        if kind != "VAE_Temporal":
            raise ValueError(f"vae_temporal.type is {kind!r}, expected VAE_Temporal_SD or VAE_Temporal")
        names = [field.name for field in fields(cls)]
        if missing := [name for name in names if name not in vae_temporal]:
            raise ValueError(f"vae_temporal of type VAE_Temporal lacks {', '.join(missing)}")
        sizes: dict[str, Any] = {name: vae_temporal[name] for name in names}
        for name in ("channel_multipliers", "temporal_downsample"):
            sizes[name] = tuple(sizes[name])
        return cls(**sizes)

    @property
    def frames_per_latent(self) -> int:
        """Video frames that one latent frame decodes to."""
        return int(2 ** sum(self.temporal_downsample))


class CausalConv3d(nn.Module):
    """3-D convolution that sees no later frame: zeros stand in front in time, around in height and width."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, bias: bool = True) -> None:
        super().__init__()
        self.front_frames = kernel_size - 1
        around = (0, kernel_size // 2, kernel_size // 2)
        self.conv = nn.Conv3d(in_channels, out_channels, kernel_size, padding=around, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """[B, in_channels, t, h, w] to [B, out_channels, t, h, w]."""
        if self.front_frames:
            x = F.pad(x, (0, 0, 0, 0, self.front_frames, 0))
        convolved: Tensor = self.conv(x)
        return convolved


class ResBlock(nn.Module):
    """Two causal convolutions with GroupNorm over the whole chunk, and a shortcut (MAGVIT-v2, arXiv 2310.05737)."""

    def __init__(self, in_channels: int, out_channels: int, num_groups: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(num_groups, in_channels)
        self.conv1 = CausalConv3d(in_channels, out_channels, 3, bias=False)
        self.norm2 = nn.GroupNorm(num_groups, out_channels)
        self.conv2 = CausalConv3d(out_channels, out_channels, 3, bias=False)
        self.conv3 = CausalConv3d(in_channels, out_channels, 1, bias=False) if in_channels != out_channels else None

    def forward(self, x: Tensor) -> Tensor:
        """[B, in_channels, t, h, w] to [B, out_channels, t, h, w]."""
        residual = self.conv1(F.silu(self.norm1(x)))
        residual = self.conv2(F.silu(self.norm2(residual)))
        out: Tensor = residual + (x if self.conv3 is None else self.conv3(x))
        return out


def depth_to_time(x: Tensor, stride: int) -> Tensor:
    """[B, C * stride, t, h, w] to [B, C, t * stride, h, w]: channel c * stride + s becomes frame t * stride + s."""
    batch, channels, frames, height, width = x.shape
    # Height and width go as one dimension, which keeps the rank at 5 (Core ML's limit).
    x = x.reshape(batch * channels // stride, stride, frames, height * width).transpose(1, 2)
    return x.reshape(batch, channels // stride, frames * stride, height, width)


class Decoder(nn.Module):
    """Latents of one chunk to frames, `frames_per_latent` of them each (MAGVIT-v2, arXiv 2310.05737)."""

    def __init__(self, config: TemporalVAEConfig) -> None:
        super().__init__()
        widths = [config.filters * multiplier for multiplier in config.channel_multipliers]
        self.time_strides = tuple(2 if downsampled else 1 for downsampled in config.temporal_downsample)

        self.conv1 = CausalConv3d(config.latent_embed_dim, widths[-1], 3)
        self.res_blocks = nn.ModuleList(
            ResBlock(widths[-1], widths[-1], config.num_groups) for _ in range(config.num_res_blocks)
        )
        self.block_res_blocks = nn.ModuleList(
            nn.ModuleList(
                ResBlock(above if block == 0 else width, width, config.num_groups)
                for block in range(config.num_res_blocks)
            )
            for width, above in zip(widths, [*widths[1:], widths[-1]], strict=True)
        )
        self.conv_blocks = nn.ModuleList(
            CausalConv3d(width, width * stride, 3) if stride > 1 else nn.Identity()
            for width, stride in zip(widths[1:], self.time_strides, strict=True)
        )
        self.norm1 = nn.GroupNorm(config.num_groups, widths[0])
        self.conv_out = CausalConv3d(widths[0], config.in_out_channels, 3)

    def forward(self, z: Tensor) -> Tensor:
        """[B, latent_embed_dim, t, h, w] to [B, in_out_channels, t * frames_per_latent, h, w]."""
        x: Tensor = self.conv1(z)
        for block in self.res_blocks:
            x = block(x)
        for level in reversed(range(len(self.block_res_blocks))):
            blocks = self.block_res_blocks[level]
            assert isinstance(blocks, nn.ModuleList)
            for block in blocks:
                x = block(x)
            if level > 0:
                x = self.conv_blocks[level - 1](x)
                if self.time_strides[level - 1] > 1:
                    x = depth_to_time(x, self.time_strides[level - 1])
        x = self.conv_out(F.silu(self.norm1(x)))
        return x


class TemporalVAEDecoder(nn.Module):
    """Decoder side of the temporal autoencoder of Open-Sora 1.2, for one chunk (arXiv 2412.20404)."""

    def __init__(self, config: TemporalVAEConfig) -> None:
        super().__init__()
        self.frames_per_latent = config.frames_per_latent
        self.post_quant_conv = CausalConv3d(config.embed_dim, config.latent_embed_dim, 1)
        self.decoder = Decoder(config)

    def forward(self, z: Tensor, num_frames: int) -> Tensor:
        """Latents z [B, 4, t, h, w] to frames [B, 4, n, h, w] fp32, n = num_frames.

        The encoder put (-n mod frames_per_latent) frames of zeros in front; they are cut here.
        """
        if math.ceil(num_frames / self.frames_per_latent) != z.shape[2]:
            raise ValueError(f"{z.shape[2]} latent frames do not decode to {num_frames} frames")
        x: Tensor = self.decoder(self.post_quant_conv(z))
        return x[:, :, -num_frames % self.frames_per_latent :]
