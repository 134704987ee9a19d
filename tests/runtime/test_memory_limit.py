"""The certificate against the kernel: what a run holds is what its bundle says, and a limit of so much is enough."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from cgroup import MemoryGroup, memory_group

from movdc.runtime.bundle import Bundle

pytestmark = pytest.mark.slow
MARGIN = 0.25  # with 0.05 the kernel kills about one run in three: what else a process takes varies by so much

# All that `movdc run` imports and opens, and nothing run: what it holds by then, in bytes.
IDLE = """
import sys
from pathlib import Path
import numpy as np
import movdc.compiler.cli
from movdc.runtime import video
from movdc.runtime.bundle import Bundle
from movdc.runtime.executor import Executor
from movdc.runtime.generate import Generator
bundle = Bundle.read(Path(sys.argv[1]))
generator = Generator(bundle, Executor(bundle, packed_cache=Path(sys.argv[2])))
video.write_mp4(Path(sys.argv[4]) / "idle.mp4", np.zeros((34, 64, 64, 3), np.uint8), 12)
print(Path(sys.argv[3]).read_text())
"""

# The most that a process holds while it runs the denoiser, less what it held before, in bytes. Another stage has run by
# then, so that the code is in memory.
SHARE = """
import sys
from pathlib import Path
import numpy as np
from movdc.runtime.bundle import NUMPY_DTYPES, Bundle
from movdc.runtime.executor import Executor

def status(name):
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[name].split()[0]) * 1024

bundle = Bundle.read(Path(sys.argv[1]))
executor = Executor(bundle, packed_cache=Path(sys.argv[2]))
def ones(stage):
    specs = bundle.stages[stage].variants["plain"].inputs
    return {spec.name: np.ones(spec.shape, NUMPY_DTYPES[spec.dtype]) for spec in specs}

executor.run("text_encoder", "plain", ones("text_encoder"))
executor.release()
inputs = ones("denoiser")
Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts here
before = status("VmRSS")
for _ in range(3):
    executor.run("denoiser", "plain", inputs, "plain")
print(status("VmHWM") - before)
"""


@pytest.fixture
def group() -> Iterator[MemoryGroup]:
    with memory_group("movdc-test") as made:
        if made is None:
            pytest.skip("this machine lets us make no memory cgroup")
        yield made


def _usage_bytes(group: MemoryGroup) -> Path:
    return group.folder / ("memory.usage_in_bytes" if group.version == 1 else "memory.current")


def _inside(group: MemoryGroup, *command: object) -> subprocess.CompletedProcess[str]:
    line = ["sh", "-c", f'echo 0 > {group.members} && exec "$@"', "sh", *map(str, command)]
    return subprocess.run(line, capture_output=True, text=True, timeout=600)


def test_a_run_fits_into_the_idle_process_and_the_certificate(bundle: Path, group: MemoryGroup, tmp_path: Path) -> None:
    """`movdc run` within what it holds before it runs anything, and the certificate, and a quarter of that."""
    clip = tmp_path / "clip.mp4"
    movdc = [Path(sys.executable).with_name("movdc"), "run", bundle, "--packed-cache", tmp_path / "packed"]
    movdc += ["--prompt", "a red circle", "--steps", 3, "-o", clip]
    idle = _inside(group, sys.executable, "-c", IDLE, bundle, tmp_path / "packed", _usage_bytes(group), tmp_path)
    assert idle.returncode == 0, idle.stderr
    peak_bytes = Bundle.read(bundle).manifest.peak_bytes
    group.limit(int(idle.stdout) + int((1 + MARGIN) * peak_bytes))
    for _ in range(2):  # the first one packs
        done = _inside(group, *movdc)
        assert done.returncode == 0, done.stdout + done.stderr
        assert clip.stat().st_size > 0
        clip.unlink()


def test_the_certificate_is_close_to_what_is_held(bundle: Path, tmp_path: Path) -> None:
    variant = Bundle.read(bundle).stages["denoiser"].variants["plain"]
    shares = []
    for _ in range(2):  # the first one packs
        command = [sys.executable, "-c", SHARE, str(bundle), str(tmp_path / "packed")]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        shares.append(int(done.stdout))
    assert shares[1] == pytest.approx(variant.peak_bytes, rel=0.1)
