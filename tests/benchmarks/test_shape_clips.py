"""The judge is right on clips rendered as the tiny checkpoint's training clips were."""

import json
from pathlib import Path

import numpy as np
import pytest
import shape_clips
import torch
from safetensors.numpy import load_file

from tools.train_example.clips import named, render

GOLDEN = Path(__file__).parents[1] / "golden" / "tiny"
FRAMES, PIXELS = 34, 64


@pytest.mark.parametrize("index", range(16))
def test_a_rendered_clip_is_judged_right(index: int) -> None:
    _, expected = list(shape_clips.prompts(16, seed=1))[index]
    clip = render(named([expected], torch.device("cpu")), torch.Generator().manual_seed(index))[0]
    frames = (clip * 127.5 + 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    assert frames.shape == (FRAMES, PIXELS, PIXELS, 3)
    assert shape_clips.judge(frames) == expected


@pytest.mark.parametrize("index", [0, 1])
def test_a_recorded_clip_shows_what_its_prompt_names(index: int) -> None:
    item = json.loads((GOLDEN / "golden.json").read_text())["items"][index]
    seen = shape_clips.judge(load_file(GOLDEN / item["file"])["frames"])
    assert seen == shape_clips.Seen(**item["seen"])
    assert shape_clips.caption(seen) == item["prompt"]


def test_a_clip_without_foreground_shows_no_shape() -> None:
    empty = np.full((FRAMES, PIXELS, PIXELS, 3), 128, np.uint8)
    assert shape_clips.judge(empty) == shape_clips.Seen("none", "gray", "none", "none")


def test_a_shape_that_stands_still_has_no_direction() -> None:
    still = np.full((FRAMES, PIXELS, PIXELS, 3), 244, np.uint8)
    still[:, 22:40, 22:40] = shape_clips.COLOURS["red"]
    assert shape_clips.judge(still) == shape_clips.Seen("red", "white", "square", "none")


def test_the_seed_decides_the_prompts() -> None:
    assert list(shape_clips.prompts(8, seed=3)) == list(shape_clips.prompts(8, seed=3))
    assert list(shape_clips.prompts(8, seed=3)) != list(shape_clips.prompts(8, seed=4))


def test_the_prompts_name_everything_that_the_grammar_has() -> None:
    drawn = [named for _, named in shape_clips.prompts(48, seed=0)]
    assert {one.colour for one in drawn} == set(shape_clips.COLOURS)
    assert {one.background for one in drawn} == set(shape_clips.BACKGROUNDS)
    assert {one.shape for one in drawn} == set(shape_clips.SHAPES)
    assert {one.direction for one in drawn} == set(shape_clips.DIRECTIONS)
