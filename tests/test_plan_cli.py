"""movdc fit, simulate and calibrate as a user types them."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import pytest

from movdc.compiler.device import read_profiles
from movdc.runtime.simulate import MODES
from movdc.runtime.timeline import read_trace

Movdc = Callable[..., CompletedProcess[str]]
Refused = Callable[[CompletedProcess[str]], str]
pytestmark = pytest.mark.slow


def test_fit_answers_without_weights(movdc: Movdc, example: Path) -> None:
    done = movdc("fit", example, "--device", "iphone-15-pro")
    assert done.returncode == 0, done.stderr
    assert re.search(r"fits: plan [\d.]+ s a video, bound [\d.]+ s, peak [\d.]+ MiB of 13\.4 MiB", done.stdout)
    small = movdc("fit", example, "--memory-budget", "4MB")
    assert small.returncode == 0, small.stderr
    assert "does not fit: denoiser" in small.stdout
    assert "17 frames" in small.stdout


def test_a_bundle_is_simulated_and_a_trace_of_it_calibrates_a_device(
    movdc: Movdc, bundle: Path, tmp_path: Path
) -> None:
    trace, profile = tmp_path / "t.json", tmp_path / "mine.toml"
    seconds, said = {}, {}
    for mode in reversed(MODES):  # the trace of the last one, sequential, is calibrated by
        done = movdc("simulate", bundle, "--mode", mode, "--trace", trace)
        assert done.returncode == 0, done.stderr
        seconds[mode] = max(event.end_s for event in read_trace(trace))
        said[mode] = done.stdout
    assert seconds["sequential"] > seconds["concurrent"] >= seconds["dynamic"]
    texts = said["dynamic"], movdc("inspect", bundle).stdout
    plans = [re.search(r"plan ([\d.]+) s .*on host, bound ([\d.]+) s", text) for text in texts]
    (plan_s, bound_s), shown = (one.groups() for one in plans if one)
    assert (plan_s, bound_s) == shown
    assert float(plan_s) == pytest.approx(seconds["dynamic"], abs=0.01)
    assert 0.5 * float(plan_s) < float(bound_s) <= float(plan_s)
    assert json.loads(trace.read_text())["traceEvents"][0]["args"]["name"] == "movdc"
    assert movdc("calibrate", bundle, "--trace", trace, "-o", profile).returncode == 0
    fitted = next(iter(read_profiles(profile).values()))
    host = read_profiles(Path(__file__).parents[1] / "targets" / "devices.toml")["host"]
    assert fitted.fp32_flops_per_s == pytest.approx(host.fp32_flops_per_s, rel=0.01)
    assert fitted.source["int8_flops_per_s"].startswith("estimate: as fp32"), "the example has no such products"
    page = tmp_path / "r.html"
    done = movdc("simulate", bundle, "--device", profile, "--measured", trace, "--report", page)
    assert done.returncode == 0, done.stderr
    assert "measured: loads above" in page.read_text()


def test_wrong_input_is_one_sentence(
    movdc: Movdc, refused: Refused, bundle: Path, example: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other.json"
    other.write_text("{}")
    assert "unknown device 'pdp11'" in refused(movdc("fit", example, "--device", "pdp11"))
    assert "is no trace of movdc" in refused(movdc("calibrate", bundle, "--trace", other))
    assert "cannot be read" in refused(movdc("simulate", bundle, "--device", tmp_path / "none.toml"))
    assert "--mode: unknown 'fast'" in refused(movdc("simulate", bundle, "--mode", "fast"))
    assert "bytes at least" in refused(movdc("simulate", bundle, "--memory-budget", "1MB"))
    assert "cannot be written" in refused(movdc("simulate", bundle, "--report", tmp_path))
    assert "folder cannot be made" in refused(movdc("simulate", bundle, "--report", other / "page.html"))
    other.with_suffix(".toml").write_text("[a]\nload_rate = 'many'\n")
    profile = refused(movdc("simulate", bundle, "--device", other.with_suffix(".toml")))
    assert "is no device profile (usable_memory: Field required)" in profile
    assert {path.name for path in tmp_path.iterdir()} == {"other.json", "other.toml"}
