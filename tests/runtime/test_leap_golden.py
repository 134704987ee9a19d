"""The sampler against loops recorded from the reference with a model given by a formula (tests/golden/README.md).

The loop with a mask of frames is not among them: the denoisers that are compiled take none.
"""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from movdc.passes.leap import Leap
from movdc.runtime.bundle import LeapRule, Sampler
from movdc.runtime.sampler import Array, sample

GOLDEN = Path(__file__).parents[1] / "golden"
MAX_RELATIVE_ERROR = 1e-5
# The phase of the formula is up to 188 (1.001 - t): the last bit of t in fp32 changes the cosines by up to 7e-5.
# Every comparison of the recorded runs is at least 2.5e-4 away from its threshold.
MAX_COSINE_ERROR = 1e-4

Case = dict[str, Any]


def _cases(name: str) -> list[Any]:
    cases = json.loads((GOLDEN / f"{name}.json").read_text())["cases"]
    return [pytest.param(case, id=case["name"]) for case in cases if case.get("mask") is None]


def _relative(ours: Array, recorded: Array) -> float:
    return float(np.linalg.norm(ours - recorded) / np.linalg.norm(recorded))


def _run(name: str, case: Case, leap: LeapRule | None) -> tuple[Any, dict[str, Array]]:
    """Run the case; holds the latents and timesteps of every call, and the result, to the recorded ones."""
    prefix = f"{case['name']}."
    tensors = load_file(GOLDEN / f"{name}.safetensors")
    recorded = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
    noise = recorded["in.z"]
    length = math.sqrt(case["num_frames"] // 17 * 5)
    shift = math.sqrt(case["height"] * case["width"] / 512**2) * length if case.get("use_timestep_transform") else 1.0
    sampler = Sampler(
        solver="euler",
        prediction="rectified_flow",
        units=(case["num_sampling_steps"],),
        leap=leap,
        shift=shift,
        rounded=case.get("use_discrete_timesteps", False),
        guidance=case["cfg_scale"],
        latent=noise.shape,
    )
    fake = case["fake_model"]
    channel, frame, row, column = np.indices(noise.shape[1:], np.float32)
    place = fake["g1"] * row + fake["g2"] * column + 0.1 * channel + 0.05 * frame
    coefficients = recorded["in.y"].mean(axis=(1, 2, 3))
    latents: list[Array] = []
    times: list[Array] = []

    def denoise(z: Array, t: Array, step: int) -> Array:
        latents.append(z[0])
        times.append(t)
        wave = np.cos(2 * np.pi * fake["w0"] * (1.001 - t / 1000) ** fake["p"] + place)
        return np.stack([fake["a"] * z[0] + k * wave + fake["d"] for k in coefficients]).astype(np.float32)

    out, trajectory = sample(denoise, noise, sampler)
    assert len(latents) == len(recorded["z_before_step"])
    assert _relative(np.concatenate(times), recorded["timesteps"].ravel()) <= 1e-6
    assert _relative(np.stack(latents), recorded["z_before_step"]) <= MAX_RELATIVE_ERROR
    assert _relative(out, recorded["out"]) <= MAX_RELATIVE_ERROR
    return trajectory, recorded


@pytest.mark.parametrize("case", _cases("rflow_loop"))
def test_without_a_leap(case: Case) -> None:
    trajectory, _ = _run("rflow_loop", case, None)
    assert trajectory.evaluations == case["num_sampling_steps"]
    assert trajectory.leap_step is None


@pytest.mark.parametrize("case", _cases("rflow_lpl_static"))
def test_the_fixed_leap(case: Case) -> None:
    trajectory, recorded = _run("rflow_lpl_static", case, LeapRule(mode="fixed", step=case["leap_step"]))
    assert trajectory.evaluations == case["model_calls"]
    last = case["leap_step"] == case["num_sampling_steps"] - 1  # nothing is left out
    assert trajectory.leap_step == (None if last else case["leap_step"])
    if not last:
        assert trajectory.sigma == pytest.approx(recorded["timesteps"].ravel()[-1] / 1000)


@pytest.mark.parametrize("case", _cases("rflow_lpl_dynamic"))
def test_the_reference_preset(case: Case) -> None:
    trajectory, recorded = _run("rflow_lpl_dynamic", case, Leap(mode="reference").rule)
    assert trajectory.leap_step == (case["last_step_index"] if case["leaps"] else None)
    assert trajectory.evaluations == case["model_calls"]
    np.testing.assert_allclose(trajectory.cosines, recorded["cos_mean"], atol=MAX_COSINE_ERROR)  # NaN equals NaN
