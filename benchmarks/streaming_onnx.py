"""The denoiser in parts that ONNX Runtime can load one at a time, for streaming_arms.py."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from movdc.models.stdit3 import STDiT3, STDiT3Block, _text_bias

CONTEXT = ["text_states", "text_bias", "modulation"]
ROTARY = ["cosines", "sines"]


class Embeddings(nn.Module):
    """Everything before the blocks."""

    inputs = ["latents", "timestep", "text", "text_mask"]
    outputs = ["tokens", "t", *CONTEXT, *ROTARY]

    def __init__(self, model: STDiT3, fps: float, side_pixels: int) -> None:
        super().__init__()
        self.x_embedder, self.t_embedder, self.fps_embedder = model.x_embedder, model.t_embedder, model.fps_embedder
        self.t_block, self.y_embedder, self.rope = model.t_block, model.y_embedder, model.rope
        self.config, self.fps, self.side_pixels = model.config, fps, side_pixels

    _grid, _embed_patches, _embed_time = STDiT3._grid, STDiT3._embed_patches, STDiT3._embed_time

    def forward(self, latents: Tensor, timestep: Tensor, text: Tensor, text_mask: Tensor) -> tuple[Tensor, ...]:
        tokens = self._embed_patches(latents, self.side_pixels, self.side_pixels)
        t, _, modulation = self._embed_time(timestep, self.fps, None)
        states = self.y_embedder(text).squeeze(1)
        bias = _text_bias(text_mask, latents.shape[0])
        return tokens, t, states, bias, modulation, *self.rope(latents.shape[2])


class Block(nn.Module):
    """One block; only a temporal one takes the rotary tables."""

    outputs = ["tokens"]

    def __init__(self, block: STDiT3Block) -> None:
        super().__init__()
        self.block = block
        self.inputs = ["tokens", *CONTEXT, *(ROTARY if block.temporal else [])]

    def forward(self, tokens: Tensor, text: Tensor, bias: Tensor, modulation: Tensor, *rotary: Tensor) -> Any:
        return self.block(tokens, text, bias, modulation, rotary or None)


class Final(nn.Module):
    """Everything after the blocks."""

    inputs = ["tokens", "t"]
    outputs = ["velocity"]

    def __init__(self, model: STDiT3, latent_side: int) -> None:
        super().__init__()
        self.final_layer, self.config, self.latent_side = model.final_layer, model.config, latent_side

    _grid, _unpatchify = STDiT3._grid, STDiT3._unpatchify

    def forward(self, tokens: Tensor, t: Tensor) -> Tensor:
        velocity = self._unpatchify(self.final_layer(tokens, t), self.latent_side, self.latent_side)
        return velocity[:, : self.config.in_channels]


def exportable_parts(model: STDiT3, fps: float, side_pixels: int) -> Iterator[Any]:
    """The parts in the order in which they run."""
    yield Embeddings(model, fps, side_pixels)
    for spatial, temporal in zip(model.spatial_blocks, model.temporal_blocks, strict=True):
        yield Block(spatial)
        yield Block(temporal)
    yield Final(model, side_pixels // 8)
