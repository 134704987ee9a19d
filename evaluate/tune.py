"""Tuning: the fastest setting of a pipeline whose measured loss is within limits.

First each thing that can be given up is measured alone. What is over a limit alone is left out; of the combinations of
the rest, each with the time that the simulator predicts, the fastest are measured, until one is within the limits.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from movdc.compiler.errors import MovdcError
from movdc.evaluate.settings import Grid, Setting
from movdc.runtime.bundle import LeapRule, Manifest
from movdc.runtime.rates import Rates
from movdc.runtime.simulate import Simulator, calls_of

MOST_COMBINATIONS = 12  # that are measured
# What a limit may be on: the column of the summary, which is of the worst clip or of all, and its unit in the text.
METRICS: dict[str, tuple[str, str, float]] = {
    "psnr": ("worst_psnr_db", "dB", 1.0),
    "ssim": ("worst_ssim", "", 1.0),
    "adherence": ("adherence", "%", 0.01),
}
Summary = Mapping[str, Any]  # a setting's row of results.summary_of


@dataclass(frozen=True)
class Limit:
    """The least that a metric may be: psnr and ssim of the worst clip, adherence of all clips together."""

    metric: str
    least: float  # in the metric's unit

    @classmethod
    def parse(cls, text: str) -> Limit:
        """Of a text like psnr>=30dB; raises MovdcError with what is allowed."""
        match = re.fullmatch(r"\s*([a-z]+)\s*>=\s*(\d+(?:\.\d+)?)\s*(dB|%)?\s*", text)
        if not match or match[1] not in METRICS or (match[3] or "") not in ("", METRICS[match[1]][1]):
            raise MovdcError(
                f"--max-loss: {text!r} is no limit; write one like psnr>=30dB, ssim>=0.95 or adherence>=98%"
            )
        return cls(match[1], float(match[2]))

    def holds(self, summary: Summary) -> bool:
        """Whether a setting is within it; the reference has nothing to be compared with."""
        column, _, scale = METRICS[self.metric]
        value = summary[column]
        return value is None or value >= self.least * scale


@dataclass(frozen=True)
class Trial:
    """A setting that was measured."""

    setting: Setting
    predicted_s: float  # of one clip
    summary: Summary
    within: bool  # all limits


Measure = Callable[[Sequence[Setting]], Mapping[Setting, Summary]]  # the first setting is the reference
Predict = Callable[[Setting, int], float]  # seconds of a clip with so many evaluations


def grid_of(steps: int) -> Grid:
    """What may be given up of a pipeline with so many steps; the first of each is nothing."""
    return Grid(
        steps=[None, *sorted({round(steps * 2 / 3), round(steps / 2)} - {0, steps}, reverse=True)],
        leap=["none", "fixed", "dynamic"],
        merge_steps=[0, *sorted({round(steps / 4), round(steps / 2), steps} - {0})],
        int8=[[], ["text_encoder"], ["text_encoder", "denoiser"]],
    )


def search(steps: int, limits: Sequence[Limit], measure: Measure, predict: Predict) -> list[Trial]:
    """The settings that were measured, nothing given up first; the last one is the choice."""
    reference = Setting()
    alone = _alone(grid_of(steps))
    summaries = dict(measure([reference, *alone]))

    def trial(setting: Setting) -> Trial:
        summary = summaries[setting]
        within = all(limit.holds(summary) for limit in limits)
        return Trial(setting, predict(setting, round(summary["evaluations"])), summary, within)

    tried = {setting: trial(setting) for setting in [reference, *alone]}
    if summaries[reference]["adherence"] is None and any(limit.metric == "adherence" for limit in limits):
        raise MovdcError("--max-loss: adherence is for captions of the example's checkpoint; limit psnr or ssim")
    if not tried[reference].within:
        raise MovdcError("--max-loss: not even the pipeline that gives nothing up is within it; allow more loss")

    def evaluations(setting: Setting) -> int:
        """As the rule alone made of all steps, for so many."""
        rule: float = summaries[Setting(leap=setting.leap)]["evaluations"] / steps
        return max(1, round(rule * (setting.steps or steps)))

    passed = [reference, *(setting for setting in alone if tried[setting].within)]
    fast = {one.setting: one.predicted_s for one in tried.values() if one.within}
    combined = {one: predict(one, evaluations(one)) for one in _combinations(passed) if one not in tried}
    for setting in sorted(combined, key=lambda one: combined[one])[:MOST_COMBINATIONS]:
        if combined[setting] >= min(fast.values()):
            break
        summaries |= measure([reference, setting])
        tried[setting] = trial(setting)
        if tried[setting].within:
            fast[setting] = tried[setting].predicted_s
            break
    best = min(fast, key=lambda one: fast[one])
    return [one for setting, one in tried.items() if setting != best] + [tried[best]]


def predicted_s(manifest: Manifest, rates: Rates, setting: Setting, evaluations: int) -> float:
    """Seconds of one clip on a device, by a bundle of the same int8 stages and with a merged variant if it merges."""
    sampler = manifest.sampler.model_copy(
        update={
            "units": (setting.steps or manifest.sampler.units[0],),
            "merged_steps": setting.merge_steps,
            "leap": LeapRule(mode="fixed", step=evaluations - 1),
        }
    )
    simulator = Simulator.of(manifest, rates)
    simulator.run(calls_of(manifest.model_copy(update={"sampler": sampler})))
    return simulator.now_s


def _alone(grid: Grid) -> list[Setting]:
    """Each thing given up by itself."""
    return [
        *(Setting(int8=tuple(stages)) for stages in grid.int8[1:]),
        *(Setting(merge_steps=steps) for steps in grid.merge_steps[1:]),
        *(Setting(leap=mode) for mode in grid.leap[1:]),
        *(Setting(steps=steps) for steps in grid.steps[1:]),
    ]


def _combinations(alone: Sequence[Setting]) -> list[Setting]:
    values = [dict.fromkeys(getattr(one, field) for one in alone) for field in Setting.model_fields]
    return [Setting(**dict(zip(Setting.model_fields, chosen, strict=True))) for chosen in product(*values)]
