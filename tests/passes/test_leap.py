"""leap: the rule in the sampler's plan, what it refuses, how many evaluations are left."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn

from movdc.compiler.errors import MovdcError
from movdc.compiler.printer import print_program
from movdc.compiler.program import Graph, Program, TokenLayout
from movdc.passes.leap import MIN_PSNR_DB, Leap, evaluations, first_leap
from movdc.passes.pipeline import parse_pipeline
from movdc.runtime.bundle import LeapRule, Sampler
from movdc.runtime.sampler import Array, initial_noise, sample
from movdc.runtime.video import to_frames

TINY = Path(__file__).parents[1] / "golden" / "tiny"
LATENT = (1, 4, 10, 8, 8)

# 8 temporal units of one latent frame, each of 3 stages of growing resolution; the first unit takes more steps.
PYRAMIDAL_FLOW = (20,) * 3 + (10,) * 3 * 7

BEFORE = """
sampler Sampler(solver='euler', prediction='rectified_flow', units=(30,), merged_steps=0, leap=None, shift=1.0, \
rounded=False, guidance=4.0, latent=(1, 4, 10, 8, 8))
"""
AFTER = """
sampler Sampler(solver='euler', prediction='rectified_flow', units=(30,), merged_steps=0, leap=LeapRule(mode='fixed', \
step=15, min_steps=None, tol=0.0001, patience=3, metric='all', best=None, floor=()), shift=1.0, rounded=False, guidance=4.0, \
latent=(1, 4, 10, 8, 8))
"""


@pytest.fixture
def toy(graph_of: Callable[..., Graph], program_of: Callable[..., Program]) -> Callable[..., Program]:
    """A toy program whose sampler has the given fields."""

    def make(**changes: Any) -> Program:
        program = program_of(denoiser=graph_of(nn.Linear(4, 4), latents=torch.ones(2, 4)))
        fields = program.sampler.model_dump() | changes
        return replace(program, sampler=Sampler.model_validate(fields))

    return make


def _holding(program: Program, mask: tuple[bool, ...] | None) -> Program:
    graph = program.stages[0].variants["plain"]
    layout = TokenLayout(frames=4, attentions=(), mlps=(), retrace=lambda frames: graph, frame_mask=mask)
    return program.map_graphs({("denoiser", "plain"): replace(graph, layout=layout)})


def test_refuses_a_mask_that_only_a_run_knows(toy: Callable[..., Program]) -> None:
    program = _holding(toy(), None)
    graph = program.stages[0].variants["plain"]
    assert graph.layout is not None
    masked = replace(graph, layout=replace(graph.layout, frame_mask_input="frame_mask"))
    with pytest.raises(MovdcError, match="takes a mask of frames as input frame_mask"):
        Leap()(program.map_graphs({("denoiser", "plain"): masked}))


def _line(program: Program) -> str:
    return "\n" + next(line for line in print_program(program).splitlines() if line.startswith("sampler")) + "\n"


def test_golden_text_the_rule_and_nothing_else(toy: Callable[..., Program]) -> None:
    before = toy()
    result = Leap(step=15)(before)
    assert _line(before) == BEFORE
    assert _line(result.program) == AFTER
    assert print_program(result.program).replace(AFTER, BEFORE) == print_program(before)
    assert result.note == "16 evaluations of 30"


def test_modified_is_honest(toy: Callable[..., Program]) -> None:
    once = Leap(mode="dynamic")(toy())
    again = Leap(mode="dynamic")(once.program)
    other = Leap(mode="dynamic", patience=4)(once.program)
    assert (once.modified, again.modified, other.modified) == (True, False, True)


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("leap", {"mode": "fixed", "step": None}),
        ("leap{step=8}", {"mode": "fixed", "step": 8}),
        ("leap{mode=dynamic}", {"mode": "dynamic", "min_steps": None, "tol": 1e-4, "patience": 3, "metric": "all"}),
        ("leap{mode=dynamic,min_steps=9,tol=1e-05,patience=2}", {"min_steps": 9, "tol": 1e-5, "patience": 2}),
        ("leap{mode=dynamic,metric=first_frame_rows}", {"metric": "first_frame_rows", "best": None}),
        ("leap{mode=reference}", {"min_steps": 14, "tol": 1e-3, "patience": 3, "metric": "first_frame_rows"}),
        ("leap{mode=reference}", {"mode": "dynamic", "best": 0.0}),
    ],
)
def test_options_parse_print_back_and_become_the_rule(text: str, rule: dict[str, Any]) -> None:
    (parsed,) = parse_pipeline(text)
    assert isinstance(parsed, Leap)
    assert str(parsed) == text
    assert rule.items() <= parsed.rule.model_dump().items()


@pytest.mark.parametrize("solver", ["heun", "ddim", "unipc", "dpm"])
def test_refuses_a_solver_that_is_not_euler(toy: Callable[..., Program], solver: str) -> None:
    with pytest.raises(MovdcError, match=f"solver is {solver}; a leap needs euler, because .* history"):
        Leap()(toy(solver=solver))


@pytest.mark.parametrize("prediction", ["v_prediction", "epsilon"])
def test_refuses_a_prediction_that_is_no_drift(toy: Callable[..., Program], prediction: str) -> None:
    with pytest.raises(MovdcError, match=f"prediction is {prediction}; a leap needs rectified_flow or flow_match"):
        Leap()(toy(prediction=prediction))


def test_takes_flow_matching(toy: Callable[..., Program]) -> None:
    assert Leap()(toy(prediction="flow_match")).modified


def test_refuses_frames_held_as_condition(toy: Callable[..., Program]) -> None:
    with pytest.raises(MovdcError, match=r"denoiser \(plain\) holds frames 0, 2 as condition"):
        Leap()(_holding(toy(), (False, True, False, True)))
    assert Leap()(_holding(toy(), (True,) * 4)).modified
    assert Leap()(_holding(toy(), None)).modified


@pytest.mark.parametrize(
    ("steps", "pass_", "message"),
    [
        (30, Leap(step=30), "step 30 is the first that can leap, and in 30 steps .* is 28; lower step"),
        (30, Leap(step=29), "step 29 is the first that can leap"),
        (2, Leap(), "step 1 is the first that can leap, and in 2 steps .* is 0"),
        (7, Leap(mode="dynamic"), "step 7 is the first .* is 5; lower min_steps or patience"),
        (17, Leap(mode="reference"), "step 16 is the first .* is 15; use mode=dynamic"),
    ],
)
def test_refuses_a_rule_that_never_leaps(toy: Callable[..., Program], steps: int, pass_: Leap, message: str) -> None:
    with pytest.raises(MovdcError, match=message):
        pass_(toy(units=(steps,)))


def test_takes_the_last_rule_that_leaps(toy: Callable[..., Program]) -> None:
    assert Leap(step=28)(toy()).note == "29 evaluations of 30"
    assert Leap(mode="reference")(toy(units=(18,))).note == "at most 18 evaluations of 18"
    assert Leap(step=12)(toy(units=(20, 10))).note == "23 evaluations of 30"  # the unit of 10 takes every step


@pytest.mark.parametrize(
    ("pass_", "message"),
    [
        (Leap(patience=2), "mode fixed has no option patience; its options are step"),
        (Leap(mode="dynamic", step=3), "mode dynamic has no option step; its options are min_steps, tol"),
        (Leap(mode="reference", tol=0.1), "mode reference has no option tol; its options are none"),
        (Leap(step=-1), "option step: .* greater than or equal to 0, got -1"),
        (Leap(mode="dynamic", tol=float("nan")), "option tol: .* got nan"),
    ],
)
def test_refuses_options_that_cannot_be_used(toy: Callable[..., Program], pass_: Leap, message: str) -> None:
    with pytest.raises(MovdcError, match=message):
        pass_(toy())


def test_pyramidal_flow_takes_159_evaluations_of_270(toy: Callable[..., Program]) -> None:
    program = toy(units=PYRAMIDAL_FLOW, prediction="flow_match")
    assert evaluations(program.sampler) == 270
    assert evaluations(Leap()(program).program.sampler) == 159


@given(
    steps=st.integers(1, 40),
    rule=st.builds(
        LeapRule,
        mode=st.sampled_from(["fixed", "dynamic"]),
        step=st.none() | st.integers(0, 45),
        min_steps=st.none() | st.integers(1, 45),
        patience=st.integers(1, 5),
        best=st.none() | st.sampled_from([0.0, 1.0]),
    ),
)
def test_the_runtime_leaps_when_the_plan_says(steps: int, rule: LeapRule) -> None:
    sampler = Sampler(
        solver="euler",
        prediction="rectified_flow",
        units=(steps,),
        leap=rule,
        shift=1.0,
        rounded=False,
        guidance=1.0,
        latent=LATENT,
    )
    noise = initial_noise(0, LATENT)
    velocity = torch.ones(2, *LATENT[1:]).numpy()  # straight from the start, so that only patience makes it wait
    _, trajectory = sample(lambda z, t, step: velocity, noise, sampler)
    earliest = first_leap(rule, steps)
    if rule.mode == "fixed":
        assert trajectory.evaluations == evaluations(sampler)
    assert trajectory.evaluations <= evaluations(sampler)
    if trajectory.leap_step is None:
        assert rule.best == 0.0 or earliest > steps - 2
    else:
        assert trajectory.leap_step == earliest + (rule.mode == "dynamic" and rule.best == 0.0)


@pytest.mark.slow
def test_numbers_of_the_example_are_within_the_figure(
    example_program: Program, run_graph: Callable[..., list[torch.Tensor]]
) -> None:
    recorded = load_file(TINY / "golden_1.safetensors")
    graphs = {(stage, variant): graph for stage, variant, graph in example_program.graphs()}
    text, mask = recorded["text_embedding"][None], recorded["attention_mask"][None].float()
    evaluated: dict[bytes, Array] = {}  # all runs begin alike

    def denoise(z: Array, t: Array, step: int) -> Array:
        if z.tobytes() not in evaluated:
            inputs = {"latents": torch.from_numpy(z), "timestep": torch.from_numpy(t), "text": text, "text_mask": mask}
            evaluated[z.tobytes()] = run_graph(graphs["denoiser", "plain"], **inputs)[0].numpy()
        return evaluated[z.tobytes()]

    def decode(latents: Array) -> np.ndarray[Any, Any]:
        decode = example_program.decode
        parts = torch.from_numpy(latents).split([chunk.latent_frames for chunk in decode.chunks], dim=2)
        chunks = [
            run_graph(graphs["vae_temporal", chunk.variant], latents=part)[0]
            for chunk, part in zip(decode.chunks, parts, strict=True)
        ]
        frames = torch.cat(chunks, dim=2)[0].transpose(0, 1)
        padded = torch.cat([frames, frames[:2]])  # 34 frames to a whole number of micro-batches
        batches = padded.split(decode.micro_batch_frames)
        pixels = torch.cat([run_graph(graphs["vae_spatial", "plain"], frames=batch)[0] for batch in batches])
        return to_frames(pixels[: len(frames)].numpy())

    noise = recorded["noise"][None].numpy()
    for pass_ in (Leap(), Leap(mode="dynamic"), Leap(mode="reference")):
        latents, trajectory = sample(denoise, noise, pass_(example_program).program.sampler)
        assert trajectory.leap_step is not None
        assert trajectory.leap_step >= 15
        error = decode(latents).astype(np.float64) - recorded["frames"].numpy()
        psnr_db = 10 * np.log10(255**2 / np.mean(error**2))
        print(f"{pass_}: {trajectory.evaluations} evaluations, {psnr_db:.1f} dB")
        assert psnr_db >= MIN_PSNR_DB
