"""The judge is right on clips rendered as the tiny checkpoint's training clips were."""

import json
from pathlib import Path

import adherence
import numpy as np
import pytest
from safetensors.numpy import load_file

from movdc.runtime.video import Frames

GOLDEN = Path(__file__).parents[1] / "golden" / "tiny"
FRAMES, PIXELS = 34, 64
SPEED_PIXELS_PER_FRAME = 40 / 55


def _clip(named: adherence.Seen, random: np.random.Generator) -> Frames:
    """A clip of the narrow tracks: one solid shape with a linear edge one pixel wide, at constant speed."""
    radius = random.uniform(9, 11)
    along = random.uniform(15.6, 24.4) + np.arange(FRAMES) * SPEED_PIXELS_PER_FRAME
    across = np.full(FRAMES, random.uniform(20, 44))
    if random.random() < 0.5:
        along = along[::-1]
    x, y = (along, across) if random.random() < 0.5 else (across, along)
    rows, columns = np.mgrid[:PIXELS, :PIXELS].astype(np.float64)
    covered = adherence.coverage(named.shape, columns - x[:, None, None], rows - y[:, None, None], radius)[..., None]
    colour = np.array(adherence.COLOURS[named.colour])
    background = np.array(adherence.BACKGROUNDS[named.background])
    return np.round(covered * colour + (1 - covered) * background).astype(np.uint8)


@pytest.mark.parametrize("index", range(16))
def test_a_rendered_clip_is_judged_right(index: int) -> None:
    named = [named for _, named in adherence.prompts(16, seed=1)][index]
    assert adherence.judge(_clip(named, np.random.Generator(np.random.PCG64(index)))) == named


@pytest.mark.parametrize("index", [0, 1])
def test_a_recorded_clip_is_judged_as_it_was(index: int) -> None:
    item = json.loads((GOLDEN / "golden.json").read_text())["items"][index]
    seen = adherence.judge(load_file(GOLDEN / item["file"])["frames"])
    assert seen == adherence.Seen(item["seen"]["color"], item["seen"]["background"], item["seen"]["shape"])


def test_a_clip_without_foreground_shows_no_shape() -> None:
    empty = np.full((FRAMES, PIXELS, PIXELS, 3), 128, np.uint8)
    assert adherence.judge(empty) == adherence.Seen("none", "gray", "none")


def test_the_seed_decides_the_prompts() -> None:
    assert list(adherence.prompts(8, seed=3)) == list(adherence.prompts(8, seed=3))
    assert list(adherence.prompts(8, seed=3)) != list(adherence.prompts(8, seed=4))


def test_the_prompts_name_every_colour_background_and_shape() -> None:
    drawn = [named for _, named in adherence.prompts(48, seed=0)]
    assert {one.colour for one in drawn} == set(adherence.COLOURS)
    assert {one.background for one in drawn} == set(adherence.BACKGROUNDS)
    assert {one.shape for one in drawn} == set(adherence.SHAPES)
