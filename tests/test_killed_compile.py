"""`kill -9` during a compile leaves no bundle or a whole one, and the next compile goes on with what was finished."""

import json
import os
import random
import shutil
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

from movdc.compiler.cache import Entry, entries
from movdc.runtime.bundle import MANIFEST, REPORT, Bundle
from movdc.runtime.executor import Executor

Movdc = Callable[..., CompletedProcess[str]]
POLL_S = 0.01
KILLS = 4
pytestmark = pytest.mark.slow


def _partials(out: Path) -> list[Path]:
    return list(out.parent.glob(f".{out.name}.partial-*"))


def _made(cache: Path, kind: str) -> list[Entry]:
    return [entry for entry in entries(cache) if entry.kind == kind]


def _compile_and_kill(spec: Path, out: Path, cache: Path, reached: Callable[[], bool]) -> int:
    """Kill a compile with all its children at the first moment when `reached` holds; gives its exit code."""
    before = set(_partials(out))
    command = [Path(sys.executable).with_name("movdc"), "compile", spec, "-o", out, "--cache", cache]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True) as run:
        try:
            while run.poll() is None and (before & set(_partials(out)) or not reached()):
                time.sleep(POLL_S)
        finally:
            with suppress(ProcessLookupError):  # it may have ended
                os.killpg(run.pid, signal.SIGKILL)
    return run.returncode


def _files(bundle: Path) -> dict[str, bytes]:
    return {str(path.relative_to(bundle)): path.read_bytes() for path in bundle.rglob("*") if path.is_file()}


def _assert_whole(out: Path) -> None:
    Executor(Bundle.read(out))


def test_a_killed_compile_goes_on_where_it_was_and_gives_the_same_bytes(
    movdc: Movdc, shallow: Path, tmp_path: Path
) -> None:
    out, cache = tmp_path / "bundles" / "shallow", tmp_path / "cache"

    kept: dict[Path, int] = {}
    for programs in (1, 3):  # early, and half way
        ended = _compile_and_kill(shallow, out, cache, lambda count=programs: len(_made(cache, "program")) >= count)
        assert ended == -signal.SIGKILL
        assert not out.exists()
        assert len(_partials(out)) == 1  # of this compile: what earlier ones left is gone
        assert len(list(cache.glob(".work-*"))) == 1
        assert kept.keys() <= {entry.path for entry in _made(cache, "program")}
        kept = {entry.path: entry.path.stat().st_ino for entry in _made(cache, "program")}

    done = movdc("compile", shallow, "-o", out, "--cache", cache)
    assert done.returncode == 0, done.stdout + done.stderr
    assert list(out.parent.iterdir()) == [out]
    assert not list(cache.glob(".work-*"))
    assert {path: path.stat().st_ino for path in kept} == kept, "what was finished is not made again"
    _assert_whole(out)

    twin = tmp_path / "twin"
    assert movdc("compile", shallow, "-o", twin, "--no-cache").returncode == 0
    assert _files(out) == _files(twin), "a compile in one go, from nothing, gives the same"
    assert list(twin.glob(".*")) == []


def test_a_kill_near_the_end_leaves_the_old_bundle_or_the_new_one(movdc: Movdc, shallow: Path, tmp_path: Path) -> None:
    out, cache = tmp_path / "bundles" / "shallow", tmp_path / "cache"
    assert movdc("compile", shallow, "-o", out, "--cache", cache).returncode == 0
    first = (out / MANIFEST).read_bytes()

    # When the new manifest is there: in these last moments it takes the old bundle's place.
    _compile_and_kill(shallow, out, cache, lambda: any((partial / MANIFEST).exists() for partial in _partials(out)))
    if out.exists():
        _assert_whole(out)

    assert _compile_and_kill(shallow, out, cache, lambda: bool(_partials(out))) == -signal.SIGKILL
    assert len(_partials(out)) == 1
    if out.exists():
        _assert_whole(out)
        assert (out / MANIFEST).read_bytes() == first


def test_kills_at_random_moments_end_in_the_same_bytes(movdc: Movdc, shallow: Path, tmp_path: Path) -> None:
    twin, out, cache = (tmp_path / name for name in ("twin", "shallow", "cache"))
    start_s = time.monotonic()
    assert movdc("compile", shallow, "-o", twin, "--no-cache").returncode == 0
    whole_s = time.monotonic() - start_s

    moments = random.Random(7)
    for _ in range(KILLS):
        stop_s = time.monotonic() + moments.uniform(0, whole_s)
        if _compile_and_kill(shallow, out, cache, lambda stop_s=stop_s: time.monotonic() > stop_s) == 0:
            assert _files(out) == _files(twin)  # it was done before its moment: the next begins anew
            shutil.rmtree(out)
            shutil.rmtree(cache)
    assert movdc("compile", shallow, "-o", out, "--cache", cache).returncode == 0
    assert _files(out) == _files(twin)


def test_an_option_redoes_what_depends_on_it(movdc: Movdc, shallow: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"

    def compiled(name: str, **changes: object) -> tuple[Path, str]:
        spec = tmp_path / f"{name}.yaml"
        spec.write_text(yaml.safe_dump(yaml.safe_load(shallow.read_text()) | changes))
        done = movdc("compile", spec, "-o", tmp_path / name, "--cache", cache)
        assert done.returncode == 0, done.stdout + done.stderr
        return tmp_path / name, done.stdout

    first, said = compiled("first")
    assert "lower" in said
    whole = _files(first)
    made = {entry.key for entry in entries(cache)}

    again, said = compiled("again")
    assert "trace" not in said, "nothing has changed: nothing is traced"
    assert "lower" not in said
    assert _files(again) == whole

    fewer, said = compiled("fewer", sampler={"steps": 12, "guidance": 4.0})
    assert "trace" not in said
    assert {entry.key for entry in entries(cache)} == made
    ours, theirs = (json.loads((bundle / MANIFEST).read_text()) for bundle in (fewer, first))
    assert ours["sampler"]["units"] == [12]
    assert {key for key in ours if ours[key] != theirs[key]} == {"sampler", "spec", "files", "expected"}
    expected, before = ours["expected"], theirs["expected"]
    assert {key for key in expected if expected[key] != before[key]} == {"sampler"}, "only what the sampler makes"
    changed = [one["path"] for one, other in zip(ours["files"], theirs["files"], strict=True) if one != other]
    assert changed == [REPORT], "which says how long so many steps take"

    compiled("leap", passes={"leap": {"step": 20}})
    leapt, said = compiled("sooner", passes={"leap": {"step": 10}})
    assert "trace" not in said
    assert Bundle.read(leapt).manifest.sampler.leap.step == 10
    assert "leap{step=10}" in Bundle.read(leapt).manifest.pipeline
    assert {entry.kind for entry in entries(cache) if entry.key not in made} == {"compile"}, "no program, no weights"

    with (first / "weights" / sorted(path.name for path in (first / "weights").iterdir())[0]).open("r+b") as file:
        file.write(b"damage")  # where files are shared by link, in the cache too
    mended, _ = compiled("mended")
    _assert_whole(mended)
    assert _files(mended) == whole

    shown = movdc("cache", "--cache", cache).stdout
    assert "program: " in shown
    assert "weights: " in shown
    assert movdc("cache", "--cache", cache, "--prune", "1B").returncode == 0
    assert entries(cache) == []
    anew, said = compiled("anew")
    assert "lower" in said
    assert _files(anew) == whole
