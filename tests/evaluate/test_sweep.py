"""A sweep as a user types it: on this machine, killed and resumed, and on a Dask cluster; the same results."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from subprocess import CompletedProcess

import polars as pl
import pytest
from polars.testing import assert_frame_equal

from movdc.evaluate.results import MEASURED
from movdc.evaluate.shape_clips import caption, held_out

Movdc = Callable[..., CompletedProcess[str]]
Refused = Callable[[CompletedProcess[str]], str]
BINARIES = Path(sys.executable).parent
POLL_S = 0.01
LIMIT_S = 900  # a compile may be among it
CLIPS = 4
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def sweep(bundle: Path, example: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two cells, two prompts; what `bundle` compiled is in the cache, and cells differ in the sampler's plan alone."""
    folder = tmp_path_factory.mktemp("sweep")
    (folder / "prompts.txt").write_text("".join(caption(one) + "\n" for one in held_out(2)))
    settings = "settings: {short: {steps: 4}}\ngrid: {steps: [4], leap: [none, fixed]}\n"
    (folder / "sweep.yaml").write_text(f"spec: {example}\nprompts: prompts.txt\n{settings}")
    return folder / "sweep.yaml"


@pytest.fixture(scope="module")
def scheduler(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a Dask scheduler with two workers, all processes of their own."""
    file = tmp_path_factory.mktemp("dask") / "scheduler.json"
    common = ["--scheduler-file", str(file), "--no-dashboard"]
    lines = [["scheduler", "--port", "0"], *[["worker", "--nthreads", "1", "--no-nanny"]] * 2]
    with ExitStack() as running:
        for line in lines:
            process = subprocess.Popen([BINARIES / "dask", *line, *common], stderr=subprocess.DEVNULL)
            running.callback(process.wait)
            running.callback(process.terminate)
        _until(lambda: file.exists() and file.read_text().strip().endswith("}"))
        yield json.loads(file.read_text())["address"]


def _until(holds: Callable[[], bool]) -> None:
    end_s = time.monotonic() + LIMIT_S
    while not holds():
        assert time.monotonic() < end_s, "it takes too long"
        time.sleep(POLL_S)


def _finished(out: Path) -> dict[str, int]:
    """Each file of a clip or a result that is there, with the time when it was written."""
    files = [*out.glob("clips/*.npz"), *out.glob("measured/*.json")]
    return {file.name: file.stat().st_mtime_ns for file in files}


def _content(out: Path) -> pl.DataFrame:
    return pl.read_parquet(out / "clips.parquet").drop(MEASURED)


def _children(pid: int) -> list[Path]:
    return [Path("/proc") / child for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.fixture(scope="module")
def local(movdc: Movdc, sweep: Path) -> Path:
    """The sweep's folder, done in local processes: once killed when the first clip was there, then resumed."""
    out = sweep.parent / "local"
    line = ["evaluate", "--sweep", sweep, "-o", out]
    cache = Path(movdc("cache").stdout.splitlines()[-1].split(": ")[0])  # where the fixture's commands keep things
    environment = os.environ | {"XDG_CACHE_HOME": str(cache.parents[1])}
    with subprocess.Popen([BINARIES / "movdc", *line], stdout=subprocess.DEVNULL, env=environment) as process:
        try:
            _until(lambda: bool(list(out.glob("measured/*.json"))) or process.poll() is not None)
            workers = _children(process.pid)
        finally:
            process.kill()
    assert workers
    _until(lambda: not any(worker.exists() for worker in workers))  # none goes on by itself
    before = _finished(out)
    assert 0 < len(before) < 2 * CLIPS, "it was killed too late"
    done = movdc(*line)
    assert done.returncode == 0, done.stdout + done.stderr
    after = _finished(out)
    assert len(after) == 2 * CLIPS
    assert {name: after[name] for name in before} == before, "what was finished was done again"
    assert "short" in done.stdout
    return out


def test_a_sweep_that_was_killed_goes_on(local: Path) -> None:
    clips = pl.read_parquet(local / "clips.parquet")
    assert clips["setting"].to_list() == ["short"] * 2 + ["leap fixed, 4 steps"] * 2
    assert clips["prompt"].to_list() == [caption(one) for one in held_out(2)] * 2
    assert clips["evaluations"].to_list() == [4, 4, 3, 3]
    assert clips["psnr_db"].null_count() == 2
    assert clips["psnr_db"].drop_nulls().is_between(10, 70).all()
    assert clips["ssim"].drop_nulls().is_between(0, 1).all()
    assert clips["colour"].null_count() == 0
    assert (clips["seconds"] > clips["denoiser_s"]).all()
    assert (clips["read_bytes"] > 0).all()
    assert (local / "pareto.png").read_bytes().startswith(b"\x89PNG")
    page = (local / "pareto.html").read_text()
    assert "leap fixed, 4 steps" in page
    assert "<script src" not in page, "it is looked at without a network"
    assert (local / "settings.md").read_text().count("\n") == 4


def test_a_cluster_gives_the_same(movdc: Movdc, local: Path, sweep: Path, scheduler: str) -> None:
    out = sweep.parent / "cluster"
    done = movdc("evaluate", "--sweep", sweep, "-o", out, "--scheduler", scheduler)
    assert done.returncode == 0, done.stdout + done.stderr
    assert _finished(out).keys() == _finished(local).keys()
    assert_frame_equal(_content(out), _content(local), check_exact=True)


def test_wrong_input_is_one_sentence(movdc: Movdc, refused: Refused, bundle: Path, sweep: Path) -> None:
    prompts = sweep.parent / "prompts.txt"
    assert "give bundles or pipelines, or --sweep YAML" in refused(movdc("evaluate"))
    assert "--prompts: is missing" in refused(movdc("evaluate", bundle))
    assert "no such bundle" in refused(movdc("evaluate", sweep.parent / "none", "--prompts", prompts))
    assert "comes twice" in refused(movdc("evaluate", bundle, bundle, "--prompts", prompts))
