"""Straightness: the curve of each prompt, and a dynamic leap that refuses one below all that was measured."""

import json
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import numpy as np
import pytest
import yaml

from movdc.passes.pipeline import parse_pipeline
from movdc.runtime.bundle import Bundle
from movdc.runtime.executors import open_executor
from movdc.runtime.generate import Generator
from movdc.runtime.sampler import initial_noise

pytestmark = pytest.mark.slow
Movdc = Callable[..., CompletedProcess[str]]
Refused = Callable[[CompletedProcess[str]], str]
PROMPTS = ("a red circle moving down on a black background", "a blue cross moving left on a white background")


def test_what_is_measured_becomes_the_floor_of_a_leap(movdc: Movdc, bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    curves = tmp_path / "curves.json"
    done = movdc("straightness", bundle, "--prompts", tmp_path / "prompts.txt", "-o", curves)
    assert done.returncode == 0, done.stdout + done.stderr
    asked = yaml.safe_load(done.stdout[done.stdout.index("passes:") :])["passes"]["leap"]
    measured = json.loads(curves.read_text())
    assert measured["prompts"] == list(PROMPTS)
    assert np.array(measured["cosines"]).shape == (2, 29)
    floor = np.array([float(one) for one in asked["floor"]])
    assert np.all(floor <= np.min(measured["cosines"], axis=0))
    assert np.all(floor > np.min(measured["cosines"], axis=0) - 1.1e-4)

    leap = f"leap{{mode=dynamic,floor={'|'.join(asked['floor'])}}}"
    read = Bundle.read(bundle)
    (pass_,) = parse_pipeline(leap)
    assert str(pass_) == leap
    sampler = pass_.plan(read.manifest.sampler)
    assert sampler.leap is not None
    assert sampler.leap.floor == tuple(floor)
    generator = Generator(read, open_executor(read))
    noise = initial_noise(0, sampler.latent)
    trajectory = generator.denoise(PROMPTS[0], noise, sampler).trajectory
    assert trajectory.leap_step is not None  # a measured prompt from its own noise is as straight as it was
    assert not trajectory.refusal
    stricter = sampler.leap.model_copy(update={"floor": tuple(np.minimum(floor + 0.05, 1.0))})
    again = generator.denoise(PROMPTS[0], noise, sampler.model_copy(update={"leap": stricter})).trajectory
    assert again.evaluations == 30
    assert "the least of the prompts" in again.refusal


def test_a_run_of_other_steps_says_why_it_does_not_leap(movdc: Movdc, bundle: Path, tmp_path: Path) -> None:
    read = Bundle.read(bundle)
    leap = {"mode": "dynamic", "min_steps": 1, "patience": 1, "floor": (-1.0,) * 29}
    sampler = read.manifest.sampler.model_validate(read.manifest.sampler.model_dump() | {"leap": leap, "units": (6,)})
    trajectory = (
        Generator(read, open_executor(read)).denoise(PROMPTS[0], initial_noise(0, sampler.latent), sampler).trajectory
    )
    assert trajectory.evaluations == 6
    assert trajectory.refusal == "straightness was measured on 30 steps, not 6"


def test_prompts_that_cannot_be_read_are_refused(movdc: Movdc, refused: Refused, bundle: Path, tmp_path: Path) -> None:
    assert "cannot be read" in refused(movdc("straightness", bundle, "--prompts", tmp_path / "none.txt"))
    (tmp_path / "empty.txt").write_text("\n \n")
    assert "has no prompt" in refused(movdc("straightness", bundle, "--prompts", tmp_path / "empty.txt"))


def test_a_file_that_cannot_be_written_is_refused_before_anything_is_measured(
    movdc: Movdc, refused: Refused, bundle: Path, tmp_path: Path
) -> None:
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    (tmp_path / "file").write_text("")
    for out, reason in ((tmp_path, "cannot be written"), (tmp_path / "file" / "curves.json", "cannot be made")):
        done = movdc("straightness", bundle, "--prompts", tmp_path / "prompts.txt", "-o", out)
        assert f"{out}: " in refused(done)
        assert reason in refused(done)
        assert "median" not in done.stdout, "no table of what was measured"
