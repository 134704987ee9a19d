"""Clips and captions to train on, drawn on the device that trains.

Letters in shapes: B clips, N frames of each, H and W pixels.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor

from movdc.evaluate.shape_clips import (
    ACROSS_PIXELS,
    BACKGROUNDS,
    COLOURS,
    DIRECTIONS,
    FRAMES,
    PIXELS,
    RADIUS_PIXELS,
    SHAPES,
    SPEED_PIXELS,
    START_PIXELS,
    Seen,
    caption,
    coverage,
    every_caption,
    held_out,
)

TEXT_TOKENS = 24
WIDE_START_PIXELS, WIDE_ACROSS_PIXELS = (12.0, 28.0), (14.0, 50.0)  # the autoencoders see more than the denoiser


def to_unit(rgb: tuple[int, int, int]) -> list[float]:
    """0..255 to -1..1."""
    return [value / 127.5 - 1 for value in rgb]


@dataclass(frozen=True)
class Named:
    """What B clips show, each attribute as indices [B] into the grammar's lists."""

    colour: Tensor
    background: Tensor
    shape: Tensor
    direction: Tensor

    def __getitem__(self, chosen: slice) -> Named:
        return Named(self.colour[chosen], self.background[chosen], self.shape[chosen], self.direction[chosen])

    def __len__(self) -> int:
        return len(self.colour)


def named(captions: list[Seen], device: torch.device) -> Named:
    """Captions as indices."""
    lists = [list(COLOURS), list(BACKGROUNDS), list(SHAPES), list(DIRECTIONS)]
    rows = [[names.index(name) for names, name in zip(lists, one, strict=True)] for one in captions]
    return Named(*torch.tensor(rows, device=device).unbind(1))


def random_names(count: int, generator: torch.Generator) -> Named:
    """Every attribute drawn on its own."""
    sizes = (len(COLOURS), len(BACKGROUNDS), len(SHAPES), len(DIRECTIONS))
    return Named(*(torch.randint(size, (count,), generator=generator, device=generator.device) for size in sizes))


def training_captions() -> list[Seen]:
    """The captions that the denoiser learns: all but those held out."""
    unseen = set(held_out())
    return [one for one in every_caption() if one not in unseen]


@dataclass(frozen=True)
class Captions:
    """Token ids [2K, 24] and mask [2K, 24] of K captions, then of the same without the background's clause."""

    ids: Tensor
    mask: Tensor

    @classmethod
    def of(cls, captions: list[Seen], tokenizer_json: Path, device: torch.device) -> Captions:
        """Tokenise and pad."""
        tokenizer = Tokenizer.from_file(str(tokenizer_json))
        texts = [caption(one) for one in captions]
        texts += [text.partition(" on a ")[0] for text in texts]
        encoded = [tokenizer.encode(text).ids for text in texts]
        ids = torch.zeros(len(texts), TEXT_TOKENS, dtype=torch.long)
        mask = torch.zeros(len(texts), TEXT_TOKENS)
        for row, tokens in enumerate(encoded):
            ids[row, : len(tokens)] = torch.tensor(tokens)
            mask[row, : len(tokens)] = 1
        return cls(ids.to(device), mask.to(device))

    def part(self, rows: slice) -> Captions:
        """Some of them."""
        return Captions(self.ids[rows], self.mask[rows])


def _uniform(bounds: tuple[float, float], count: int, generator: torch.Generator) -> Tensor:
    low, high = bounds
    return low + (high - low) * torch.rand(count, generator=generator, device=generator.device)


def render(names: Named, generator: torch.Generator, wide: bool = False, any_colour: float = 0.0) -> Tensor:
    """Clips [B, N, 3, H, W] in [-1, 1]; `any_colour` of them in colours that the grammar does not have."""
    device, count = generator.device, len(names)
    radius = _uniform(RADIUS_PIXELS, count, generator)[:, None, None, None]
    start = _uniform(WIDE_START_PIXELS if wide else START_PIXELS, count, generator)
    across = _uniform(WIDE_ACROSS_PIXELS if wide else ACROSS_PIXELS, count, generator)[:, None]
    along = start[:, None] + SPEED_PIXELS * torch.arange(FRAMES, device=device)
    signs = torch.tensor(list(DIRECTIONS.values()), device=device)[names.direction]
    along = torch.where(signs.sum(dim=1, keepdim=True) < 0, along.flip(1), along)
    horizontal = signs[:, :1] != 0
    x = torch.where(horizontal, along, across)[:, :, None, None]
    y = torch.where(horizontal, across, along)[:, :, None, None]

    rows = torch.arange(PIXELS, device=device, dtype=torch.float32)[:, None]
    columns = rows.T
    dx, dy = (columns - x).expand(-1, -1, PIXELS, -1), (rows - y).expand(-1, -1, -1, PIXELS)
    covered = torch.empty(count, FRAMES, 1, PIXELS, PIXELS, device=device)
    for index, shape in enumerate(SHAPES):
        of_shape = names.shape == index
        covered[of_shape, :, 0] = coverage(shape, dx[of_shape], dy[of_shape], radius[of_shape], torch)

    colours, backgrounds = (
        torch.tensor([to_unit(rgb) for rgb in table.values()], device=device)[chosen]
        for table, chosen in ((COLOURS, names.colour), (BACKGROUNDS, names.background))
    )
    other = torch.rand(count, 1, generator=generator, device=device) < any_colour
    colours = torch.where(other, torch.rand(count, 3, generator=generator, device=device) * 2 - 1, colours)
    backgrounds = torch.where(other, torch.rand(count, 3, generator=generator, device=device) * 2 - 1, backgrounds)
    return torch.lerp(backgrounds[:, None, :, None, None], colours[:, None, :, None, None], covered)
