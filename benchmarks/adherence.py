"""Does the video show what the prompt names? The tiny checkpoint, prompts of its grammar, judged by a formula.

    python benchmarks/adherence.py out/tiny --prompts 48 --seed 0

The direction of motion is not judged: the checkpoint does not follow the word.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from movdc.runtime.bundle import Bundle
from movdc.runtime.executor import Executor
from movdc.runtime.generate import Generator
from movdc.runtime.video import Frames

Array = np.ndarray[Any, np.dtype[np.float64]]
Mask = np.ndarray[Any, np.dtype[np.bool_]]

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
DIRECTIONS = ("left", "right", "up", "down")
ATTRIBUTES = ("colour", "background", "shape")

FOREGROUND_DISTANCE = 70  # in RGB, from the background
JUDGED_FRAMES = 5
RADII_PIXELS = np.arange(8.0, 12.5, 0.5)  # the clips have 9 to 11
OFFSETS_PIXELS = np.arange(-2.0, 3.0)  # of the template's middle from the foreground's


class Seen(NamedTuple):
    """What a clip shows."""

    colour: str
    background: str
    shape: str


def coverage(shape: str, dx: Array, dy: Array, radius: Array | float) -> Array:
    """How much of a pixel a shape covers, in [0, 1]; dx and dy are the pixel's distance from the track point."""
    if shape == "circle":
        distance = np.hypot(dx, dy) - radius
    elif shape == "square":
        distance = np.maximum(abs(dx), abs(dy)) - 0.88 * radius
    elif shape == "triangle":  # equilateral, apex up: three half planes at the inradius from the centre
        below = dy - 0.2 * radius
        distance = np.maximum(below, abs(dx) * np.sqrt(3) / 2 - below / 2) - 0.62 * radius
    else:
        wide = np.maximum(abs(dx) - 1.05 * radius, abs(dy) - 0.36 * radius)
        high = np.maximum(abs(dx) - 0.36 * radius, abs(dy) - 1.05 * radius)
        distance = np.minimum(wide, high)
    return np.clip(0.5 - distance, 0, 1)


def judge(frames: Frames) -> Seen:
    """What frames [N, H, W, 3] uint8 show: the nearest of the named colours, backgrounds and shapes."""
    pixels = frames.astype(np.float64)
    border = np.concatenate([pixels[:, 0], pixels[:, -1], pixels[:, :, 0], pixels[:, :, -1]], axis=1)
    background = _nearest(np.median(border, axis=(0, 1)), BACKGROUNDS)
    foreground = np.linalg.norm(pixels - BACKGROUNDS[background], axis=-1) > FOREGROUND_DISTANCE
    core = _core(foreground)
    if not core.any():
        return Seen("none", background, "none")
    return Seen(_nearest(np.median(pixels[core], axis=0), COLOURS), background, _shape(foreground))


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
    return max(SHAPES, key=lambda shape: sum(_best_overlap(shape, mask) for mask in masks))


def _best_overlap(shape: str, mask: Mask) -> float:
    y, x = np.mgrid[: mask.shape[0], : mask.shape[1]].astype(np.float64)
    best = 0.0
    for radius in RADII_PIXELS:
        # An upright triangle has its middle 0.2 radius below its track point; the others have it there.
        drop = 0.2 * radius if shape == "triangle" else 0.0
        dx = x - (x[mask].mean() + OFFSETS_PIXELS)[:, None, None]
        dy = y - (y[mask].mean() - drop + OFFSETS_PIXELS)[:, None, None]
        template = coverage(shape, dx[None], dy[:, None], radius) > 0.5
        both = np.count_nonzero(template & mask, axis=(-2, -1))
        either = np.count_nonzero(template | mask, axis=(-2, -1))
        best = max(best, float((both / either).max()))
    return best


def prompts(count: int, seed: int) -> Iterator[tuple[str, Seen]]:
    """Prompts of the checkpoint's grammar drawn at random, each with what it names."""
    random = np.random.Generator(np.random.PCG64(seed))
    for _ in range(count):
        named = Seen(*(str(random.choice(choices)) for choices in (list(COLOURS), list(BACKGROUNDS), SHAPES)))
        direction = random.choice(DIRECTIONS)
        yield f"a {named.colour} {named.shape} moving {direction} on a {named.background} background", named


def score(bundle: Path, count: int, seed: int) -> dict[str, int]:
    """How many of `count` prompts give a video with the named colour, background and shape."""
    read = Bundle.read(bundle)
    generator = Generator(read, Executor(read))
    right = dict.fromkeys(ATTRIBUTES, 0)
    for index, (prompt, named) in enumerate(prompts(count, seed)):
        seen = judge(generator.generate(prompt, seed=seed + index).frames)
        for attribute in ATTRIBUTES:
            right[attribute] += getattr(seen, attribute) == getattr(named, attribute)
    return right


def main(
    bundle: Annotated[Path, typer.Argument(help="A bundle of the tiny checkpoint.")],
    count: Annotated[int, typer.Option("--prompts", min=1, help="How many prompts to draw.")] = 48,
    seed: Annotated[int, typer.Option(min=0, help="Decides the prompts and the noises.")] = 0,
) -> None:
    """Generate one video a prompt and print how often each attribute is right."""
    start = time.perf_counter()
    right = score(bundle, count, seed)
    table = Table(title=f"{bundle}, seed {seed}, {time.perf_counter() - start:.0f} s")
    for column in ("attribute", "right", "of"):
        table.add_column(column)
    for attribute in ATTRIBUTES:
        table.add_row(attribute, str(right[attribute]), str(count))
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
