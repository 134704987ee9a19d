"""Straightness: how alike the drifts of successive steps are, measured prompt by prompt with every step taken."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from movdc.runtime.bundle import Bundle
from movdc.runtime.generate import Generator
from movdc.runtime.sampler import initial_noise

_DIGITS = 4  # of a floor, rounded down


@dataclass(frozen=True)
class Straightness:
    """The cosine of each step's drift with the one before, step 1 first."""

    prompts: tuple[str, ...]
    curves: np.ndarray[Any, np.dtype[np.float64]]  # [prompts, steps - 1]; NaN where drifts are not compared

    @property
    def floor(self) -> tuple[float, ...]:
        """The least of any prompt, -1 where drifts are not compared."""
        least = [min((cosine for cosine in step if not math.isnan(cosine)), default=-1.0) for step in self.curves.T]
        return tuple(max(-1.0, math.floor(one * 10**_DIGITS) / 10**_DIGITS) for one in least)

    def quantiles(self, *shares: float) -> list[list[float]]:
        """For each step, the cosines that these shares of the prompts are below; NaN where drifts are not compared."""
        made = np.full((self.curves.shape[1], len(shares)), math.nan)
        compared = ~np.isnan(self.curves).all(axis=0)
        made[compared] = np.nanquantile(self.curves[:, compared], shares, axis=0).T
        return [[float(one) for one in step] for step in made]

    def json(self) -> str:
        """Every prompt with its curve; null where drifts are not compared."""
        curves = [[None if math.isnan(one) else round(float(one), 6) for one in curve] for curve in self.curves]
        return json.dumps({"prompts": list(self.prompts), "cosines": curves}, indent=1) + "\n"


def measure_straightness(
    bundle: Bundle, generator: Generator, prompts: Sequence[str], on_progress: Callable[[str, int, int], None]
) -> Straightness:
    """The curve of each prompt, from the noise of its own seed; no leap, and nothing is decoded."""
    sampler = bundle.manifest.sampler.model_copy(update={"leap": None})
    curves = []
    for seed, prompt in enumerate(prompts):
        on_progress("prompts", seed, len(prompts))
        noise = initial_noise(seed, sampler.latent)
        curves.append(generator.denoise(prompt, noise, sampler).trajectory.cosines[1:])
    on_progress("prompts", len(prompts), len(prompts))
    return Straightness(tuple(prompts), np.array(curves, np.float64).reshape(len(prompts), -1))
