"""The sampler: first-order rectified flow with classifier-free guidance, in fp32 (arXiv 2209.03003).

z goes from noise at t = 1 to data at t = 0 by z += drift * dt, dt > 0. Where the drift has stopped turning, all the
steps that are left add up to one of length t: a *leap* (arXiv 2502.04363, section 4). A fixed rule names its step; a
dynamic one watches the cosine of successive drifts and leaps when it has stopped growing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from movdc.runtime.bundle import LeapRule, Sampler
from movdc.runtime.errors import RunError

Array = np.ndarray[Any, np.dtype[np.float32]]

DRIFT_SIGNS = {"rectified_flow": 1.0, "flow_match": -1.0}  # prediction -> what makes it data - noise
NO_LENGTH = 1e-12  # a drift shorter than this has no direction, and counts as straight


@dataclass(frozen=True)
class Trajectory:
    """The way that one run took from noise to data."""

    evaluations: int  # of the denoiser
    leap_step: int | None  # from 0; None if every step was taken
    sigma: float | None  # the time in (0, 1] that the leap left out
    cosines: tuple[
        float, ...
    ]  # of the drift of each evaluation with the one before; NaN where there is none to compare
    refusal: str = ""  # why a rule that looks at straightness did not let this run leap


@dataclass(frozen=True)
class Point:
    """Where a run stands between two steps: all that `sample` needs to go on from there, with the same bits."""

    latents: Array  # [1, C, T, H, W]
    drift: Array | None = None  # [C, T, H, W] of the last step; None before the first
    cosines: tuple[float, ...] = ()  # one for each step so far, as in Trajectory


class _Watch:
    """Whether to leap now, asked once a step; one is made for each run, so that nothing is left of the last."""

    def __init__(self, sampler: Sampler) -> None:
        self._rule = sampler.leap
        self._steps = sampler.units[0]
        self._merged_steps = sampler.merged_steps
        self.refusal = self._other_steps()
        self._restart()

    def _restart(self) -> None:
        """Forget the cosines so far."""
        self._best = -math.inf if self._rule is None or self._rule.best is None else self._rule.best
        self._worse = 0  # cosines in a row that were not better

    def leaps(self, step: int, cosine: float) -> bool:
        """Whether this step, whose drift has this cosine with the one before, goes to t = 0."""
        rule = self._rule
        if step == self._merged_steps:
            self._restart()
        if rule is None or step + 1 == self._steps:  # the last step ends at t = 0 in any case
            return False
        if rule.mode == "fixed":
            return step == rule.fixed_step(self._steps)
        if not self.refusal and rule.floor and step > 0 and cosine < rule.floor[step - 1]:
            self.refusal = (
                f"at step {step} the cosine {cosine:.4f} is below {rule.floor[step - 1]:.4f}, the least of the prompts "
                "that this model was measured on"
            )
        if math.isnan(cosine) or step < rule.first_compared(self._steps):
            return False
        if cosine > self._best + rule.tol:
            self._best, self._worse = cosine, 0
        else:
            self._worse += 1
        return self._worse == rule.patience and not self.refusal

    def _other_steps(self) -> str:
        """Cosines of other steps are those of other times, and say nothing of these."""
        if self._rule is None or not self._rule.floor or len(self._rule.floor) + 1 == self._steps:
            return ""
        return f"straightness was measured on {len(self._rule.floor) + 1} steps, not {self._steps}"


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


def drift_cosine(drift: Array, before: Array, rule: LeapRule | None = None) -> float:
    """Cosine in [-1, 1] of two drifts [C, T, H, W], by the rule's metric; over all elements without a rule."""
    by_rows = rule is not None and rule.metric == "first_frame_rows"
    rows = [(one[0, 0] if by_rows else one.reshape(1, -1)).astype(np.float64) for one in (drift, before)]
    lengths = [np.linalg.norm(one, axis=-1) for one in rows]
    straight = np.minimum(*lengths) < NO_LENGTH
    products = np.sum(rows[0] * rows[1], axis=-1) / np.where(straight, 1.0, lengths[0] * lengths[1])
    return float(np.mean(np.where(straight, 1.0, np.clip(products, -1.0, 1.0))))


def is_over(point: Point, sampler: Sampler) -> bool:
    """Whether no step is left to take."""
    return len(point.cosines) == sampler.units[0] or _has_leapt(_Watch(sampler), point.cosines)


def sample(
    denoise: Callable[[Array, Array, int], Array],
    start: Array | Point,
    sampler: Sampler,
    on_step: Callable[[int, int], None] | None = None,
    on_point: Callable[[Point], None] | None = None,
) -> tuple[Array, Trajectory]:
    """Latents [1, C, T, H, W] fp32 from noise, or from where an earlier call stood after one of its steps.

    `denoise(z, timestep [1], step)` gives velocities [2, C, T, H, W]: row 0 is for the caption, row 1 for the null
    caption. Raises RunError when one is not finite, and for a sampler that is not of one unit, first order, and
    rectified flow or flow matching.
    """
    _check(sampler)
    rule, steps = sampler.leap, sampler.units[0]
    schedule = np.append(timesteps(sampler), 0.0)
    point = start if isinstance(start, Point) else Point(start)
    z, before, cosines = point.latents, point.drift, list(point.cosines)
    watch = _Watch(sampler)
    leapt = _has_leapt(watch, cosines)
    for step in range(steps if leapt else len(cosines), steps):
        conditional, null = denoise(z, schedule[step : step + 1].astype(np.float32), step)
        drift = null + np.float32(sampler.guidance) * (conditional - null)
        drift = drift * np.float32(DRIFT_SIGNS[sampler.prediction])
        if not np.isfinite(drift).all():
            raise RunError(f"step {step} of {steps}: the denoiser gave a velocity that is not finite")
        if step == sampler.merged_steps:  # the plain variant's drift differs anyhow, which would cost patience
            before = None
        cosines.append(math.nan if before is None else drift_cosine(drift, before, rule))
        leapt = watch.leaps(step, cosines[-1])
        end = 0.0 if leapt else schedule[step + 1]
        z = z + drift[None] * np.float32((schedule[step] - end) / 1000)
        before = drift
        if on_point is not None:
            on_point(Point(z, drift, tuple(cosines)))
        if on_step is not None:
            on_step(step + 1, step + 1 if leapt else steps)
        if leapt:
            break
    taken = len(cosines)
    left = float(schedule[taken - 1]) / 1000 if leapt else None
    return z, Trajectory(taken, taken - 1 if leapt else None, left, tuple(cosines), "" if leapt else watch.refusal)


def _has_leapt(watch: _Watch, cosines: Sequence[float]) -> bool:
    """Show a watch the steps that were taken; gives whether the last of them was a leap."""
    return any([watch.leaps(step, cosine) for step, cosine in enumerate(cosines)])


def _check(sampler: Sampler) -> None:
    kind = f"{sampler.solver} with {sampler.prediction}"
    if sampler.solver != "euler" or sampler.prediction not in DRIFT_SIGNS:
        raise RunError(f"the bundle's sampler is {kind}; this movdc runs euler with {' or '.join(DRIFT_SIGNS)}")
    if len(sampler.units) != 1:
        raise RunError(f"the bundle's sampler has {len(sampler.units)} units of steps; this movdc runs one")
