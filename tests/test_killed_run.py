"""`kill -9` during a run, at any moment: with --resume it goes on and makes the same bits; or says why it cannot."""

import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import numpy as np
import pytest

Movdc = Callable[..., CompletedProcess[str]]
Refused = Callable[[CompletedProcess[str]], str]
KILLS = 20
POLL_S = 0.002
PROMPT = "a red [circle] moving down"  # the brackets mean something to the terminal
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def command(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[str]]:
    """The run that all tests here kill."""
    packed = tmp_path_factory.mktemp("packed")

    def of(out: Path, *options: object) -> list[str]:
        line = ["run", bundle, "--prompt", PROMPT, "--seed", 3, "-o", out, "--packed-cache", packed, *options]
        return [*map(str, line), "--save-latents", str(out.with_suffix(".npy"))]

    return of


def _journal(out: Path) -> Path:
    return out.with_name(f"{out.name}.journal")


def _start(line: list[str], cache: Path) -> subprocess.Popen[bytes]:
    movdc = Path(sys.executable).with_name("movdc")
    environment = os.environ | {"XDG_CACHE_HOME": str(cache)}
    return subprocess.Popen([movdc, *line], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment)


def _stop(line: list[str], out: Path, kind: signal.Signals = signal.SIGKILL, after_s: float = 0.0) -> tuple[int, str]:
    """Start a run, and stop it some time after its journal has appeared; gives its exit code and what it said."""
    with _start(line, out.parent / "cache") as run:
        while run.poll() is None and not list(_journal(out).glob("*.sealed")):
            time.sleep(POLL_S)
        time.sleep(after_s)
        run.send_signal(kind)
        said, _ = run.communicate()
    return run.returncode, said.decode()


def _files(out: Path) -> tuple[bytes, ...]:
    return tuple(out.with_suffix(suffix).read_bytes() for suffix in (".npy", ".mp4", ".png"))


def test_a_killed_run_goes_on_with_the_same_bits(
    movdc: Movdc, command: Callable[..., list[str]], tmp_path: Path
) -> None:
    out = tmp_path / "clip.mp4"
    done = movdc(*command(out))
    assert done.returncode == 0, done.stdout + done.stderr
    expected = _files(out)
    parts = re.search(r"denoiser ([\d.]+) s, vae\s+([\d.]+) s", done.stdout)
    assert parts, done.stdout
    last_s = float(parts[1]) + float(parts[2]) + 0.2  # from the journal's first file to its last, and a little more
    moments = random.Random(0)
    calls = set()
    for kill in range(KILLS):
        out = tmp_path / f"{kill}.mp4"
        code, said = _stop(command(out), out, after_s=moments.uniform(0, last_s))
        assert code in (-signal.SIGKILL, 0), said
        assert (code == 0) <= (not _journal(out).exists())
        if code == 0:  # the kill came too late
            continue
        done = movdc(*command(out, "--resume"))
        assert done.returncode == 0, done.stdout + done.stderr
        assert _files(out) == expected
        assert not _journal(out).exists()
        rows = dict(re.findall(r"^ (denoiser|vae_temporal|vae_spatial) +(\d+) ", done.stdout, re.MULTILINE))
        calls.add(tuple(int(rows.get(stage, 0)) for stage in ("denoiser", "vae_temporal", "vae_spatial")))
    print(sorted(calls))
    assert len({call for call in calls if call[0] > 0}) > 3  # killed in several steps,
    assert any(call[0] == 0 for call in calls)  # and in the decode, whose latents were kept


def test_a_run_that_is_killed_again_and_again_ends_with_the_same_bits(
    movdc: Movdc, command: Callable[..., list[str]], tmp_path: Path
) -> None:
    out, whole = tmp_path / "clip.mp4", tmp_path / "whole.mp4"
    assert movdc(*command(whole)).returncode == 0
    for _ in range(6):
        code, said = _stop(command(out, "--resume", "--memory-budget", "14MB"), out, after_s=0.1)
        assert code in (-signal.SIGKILL, 0), said
    assert movdc(*command(out, "--resume", "--mode", "sequential")).returncode == 0  # no part of what was asked for
    assert _files(out) == _files(whole)


def test_an_interrupted_run_says_how_to_go_on(command: Callable[..., list[str]], tmp_path: Path) -> None:
    out = tmp_path / "clip.mp4"
    code, said = _stop(command(out), out, signal.SIGINT)
    assert code == 130
    assert f"{_journal(out)} has what is done: the same command with --resume goes on from there" in said
    assert "Traceback" not in said
    assert not out.exists()


def test_a_journal_that_cannot_be_used_is_refused(
    movdc: Movdc, refused: Refused, command: Callable[..., list[str]], tmp_path: Path
) -> None:
    out, noise = tmp_path / "clip.mp4", tmp_path / "noise.npy"
    assert _stop(command(out), out)[0] == -signal.SIGKILL
    kept = shutil.copytree(_journal(out), tmp_path / "kept")
    np.save(noise, np.zeros(1, np.float32))
    for option, says in {
        "--seed=4": "had --seed 3, this one has 4; give what it had, or leave --resume out to start over",
        "--prompt=a": rf"had --prompt {PROMPT!r}, this one has 'a'",
        "--steps=5": "had --steps 30, this one has 5",
        f"--noise={noise}": "had --noise None, this one has '",
    }.items():
        message = refused(movdc(*command(out, "--resume", option)))
        assert message.startswith(f"{_journal(out)}: the run that was stopped {says}"), message
    point = _journal(out) / "point.sealed"
    point.write_bytes(point.read_bytes()[:-1])
    message = refused(movdc(*command(out, "--resume")))
    assert message == f"{point}: is damaged; leave --resume out to start over"
    assert [path.name for path in _journal(out).iterdir()] == [path.name for path in kept.iterdir()]
    assert not out.exists()
    assert movdc(*command(out)).returncode == 0
    assert not _journal(out).exists()
