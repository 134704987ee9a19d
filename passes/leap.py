"""leap: the denoising steps at the end of a unit as one (LPL)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

from pydantic import ValidationError

from movdc.compiler.errors import MovdcError
from movdc.compiler.pass_base import Pass, PassResult
from movdc.compiler.program import Program
from movdc.runtime.bundle import LeapRule, Sampler

# What each mode fixes, and the options that it leaves to the user.
MODES: dict[str, tuple[Mapping[str, Any], tuple[str, ...]]] = {
    "fixed": ({"mode": "fixed"}, ("step",)),
    "dynamic": ({"mode": "dynamic"}, ("min_steps", "tol", "patience", "metric", "floor")),
    # The constants of the PyTorch reference of On-device Sora.
    "reference": (
        {"mode": "dynamic", "min_steps": 14, "tol": 1e-3, "patience": 3, "metric": "first_frame_rows", "best": 0.0},
        (),
    ),
}
MIN_PSNR_DB = 35  # with a leap at half of the steps or later; the worst of 100 clips had 36.9


@dataclass(frozen=True)
class Leap(Pass):
    """End each unit's denoising early, by one step from the time that is left to t = 0.

    Before:  sampler Sampler(solver='euler', prediction='rectified_flow', units=(30,), merged_steps=0, leap=None, ...)
    After:   sampler Sampler(solver='euler', ..., leap=LeapRule(mode='fixed', step=15, ...), ...): 16 evaluations
             z_15 = z_14 + drift_14 * (t_14 - t_15), then z = z_15 + drift_15 * t_15, for the dt left add up to t_15

    Refuses: 1. a sampler other than first-order Euler over rectified flow or flow matching: a solver of several steps
    keeps a history that a leap makes wrong, and an epsilon or v prediction of DDPM is no drift in t; 2. frames held as
    condition: one whose mask is below the time left at the leap would never be denoised, and only a run knows it;
    3. a rule by which no unit can leap; 4. an option that the mode does not have.
    Cost: no bytes; a fixed rule evaluates the denoiser step + 1 times a unit (half of the steps by default), a dynamic
    one min_steps + patience + 1 times or more; by how much the video changes depends on how straight the model's
    trajectories are. Paper: arXiv 2502.04363, section 4. The rule itself is run by runtime/sampler.py.
    """

    name: ClassVar[str] = "leap"
    exact: ClassVar[bool] = False
    figure: ClassVar[str] = f"PSNR >= {MIN_PSNR_DB} dB of the example's frames against those of every step"
    paper: ClassVar[str] = "arXiv 2502.04363, section 4"
    plan_options: ClassVar[tuple[str, ...]] = ("mode", "step", "min_steps", "tol", "patience", "metric", "floor")

    mode: Literal["fixed", "dynamic", "reference"] = "fixed"
    # None is what LeapRule has where the mode has the option; what each means is written there.
    step: int | None = None
    min_steps: int | None = None
    tol: float | None = None
    patience: int | None = None
    metric: Literal["all", "first_frame_rows"] | None = None
    floor: tuple[str, ...] = ()  # numbers that `movdc straightness` prints

    @property
    def rule(self) -> LeapRule:
        """The rule that the runtime applies; raises MovdcError for an option that cannot be used."""
        fixed, open_ = MODES[self.mode]
        given = {key: value for key, value in self._given().items() if value not in (None, ())}
        for key in given:
            if key not in open_:
                raise MovdcError(
                    f"pass leap: mode {self.mode} has no option {key}; its options are {', '.join(open_) or 'none'}"
                )
        try:
            return LeapRule.model_validate({**fixed, **given})
        except ValidationError as error:
            first = error.errors()[0]
            raise MovdcError(f"pass leap: option {first['loc'][0]}: {first['msg']}, got {first['input']!r}") from None

    def _given(self) -> dict[str, Any]:
        return {key: getattr(self, key) for key in self.options() if key != "mode"}

    def requires(self, program: Program) -> None:
        """Refuse frames that are not denoised from the start, and what `plan` refuses."""
        self.plan(program.sampler)
        for stage, variant, graph in program.graphs():
            if graph.layout and graph.layout.frame_mask_input:
                raise MovdcError(
                    f"pass leap: {stage} ({variant}) takes a mask of frames as input {graph.layout.frame_mask_input}, "
                    "which only a run knows; a leap needs every frame denoised from the start; leave the pass out"
                )
            mask = graph.layout.frame_mask if graph.layout else None
            if mask is not None and not all(mask):
                held = ", ".join(str(frame) for frame, denoised in enumerate(mask) if not denoised)
                raise MovdcError(
                    f"pass leap: {stage} ({variant}) holds frames {held} as condition; a leap needs every frame "
                    "denoised from the start, because one that joins later than the leap never would be; leave the "
                    "pass out"
                )

    def plan(self, sampler: Sampler) -> Sampler:
        """The rule; refuses samplers that no leap is right for, and steps that it would never leave out."""
        if sampler.solver != "euler":
            raise MovdcError(
                f"pass leap: the sampler's solver is {sampler.solver}; a leap needs euler, because any other carries "
                "a history or a correction that one long step makes wrong; leave the pass out"
            )
        if sampler.prediction not in ("rectified_flow", "flow_match"):
            raise MovdcError(
                f"pass leap: the sampler's prediction is {sampler.prediction}; a leap needs rectified_flow or "
                "flow_match, because any other is no drift along a straight line; leave the pass out"
            )
        floor = self.rule.floor
        if floor and any(steps != len(floor) + 1 for steps in sampler.units):
            raise MovdcError(
                f"pass leap: option floor has {len(floor)} numbers, one for each step but the first, and a unit has "
                f"{max(sampler.units)} steps; measure it with `movdc straightness` on a bundle of these steps"
            )
        first = {steps: first_leap(self.rule, steps) for steps in sampler.units}
        if all(step > steps - 2 for steps, step in first.items()):
            steps = max(first)
            raise MovdcError(
                f"pass leap: step {first[steps]} is the first that can leap, and in {steps} steps the last that leaves "
                f"out any is {steps - 2}; {self._advice()}"
            )
        return sampler.model_copy(update={"leap": self.rule})

    def _advice(self) -> str:
        lower = {"fixed": "step", "dynamic": "min_steps or patience"}.get(self.mode)
        return f"lower {lower}, or leave the pass out" if lower else "use mode=dynamic, or leave the pass out"

    def apply(self, program: Program) -> PassResult:
        """Write the rule into the sampler's plan."""
        sampler = self.plan(program.sampler)
        bound = "" if self.rule.mode == "fixed" else "at most "
        note = f"{bound}{evaluations(sampler)} evaluations of {sum(sampler.units)}"
        return PassResult(replace(program, sampler=sampler), sampler != program.sampler, note)


def first_leap(rule: LeapRule, steps: int) -> int:
    """The first step that may leap in a unit of so many steps."""
    if rule.mode == "fixed":
        return rule.fixed_step(steps)
    # Without a best to start from, the first cosine is better than none and takes no patience.
    return max(rule.first_compared(steps), 1) + rule.patience - (rule.best is not None)


def evaluations(sampler: Sampler) -> int:
    """Evaluations of the denoiser that the plan needs, all units together; the most where the leap is dynamic."""
    rule = sampler.leap
    if rule is None or rule.mode == "dynamic":
        return sum(sampler.units)
    return sum(min(rule.fixed_step(steps) + 1, steps) for steps in sampler.units)
