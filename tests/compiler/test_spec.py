"""Wrong YAML: one sentence with file, line and what is allowed."""

from pathlib import Path

import pytest
import yaml

from movdc.compiler.errors import MovdcError
from movdc.compiler.spec import load_spec

EXAMPLES = Path(__file__).parents[2] / "examples"
TINY = (EXAMPLES / "tiny.yaml").read_text()


def test_the_example_is_valid() -> None:
    spec = load_spec(EXAMPLES / "tiny.yaml").spec
    assert spec.memory_budget == 14_000_000
    assert spec.video.frames == 34


def test_what_the_readme_recommends_is_a_setting_of_the_sweep_that_was_measured() -> None:
    recommended = load_spec(EXAMPLES / "tiny-fast.yaml").spec
    plain = load_spec(EXAMPLES / "tiny.yaml").spec
    assert recommended.model_copy(update={"passes": {}, "sampler": plain.sampler}) == plain
    measured = yaml.safe_load((EXAMPLES / "tiny-sweep.yaml").read_text())["settings"]["int8, leap, 26 steps"]
    assert recommended.sampler == plain.sampler.model_copy(update={"steps": measured["steps"]})
    stages = recommended.passes["quantize-int8"]["stages"]
    assert measured == {"steps": 26, "int8": stages, "leap": recommended.passes["leap"]["mode"]}


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("steps: 30", "stepps: 30", r":8: sampler.stepps: unknown key; did you mean 'steps'"),
        ("frames: 34", "frames: many", r":7: video.frames: .*got 'many'"),
        ("frames: 34", "frames: 0", r":7: video.frames: .*got 0"),
        ("memory_budget: 14MB", "memory_budget: 6 parsecs", r":12: memory_budget: .*not a size"),
        ("movdc: 1", "movdc: 2", r":2: movdc: "),
        ("family: opensora-1.2\n", "", r": family: is required but missing"),
        ("target:", "taget:", r": taget: unknown key; did you mean 'target'"),
        ("device: host", "device: host\ndevice: host", r": device: is given twice"),
        ("sampler:      {", "sampler:      [", r"is not YAML"),
        ("frames: 34", "fraems: 34", r":7: video.fraems: unknown key; did you mean 'frames'"),
        ("guidance: 4.0", "guidance: .nan", r":8: sampler.guidance: .*finite"),
        ("device: host", "device: ho\x01st", r"is not YAML .*quote"),
        ("device: host", "device: 2024-13-45", r"is not YAML .*quote"),
        ("{weights: checkpoints/tiny/vae}", "&a {weights: x, config: *a}", r"is not YAML"),
        (", max_tokens: 24", "", r":4: text_encoder.max_tokens: is required but missing"),
    ],
)
def test_errors_say_where_and_what(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert old in TINY
    path = tmp_path / "wrong.yaml"
    path.write_text(TINY.replace(old, new, 1))
    with pytest.raises(MovdcError, match=message) as caught:
        load_spec(path)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "just words", "- a\n- b\n"])
def test_a_file_without_keys_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "wrong.yaml"
    path.write_text(text)
    with pytest.raises(MovdcError, match="holds no keys"):
        load_spec(path)
