"""VBench's dimensions that need trained networks, which are TorchScript files in a folder.

CLIP's two files are as OpenAI published them, the linear head as LAION did. DINO, AMT-S, RAFT and MUSIQ were published
as code with weights: trace them once with the inputs that docs/evaluate.md names.

Letters in shapes: N frames of H x W pixels, D features.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from movdc.compiler.errors import MovdcError
from movdc.runtime.video import Frames

FILES = {
    "subject_consistency": ("dino_vitb16.pt",),
    "background_consistency": ("ViT-B-32.pt",),
    "motion_smoothness": ("amt-s.pt",),
    "dynamic_degree": ("raft-things.pt",),
    "aesthetic_quality": ("ViT-L-14.pt", "sa_0_4_vit_l_14_linear.pth"),
    "imaging_quality": ("musiq_spaq.pt",),
}
SIDE_PIXELS = 224
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # means and deviations
CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
DYNAMIC_FPS, DYNAMIC_SHARE, DYNAMIC_PIXELS = 8, 0.05, 6  # of 256, which is scaled by the shorter side
MUSIQ_PIXELS = 512


def check_weights(folder: Path) -> str:
    """A digest of the files of a folder; raises MovdcError naming those that are missing, and for which dimension."""
    missing = {file: name for name, files in FILES.items() for file in files if not (folder / file).is_file()}
    if missing:
        names = ", ".join(f"{file} (for {name})" for file, name in missing.items())
        raise MovdcError(f"--metric-weights: {folder} lacks {names}; docs/evaluate.md says where each comes from")
    digest = hashlib.sha256()
    for file in sorted(file for files in FILES.values() for file in files):
        with (folder / file).open("rb") as data:
            digest.update(hashlib.file_digest(data, "sha256").digest())
    return digest.hexdigest()


@torch.no_grad()
def scores(frames: Frames, fps: int, folder: Path) -> dict[str, float]:
    """The raw scores of one clip [N, H, W, 3] in the six dimensions, N at least 3."""
    pixels = torch.from_numpy(frames).permute(0, 3, 1, 2).float()  # [N, 3, H, W] in 0..255
    network = {name: _network(folder / files[0]) for name, files in FILES.items()}
    head = _linear(folder / FILES["aesthetic_quality"][1])
    for_clip = _normalised(_cropped(_resized(pixels, SIDE_PIXELS, "bicubic")), CLIP)
    aesthetic = F.normalize(network["aesthetic_quality"].encode_image(for_clip).float(), dim=-1)
    return {
        "subject_consistency": consistency(
            network["subject_consistency"](_normalised(_resized(pixels, SIDE_PIXELS, "bilinear"), IMAGENET))
        ),
        "background_consistency": consistency(network["background_consistency"].encode_image(for_clip)),
        "motion_smoothness": smoothness(pixels, network["motion_smoothness"]),
        "dynamic_degree": dynamic_degree(pixels, fps, network["dynamic_degree"]),
        "aesthetic_quality": float(F.linear(aesthetic, *head).mean()) / 10,
        "imaging_quality": _imaging(pixels, network["imaging_quality"]),
    }


def consistency(features: Tensor) -> float:
    """Of features [N, D]: the mean likeness of each frame to the one before and to the first, in [0, 1]."""
    unit = F.normalize(features.float().flatten(1), dim=-1)
    before, first = (unit[:-1] * unit[1:]).sum(-1), (unit[:1] * unit[1:]).sum(-1)
    return float((before.clamp(min=0) + first.clamp(min=0)).mean() / 2)


def smoothness(pixels: Tensor, between: Callable[[Tensor, Tensor], Tensor]) -> float:
    """Of frames [N, 3, H, W] in 0..255: how close each odd one is to what is interpolated, in [0, 1]."""
    errors = []
    for index in range(1, len(pixels) - 1, 2):
        made = between(pixels[index - 1 : index] / 255, pixels[index + 1 : index + 2] / 255)
        errors.append(float(((made.clamp(0, 1) * 255).round() - pixels[index]).abs().mean()))
    return (255 - float(np.mean(errors))) / 255


def dynamic_degree(pixels: Tensor, fps: int, flow: Callable[[Tensor, Tensor], Tensor]) -> float:
    """1 for frames [N, 3, H, W] in 0..255 of which enough pairs move far, otherwise 0."""
    chosen = pixels[:: max(1, round(fps / DYNAMIC_FPS))]
    least_pixels = DYNAMIC_PIXELS * min(pixels.shape[-2:]) / 256
    moving = 0
    for one, other in pairwise(chosen):
        lengths = flow(one[None], other[None])[0].norm(dim=0).flatten()
        moving += float(lengths.topk(int(len(lengths) * DYNAMIC_SHARE)).values.mean()) > least_pixels
    return float(moving >= round(4 * len(chosen) / 16))


def _imaging(pixels: Tensor, network: Callable[[Tensor], Tensor]) -> float:
    longer = max(pixels.shape[-2:])
    if longer > MUSIQ_PIXELS:
        size = [round(side * MUSIQ_PIXELS / longer) for side in pixels.shape[-2:]]
        pixels = F.interpolate(pixels, size, mode="bilinear", antialias=False)
    return float(np.mean([float(network(frame[None] / 255)) for frame in pixels])) / 100


def _resized(pixels: Tensor, shorter: int, mode: str) -> Tensor:
    """So that the shorter side has so many pixels, in 0..255."""
    size = [round(side * shorter / min(pixels.shape[-2:])) for side in pixels.shape[-2:]]
    return F.interpolate(pixels, size, mode=mode, antialias=False).clamp(0, 255)


def _cropped(pixels: Tensor) -> Tensor:
    top, left = ((side - SIDE_PIXELS) // 2 for side in pixels.shape[-2:])
    return pixels[..., top : top + SIDE_PIXELS, left : left + SIDE_PIXELS]


def _normalised(pixels: Tensor, by: tuple[tuple[float, ...], tuple[float, ...]]) -> Tensor:
    mean, deviation = (torch.tensor(values)[:, None, None] for values in by)
    return (pixels / 255 - mean) / deviation


@cache
def _network(path: Path) -> Any:
    return torch.jit.load(str(path), map_location="cpu").eval().float()


@cache
def _linear(path: Path) -> tuple[Tensor, Tensor]:
    state = torch.load(path, map_location="cpu", weights_only=True)
    return state["weight"].float(), state["bias"].float()
