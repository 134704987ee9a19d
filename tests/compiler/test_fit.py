"""movdc fit: sizes that follow from configs are those of the models, and what does not fit is told with what would."""

import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from movdc.compiler import offers as choices
from movdc.compiler.device import read_profiles
from movdc.compiler.errors import MovdcError
from movdc.compiler.fit import SLACK, Choice, fit
from movdc.compiler.spec import VideoSpec
from movdc.models.opensora_layers import PUBLISHED, stages

REPOSITORY = Path(__file__).parents[2]
PROFILES = read_profiles(REPOSITORY / "targets" / "devices.toml")
FAMILY = choices.FamilyLayers(stages, PUBLISHED)
PHONE = choices.machine_of(PROFILES["iphone-15-pro"], None)


def _of(name: str) -> tuple[choices.StagesOf, Choice]:
    spec_file = choices.read(REPOSITORY / "examples" / name)
    return choices.stages_of(spec_file, FAMILY), choices.choice_of(spec_file.spec)


def test_published_configs_have_the_published_numbers_of_parameters_and_flops() -> None:
    video = VideoSpec(frames=68, height=256, width=256, fps=24)
    text, denoiser, vae = PUBLISHED.values()
    found = {one.name: one for one in stages(text, denoiser, vae, video, 35, 4, True)}
    values = {
        (name, variant): sum(layer.weights + layer.others for layer in layers)
        for name, one in found.items()
        for variant, layers in one.variants.items()
    }
    assert values["text_encoder", "plain"] == pytest.approx(4630708224 + 131596288, rel=1e-4)
    assert values["denoiser", "plain"] == pytest.approx(1207643972, rel=2e-3)
    assert values["denoiser", "merged"] == values["denoiser", "plain"]
    assert values["vae_temporal", "frames17"] == pytest.approx(165265924, rel=1e-3)
    assert values["vae_spatial", "plain"] == pytest.approx(49490179, rel=1e-3)
    plain, merged = (sum(one.flops for one in found["denoiser"].variants[name]) for name in ("plain", "merged"))
    assert plain == pytest.approx(21.88e12, rel=0.02)
    assert plain / merged == pytest.approx(1.285, rel=0.01)


@pytest.mark.slow
def test_the_phone_of_the_paper_holds_the_paper_s_video() -> None:
    layers, choice = _of("opensora.yaml")
    assert (choice.evaluations, choice.merged_steps, choice.int8) == (16, 15, ("text_encoder",))
    video = replace(choice, frames=17)  # the weights are the same, and there is less to plan
    found = fit(layers, video, PHONE)
    assert found.fits
    assert found.peak_bytes <= PHONE.budget_bytes
    assert found.bundle_bytes == pytest.approx(10.5e9, rel=0.01)  # what a compile of it writes (README)
    assert found.stages["denoiser"].times.calls == 16
    assert found.seconds > sum(one.bound_s for one in found.stages.values())


def test_what_does_not_fit_is_told_with_what_would() -> None:
    layers, choice = _of("tiny.yaml")
    machine = choices.machine_of(PROFILES["host"], None)
    needs = fit(layers, choice, machine).needs_bytes
    small = replace(machine, budget_bytes=round(0.85 * needs))
    found = fit(layers, choice, small)
    assert not found.fits
    assert found.needs_bytes == needs
    assert found.refusal.startswith("denoiser: takes")
    given_up = choices.offers(layers, choice, small)
    assert {one.what for one in given_up if one.fit.needs_bytes < needs} >= {"17 frames", "48x48"}
    assert fit(layers, choice, replace(machine, budget_bytes=round(1.3 * needs))).fits


@settings(max_examples=6, deadline=None)
@given(st.lists(st.floats(0.9, 1.5), min_size=2, max_size=3))
def test_what_fits_a_budget_fits_every_larger_one(shares: list[float]) -> None:
    layers, choice = _of("tiny.yaml")
    machine = choices.machine_of(PROFILES["host"], None)
    needs = fit(layers, choice, machine).needs_bytes
    before_s = math.inf
    for share in sorted(shares):
        budget_bytes = round(share * needs)
        found = fit(layers, choice, replace(machine, budget_bytes=budget_bytes))
        assert found.fits == (budget_bytes >= needs)
        assert found.seconds <= before_s * (1 + SLACK)  # which the planner trades for fewer programs
        assert not found.fits or (found.peak_bytes <= budget_bytes and found.seconds >= found.bound_s)
        before_s = found.seconds


def test_merging_leaping_and_fewer_steps_gain_seconds() -> None:
    layers, choice = _of("tiny.yaml")
    machine = choices.machine_of(PROFILES["host"], 10**8)
    now = fit(layers, choice, machine).seconds
    gains = {one.what: now - one.fit.seconds for one in choices.offers(layers, choice, machine)}
    assert gains["leap at step 15"] > gains["merge-tokens, 15 steps"] > 0


def test_no_torch_is_imported() -> None:
    code = "import sys; from movdc.compiler import fit, offers; from movdc.models import opensora_layers; "
    done = subprocess.run(
        [sys.executable, "-c", code + "print('torch' in sys.modules)"], capture_output=True, text=True
    )
    assert done.stdout.strip() == "False", done.stderr


def test_the_memory_figures_are_those_of_the_target() -> None:
    from movdc.targets.executorch_xnnpack import ExecutorchXnnpack as Target

    figures = (Target.load_copies, Target.value_copies, Target.node_bytes)
    assert figures == (choices.LOAD_COPIES, choices.VALUE_COPIES, choices.NODE_BYTES)


def test_a_folder_of_models_needs_no_yaml_and_one_without_configs_is_refused(tmp_path: Path) -> None:
    tiny = REPOSITORY / "examples" / "checkpoints" / "tiny"
    spec_file = choices.read(tiny)
    machine = choices.machine_of(PROFILES["host"], None)
    small = replace(choices.choice_of(spec_file.spec), frames=17, height=64, width=64)
    assert fit(choices.stages_of(spec_file, FAMILY), small, machine).fits
    with pytest.raises(MovdcError, match=r"has no text_encoder/config\.json and not one YAML"):
        choices.read(tmp_path)


def test_a_repository_whose_config_is_not_here_is_refused(tmp_path: Path) -> None:
    text = (REPOSITORY / "examples" / "opensora.yaml").read_text()
    path = tmp_path / "other.yaml"
    path.write_text(text.replace("hpcai-tech/OpenSora-STDiT-v3", "someone/else"))
    with pytest.raises(MovdcError, match=r"other\.yaml:6: denoiser\.weights: no readable .*config\.json"):
        choices.stages_of(choices.read(path), FAMILY)
