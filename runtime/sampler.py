"""The sampler: first-order rectified flow with classifier-free guidance, in fp32 (arXiv 2209.03003)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from movdc.runtime.bundle import Sampler
from movdc.runtime.errors import RunError

Array = np.ndarray[Any, np.dtype[np.float32]]


def timesteps(sampler: Sampler) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Timesteps [steps] of the first unit from 1000 downwards, shifted towards noise by r (Open-Sora 1.2)."""
    steps = sampler.units[0]
    plain = (1 - np.arange(steps) / steps) * 1000
    if sampler.rounded:
        plain = np.round(plain)  # half to even, as the reference rounds
    t = plain / 1000
    return sampler.shift * t / (1 + (sampler.shift - 1) * t) * 1000


def initial_noise(seed: int, shape: tuple[int, ...]) -> Array:
    """Standard normal noise fp32 that depends on the seed alone: PCG64 is the same on every platform."""
    return np.random.Generator(np.random.PCG64(seed)).standard_normal(shape, dtype=np.float32)


def sample(
    denoise: Callable[[Array, Array], Array],
    noise: Array,
    sampler: Sampler,
    on_step: Callable[[int, int], None] | None = None,
) -> Array:
    """Latents [1, C, T, H, W] fp32 from noise; `denoise(z, timestep [1])` gives velocities [2, C, T, H, W].

    Row 0 of the velocities is for the caption, row 1 for the null caption; raises RunError when one is not finite.
    """
    schedule = timesteps(sampler)
    steps = len(schedule)
    z = noise
    for index, t in enumerate(schedule):
        conditional, null = denoise(z, np.array([t], np.float32))
        velocity = null + np.float32(sampler.guidance) * (conditional - null)
        if not np.isfinite(velocity).all():
            raise RunError(f"step {index} of {steps}: the denoiser gave a velocity that is not finite")
        following = schedule[index + 1] if index + 1 < steps else 0.0
        z = z + velocity[None] * np.float32((t - following) / 1000)
        if on_step is not None:
            on_step(index + 1, steps)
    return z
