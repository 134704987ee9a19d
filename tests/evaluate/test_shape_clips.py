"""The judge is right on clips rendered as the tiny checkpoint's training clips were."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from movdc.evaluate import shape_clips
from tools.train_example.clips import named, render

GOLDEN = Path(__file__).parents[1] / "golden" / "tiny"
FRAMES, PIXELS = 34, 64


@pytest.mark.parametrize("index", range(16))
def test_a_rendered_clip_is_judged_right(index: int) -> None:
    expected = shape_clips.held_out(16)[index]
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


def test_the_first_held_out_captions_name_everything_that_the_grammar_has() -> None:
    assert shape_clips.held_out(48) == shape_clips.held_out()[:48]
    chosen = shape_clips.held_out(48)
    for index, of in enumerate((shape_clips.COLOURS, shape_clips.BACKGROUNDS, shape_clips.SHAPES)):
        assert {one[index] for one in chosen} == set(of)
    assert {one.direction for one in chosen} == set(shape_clips.DIRECTIONS)


def test_a_caption_is_read_back_and_another_text_is_none() -> None:
    for one in shape_clips.every_caption():
        assert shape_clips.read_caption(shape_clips.caption(one)) == one
    assert shape_clips.read_caption("a red circle moving down") is None
    assert shape_clips.read_caption("a pink circle moving down on a black background") is None
