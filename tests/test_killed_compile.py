"""`kill -9` during a compile leaves no bundle or a whole one, and the next compile sweeps up."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from subprocess import CompletedProcess

import pytest
import yaml

from movdc.runtime.bundle import MANIFEST, Bundle
from movdc.runtime.executor import Executor

Movdc = Callable[..., CompletedProcess[str]]
POLL_S = 0.01
pytestmark = pytest.mark.slow


@pytest.fixture
def shallow(tmp_path: Path, example: Path) -> Path:
    """The example's pipeline with one layer of everything and one small frame, so that a compile is short."""
    spec = yaml.safe_load(example.read_text())
    checkpoint = example.parent / "checkpoints" / "tiny"

    def config(model: str, **smaller: object) -> dict[str, object]:
        return json.loads((checkpoint / model / "config.json").read_text()) | smaller

    spec["text_encoder"] |= {
        "weights": str(checkpoint / "text_encoder"),
        "config": config("text_encoder", num_layers=1),
    }
    spec["denoiser"] = {"weights": str(checkpoint / "denoiser"), "config": config("denoiser", depth=1)}
    vae = config("vae", spatial={"block_out_channels": [8], "layers_per_block": 1, "norm_num_groups": 2})
    vae["vae_temporal"] |= {"channel_multipliers": [1, 1, 1], "temporal_downsample": [True, True], "filters": 8}
    spec["vae"] = {"weights": "random:0", "config": vae}
    spec["video"] |= {"frames": 1, "height": 16, "width": 16}
    spec["memory_budget"] = "1GB"
    path = tmp_path / "shallow.yaml"
    path.write_text(yaml.safe_dump(spec))
    return path


def _partials(out: Path) -> list[Path]:
    return list(out.parent.glob(f".{out.name}.partial-*"))


def _programs(out: Path) -> int:
    return sum(len(list(partial.rglob("*.pte"))) for partial in _partials(out))


def _compile_and_kill(spec: Path, out: Path, reached: Callable[[], bool]) -> int:
    """Kill a compile with all its children at the first moment when `reached` holds; gives its exit code."""
    before = set(_partials(out))
    command = [Path(sys.executable).with_name("movdc"), "compile", spec, "-o", out]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True) as run:
        try:
            while run.poll() is None and (before & set(_partials(out)) or not reached()):
                time.sleep(POLL_S)
        finally:
            with suppress(ProcessLookupError):  # it may have ended
                os.killpg(run.pid, signal.SIGKILL)
    return run.returncode


def _assert_whole(out: Path) -> None:
    Executor(Bundle.read(out))


def test_a_killed_compile_leaves_no_bundle_or_a_whole_one(movdc: Movdc, shallow: Path, tmp_path: Path) -> None:
    out = tmp_path / "bundles" / "shallow"

    for programs in (1, 2):  # early, and half way
        ended = _compile_and_kill(shallow, out, lambda count=programs: _programs(out) >= count)
        assert ended == -signal.SIGKILL
        assert not out.exists()
        assert len(_partials(out)) == 1  # of this compile: what earlier ones left is gone

    done = movdc("compile", shallow, "-o", out)
    assert done.returncode == 0, done.stdout + done.stderr
    assert list(out.parent.iterdir()) == [out]
    _assert_whole(out)
    first = (out / MANIFEST).read_bytes()

    # Over a bundle, when the new manifest is there: in these last moments it takes the old bundle's place.
    _compile_and_kill(shallow, out, lambda: any((partial / MANIFEST).exists() for partial in _partials(out)))
    if out.exists():
        _assert_whole(out)

    assert _compile_and_kill(shallow, out, lambda: bool(_partials(out))) == -signal.SIGKILL
    assert len(_partials(out)) == 1
    if out.exists():
        _assert_whole(out)
        assert (out / MANIFEST).read_bytes() == first
