"""What a trained checkpoint draws: unseen captions, one noise under the four directions, straightness, the autoencoder.

Letters in shapes: B clips, N frames, T latent frames, h and w latent size, L text tokens.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from movdc.evaluate.shape_clips import (
    ATTRIBUTES,
    BACKGROUNDS,
    COLOURS,
    DIRECTIONS,
    FRAMES,
    PIXELS,
    SHAPES,
    Clip,
    Seen,
    held_out,
    judge,
)
from tools.train_example.autoencoder import CHUNK_FRAMES, CHUNK_LATENTS, VideoAutoencoder
from tools.train_example.clips import Captions, random_names, render
from tools.train_example.phases import TextToVideo

STEPS, GUIDANCE, LEAP_STEP = 30, 4.0, 15
BATCH = 25  # clips sampled at a time
LATENT = (4, FRAMES // CHUNK_FRAMES * CHUNK_LATENTS, PIXELS // 8, PIXELS // 8)
BASE_PIXELS = 512  # where the published timestep transform does nothing
SHEET_COLUMNS = 8


class Sampled(NamedTuple):
    """Latents [B, 4, T, h, w] after all steps and after a leap at the 16th, and cosines [steps - 1, B]."""

    latents: Tensor
    leapt: Tensor
    cosines: Tensor


def timesteps(steps: int = STEPS) -> list[float]:
    """t of each step from 1 downwards by the published transform, and 0 at the end."""
    ratio = PIXELS / BASE_PIXELS * math.sqrt(FRAMES // CHUNK_FRAMES * CHUNK_LATENTS)
    plain = [1 - step / steps for step in range(steps)]
    return [ratio * t / (1 + (ratio - 1) * t) for t in plain] + [0.0]


@torch.no_grad()
def sample(model: TextToVideo, captions: Captions, noise: Tensor) -> Sampled:
    """One clip for each row of ids [B, L], from noise [B, 4, T, h, w]."""
    text, schedule = model.text(captions), timesteps()
    null = model.denoiser.y_embedder.y_embedding.expand_as(text)
    both, mask = torch.cat((text, null)), captions.mask.repeat(2, 1)
    latents, leapt, before, cosines = noise, noise, None, []
    for step, (t, after) in enumerate(pairwise(schedule)):
        times = torch.full((len(both),), t, device=noise.device)
        conditional, unconditional = model.velocity(torch.cat((latents, latents)), times, both, mask).chunk(2)
        velocity = unconditional + GUIDANCE * (conditional - unconditional)
        if before is not None:
            cosines.append(F.cosine_similarity(velocity.flatten(1), before.flatten(1)))
        if step == LEAP_STEP:
            leapt = latents + velocity * t
        latents, before = latents + velocity * (t - after), velocity
    return Sampled(latents, leapt, torch.stack(cosines))


@torch.no_grad()
def frames_of(vae: VideoAutoencoder, latents: Tensor) -> Clip:
    """Frames [B, N, H, W, 3] of normalised latents."""
    pixels = vae.decode(latents).clamp(-1, 1) * 127.5 + 127.5
    frames: Clip = pixels.round().to(torch.uint8).permute(0, 1, 3, 4, 2).cpu().numpy()
    return frames


def psnr_db(made: Any, expected: Any) -> float:
    """Of clips in 0..255."""
    error = np.mean((made.astype(np.float64) - expected) ** 2)
    return float(10 * np.log10(255**2 / max(error, 1e-12)))


class Measured(NamedTuple):
    """The report, as lines, and the clips [B, N, H, W, 3] to look at."""

    lines: list[str]
    clips: Clip


def measure(model: TextToVideo, vae: VideoAutoencoder, tokenizer_json: Path, count: int, seed: int) -> Measured:
    """Everything that the checkpoint's README says, over the first `count` captions that were held out."""
    named, device = held_out(count), vae.scale.device
    generator = torch.Generator(device).manual_seed(seed)
    captions = Captions.of(named, tokenizer_json, device)
    clips, leaps, cosines = [], [], []
    for first in range(0, count, BATCH):
        rows = slice(first, min(first + BATCH, count))
        part = captions.part(rows)
        noise = torch.randn(len(part.ids), *LATENT, generator=generator, device=device)
        made = sample(model, part, noise)
        clips.append(frames_of(vae, made.latents))
        leaps += [psnr_db(*pair) for pair in zip(frames_of(vae, made.leapt), clips[-1], strict=True)]
        cosines.append(made.cosines)
    frames = np.concatenate(clips)
    seen = _judged(frames)
    straight = [f"{float(value):.3f}" for value in torch.cat(cosines, dim=1).mean(dim=1)]
    lines = [
        *_adherence(named, seen),
        _same_noise(model, vae, tokenizer_json, generator, max(1, count // 12)),
        f"leap at step {LEAP_STEP}: PSNR mean {np.mean(leaps):.1f} dB, worst {min(leaps):.1f} dB",
        f"cosines of successive velocities: {' '.join(straight)}",
        reconstruction(vae, generator, max(1, count // 3)),
    ]
    return Measured(lines, frames)


def _adherence(named: Sequence[Seen], seen: Sequence[Seen]) -> Iterator[str]:
    pairs = list(zip(named, seen, strict=True))
    for attribute in ATTRIBUTES:
        right = sum(getattr(one, attribute) == getattr(other, attribute) for one, other in pairs)
        yield f"{attribute}: {right} of {len(named)} unseen captions"
    yield f"all four: {sum(one == other for one, other in pairs)} of {len(named)}"


def _judged(clips: Clip) -> list[Seen]:
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(judge, clips))


def _same_noise(
    model: TextToVideo, vae: VideoAutoencoder, tokenizer_json: Path, generator: torch.Generator, noises: int
) -> str:
    """The same noises under all four words."""
    named = []
    for index in range(noises):
        colour, background, shape = (list(of)[index % len(of)] for of in (COLOURS, BACKGROUNDS, SHAPES))
        named += [Seen(colour, background, shape, direction) for direction in DIRECTIONS]
    captions = Captions.of(named, tokenizer_json, vae.scale.device)
    noise = torch.randn(noises, *LATENT, generator=generator, device=vae.scale.device)
    made = sample(model, captions.part(slice(len(named))), noise.repeat_interleave(len(DIRECTIONS), dim=0))
    seen = _judged(frames_of(vae, made.latents))
    right = sum(one.direction == other.direction for one, other in zip(named, seen, strict=True))
    return f"one noise under the four words: {right} of {len(named)} directions right, {noises} noises"


@torch.no_grad()
def reconstruction(vae: VideoAutoencoder, generator: torch.Generator, count: int) -> str:
    """How close new clips come back, encoded and decoded."""
    clips = render(random_names(count, generator), generator)
    latents = vae.encode(clips)
    expected = (clips * 127.5 + 127.5).permute(0, 1, 3, 4, 2).cpu().numpy()
    values = [psnr_db(*pair) for pair in zip(frames_of(vae, latents), expected, strict=True)]
    return f"autoencoder: PSNR mean {np.mean(values):.1f} dB, worst {min(values):.1f} dB of {len(values)} new clips"


def write_sheet(path: Path, clips: Clip) -> None:
    """A picture of clips [B, N, H, W, 3], a row each of eight frames."""
    chosen = np.linspace(0, clips.shape[1] - 1, SHEET_COLUMNS).round().astype(int)
    rows = np.pad(clips[:, chosen], ((0, 0), (0, 0), (1, 1), (1, 1), (0, 0)), constant_values=255)
    Image.fromarray(np.concatenate(np.concatenate(rows, axis=1), axis=1)).save(path)
