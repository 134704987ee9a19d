"""The whole thing as a user types it: compile the example, make a video, compare with what was recorded."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import numpy as np
import pytest
from safetensors.numpy import load_file

from movdc.evaluate.shape_clips import ATTRIBUTES, caption, held_out, judge
from movdc.runtime.bundle import Bundle, Manifest
from movdc.runtime.executor import Executor
from movdc.runtime.generate import Generator, Result

GOLDEN = Path(__file__).parent / "golden" / "tiny"
MAX_RELATIVE_ERROR = 1e-4  # another order of summation gives about 1e-6
MIN_PSNR_DB = 60
PROMPTS, MIN_RIGHT = 48, 46
Movdc = Callable[..., CompletedProcess[str]]
pytestmark = pytest.mark.slow


def _relative_error(ours: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(ours - expected) / np.linalg.norm(expected))


def _psnr_db(ours: np.ndarray, expected: np.ndarray) -> float:
    squared = np.mean((ours.astype(np.float64) - expected) ** 2)
    return float(10 * np.log10(255**2 / max(squared, 1e-12)))


def _recorded_run(bundle: Path, index: int) -> tuple[Result, dict[str, np.ndarray]]:
    """The recorded prompt from the recorded noise, and what was recorded; the run stays within the predicted peak."""
    item = json.loads((GOLDEN / "golden.json").read_text())["items"][index]
    recorded = load_file(GOLDEN / item["file"])
    read = Bundle.read(bundle)
    executor = Executor(read)
    noise = recorded["noise"].reshape(read.manifest.sampler.latent)
    result = Generator(read, executor).generate(item["prompt"], noise=noise)
    assert executor.peak_bytes <= read.manifest.peak_bytes
    return result, recorded


def _partitions_of(manifest: Manifest) -> dict[str, int]:
    stages = [partition.name.split(".")[0] for partition in manifest.partitions]
    return {stage: stages.count(stage) for stage in stages}


def _assert_shown_within_budget(movdc: Movdc, bundle: Path) -> None:
    shown = movdc("inspect", bundle)
    assert shown.returncode == 0
    found = re.search(r"predicted peak (\d+) bytes, budget (\d+) bytes", " ".join(shown.stdout.split()))
    assert found, shown.stdout
    peak_bytes, budget_bytes = int(found[1]), int(found[2])
    assert 0 < peak_bytes <= budget_bytes
    assert budget_bytes == Bundle.read(bundle).manifest.budget_bytes


def test_the_example_is_cut_and_stays_within_its_budget(movdc: Movdc, bundle: Path) -> None:
    manifest = Bundle.read(bundle).manifest
    count = _partitions_of(manifest)
    assert count["denoiser"] >= 4
    assert count["vae_temporal"] + count["vae_spatial"] >= 3
    assert manifest.budget_bytes < sum(partition.weight_bytes for partition in manifest.partitions)
    _assert_shown_within_budget(movdc, bundle)


@pytest.mark.parametrize("index", [0, 1])
def test_the_compiled_sampler_repeats_the_recorded_run(bundle: Path, index: int) -> None:
    result, recorded = _recorded_run(bundle, index)
    error = _relative_error(result.latents[0], recorded["final_latents"])
    psnr_db = _psnr_db(result.frames, recorded["frames"])
    print(f"relative L2 {error:.1e}, PSNR {psnr_db:.1f} dB")
    assert error <= MAX_RELATIVE_ERROR
    assert psnr_db >= MIN_PSNR_DB


def test_less_memory_cuts_more_and_gives_the_same_video(movdc: Movdc, bundle: Path, small_bundle: Path) -> None:
    ours, theirs = Bundle.read(small_bundle).manifest, Bundle.read(bundle).manifest
    assert ours.budget_bytes < theirs.budget_bytes
    assert len(ours.partitions) > len(theirs.partitions)
    _assert_shown_within_budget(movdc, small_bundle)
    small, _ = _recorded_run(small_bundle, 1)
    expected, _ = _recorded_run(bundle, 1)
    assert np.array_equal(small.latents, expected.latents)  # where a stage is cut changes no operation
    assert np.array_equal(small.frames, expected.frames)


def test_two_compiles_give_the_same_bytes(bundle: Path, twin_bundle: Path) -> None:
    def content(root: Path) -> dict[str, bytes]:
        return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}

    ours, twin = content(bundle), content(twin_bundle)
    assert ours.keys() == twin.keys()
    assert [name for name in ours if ours[name] != twin[name]] == []


def test_a_video_is_made(movdc: Movdc, bundle: Path, tmp_path: Path) -> None:
    video = tmp_path / "clip.mp4"
    done = movdc("run", bundle, "--prompt", "a red circle moving down on a black background", "-o", video, "--steps", 2)
    assert done.returncode == 0, done.stdout + done.stderr
    assert video.read_bytes()[4:8] == b"ftyp"
    assert video.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_a_trace_shows_both_lanes_and_the_modes_agree(movdc: Movdc, bundle: Path, tmp_path: Path) -> None:
    made = []
    for options in (["--mode", "sequential", "--packed-cache", tmp_path / "packed"], ["--trace", tmp_path / "t.json"]):
        latents = tmp_path / "latents.npy"
        common = ["--prompt", "a red circle", "--steps", 3, "-o", tmp_path / "clip.mp4", "--save-latents", latents]
        done = movdc("run", bundle, *common, *options)
        assert done.returncode == 0, done.stdout + done.stderr
        assert re.search(r"denoiser +3 ", done.stdout), done.stdout
        made.append(np.load(latents))
    assert np.array_equal(*made)
    events = json.loads((tmp_path / "t.json").read_text())["traceEvents"]
    lanes = {event["args"]["name"]: event["tid"] for event in events if event["name"] == "thread_name"}
    spans = [event for event in events if event["ph"] == "X"]
    assert {event["cat"] for event in spans if event["tid"] == lanes["loader"]} >= {"load", "read", "init"}
    runs = [event for event in spans if event["cat"] == "run"]
    assert all(event["tid"] == lanes["execution"] for event in runs)
    order = Bundle.read(bundle).stages["denoiser"].variants["plain"].order
    assert [event["name"] for event in runs if "denoiser" in event["name"]] == [f"run {name}" for name in order] * 3
    loaded = {event["name"].removeprefix("load ") for event in spans if event["cat"] == "load"}
    assert loaded == {event["name"].removeprefix("run ") for event in runs}


def test_another_seed_and_another_prompt_give_other_latents(movdc: Movdc, bundle: Path, tmp_path: Path) -> None:
    made = []
    for seed, colour in ((8, "red"), (8, "red"), (9, "red"), (8, "blue")):
        latents = tmp_path / "latents.npy"
        prompt = f"a {colour} circle moving down on a black background"
        options = ["--seed", seed, "--steps", 2, "--save-latents", latents]
        done = movdc("run", bundle, "--prompt", prompt, "-o", tmp_path / "clip.mp4", *options)
        assert done.returncode == 0, done.stdout + done.stderr
        made.append(np.load(latents))
    assert np.array_equal(made[0], made[1])
    assert not np.array_equal(made[0], made[2])
    assert not np.array_equal(made[0], made[3])


def test_the_videos_show_what_the_prompts_name(bundle: Path) -> None:
    read = Bundle.read(bundle)
    generator = Generator(read, Executor(read))
    right = dict.fromkeys(ATTRIBUTES, 0)
    for index, named in enumerate(held_out(PROMPTS)):
        seen = judge(generator.generate(caption(named), seed=index).frames)
        for attribute in ATTRIBUTES:
            right[attribute] += getattr(seen, attribute) == getattr(named, attribute)
    print(right)
    assert min(right.values()) >= MIN_RIGHT
