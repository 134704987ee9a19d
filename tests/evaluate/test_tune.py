"""The search for a setting, on losses and times that are formulas here, and the YAML that it writes."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest

from movdc.compiler.errors import MovdcError
from movdc.compiler.spec import load_spec
from movdc.evaluate.chosen import write_chosen
from movdc.evaluate.results import pareto_front
from movdc.evaluate.settings import Setting
from movdc.evaluate.tune import MOST_COMBINATIONS, Limit, search

Movdc = Callable[..., CompletedProcess[str]]
Refused = Callable[[CompletedProcess[str]], str]
STEPS = 30


def _evaluations(setting: Setting) -> int:
    steps = setting.steps or STEPS
    return {"none": steps, "fixed": steps // 2 + 1, "dynamic": steps * 2 // 3}[setting.leap]


def _psnr_db(setting: Setting) -> float | None:
    """Each thing that is given up costs; merging most."""
    lost = 10 * (setting.merge_steps > 0) + 4 * len(setting.int8) + 6 * (setting.leap != "none")
    lost += 5 * (setting.steps is not None)
    return 50.0 - lost if lost else None


def _predict(setting: Setting, evaluations: int) -> float:
    merged = min(setting.merge_steps, evaluations)
    return evaluations - 0.2 * merged - 0.1 * len(setting.int8)


class _Measured:
    """Measures by the formulas above, and remembers what it was asked for."""

    def __init__(self) -> None:
        self.asked: list[Setting] = []

    def __call__(self, settings: Sequence[Setting]) -> Mapping[Setting, dict[str, Any]]:
        self.asked += settings
        return {
            one: {
                "worst_psnr_db": _psnr_db(one),
                "worst_ssim": None,
                "adherence": None,
                "evaluations": _evaluations(one),
            }
            for one in settings
        }


def test_the_fastest_within_the_limit_is_chosen() -> None:
    measure = _Measured()
    found = search(STEPS, [Limit("psnr", 42)], measure, _predict)
    assert found[0].setting == Setting()
    chosen = found[-1]
    assert chosen.setting == Setting(steps=15)  # with anything else it would be over the limit, merging is so alone
    assert chosen.within
    assert all(one.predicted_s >= chosen.predicted_s for one in found if one.within)
    combined = [one for one in measure.asked if one.merge_steps and one.leap != "none"]
    assert not combined, "what is over the limit alone is not combined"


def test_what_is_within_the_limit_together_is_combined() -> None:
    found = search(STEPS, [Limit("psnr", 30)], _Measured(), _predict)
    assert found[-1].setting == Setting(steps=15, leap="fixed", int8=("text_encoder", "denoiser"))
    assert found[-1].summary["worst_psnr_db"] == 31
    assert sum(_psnr_db(one.setting) is not None for one in found) <= 10 + MOST_COMBINATIONS


def test_where_nothing_is_within_the_limit_nothing_is_given_up() -> None:
    found = search(STEPS, [Limit("psnr", 49)], _Measured(), _predict)
    assert found[-1].setting == Setting()
    assert not any(one.within for one in found[:-1])
    with pytest.raises(MovdcError, match="adherence is for captions"):
        search(STEPS, [Limit("adherence", 90)], _Measured(), _predict)


def test_limits_are_read_with_their_units() -> None:
    assert Limit.parse("psnr>=30dB") == Limit("psnr", 30)
    assert Limit.parse("ssim >= 0.95") == Limit("ssim", 0.95)
    assert Limit.parse("adherence>=98%").holds({"adherence": 0.981})
    assert not Limit.parse("adherence>=98%").holds({"adherence": 0.979})
    for text in ("psnr<=30", "psnr>=30%", "lpips>=1", "psnr"):
        with pytest.raises(MovdcError, match="is no limit; write one like psnr>=30dB"):
            Limit.parse(text)


def test_the_front_has_no_point_that_another_beats() -> None:
    costs, values = [3.0, 1.0, 2.0, 1.0, 4.0], [9.0, 5.0, 5.0, 4.0, 9.0]
    assert pareto_front(costs, values) == [1, 0]
    assert pareto_front([], []) == []


@pytest.mark.slow
def test_a_limit_that_cannot_be_read_is_refused_before_anything_is_compiled(
    movdc: Movdc, refused: Refused, example: Path, tmp_path: Path
) -> None:
    prompts = example.parent / "tiny-prompts.txt"
    line = ["tune", example, "--prompts", prompts, "-o", tmp_path / "chosen.yaml", "--max-loss", "quality>=1"]
    assert "is no limit" in refused(movdc(*line, cwd=tmp_path))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_yaml_that_cannot_be_written_is_refused_before_anything_is_compiled(
    movdc: Movdc, refused: Refused, example: Path, tmp_path: Path
) -> None:
    prompts = example.parent / "tiny-prompts.txt"
    line = ["tune", example, "--prompts", prompts, "-o", tmp_path, "--max-loss", "psnr>=30dB"]
    assert f"{tmp_path}: cannot be written (Is a directory)" in refused(movdc(*line, cwd=tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_the_chosen_yaml_says_the_same_from_another_folder(example: Path, tmp_path: Path) -> None:
    given = load_spec(example)
    chosen = Setting(leap="fixed", merge_steps=8, int8=("text_encoder",), steps=20)
    write_chosen(tmp_path / "chosen.yaml", given, chosen)
    written = load_spec(tmp_path / "chosen.yaml")
    expected = chosen.applied(given.spec)
    assert (written.spec.passes, written.spec.sampler) == (expected.passes, expected.sampler)
    assert written.spec.memory_budget == given.spec.memory_budget
    for section in ("text_encoder", "denoiser", "vae"):
        weights = written.path.parent / getattr(written.spec, section).weights
        assert weights.resolve() == (example.parent / getattr(given.spec, section).weights).resolve()
