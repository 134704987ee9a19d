"""The sampler: drifts whose answer is known, the rule of the leap, what it refuses."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from movdc.runtime.bundle import LeapRule, Sampler
from movdc.runtime.errors import RunError
from movdc.runtime.sampler import Array, drift_cosine, initial_noise, sample, timesteps

GOLDEN = Path(__file__).parents[1] / "golden"
CASES = json.loads((GOLDEN / "rflow_timesteps.json").read_text())["cases"]
LATENT = (1, 4, 2, 3, 3)


def _sampler(steps: int, leap: LeapRule | None = None, **others: object) -> Sampler:
    plan = {"solver": "euler", "prediction": "rectified_flow", "units": (steps,), "shift": 1.0, "rounded": False}
    return Sampler.model_validate(plan | {"guidance": 4.0, "latent": LATENT, "leap": leap} | others)


def _drifts_by_angle(*degrees: float) -> list[Array]:
    """Velocities, one a step, whose guided drifts turn to these angles in a plane."""
    drifts = []
    for angle in np.radians(degrees):
        one = np.zeros((2, *LATENT[1:]), np.float32)
        one[:, 0, 0, 0, 0], one[:, 0, 0, 0, 1] = np.cos(angle), np.sin(angle)
        drifts.append(one)
    return drifts


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["tensor"])
def test_timesteps_match_the_recorded_ones(case: dict[str, object]) -> None:
    recorded = load_file(GOLDEN / "rflow_timesteps.safetensors")[str(case["tensor"])].ravel()
    frames, height, width = (int(str(case[key])) for key in ("num_frames", "height", "width"))
    length = 1 if frames == 1 else frames // 17 * 5
    shift = math.sqrt(height * width / 512**2) * math.sqrt(length)
    ours = timesteps(_sampler(int(str(case["num_sampling_steps"])), shift=shift, rounded=bool(case["rounded"])))
    assert np.linalg.norm(ours - recorded) <= 1e-6 * np.linalg.norm(recorded)


@settings(deadline=None)
@given(steps=st.integers(1, 40), step=st.integers(0, 45), shift=st.floats(0.3, 7.0), flow_match=st.booleans())
def test_a_constant_drift_leads_to_the_data_from_any_leap(
    steps: int, step: int, shift: float, flow_match: bool
) -> None:
    noise, data = initial_noise(1, LATENT), initial_noise(2, LATENT)
    velocity = np.repeat(noise - data if flow_match else data - noise, 2, axis=0)
    prediction = "flow_match" if flow_match else "rectified_flow"
    sampler = _sampler(steps, LeapRule(mode="fixed", step=step), shift=shift, prediction=prediction)
    calls: list[int] = []
    made, trajectory = sample(lambda z, t, index: calls.append(index) or velocity, noise, sampler)
    np.testing.assert_allclose(made, data, atol=1e-5)
    assert calls == list(range(min(step + 1, steps)))
    assert trajectory.evaluations == len(calls) == len(trajectory.cosines)
    if step < steps - 1:
        assert trajectory.leap_step == step
        assert trajectory.sigma == pytest.approx(timesteps(sampler)[step] / 1000)
    else:
        assert trajectory.leap_step is None
        assert trajectory.sigma is None


@settings(deadline=None)
@given(steps=st.integers(1, 40), min_steps=st.integers(1, 40), patience=st.integers(1, 5))
def test_on_a_straight_line_the_dynamic_leap_waits_for_its_patience_alone(
    steps: int, min_steps: int, patience: int
) -> None:
    noise, data = initial_noise(1, LATENT), initial_noise(2, LATENT)
    velocity = np.repeat(data - noise, 2, axis=0)
    rule = LeapRule(mode="dynamic", min_steps=min_steps, patience=patience)
    made, trajectory = sample(lambda z, t, index: velocity, noise, _sampler(steps, rule))
    np.testing.assert_allclose(made, data, atol=1e-5)
    assert trajectory.evaluations == min(steps, min_steps + patience + 1)  # one more: the first cosine is the best


@pytest.mark.parametrize(("steps", "fixed", "dynamic"), [(30, 15, 18), (31, 15, 19), (10, 5, 8)])
def test_a_rule_without_numbers_goes_by_half_of_the_steps(steps: int, fixed: int, dynamic: int) -> None:
    velocity = np.ones((2, *LATENT[1:]), np.float32)
    for mode, expected in (("fixed", fixed), ("dynamic", dynamic)):
        rule = LeapRule.model_validate({"mode": mode})
        assert sample(lambda z, t, index: velocity, initial_noise(0, LATENT), _sampler(steps, rule))[1].leap_step == (
            expected
        )


def test_a_cosine_that_grows_restores_patience_and_a_second_run_repeats_the_first() -> None:
    drifts = _drifts_by_angle(0, 80, 140, 200, 220, 240, 260, 262, 264, 266, 266)
    sampler = _sampler(11, LeapRule(mode="dynamic", min_steps=1, patience=2))
    first, second = (sample(lambda z, t, index: drifts[index], initial_noise(3, LATENT), sampler) for _ in "12")
    expected = [math.cos(math.radians(turn)) for turn in (80, 60, 60, 20, 20, 20)]
    # steps 1 and 2 are better than all before, step 3 is not, step 4 is; then 5 and 6 are not
    assert first[1].leap_step == 6
    assert math.isnan(first[1].cosines[0])
    np.testing.assert_allclose(first[1].cosines[1:], expected, atol=1e-6)
    assert np.array_equal(first[0], second[0])
    np.testing.assert_equal(first[1], second[1])


def test_nothing_is_compared_across_the_step_where_merging_ends() -> None:
    drifts = _drifts_by_angle(0, 0, 0, 50, 60, 70, 80, 90)
    rule = LeapRule(mode="dynamic", min_steps=1, patience=2)
    _, plain = sample(lambda z, t, index: drifts[index], initial_noise(3, LATENT), _sampler(8, rule))
    _, merged = sample(lambda z, t, index: drifts[index], initial_noise(3, LATENT), _sampler(8, rule, merged_steps=3))
    assert plain.leap_step == 3  # steps 2 and 3 are not better than step 1
    assert merged.leap_step == 6  # step 3 is compared with none, step 4 is better than none, 5 and 6 are not
    assert math.isnan(merged.cosines[3])


def test_an_initial_best_must_be_beaten() -> None:
    drifts = _drifts_by_angle(*range(0, 1000, 100))  # every cosine is cos(100 deg), below 0
    for best, expected in ((0.0, 3), (None, 4)):
        rule = LeapRule(mode="dynamic", min_steps=2, patience=2, best=best)
        _, trajectory = sample(lambda z, t, index: drifts[index], initial_noise(3, LATENT), _sampler(10, rule))
        assert trajectory.leap_step == expected


def test_a_drift_of_no_length_counts_as_straight() -> None:
    zero, one = np.zeros(LATENT[1:], np.float32), np.ones(LATENT[1:], np.float32)
    assert drift_cosine(zero, one) == 1
    assert drift_cosine(one, -one) == -1
    rows = one.copy()
    rows[0, 0, 0] = -1  # one of three rows of the first channel of the first frame
    assert drift_cosine(rows, one, LeapRule(mode="dynamic", metric="first_frame_rows")) == pytest.approx(1 / 3)
    assert drift_cosine(rows, one) == pytest.approx(1 - 2 * 3 / one.size)


def test_guidance_weighs_the_caption_against_the_null_caption() -> None:
    noise = np.zeros(LATENT, np.float32)
    rows = np.stack([np.full(LATENT[1:], 3, np.float32), np.full(LATENT[1:], 1, np.float32)])
    assert np.allclose(sample(lambda z, t, index: rows, noise, _sampler(1))[0], 1 + 4 * (3 - 1))


@pytest.mark.parametrize("leap", [None, LeapRule(mode="fixed", step=1), LeapRule(mode="dynamic")])
def test_a_velocity_that_is_not_finite_names_the_step(leap: LeapRule | None) -> None:
    def denoise(z: Array, t: Array, step: int) -> Array:
        return np.full((2, *LATENT[1:]), np.nan if step == 1 else 1.0, np.float32)

    with pytest.raises(RunError, match="step 1 of 3"):
        sample(denoise, initial_noise(0, LATENT), _sampler(3, leap))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"solver": "unipc"}, "unipc with rectified_flow; this movdc runs euler"),
        ({"prediction": "epsilon"}, "euler with epsilon; this movdc runs euler with rectified_flow or flow_match"),
        ({"units": (3, 3)}, "2 units of steps; this movdc runs one"),
    ],
)
def test_a_sampler_that_is_not_run_is_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(RunError, match=message):
        sample(lambda z, t, index: z, initial_noise(0, LATENT), _sampler(3, **changes))


def test_the_bar_of_progress_ends_at_the_leap() -> None:
    said: list[tuple[int, int]] = []
    velocity = np.ones((2, *LATENT[1:]), np.float32)
    sampler = _sampler(4, LeapRule(mode="fixed"))
    sample(lambda z, t, index: velocity, initial_noise(0, LATENT), sampler, lambda *done: said.append(done))
    assert said == [(1, 4), (2, 4), (3, 3)]


def test_the_seed_decides_the_noise() -> None:
    assert np.array_equal(initial_noise(5, LATENT), initial_noise(5, LATENT))
    assert not np.array_equal(initial_noise(5, LATENT), initial_noise(6, LATENT))
