"""The clips that the tiny checkpoint draws: their captions, how they are rendered, and a judge of what a clip shows.

One solid shape in one colour moves at constant speed along one axis, on a plain background. A shape is drawn from its
signed distance with a linear edge one pixel wide, by the same formula in numpy (the judge) and torch (the training).
"""

from __future__ import annotations

import re
from itertools import product
from typing import Any, NamedTuple

import numpy as np

Array = np.ndarray[Any, np.dtype[np.float64]]
Mask = np.ndarray[Any, np.dtype[np.bool_]]
Clip = np.ndarray[Any, np.dtype[np.uint8]]

FRAMES, PIXELS = 34, 64
COLOURS = {
    "red": (222, 32, 32),
    "green": (32, 168, 64),
    "blue": (36, 64, 224),
    "yellow": (240, 208, 32),
    "purple": (152, 48, 200),
    "cyan": (32, 200, 216),
}
BACKGROUNDS = {"white": (244, 244, 244), "black": (16, 16, 16), "gray": (128, 128, 128)}
SHAPES = ("circle", "square", "triangle", "cross")
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}  # (x, y) on the screen, y downwards
ATTRIBUTES = ("colour", "background", "shape", "direction")

SPEED_PIXELS = 40 / 55  # a frame: 24 pixels from the first frame to the last
START_PIXELS = (15.6, 24.4)  # the low end of the track, along the motion
ACROSS_PIXELS = (20.0, 44.0)
RADIUS_PIXELS = (9.0, 11.0)

FOREGROUND_DISTANCE = 70  # in RGB, from the background
JUDGED_FRAMES = 5
JUDGED_RADII = np.arange(8.0, 12.5, 0.5)
JUDGED_OFFSETS = np.arange(-2.0, 3.0)  # pixels of the template's middle from the foreground's
LEAST_MOTION_PIXELS = 8


class Seen(NamedTuple):
    """What a clip shows, or what a caption names."""

    colour: str
    background: str
    shape: str
    direction: str


def caption(named: Seen) -> str:
    """The grammar's sentence."""
    return f"a {named.colour} {named.shape} moving {named.direction} on a {named.background} background"


def read_caption(text: str) -> Seen | None:
    """What a caption names; None for a text that is not of the grammar."""
    choices = ("|".join(of) for of in (COLOURS, SHAPES, DIRECTIONS, BACKGROUNDS))
    pattern = "a ({}) ({}) moving ({}) on a ({}) background".format(*choices)
    if not (match := re.fullmatch(pattern, text.strip())):
        return None
    colour, shape, direction, background = match.groups()
    return Seen(colour, background, shape, direction)


def every_caption() -> list[Seen]:
    """All 288 that the grammar has, in a fixed order."""
    return [Seen(*names) for names in product(COLOURS, BACKGROUNDS, SHAPES, DIRECTIONS)]


def held_out(count: int = 100) -> list[Seen]:
    """Captions that the checkpoint was not trained on, in a mixed order; the first n of them are the same for any n."""
    captions = every_caption()
    order = np.random.Generator(np.random.PCG64(0)).permutation(len(captions))
    return [captions[index] for index in order[:count]]


def coverage(shape: str, dx: Any, dy: Any, radius: Any, library: Any = np) -> Any:
    """How much of a pixel a shape covers, in [0, 1]; dx and dy are the pixel's distance from the track point.

    `library` is numpy or torch, whichever the arrays are of.
    """
    if shape == "circle":
        distance = library.hypot(dx, dy) - radius
    elif shape == "square":
        distance = library.maximum(abs(dx), abs(dy)) - 0.88 * radius
    elif shape == "triangle":  # equilateral, apex up: three half planes at the inradius from the centre
        below = dy - 0.2 * radius
        distance = library.maximum(below, abs(dx) * 3**0.5 / 2 - below / 2) - 0.62 * radius
    else:
        wide = library.maximum(abs(dx) - 1.05 * radius, abs(dy) - 0.36 * radius)
        high = library.maximum(abs(dx) - 0.36 * radius, abs(dy) - 1.05 * radius)
        distance = library.minimum(wide, high)
    return library.clip(0.5 - distance, 0, 1)


def judge(clip: Clip) -> Seen:
    """What frames [N, H, W, 3] show: the nearest of the named colours, backgrounds, shapes and directions."""
    pixels = clip.astype(np.float64)
    border = np.concatenate([pixels[:, 0], pixels[:, -1], pixels[:, :, 0], pixels[:, :, -1]], axis=1)
    background = _nearest(np.median(border, axis=(0, 1)), BACKGROUNDS)
    foreground = np.linalg.norm(pixels - BACKGROUNDS[background], axis=-1) > FOREGROUND_DISTANCE
    core = _core(foreground)
    if not core.any():
        return Seen("none", background, "none", "none")
    colour = _nearest(np.median(pixels[core], axis=0), COLOURS)
    return Seen(colour, background, _shape(foreground), _direction(foreground))


def motion(foreground: Mask) -> Array:
    """Pixels (x, y) from where the foreground [N, H, W] is in frames 1-4 to where it is in the last five."""
    y, x = np.mgrid[: foreground.shape[1], : foreground.shape[2]]
    first, last = foreground[1:5].sum(axis=0), foreground[-5:].sum(axis=0)
    if not first.any() or not last.any():
        return np.zeros(2)
    return np.array([np.average(axis, weights=last) - np.average(axis, weights=first) for axis in (x, y)])


def _direction(foreground: Mask) -> str:
    moved = motion(foreground)
    if np.abs(moved).max() < LEAST_MOTION_PIXELS:
        return "none"
    return max(DIRECTIONS, key=lambda name: float(moved @ DIRECTIONS[name]))


def _nearest(rgb: Array, named: dict[str, tuple[int, int, int]]) -> str:
    return min(named, key=lambda name: float(np.linalg.norm(rgb - np.array(named[name]))))


def _core(foreground: Mask) -> Mask:
    """Foreground pixels whose four neighbours are foreground too: none of them is blended with the background."""
    core = np.zeros_like(foreground)
    core[:, 1:-1, 1:-1] = (
        foreground[:, 1:-1, 1:-1]
        & foreground[:, :-2, 1:-1]
        & foreground[:, 2:, 1:-1]
        & foreground[:, 1:-1, :-2]
        & foreground[:, 1:-1, 2:]
    )
    return core


def _shape(foreground: Mask) -> str:
    """The template with the best intersection over union, each fitted to five frames spread over the clip."""
    chosen = np.linspace(0, len(foreground) - 1, JUDGED_FRAMES).round().astype(int)
    masks = [foreground[index] for index in chosen if foreground[index].any()]
    return max(SHAPES, key=lambda shape: sum(best_overlap(shape, mask) for mask in masks))


def best_overlap(shape: str, mask: Mask) -> float:
    """Intersection over union of a mask [H, W] with the shape where it fits best, in [0, 1]."""
    y, x = np.mgrid[: mask.shape[0], : mask.shape[1]].astype(np.float64)
    best = 0.0
    for radius in JUDGED_RADII:
        # An upright triangle has its middle 0.2 radius below its track point; the others have it there.
        drop = 0.2 * radius if shape == "triangle" else 0.0
        dx = x - (x[mask].mean() + JUDGED_OFFSETS)[:, None, None]
        dy = y - (y[mask].mean() - drop + JUDGED_OFFSETS)[:, None, None]
        template = coverage(shape, dx[None], dy[:, None], radius) > 0.5
        both = np.count_nonzero(template & mask, axis=(-2, -1))
        either = np.count_nonzero(template | mask, axis=(-2, -1))
        best = max(best, float((both / either).max()))
    return best
