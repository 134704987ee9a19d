"""Settings and the YAML of a sweep: what they make of a pipeline, and what is refused in one sentence."""

from pathlib import Path

import pytest

from movdc.compiler.errors import MovdcError
from movdc.compiler.spec import load_spec
from movdc.evaluate.settings import Grid, Setting, load_prompts, load_sweep
from movdc.evaluate.shape_clips import caption, held_out

EXAMPLES = Path(__file__).parents[2] / "examples"


def test_a_setting_takes_the_place_of_what_a_pipeline_gives_up() -> None:
    spec = load_spec(EXAMPLES / "tiny.yaml").spec
    passes = {"leap": {"mode": "fixed", "step": 20}, "quantize-int8": {"keep": ["a*"]}, "merge-tokens": {"steps": 3}}
    given = spec.model_copy(update={"passes": passes})
    assert Setting().applied(given) == spec
    assert Setting(leap="dynamic").applied(given).passes == {"leap": {"mode": "dynamic"}}, "step is an option of fixed"
    made = Setting(leap="fixed", int8=("denoiser",), merge_steps=8, steps=20).applied(given)
    assert made.passes == {
        "leap": {"mode": "fixed", "step": 20},
        "quantize-int8": {"keep": ["a*"], "stages": ["denoiser"]},
        "merge-tokens": {"steps": 8},
    }
    assert made.sampler.steps == 20
    assert made.sampler.guidance == spec.sampler.guidance


def test_a_grid_is_every_combination_and_names_what_it_is() -> None:
    grid = Grid(steps=[None, 20], leap=["none", "fixed"], int8=[[], ["text_encoder", "denoiser"]])
    names = [str(one) for one in grid.settings()]
    assert len(set(names)) == 8
    assert names[0] == "full"
    assert names[-1] == "int8 text_encoder+denoiser, leap fixed, 20 steps"


def test_the_examples_sweep_has_the_settings_of_the_readme(tmp_path: Path) -> None:
    sweep = load_sweep(EXAMPLES / "tiny-sweep.yaml")
    assert next(iter(sweep.named_settings())) == "full"
    assert next(iter(sweep.named_settings().values())) == Setting()
    prompts = load_prompts(EXAMPLES / sweep.prompts)
    assert prompts == [caption(one) for one in held_out(48)]
    path = tmp_path / "sweep.yaml"
    path.write_text("spec: s\nprompts: p\nsettings: {plain: {}}\ngrid: {merge_steps: [0, 5]}")
    assert list(load_sweep(path).named_settings()) == ["plain", "merge 5"]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("spec: a\nprompt: b", "prompts: Field required"),
        ("spec: a\nprompts: b\nseed: 3", "seed: Extra inputs are not permitted; the keys are spec, prompts, seeds"),
        ("spec: a\nprompts: b\nsettings: {x: {leap: far}}", "settings.x.leap: Input should be 'none', 'fixed'"),
        ("spec: a\nprompts: b\nsettings: {}", "settings has none; give one"),
        ("spec: [", "is not YAML"),
        ("", "the whole: Input should be a valid dictionary"),
    ],
)
def test_a_wrong_sweep_is_refused(text: str, says: str, tmp_path: Path) -> None:
    path = tmp_path / "sweep.yaml"
    path.write_text(text)
    with pytest.raises(MovdcError) as error:
        load_sweep(path)
    assert str(error.value).startswith(f"{path}: ")
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def test_prompts_are_one_a_line(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("# a comment\n\n  a red circle \na cat\n")
    assert load_prompts(path) == ["a red circle", "a cat"]
    path.write_text("# nothing")
    with pytest.raises(MovdcError, match="has no prompts; write one a line"):
        load_prompts(path)
    with pytest.raises(MovdcError, match="cannot be read"):
        load_prompts(tmp_path / "none.txt")
