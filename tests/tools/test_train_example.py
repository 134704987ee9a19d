"""The recipe of the example checkpoint: what it learns from, that a stop costs nothing, and the layout it writes."""

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

from movdc.evaluate import shape_clips
from tools.train_example import layout
from tools.train_example.__main__ import EXAMPLE, PRESETS, run
from tools.train_example.clips import Captions, random_names, render, training_captions
from tools.train_example.measure import frames_of, psnr_db, timesteps
from tools.train_example.training import Schedule, StoppedError, train


def test_no_caption_that_is_measured_is_learnt() -> None:
    learnt = {shape_clips.Seen(*one) for one in training_captions()}
    assert len(learnt) == 188
    assert learnt.isdisjoint(shape_clips.held_out())
    assert len(set(shape_clips.held_out())) == 100
    assert all(
        {one.direction for one in learnt if one.shape == shape} == set(shape_clips.DIRECTIONS)
        for shape in shape_clips.SHAPES
    )


def test_captions_are_padded_and_come_a_second_time_without_their_background() -> None:
    named = [shape_clips.Seen("red", "white", "circle", "left")]
    captions = Captions.of(named, EXAMPLE / "text_encoder" / "tokenizer.json", torch.device("cpu"))
    whole, short = captions.mask.sum(dim=1).long().tolist()
    assert whole == short + 4  # on a white background
    assert torch.equal(captions.ids[0, : short - 1], captions.ids[1, : short - 1])
    assert captions.ids[1, short - 1] == 1  # the end of the sentence
    assert not captions.ids[1, short:].any()


def test_the_whole_autoencoder_brings_clips_back() -> None:
    _, vae = layout.read(EXAMPLE)
    clips = render(random_names(1, generator := torch.Generator().manual_seed(0)), generator)
    with torch.no_grad():
        latents = vae.eval().encode(clips)
    expected = (clips * 127.5 + 127.5).permute(0, 1, 3, 4, 2).numpy()
    assert latents.shape == (1, 4, 10, 8, 8)
    assert psnr_db(frames_of(vae, latents), expected) > 31


def test_folding_the_deviation_of_latents_changes_no_frame() -> None:
    _, vae = layout.read(EXAMPLE)
    frames = render(random_names(2, generator := torch.Generator().manual_seed(0)), generator)[:, 0]
    with torch.no_grad():
        before, variance = vae.frame_moments(frames)
        expected = vae.decode_frames(before)
        mean, deviation = torch.tensor([0.5, -1, 0, 2]), torch.tensor([0.5, 2, 1, 3])
        vae.normalise_frame_latents(mean, deviation)
        after, new_variance = vae.frame_moments(frames)
        made = vae.decode_frames(after)
    torch.testing.assert_close(after, (before - mean[:, None, None]) / deviation[:, None, None], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(new_variance, variance - 2 * deviation.log()[:, None, None], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(made, expected, atol=1e-4, rtol=1e-4)


def test_a_training_that_was_stopped_ends_where_one_that_was_not_ends(tmp_path: Path) -> None:
    def trained(folder: Path, stop_at: int | None) -> Tensor:
        torch.manual_seed(0)
        model, steps = nn.Linear(3, 2), iter(range(100))

        def losses(generator: torch.Generator) -> dict[str, Tensor]:
            if next(steps) == stop_at:
                os.kill(os.getpid(), signal.SIGINT)
            return {"loss": model(torch.randn(4, 3, generator=generator)).square().mean()}

        folder.mkdir(exist_ok=True)
        train("toy", model, losses, Schedule(8, 0.1, 2), folder, seed=3)
        return model.weight.detach().clone()

    expected = trained(tmp_path / "whole", None)
    with pytest.raises(StoppedError, match="toy stopped at step 4; the same command goes on from there"):
        trained(tmp_path / "stopped", 3)
    assert torch.equal(trained(tmp_path / "stopped", None), expected)
    assert torch.equal(trained(tmp_path / "stopped", 0), expected)  # it is done: no step is taken


def test_a_time_limit_ends_a_schedule() -> None:
    schedule = Schedule(100, 1e-3, 10, seconds=50)
    assert schedule.progress(10, 40) == 0.8
    assert schedule.progress(90, 40) == 0.9
    assert schedule.progress(1, 60) == 1
    assert schedule.rate_at(0, 0) == pytest.approx(1e-4)
    assert schedule.rate_at(99, 1) == pytest.approx(1e-5)


def test_the_recipe_samples_at_the_recorded_timesteps(recorded: dict[str, Tensor]) -> None:
    np.testing.assert_allclose(1000 * np.array(timesteps()[:-1]), recorded["timesteps"].numpy(), rtol=1e-6)


@pytest.fixture
def recorded() -> dict[str, Tensor]:
    """The first recorded run of the example."""
    path = Path(__file__).parents[1] / "golden" / "tiny" / "golden_0.safetensors"
    with safe_open(path, "pt") as file:
        return {"timesteps": file.get_tensor("timesteps")}


@pytest.mark.slow
def test_every_phase_runs_and_the_published_layout_comes_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    again: Callable[[], None] = lambda: run(tmp_path, PRESETS["smoke"], 0, torch.device("cpu"), None)  # noqa: E731
    again()
    files = {str(path.relative_to(tmp_path / "checkpoint")) for path in (tmp_path / "checkpoint").rglob("*.*")}
    assert files == {str(path.relative_to(EXAMPLE)) for path in EXAMPLE.rglob("*.*")} - {"README.md"}
    for name in ("denoiser", "text_encoder", "vae"):
        ours, example = (folder / name / "model.safetensors" for folder in (tmp_path / "checkpoint", EXAMPLE))
        with safe_open(ours, "pt") as made, safe_open(example, "pt") as expected:
            assert set(made.keys()) == set(expected.keys())
            for key in made.keys():  # noqa: SIM118  # the file is no dictionary
                assert made.get_slice(key).get_shape() == expected.get_slice(key).get_shape()
    config = json.loads((tmp_path / "checkpoint" / "vae" / "config.json").read_text())
    _, vae = layout.read(tmp_path / "checkpoint")
    np.testing.assert_allclose(config["scale"], vae.scale.flatten().numpy(), atol=1e-6)
    capsys.readouterr()
    again()
    assert capsys.readouterr().out.count("done before") == 3
