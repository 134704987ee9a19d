"""The whole thing as a user types it: compile the example, make a video, compare with what was recorded."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from movdc.runtime.bundle import Bundle
from movdc.runtime.executor import Executor
from movdc.runtime.generate import Generator

REPOSITORY = Path(__file__).parents[1]
MOVDC = Path(sys.executable).with_name("movdc")
GOLDEN = REPOSITORY / "tests" / "golden" / "tiny"
MAX_RELATIVE_ERROR = 1e-2
MIN_PSNR_DB = 40


def _movdc(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([MOVDC, *map(str, arguments)], capture_output=True, text=True, check=False)


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("bundles") / "tiny"
    done = _movdc("compile", REPOSITORY / "examples/tiny.yaml", "-o", out)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


@pytest.mark.slow
def test_the_example_is_cut_and_stays_within_its_budget(bundle: Path) -> None:
    manifest = Bundle.read(bundle).manifest
    stages = [partition.name.split(".")[0] for partition in manifest.partitions]
    assert stages.count("denoiser") >= 4
    assert stages.count("vae_temporal") + stages.count("vae_spatial") >= 3
    assert manifest.peak_bytes <= manifest.budget_bytes
    assert manifest.budget_bytes < sum(partition.weight_bytes for partition in manifest.partitions)
    shown = _movdc("inspect", bundle)
    assert shown.returncode == 0
    assert f"predicted peak {manifest.peak_bytes} bytes" in shown.stdout.replace("\n", " ")


@pytest.mark.slow
@pytest.mark.parametrize("index", [0, 1])
def test_the_compiled_sampler_repeats_the_recorded_run(bundle: Path, index: int) -> None:
    item = json.loads((GOLDEN / "golden.json").read_text())["items"][index]
    recorded = load_file(GOLDEN / item["file"])
    read = Bundle.read(bundle)
    executor = Executor(read)
    noise = recorded["noise"].reshape(read.manifest.sampler.latent)
    result = Generator(read, executor).generate(item["prompt"], noise=noise)
    latents = recorded["final_latents"].reshape(result.latents.shape)
    error = np.linalg.norm(result.latents - latents) / np.linalg.norm(latents)
    squared = np.mean((result.frames.astype(np.float64) - recorded["frames"]) ** 2)
    psnr_db = 10 * np.log10(255**2 / max(squared, 1e-12))
    print(f"relative L2 {error:.1e}, PSNR {psnr_db:.1f} dB")
    assert error <= MAX_RELATIVE_ERROR
    assert psnr_db >= MIN_PSNR_DB
    assert executor.peak_bytes <= read.manifest.peak_bytes


@pytest.mark.slow
def test_a_video_is_made(bundle: Path, tmp_path: Path) -> None:
    video = tmp_path / "clip.mp4"
    done = _movdc(
        "run", bundle, "--prompt", "a red circle moving down on a black background", "-o", video, "--steps", 2
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert video.stat().st_size > 1000
    assert video.with_suffix(".png").stat().st_size > 1000


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["truncate", "flip", "remove", "link"])
def test_every_damaged_file_is_refused_by_name(bundle: Path, tmp_path: Path, damage: str) -> None:
    names = [file.path for file in Bundle.read(bundle).manifest.files]
    for name in ["bundle.json", *names]:
        copy = tmp_path / "copy"
        shutil.copytree(bundle, copy)
        path = copy / name
        data = path.read_bytes()
        path.unlink()
        if damage == "truncate":
            path.write_bytes(data[:-1])
        elif damage == "flip":
            path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        elif damage == "link":
            path.symlink_to(bundle / name)
        with pytest.raises(Exception, match=name) as caught:  # reading or opening may refuse
            Executor(Bundle.read(copy))
        assert type(caught.value).__name__ == "BundleError"
        shutil.rmtree(copy)
