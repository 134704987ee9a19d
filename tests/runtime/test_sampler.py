"""Timesteps against the recorded ones, and the Euler loop on a drift whose answer is known."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from movdc.runtime.bundle import Sampler
from movdc.runtime.errors import RunError
from movdc.runtime.sampler import initial_noise, sample, timesteps

GOLDEN = Path(__file__).parents[1] / "golden"
CASES = json.loads((GOLDEN / "rflow_timesteps.json").read_text())["cases"]
LATENT = (1, 4, 2, 3, 3)


def _sampler(steps: int, shift: float = 1.0, rounded: bool = False, guidance: float = 4.0) -> Sampler:
    return Sampler(
        solver="euler",
        prediction="rectified_flow",
        units=(steps,),
        shift=shift,
        rounded=rounded,
        guidance=guidance,
        latent=LATENT,
    )


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["tensor"])
def test_timesteps_match_the_recorded_ones(case: dict[str, object]) -> None:
    recorded = load_file(GOLDEN / "rflow_timesteps.safetensors")[str(case["tensor"])].ravel()
    frames, height, width = (int(str(case[key])) for key in ("num_frames", "height", "width"))
    length = 1 if frames == 1 else frames // 17 * 5
    shift = math.sqrt(height * width / 512**2) * math.sqrt(length)
    ours = timesteps(_sampler(int(str(case["num_sampling_steps"])), shift, bool(case["rounded"])))
    assert np.linalg.norm(ours - recorded) <= 1e-6 * np.linalg.norm(recorded)


@pytest.mark.parametrize("steps", [1, 2, 30])
def test_a_constant_drift_leads_to_the_data(steps: int) -> None:
    noise, data = initial_noise(1, LATENT), initial_noise(2, LATENT)
    velocity = np.concatenate([data - noise, data - noise])
    made = sample(lambda z, t: velocity, noise, _sampler(steps, shift=0.4))
    np.testing.assert_allclose(made, data, atol=1e-5)


def test_guidance_weighs_the_caption_against_the_null_caption() -> None:
    noise = np.zeros(LATENT, np.float32)
    rows = np.stack([np.full(LATENT[1:], 3, np.float32), np.full(LATENT[1:], 1, np.float32)])
    assert np.allclose(sample(lambda z, t: rows, noise, _sampler(1)), 1 + 4 * (3 - 1))


def test_a_velocity_that_is_not_finite_names_the_step() -> None:
    rows = np.full((2, *LATENT[1:]), np.nan, np.float32)
    with pytest.raises(RunError, match="step 0"):
        sample(lambda z, t: rows, initial_noise(0, LATENT), _sampler(3))


def test_the_seed_decides_the_noise() -> None:
    assert np.array_equal(initial_noise(5, LATENT), initial_noise(5, LATENT))
    assert not np.array_equal(initial_noise(5, LATENT), initial_noise(6, LATENT))
