"""STDiT3, the denoiser of Open-Sora 1.2: spatial and temporal transformer blocks over video latents (arXiv 2412.20404).

Letters in shapes: B batch rows, T latent frames, H and W latent height and width, S patches of one frame, C hidden
channels, h heads, d channels of one head, L text tokens, F modulated frames (1, or T where frames differ).

Parameter names and shapes are those of the published checkpoint. Nothing but parameters and the null caption is held
by the module: tables are computed in `forward` from Python numbers and from `rope.freqs`, so that a module built on
fake tensors loses no value that a checkpoint would not bring back.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

TIMESTEP_FREQUENCIES = 256
MASKED_SCORE = -1e9  # finite, so that no 0 * inf can occur in a lowered program; exp() of it is exactly 0 in fp32


@dataclass(frozen=True)
class STDiT3Config:
    """Sizes of an STDiT3, under the key names of the published config.json (Open-Sora 1.2)."""

    hidden_size: int = 1152
    depth: int = 28
    num_heads: int = 16
    mlp_ratio: float = 4.0
    in_channels: int = 4
    patch_size: tuple[int, int, int] = (1, 2, 2)
    caption_channels: int = 4096
    model_max_length: int = 300
    input_sq_size: int = 512
    qk_norm: bool = True
    pred_sigma: bool = True

    def __post_init__(self) -> None:
        if self.patch_size[0] != 1:
            raise ValueError(f"patch_size {self.patch_size}: patches must be one frame long")
        if self.hidden_size % (2 * self.num_heads) or self.hidden_size % 4:
            raise ValueError(f"hidden_size {self.hidden_size} must be a multiple of 4 and of 2 x {self.num_heads}")

    @classmethod
    def from_dict(cls, config_json: Mapping[str, Any]) -> STDiT3Config:
        """Take the sizes from a published config.json and ignore its training-only keys."""
        for key in ("skip_y_embedder", "qk_norm_legacy"):
            if config_json.get(key):
                raise ValueError(f"{key} = true is another architecture than Open-Sora 1.2's")
        known = {field.name: config_json[field.name] for field in fields(cls) if field.name in config_json}
        if "patch_size" in known:
            known["patch_size"] = tuple(known["patch_size"])
        return cls(**known)

    @property
    def head_dim(self) -> int:
        """Channels of one attention head."""
        return self.hidden_size // self.num_heads

    @property
    def out_channels(self) -> int:
        """Output channels: the velocity and, with pred_sigma, as many that sampling does not use."""
        return self.in_channels * (2 if self.pred_sigma else 1)


def inverse_frequencies(channels: int, device: torch.device | None = None) -> Tensor:
    """10000 ** (-2j / channels), [channels / 2] fp32; with the head's channels these are the published `rope.freqs`."""
    return 1.0 / 10000 ** (torch.arange(0, channels, 2, device=device, dtype=torch.float32) / channels)


def position_embedding_2d(
    rows: int, columns: int, channels: int, scale: float, base_size: int | None, device: torch.device | None = None
) -> Tensor:
    """Sinusoidal table of a patch grid, [1, rows * columns, channels] fp32, column half first (Open-Sora 1.2).

    With `base_size` both axes first span that many units, whatever their patches; then `scale` divides them.
    """
    frequencies = inverse_frequencies(channels // 2, device)

    def axis(patches: int) -> Tensor:
        coordinates = torch.arange(patches, device=device, dtype=torch.float32) / scale
        if base_size is not None:
            coordinates = coordinates * (base_size / patches)
        angles = coordinates[:, None] * frequencies
        return torch.cat((angles.sin(), angles.cos()), dim=-1)

    by_column = axis(columns)[None].expand(rows, columns, channels // 2)
    by_row = axis(rows)[:, None].expand(rows, columns, channels // 2)
    return torch.cat((by_column, by_row), dim=-1).reshape(1, rows * columns, channels)


def timestep_sinusoid(values: Tensor, channels: int = TIMESTEP_FREQUENCIES) -> Tensor:
    """Sinusoids of [B] values, [B, channels] fp32, cosines first (DiT, arXiv 2212.09748)."""
    half = channels // 2
    steps = torch.arange(half, device=values.device, dtype=torch.float32)
    # The order of operations is the reference's: at timestep 1000 one ulp of a frequency is 6e-5 of an angle.
    frequencies = torch.exp(-math.log(10000) * steps / half)
    angles = values[:, None] * frequencies
    return torch.cat((angles.cos(), angles.sin()), dim=-1)


def apply_rotary(x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """Rotate adjacent channel pairs of x [B, h, T, d] by the angles whose cosines and sines are [T, d / 2].

    Pairs are interleaved (2j, 2j + 1), not split in halves (RoPE, arXiv 2104.09864).
    """
    even, odd = x.reshape(*x.shape[:-1], -1, 2).unbind(-1)
    return torch.stack((even * cosines - odd * sines, odd * cosines + even * sines), dim=-1).flatten(-2)


def _modulated_norm(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """LayerNorm of x [B, T, S, C], shifted and scaled by [B, F, 1, C]."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift


def _split_heads(x: Tensor, heads: int) -> Tensor:
    """[G, N, C] to [G, h, N, d]."""
    return x.reshape(*x.shape[:2], heads, -1).transpose(1, 2)


class RotaryEmbedding(nn.Module):
    """Angles of the frame positions, shared by all temporal blocks (RoPE, arXiv 2104.09864)."""

    def __init__(self, head_dim: int) -> None:
        super().__init__()
        self.freqs = nn.Parameter(inverse_frequencies(head_dim), requires_grad=False)

    def forward(self, frames: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines for positions 0 .. frames - 1, each [T, d / 2]."""
        angles = torch.arange(frames, device=self.freqs.device, dtype=self.freqs.dtype)[:, None] * self.freqs
        return angles.cos(), angles.sin()


class PatchEmbedding(nn.Module):
    """Latent patches to tokens, [B, 4, T, H, W] to [B, T, S, C] (Open-Sora 1.2)."""

    def __init__(self, config: STDiT3Config) -> None:
        super().__init__()
        self.proj = nn.Conv3d(config.in_channels, config.hidden_size, config.patch_size, stride=config.patch_size)

    def forward(self, x: Tensor) -> Tensor:
        """Zero-pad x at the bottom and right to whole patches and project each patch."""
        _, patch_height, patch_width = self.proj.kernel_size
        pad_bottom, pad_right = -x.shape[-2] % patch_height, -x.shape[-1] % patch_width
        if pad_bottom or pad_right:
            x = F.pad(x, (0, pad_right, 0, pad_bottom))
        patches: Tensor = self.proj(x)
        return patches.flatten(3).permute(0, 2, 3, 1)


class ScalarEmbedding(nn.Module):
    """Embedding of one number a row (timestep or fps), [B] to [B, C] (DiT, arXiv 2212.09748)."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(TIMESTEP_FREQUENCIES, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size)
        )

    def forward(self, values: Tensor) -> Tensor:
        """Sinusoids of the values through a two-layer MLP."""
        embedding: Tensor = self.mlp(timestep_sinusoid(values))
        return embedding


class MLP(nn.Module):
    """Linear, tanh-approximated GELU, Linear, on the last dimension (DiT, arXiv 2212.09748)."""

    def __init__(self, in_features: int, hidden_features: int, out_features: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(in_features, hidden_features)
        self.fc2 = nn.Linear(hidden_features, out_features)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] to [..., out_features]."""
        out: Tensor = self.fc2(F.gelu(self.fc1(x), approximate="tanh"))
        return out


class CaptionEmbedding(nn.Module):
    """Text states to hidden channels, [B, 1, L, caption_channels] to [B, 1, L, C] (Open-Sora 1.2)."""

    y_embedding: Tensor

    def __init__(self, config: STDiT3Config) -> None:
        super().__init__()
        self.y_proj = MLP(config.caption_channels, config.hidden_size, config.hidden_size)
        # The null caption, in the space of the text states: guidance uses it as `y` of the unconditional rows.
        null_caption = torch.randn(config.model_max_length, config.caption_channels) / config.caption_channels**0.5
        self.register_buffer("y_embedding", null_caption)

    def forward(self, y: Tensor) -> Tensor:
        """Project the text states; the null caption passes through the same layers."""
        y = self.y_proj(y)
        return y


class SelfAttention(nn.Module):
    """Attention within groups of tokens, with RMS-normalised queries and keys (Open-Sora 1.2)."""

    def __init__(self, config: STDiT3Config) -> None:
        super().__init__()
        self.heads = config.num_heads
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.q_norm: nn.Module = nn.Identity()
        self.k_norm: nn.Module = nn.Identity()
        if config.qk_norm:
            self.q_norm = nn.RMSNorm(config.head_dim, eps=1e-6)
            self.k_norm = nn.RMSNorm(config.head_dim, eps=1e-6)
        self.proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """Attend within each group of x [G, N, C]; `rotary` is cosines and sines [N, d / 2] of the token positions."""
        query, key, value = (_split_heads(part, self.heads) for part in self.qkv(x).chunk(3, dim=-1))
        query, key = self.q_norm(query), self.k_norm(key)
        if rotary is not None:
            query, key = apply_rotary(query, *rotary), apply_rotary(key, *rotary)
        attended = F.scaled_dot_product_attention(query, key, value)
        projected: Tensor = self.proj(attended.transpose(1, 2).flatten(2))
        return projected


class CrossAttention(nn.Module):
    """Attention from video tokens to text tokens (Open-Sora 1.2)."""

    def __init__(self, config: STDiT3Config) -> None:
        super().__init__()
        self.heads = config.num_heads
        self.q_linear = nn.Linear(config.hidden_size, config.hidden_size)
        self.kv_linear = nn.Linear(config.hidden_size, 2 * config.hidden_size)
        self.proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x: Tensor, y: Tensor, text_bias: Tensor | None) -> Tensor:
        """Attend from x [B, N, C] to y [B, L, C] with the additive score bias [B, 1, 1, L]."""
        query = _split_heads(self.q_linear(x), self.heads)
        key, value = (_split_heads(part, self.heads) for part in self.kv_linear(y).chunk(2, dim=-1))
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=text_bias)
        projected: Tensor = self.proj(attended.transpose(1, 2).flatten(2))
        return projected


class STDiT3Block(nn.Module):
    """One block; spatial blocks attend within a frame, temporal blocks within a place (Open-Sora 1.2)."""

    def __init__(self, config: STDiT3Config, temporal: bool) -> None:
        super().__init__()
        self.temporal = temporal
        self.attn = SelfAttention(config)
        self.cross_attn = CrossAttention(config)
        self.mlp = MLP(config.hidden_size, int(config.hidden_size * config.mlp_ratio), config.hidden_size)
        self.scale_shift_table = nn.Parameter(torch.randn(6, config.hidden_size) / config.hidden_size**0.5)

    def forward(
        self,
        x: Tensor,
        y: Tensor,
        text_bias: Tensor | None,
        modulation: Tensor,
        rotary: tuple[Tensor, Tensor] | None,
    ) -> Tensor:
        """[B, T, S, C] to [B, T, S, C], given text y [B, L, C], its bias, and modulation [B, F, 6, C]."""
        batch, frames, patches, _ = x.shape
        modulation = self.scale_shift_table + modulation
        shift_attn, scale_attn, gate_attn, shift_mlp, scale_mlp, gate_mlp = modulation.chunk(6, dim=2)

        attn_in = _modulated_norm(x, shift_attn, scale_attn)
        if self.temporal:
            attended = self.attn(attn_in.transpose(1, 2).flatten(0, 1), rotary)
            attended = attended.unflatten(0, (batch, patches)).transpose(1, 2)
        else:
            attended = self.attn(attn_in.flatten(0, 1)).unflatten(0, (batch, frames))
        x = x + gate_attn * attended
        x = x + self.cross_attn(x.flatten(1, 2), y, text_bias).unflatten(1, (frames, patches))
        x = x + gate_mlp * self.mlp(_modulated_norm(x, shift_mlp, scale_mlp))
        return x


class FinalLayer(nn.Module):
    """Tokens to patch values, [B, T, S, C] to [B, T, S, patch rows * patch columns * out_channels] (Open-Sora 1.2)."""

    def __init__(self, config: STDiT3Config) -> None:
        super().__init__()
        self.linear = nn.Linear(config.hidden_size, math.prod(config.patch_size) * config.out_channels)
        self.scale_shift_table = nn.Parameter(torch.randn(2, config.hidden_size) / config.hidden_size**0.5)

    def forward(self, x: Tensor, t: Tensor, t_condition: Tensor | None = None, x_mask: Tensor | None = None) -> Tensor:
        """Modulate x by the embedding t [B, C], or t_condition on frames where x_mask [B, T] is False, and project."""
        x = _modulated_norm(x, *self._shift_and_scale(t))
        if t_condition is not None and x_mask is not None:
            # Condition frames are modulated a second time on top of the first, not instead of it: the published model
            # does so. Sampling puts their latents back after each step, so no video depends on it.
            again = _modulated_norm(x, *self._shift_and_scale(t_condition))
            x = torch.where(x_mask[:, :, None, None], x, again)
        patches: Tensor = self.linear(x)
        return patches

    def _shift_and_scale(self, t: Tensor) -> tuple[Tensor, ...]:
        """Shift and scale, each [B, 1, 1, C], of the embedding t [B, C]."""
        return (self.scale_shift_table + t[:, None, None]).chunk(2, dim=2)


class STDiT3(nn.Module):
    """The denoiser of Open-Sora 1.2 (arXiv 2412.20404): velocity of a noisy video latent under a caption."""

    def __init__(self, config: STDiT3Config) -> None:
        super().__init__()
        self.config = config
        self.rope = RotaryEmbedding(config.head_dim)
        self.x_embedder = PatchEmbedding(config)
        self.t_embedder = ScalarEmbedding(config.hidden_size)
        self.fps_embedder = ScalarEmbedding(config.hidden_size)
        self.t_block = nn.Sequential(nn.SiLU(), nn.Linear(config.hidden_size, 6 * config.hidden_size))
        self.y_embedder = CaptionEmbedding(config)
        self.spatial_blocks = nn.ModuleList(STDiT3Block(config, temporal=False) for _ in range(config.depth))
        self.temporal_blocks = nn.ModuleList(STDiT3Block(config, temporal=True) for _ in range(config.depth))
        self.final_layer = FinalLayer(config)

    def forward(
        self,
        x: Tensor,
        timestep: Tensor,
        y: Tensor,
        mask: Tensor | None = None,
        x_mask: Tensor | None = None,
        *,
        fps: Tensor | float,
        height: float,
        width: float,
    ) -> Tensor:
        """Noisy latent x [B, 4, T, H, W] to [B, 8, T, H, W] fp32; channels 0..3 are the velocity.

        timestep [B] is in 0..1000; y [B, 1, L, caption_channels] are text states; mask [Bm, L] is 1 on real tokens,
        and row b uses mask row b mod Bm; x_mask [B, T] is False on frames held as condition (timestep 0); fps is a
        number, [1] or [B]; height and width are pixels of the video.
        """
        batch, _, frames, latent_height, latent_width = x.shape
        tokens = self._embed_patches(x, height, width)
        t, t_condition, modulation = self._embed_time(timestep, fps, x_mask)
        text = self.y_embedder(y).squeeze(1)
        text_bias = _text_bias(mask, batch) if mask is not None else None
        rotary = self.rope(frames)

        for spatial, temporal in zip(self.spatial_blocks, self.temporal_blocks, strict=True):
            tokens = spatial(tokens, text, text_bias, modulation, None)
            tokens = temporal(tokens, text, text_bias, modulation, rotary)
        return self._unpatchify(self.final_layer(tokens, t, t_condition, x_mask), latent_height, latent_width)

    def _grid(self, latent_height: int, latent_width: int) -> tuple[int, int]:
        """Patch rows and columns of a latent, the last ones possibly padded."""
        _, patch_height, patch_width = self.config.patch_size
        return -(-latent_height // patch_height), -(-latent_width // patch_width)

    def _embed_patches(self, x: Tensor, height: float, width: float) -> Tensor:
        """Patch embedding plus the position of each patch in its frame, [B, T, S, C]."""
        rows, columns = self._grid(x.shape[-2], x.shape[-1])
        scale = math.sqrt(height * width) / self.config.input_sq_size
        base_size = round(math.sqrt(rows * columns))
        tokens: Tensor = self.x_embedder(x)
        return tokens + position_embedding_2d(rows, columns, self.config.hidden_size, scale, base_size, x.device)

    def _embed_time(
        self, timestep: Tensor, fps: Tensor | float, x_mask: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """Embeddings [B, C] of the timestep and of timestep 0 (with x_mask only), and the modulation [B, F, 6, C].

        Condition frames get the modulation of timestep 0. Choosing the modulation, and not what blocks make of it,
        gives the same numbers and keeps the choice out of the blocks.
        """
        if not isinstance(fps, Tensor):
            fps = torch.full((1,), fps, device=timestep.device, dtype=torch.float32)
        fps_embedding = self.fps_embedder(fps)
        fps_embedding = fps_embedding.repeat(timestep.shape[0] // fps_embedding.shape[0], 1)
        t = self.t_embedder(timestep) + fps_embedding
        t_condition = None
        modulation = self.t_block(t)[:, None]
        if x_mask is not None:
            t_condition = self.t_embedder(torch.zeros_like(timestep)) + fps_embedding
            modulation = torch.where(x_mask[:, :, None], modulation, self.t_block(t_condition)[:, None])
        return t, t_condition, modulation.unflatten(-1, (6, -1))

    def _unpatchify(self, patches: Tensor, latent_height: int, latent_width: int) -> Tensor:
        """Patch values [B, T, S, ph * pw * C_out] to [B, C_out, T, H, W] fp32, without the padding."""
        batch, frames = patches.shape[:2]
        _, patch_height, patch_width = self.config.patch_size
        rows, columns = self._grid(latent_height, latent_width)
        # Rows and columns are put in place one after the other: at once would take a rank of 7.
        x = patches.reshape(batch * frames, rows, columns, patch_height, patch_width * self.config.out_channels)
        x = x.transpose(2, 3).reshape(batch, frames, rows * patch_height, columns * patch_width, -1)
        return x.permute(0, 4, 1, 2, 3)[..., :latent_height, :latent_width].float()


def _text_bias(mask: Tensor, batch: int) -> Tensor:
    """Additive score bias [B, 1, 1, L] fp32: 0 on real text tokens, very negative on padding."""
    bias = (1.0 - mask.float()) * MASKED_SCORE
    return bias.repeat(batch // mask.shape[0], 1)[:, None, None]
