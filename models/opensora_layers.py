"""The layers of the family opensora-1.2 from its configs: no torch, no weights (compiler/fit.py plans with them).

Letters: n text tokens, D and I channels of the text encoder and of its attention, C channels of the denoiser, T latent
frames, S patches of a frame, m text tokens of the denoiser, h and w latent height and width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import reduce
from typing import Any

from movdc.compiler.layers import F32_BYTES, Layer, StageLayers, joined
from movdc.compiler.spec import VideoSpec

ROWS = 2  # the caption and the null caption, in one evaluation
FRAMES_PER_LATENT, CHUNK_FRAMES, LATENT_CHANNELS, PIXELS_PER_LATENT = 4, 17, 4, 8
OVER_FRAMES, IN_FRAMES = 27, 9  # values that a convolution reads for each pixel and channel
SINES = 256  # channels of a timestep's embedding
Config = Mapping[str, Any]

# Configs of the published repositories, as far as sizes go, for a machine that cannot ask the hub.
PUBLISHED: dict[str, Config] = {
    "DeepFloyd/t5-v1_1-xxl": {
        "d_model": 4096, "d_ff": 10240, "d_kv": 64, "num_heads": 64, "num_layers": 24, "vocab_size": 32128,
        "feed_forward_proj": "gated-gelu",
    },
    "hpcai-tech/OpenSora-STDiT-v3": {
        "hidden_size": 1152, "depth": 28, "num_heads": 16, "caption_channels": 4096, "model_max_length": 300,
    },
    "hpcai-tech/OpenSora-VAE-v1.2": {"vae_temporal": {"type": "VAE_Temporal_SD"}},
}  # fmt: skip


def chunks(frames: int) -> list[tuple[int, int]]:
    """(latent frames, frames) of each part of a video that decodes on its own."""
    sizes = [min(CHUNK_FRAMES, frames - start) for start in range(0, frames, CHUNK_FRAMES)]
    return [(math.ceil(size / FRAMES_PER_LATENT), size) for size in sizes]


def stages(
    text: Config, denoiser: Config, vae: Config, video: VideoSpec, tokens: int, batch: int, merges: bool
) -> list[StageLayers]:
    """The four stages; `batch` frames are decoded at once, `merges` adds the denoiser's variant "merged"."""
    latent = sum(latents for latents, _ in chunks(video.frames)), video.height // 8, video.width // 8
    return [
        _text(text, tokens),
        _denoiser(denoiser, latent, tokens, merges),
        _temporal(vae, video.frames, latent[1:]),
        _spatial(vae, batch, latent[1:]),
    ]


def _text(config: Config, n: int) -> StageLayers:
    wide, inner, hidden = config["d_model"], config["d_kv"] * config["num_heads"], config["d_ff"]
    scores = config["num_heads"] * n * n
    live = F32_BYTES * (n * wide + n * n)  # the states, and the mask
    attention = Layer(
        kind="text attention",
        weights=4 * wide * inner,
        rows=3 * inner + wide,
        others=wide,
        flops=8 * n * wide * inner + 4 * n * n * inner,
        live_bytes=live,
        working_bytes=F32_BYTES * max(4 * n * inner, n * wide + 2 * scores),
        kept_bytes=F32_BYTES * n * wide,
        shared=scores,  # the bias of all attentions
    )
    mlp = Layer(
        kind="text mlp",
        weights=3 * wide * hidden,
        rows=2 * hidden + wide,
        others=wide,
        flops=6 * n * wide * hidden,
        live_bytes=live,
        working_bytes=F32_BYTES * n * (4 * hidden + wide),
        kept_bytes=F32_BYTES * n * wide,
    )
    rows = config["vocab_size"]
    lookup = Layer("text lookup", rows * wide, rows, 0, 0, live, F32_BYTES * n * wide, looks_up=True)
    norm = Layer("text norm", 0, 0, wide, 0, F32_BYTES * n * wide, F32_BYTES * n * wide)
    first = replace(attention, kind="first text attention")  # its mean is taken where the rows are looked up
    layers = [lookup, first, mlp, *[attention, mlp] * (config["num_layers"] - 1), norm]
    return StageLayers("text_encoder", "once", {"plain": layers}, 8 * n + F32_BYTES * n, F32_BYTES * n * wide)


def _denoiser(config: Config, latent: tuple[int, ...], m: int, merges: bool) -> StageLayers:
    frames, height, width = latent
    patches = math.ceil(height / 2) * math.ceil(width / 2)
    values = ROWS * LATENT_CHANNELS * frames * height * width
    plain = _denoiser_layers(config, frames, frames, patches, m)
    inputs = values // ROWS + 1 + m * config["caption_channels"] + m
    stage = StageLayers("denoiser", "per_step", {"plain": plain}, F32_BYTES * inputs, F32_BYTES * values)
    if not merges or frames == 1:
        return stage
    return stage.with_variant("merged", _denoiser_layers(config, frames, math.ceil(frames / 2), patches, m))


def _denoiser_layers(config: Config, frames: int, seen: int, patches: int, m: int) -> list[Layer]:
    """Attentions see `seen` of the frames; the rest of each block all of them."""
    wide, heads = config["hidden_size"], config["num_heads"]
    tokens, attended = ROWS * frames * patches, ROWS * seen * patches
    states = F32_BYTES * tokens * wide
    live = states + F32_BYTES * (ROWS * 6 * wide + ROWS * m * wide)  # and modulation, text
    caption = config["caption_channels"]
    entry = Layer(
        kind="denoiser entry",
        weights=(4 * LATENT_CHANNELS + SINES + wide + 6 * wide + caption + wide) * wide,  # what embeds fps is folded
        rows=11 * wide,
        others=12 * wide + caption * config["model_max_length"] + patches * wide,
        flops=2 * tokens * 4 * LATENT_CHANNELS * wide + 2 * ROWS * m * (caption + wide) * wide,
        live_bytes=live,
        working_bytes=states,
    )

    def block(kind: str, keys: int, tensors: int) -> list[Layer]:
        self_scores, cross_scores = heads * attended * keys, heads * attended * m
        return [
            Layer(
                kind=f"denoiser {kind} attention",
                weights=4 * wide * wide,
                rows=4 * wide,
                others=10 * wide + 2 * wide // heads,
                flops=8 * attended * wide * wide + 4 * attended * keys * wide,
                live_bytes=live,
                working_bytes=F32_BYTES * max(tensors * attended * wide, attended * wide + 2 * self_scores),
                kept_bytes=states,
            ),
            Layer(
                kind="denoiser cross attention",
                weights=4 * wide * wide,
                rows=4 * wide,
                others=4 * wide,
                flops=4 * (attended + ROWS * m) * wide * wide + 4 * attended * m * wide,
                live_bytes=live,
                working_bytes=F32_BYTES * max(3 * attended * wide, ROWS * m * wide + 2 * cross_scores),
                kept_bytes=states,
            ),
            Layer(
                kind="denoiser mlp",
                weights=8 * wide * wide,
                rows=5 * wide,
                others=5 * wide,
                flops=16 * tokens * wide * wide,
                live_bytes=live,
                working_bytes=12 * states,  # GELU in its parts, of four times the channels
                kept_bytes=states,
            ),
        ]

    out = 4 * LATENT_CHANNELS
    leave = Layer(
        kind="denoiser exit",
        weights=out * wide,
        rows=out,
        others=2 * wide + out,
        flops=2 * tokens * out * wide,
        live_bytes=F32_BYTES * tokens * out,
        working_bytes=states,
    )
    first, *others = (block("spatial", patches, 4) + block("temporal", seen, 6)) * config["depth"]  # 6 to rotate
    return [joined(entry, first), *others[:-1], joined(others[-1], leave)]


def _convolution(kind: str, taps: int, before: int, after: int, pixels: int) -> Layer:
    """A convolution of `taps` values a pixel; one over frames works on copies of those that it reads."""
    tensors = 6 if taps == OVER_FRAMES else 3
    return Layer(
        kind=f"{kind} {before} {after} {pixels}",
        weights=taps * before * after,
        rows=after,
        others=3 * after,
        flops=2 * taps * before * after * pixels,
        live_bytes=F32_BYTES * after * pixels,
        working_bytes=F32_BYTES * tensors * before * pixels,
    )


def _block(kind: str, taps: int, before: int, after: int, pixels: int) -> Layer:
    """Two convolutions, and a shortcut where channels change."""
    layers = [_convolution(kind, taps, before, after, pixels), _convolution(kind, taps, after, after, pixels)]
    if before != after:
        layers.append(_convolution(f"{kind} shortcut", 1, before, after, pixels))
    kept_bytes = F32_BYTES * before * pixels if taps == OVER_FRAMES else 0
    return replace(reduce(joined, layers), kept_bytes=kept_bytes)


def _temporal(vae: Config, frames: int, size: Sequence[int]) -> StageLayers:
    given = {} if vae["vae_temporal"].get("type") == "VAE_Temporal_SD" else vae["vae_temporal"]
    filters, blocks = given.get("filters", 128), given.get("num_res_blocks", 4)
    widths = [filters * one for one in given.get("channel_multipliers", (1, 2, 2, 4))]
    strides = [2 if one else 1 for one in given.get("temporal_downsample", (False, True, True))]
    area = math.prod(size)
    variants = {}
    for latents, shown in dict.fromkeys(chunks(frames)):
        pixels, before = latents * area, widths[-1]
        block = _block("temporal", OVER_FRAMES, before, before, pixels)
        layers = [joined(_convolution("temporal", OVER_FRAMES, LATENT_CHANNELS, before, pixels), block)]
        layers += [block] * (blocks - 1)
        for level in reversed(range(len(widths))):
            for _ in range(blocks):
                block = _block("temporal", OVER_FRAMES, before, widths[level], pixels)
                narrows = layers[-1].kind.startswith("temporal up") and before > widths[level]
                layers.append(joined(layers.pop(), block) if narrows else block)
                before = widths[level]
            if level > 0 and strides[level - 1] > 1:
                layers.append(_convolution("temporal up", OVER_FRAMES, before, 2 * before, pixels))
                pixels *= 2
        layers.append(_convolution("temporal exit", OVER_FRAMES, before, LATENT_CHANNELS, pixels))
        variants[f"frames{shown}"] = layers
    latents, shown = chunks(frames)[0]
    sizes = (F32_BYTES * LATENT_CHANNELS * count * area for count in (latents, shown))
    return StageLayers("vae_temporal", "per_chunk", variants, *sizes)


def _spatial(vae: Config, batch: int, size: Sequence[int]) -> StageLayers:
    given = vae.get("spatial") or {}
    widths = list(given.get("block_out_channels", (128, 256, 512, 512)))
    blocks, out = given.get("layers_per_block", 2) + 1, given.get("out_channels", 3)
    pixels, top = batch * math.prod(size), widths[-1]
    scores = pixels * math.prod(size)
    attention = Layer(
        kind="spatial attention",
        weights=4 * top * top,
        rows=4 * top,
        others=6 * top,
        flops=8 * pixels * top * top + 4 * scores * top,
        live_bytes=F32_BYTES * top * pixels,
        working_bytes=F32_BYTES * max(4 * top * pixels, 2 * top * pixels + 2 * scores),
    )
    block = _block("spatial", IN_FRAMES, top, top, pixels)
    layers = [joined(_convolution("spatial", IN_FRAMES, LATENT_CHANNELS, top, pixels), block), attention, block]
    before = top
    for level, after in enumerate(reversed(widths)):
        for index in range(blocks):
            block = _block("spatial", IN_FRAMES, before, after, pixels)
            layers.append(joined(layers.pop(), block) if level > 0 and index == 0 else block)
            before = after
        if level + 1 < len(widths):
            pixels *= 4
            layers.append(_convolution("spatial up", IN_FRAMES, before, before, pixels))
    layers.append(joined(layers.pop(), _convolution("spatial exit", IN_FRAMES, before, out, pixels)))
    area = F32_BYTES * batch * math.prod(size)
    return StageLayers(
        "vae_spatial", "per_chunk", {"plain": layers}, LATENT_CHANNELS * area, out * PIXELS_PER_LATENT**2 * area
    )
