"""Wrong input as a user types it: one sentence on one line, exit code 2, nothing left behind."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import numpy as np
import pytest

from movdc.runtime.bundle import Bundle

Movdc = Callable[..., CompletedProcess[str]]
Refused = Callable[[CompletedProcess[str]], str]
pytestmark = pytest.mark.slow  # each command takes seconds to import torch


@pytest.fixture
def example_with(tmp_path: Path, example: Path) -> Callable[[str, str], Path]:
    """The example with one passage replaced, in a folder of its own with the checkpoints beside it."""
    text = example.read_text()
    (tmp_path / "checkpoints").symlink_to(example.parent / "checkpoints")

    def write(old: str, new: str) -> Path:
        assert old in text
        path = tmp_path / "wrong.yaml"
        path.write_text(text.replace(old, new, 1))
        return path

    return write


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        pytest.param("steps: 30", "stepps: 30", "sampler.stepps: unknown key; did you mean 'steps'", id="unknown key"),
        pytest.param("fps: 12", "fps: fast", "video.fps: .*got 'fast'", id="wrong type"),
        pytest.param("max_tokens: 24", "max_tokens: -1", "text_encoder.max_tokens: .*got -1", id="out of range"),
        pytest.param("movdc: 1", "movdc: 7", "movdc: .*got 7", id="format version"),
        pytest.param(
            "max_tokens: 24",
            "max_tokens: 24, buckets: [16, 24]",
            r"text_encoder.buckets: \[16, 24\]: write them from the shortest up, all below 24",
            id="buckets",
        ),
        pytest.param(", max_tokens: 24", "", "text_encoder.max_tokens: is required but missing", id="missing key"),
        pytest.param("device: host", "device: host\ndevice: host", "device: is given twice", id="duplicate key"),
        pytest.param("video:        {", "video:        [", "is not YAML", id="not YAML"),
        pytest.param("memory_budget: ", "memory_budget: huge  # ", "memory_budget: 'huge' is not a size", id="size"),
        pytest.param("family: opensora-1.2", "family: sora", "family: unknown .*opensora-1.2", id="family"),
        pytest.param("target: executorch-xnnpack", "target: abacus", "target: unknown .*executorch", id="target"),
        pytest.param("device: host", "device: pdp11", "device: unknown .*iphone-15-pro", id="device"),
        pytest.param("device: host", "passes: {merge: {}}", "passes: unknown pass 'merge'; .*leap", id="pass"),
        pytest.param(
            "device: host", "passes: {leap: {step: many}}", "passes: pass leap: option step: .*got 'many'", id="option"
        ),
        pytest.param("frames: 34", "frames: 9", "video.frames: 9 is neither 1 nor at least 17", id="frames"),
        pytest.param("tiny/denoiser", "none/denoiser", "denoiser.weights: no folder .*config.json", id="no folder"),
        pytest.param("checkpoints/tiny/vae", "someone/some-model", "vae.weights: .*config.json.*folder", id="no hub"),
    ],
)
def test_wrong_yaml_is_refused(
    movdc: Movdc, refused: Refused, example_with: Callable[[str, str], Path], old: str, new: str, says: str
) -> None:
    spec = example_with(old, new)
    # Nothing listens at this endpoint: a hub that cannot be reached, on machines with a network too.
    message = refused(movdc("compile", spec, "-o", spec.parent / "out", HF_ENDPOINT="http://127.0.0.1:9"))
    assert re.match(rf"{re.escape(str(spec))}:\d+: {says}", message), message
    assert {path.name for path in spec.parent.iterdir()} == {"wrong.yaml", "checkpoints"}


@pytest.mark.parametrize(("text", "says"), [("", "holds no keys"), ("just words", "holds no keys")])
def test_a_file_that_is_no_spec_is_refused(
    movdc: Movdc, refused: Refused, tmp_path: Path, text: str, says: str
) -> None:
    spec = tmp_path / "wrong.yaml"
    spec.write_text(text)
    assert says in refused(movdc("compile", spec, "-o", tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_spec_that_is_not_there_is_refused(movdc: Movdc, refused: Refused, tmp_path: Path) -> None:
    message = refused(movdc("compile", tmp_path / "none.yaml", "-o", tmp_path / "out"))
    assert message.startswith(f"{tmp_path / 'none.yaml'}: cannot be read")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("budget", ["-3MB", "5 parsecs"])
def test_a_budget_that_is_no_size_is_refused(
    movdc: Movdc, refused: Refused, example: Path, tmp_path: Path, budget: str
) -> None:
    message = refused(movdc("compile", example, "-o", tmp_path / "out", f"--memory-budget={budget}"))
    assert message.startswith(f"--memory-budget: {budget!r} is not a size")
    assert not list(tmp_path.iterdir())


def test_a_budget_that_nothing_fits_into_names_the_smallest_and_its_node(
    movdc: Movdc, refused: Refused, example: Path, tmp_path: Path
) -> None:
    message = refused(movdc("compile", example, "-o", tmp_path / "out", "--memory-budget", "2MB"))
    found = re.search(r"smallest memory budget is (\d+) bytes .*set by %\w+ \(aten\.", message)
    assert found, message
    assert int(found[1]) > 2_000_000
    assert not list(tmp_path.iterdir())


def test_a_file_in_the_place_of_the_bundle_is_kept(
    movdc: Movdc, refused: Refused, example: Path, tmp_path: Path
) -> None:
    (tmp_path / "out").write_text("mine")
    assert "is no bundle" in refused(movdc("compile", example, "-o", tmp_path / "out"))
    assert (tmp_path / "out").read_text() == "mine"


@pytest.mark.parametrize("command", ["run", "inspect"])
def test_a_bundle_that_is_not_there_is_refused(movdc: Movdc, refused: Refused, tmp_path: Path, command: str) -> None:
    options = ["--prompt", "a red circle", "-o", tmp_path / "clip.mp4"] if command == "run" else []
    message = refused(movdc(command, tmp_path / "none", *options))
    assert message.startswith(f"{tmp_path / 'none'}: no such bundle")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("prompt", ["", "<b></b>"])
def test_a_prompt_of_which_nothing_is_left_is_refused(
    movdc: Movdc, refused: Refused, bundle: Path, tmp_path: Path, prompt: str
) -> None:
    message = refused(movdc("run", bundle, "--prompt", prompt, "-o", tmp_path / "clip.mp4"))
    assert message.startswith("the prompt is empty")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("noise", "says"),
    [
        pytest.param(np.zeros((1, 4, 3), np.float32), r"the noise is float32 \[1, 4, 3\]; .*needs float32", id="shape"),
        pytest.param("latent of float64", "the noise is float64 .*needs float32", id="dtype"),
        pytest.param(b"not an array", "is not a readable .npy file", id="not npy"),
        pytest.param(b"", "is not a readable .npy file", id="empty"),
        pytest.param(None, "is not a readable .npy file", id="missing"),
    ],
)
def test_noise_that_does_not_fit_is_refused(
    movdc: Movdc, refused: Refused, bundle: Path, tmp_path: Path, noise: object, says: str
) -> None:
    path, clip = tmp_path / "noise.npy", tmp_path / "clip.mp4"
    if isinstance(noise, bytes):
        path.write_bytes(noise)
    elif isinstance(noise, str):
        np.save(path, np.zeros(Bundle.read(bundle).manifest.sampler.latent, np.float64))
    elif noise is not None:
        np.save(path, noise)
    message = refused(movdc("run", bundle, "--prompt", "a red circle", "-o", clip, "--noise", path))
    assert re.search(says, message), message
    assert not clip.exists()


@pytest.mark.parametrize(("option", "value"), [("--steps", "0"), ("--steps", "many"), ("--seed", "-1")])
def test_a_number_out_of_range_is_refused(movdc: Movdc, bundle: Path, tmp_path: Path, option: str, value: str) -> None:
    done = movdc("run", bundle, "--prompt", "a red circle", "-o", tmp_path / "clip.mp4", f"{option}={value}")
    assert done.returncode == 2
    assert f"Invalid value for '{option}'" in done.stderr + done.stdout
    assert "Traceback" not in done.stderr + done.stdout
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("option", "value", "says"),
    [
        ("--mode", "fast", "--mode: unknown 'fast'; there are sequential, concurrent, dynamic"),
        ("--memory-budget", "much", "--memory-budget: .*much"),
        ("--memory-budget", "1MB", r"text_encoder needs \d+ bytes at least; the budget is 1000000"),
    ],
)
def test_a_way_to_run_that_there_is_not_is_refused(
    movdc: Movdc, refused: Refused, bundle: Path, tmp_path: Path, option: str, value: str, says: str
) -> None:
    options = ["--prompt", "a red circle", "-o", tmp_path / "clip.mp4", "--no-cache", option, value]
    message = refused(movdc("run", bundle, *options))
    assert re.search(says, message), message
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", ["run", "inspect"])
def test_a_damaged_bundle_is_refused_by_the_name_of_its_file(
    movdc: Movdc, refused: Refused, bundle: Path, tmp_path: Path, command: str
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(bundle, copy)
    name = "bundle.json" if command == "inspect" else Bundle.read(bundle).manifest.partitions[-1].program
    data = (copy / name).read_bytes()
    (copy / name).write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    options = ["--prompt", "a red circle", "-o", tmp_path / "clip.mp4"] if command == "run" else []
    message = refused(movdc(command, copy, *options))
    assert str(copy) in message
    assert name in message
    assert {path.name for path in tmp_path.iterdir()} == {"copy"}


@pytest.mark.parametrize("listing", ["passes", "targets", "devices"])
def test_what_there_is_can_be_listed(movdc: Movdc, listing: str) -> None:
    done = movdc(listing)
    assert done.returncode == 0
    one = {"passes": "partition", "targets": "executorch-xnnpack", "devices": "iphone-15-pro"}[listing]
    assert one in done.stdout


def test_a_file_in_the_place_of_a_cache_is_refused(
    movdc: Movdc, refused: Refused, bundle: Path, example: Path, tmp_path: Path
) -> None:
    file, out = tmp_path / "file", tmp_path / "out"
    file.write_bytes(b"mine")
    for command in (
        ["compile", example, "-o", out, "--cache", file],
        ["compile", example, "-o", file / "out"],
        ["cache", "--cache", file],
        ["run", bundle, "--prompt", "a red circle", "-o", tmp_path / "clip.mp4", "--packed-cache", file],
    ):
        assert str(file) in refused(movdc(*command))
    assert list(tmp_path.iterdir()) == [file]
    assert file.read_bytes() == b"mine"


def test_a_full_disk_is_one_sentence(movdc: Movdc, refused: Refused, bundle: Path, tmp_path: Path) -> None:
    options = ["--prompt", "a red circle", "--steps", "1", "-o", tmp_path / "clip.mp4", "--trace", "/dev/full"]
    assert "the disk is full" in refused(movdc("run", bundle, *options))
