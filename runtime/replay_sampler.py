"""The sampler's plan by itself: run on velocities that are known in closed form, so that a wrong step shows."""

from __future__ import annotations

from typing import Any

import numpy as np

from movdc.runtime.bundle import Sampler
from movdc.runtime.errors import RunError
from movdc.runtime.expected import Recipe, SamplerCheck, digest_of, make_input
from movdc.runtime.sampler import DRIFT_SIGNS, sample

Array = np.ndarray[Any, np.dtype[np.float32]]
SAMPLER = "sampler"
_TENSORS = tuple(Recipe(name=name, rule="uniform", low=-1.0, high=1.0) for name in ("noise", "data", "turn"))


def run_sampler(sampler: Sampler) -> tuple[Array, int, int]:
    """Latents [1, C, T, H, W], evaluations, and how many of them are by the variant `merged`.

    At time t the null caption's velocity is data - z and the caption's t turn more, negated where the prediction is
    noise - data: the drift turns at first and is straight in the end. Raises RunError for a plan that cannot be run.
    """
    shape = sampler.latent
    noise, data, turn = (make_input(one, SAMPLER, shape, np.dtype(np.float32)) for one in _TENSORS)

    def denoise(z: Array, timestep: Array, step: int) -> Array:
        null = data - z
        both = np.concatenate((null + timestep / np.float32(1000) * turn, null))
        return both * np.float32(DRIFT_SIGNS[sampler.prediction])

    latents, trajectory = sample(denoise, noise, sampler)
    return latents, trajectory.evaluations, min(trajectory.evaluations, sampler.merged_steps)


def sampler_check(sampler: Sampler) -> SamplerCheck | None:
    """What a runtime is to make of a plan that is right; None of one that this movdc does not run."""
    try:
        latents, evaluations, merged = run_sampler(sampler)
    except RunError:
        return None
    return SamplerCheck(evaluations=evaluations, merged=merged, latents=digest_of(latents, "latents", SAMPLER))
