"""The certificate against the kernel: what a run holds is what its bundle says, and a limit of so much is enough."""

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from cgroup import MemoryGroup, memory_group

from movdc.runtime.bundle import Bundle

pytestmark = pytest.mark.slow
MARGIN = 0.05

# `movdc run` to its end, where nothing is loaded any more. Keeps what its group takes by then: the first two arguments
# are the group's folder and where to keep it.
IDLE = """
import shutil
import sys
from pathlib import Path
from movdc.compiler import cli

group, kept = Path(sys.argv.pop(1)), Path(sys.argv.pop(1))
try:
    cli.main()
finally:
    for name in ("memory.stat", "memory.usage_in_bytes", "memory.current"):
        if (group / name).exists():
            shutil.copyfile(group / name, kept / name)
"""

# The most that a process holds while it runs the denoiser, less what it held before, in bytes. Another stage has run by
# then, so that the code is in memory.
SHARE = """
import sys
from pathlib import Path
import numpy as np
from movdc.runtime.bundle import NUMPY_DTYPES, Bundle
from movdc.runtime.executors import open_executor

def status(name):
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[name].split()[0]) * 1024

bundle = Bundle.read(Path(sys.argv[1]))
executor = open_executor(bundle, packed_cache=Path(sys.argv[2]))
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


def _idle_bytes(group: MemoryGroup, kept: Path) -> int:
    """What the idle process took: all but the page cache that it had not mapped, which goes when memory is short."""
    stat = dict(line.split() for line in (kept / "memory.stat").read_text().splitlines())
    usage, cache, mapped = (
        ("memory.usage_in_bytes", "cache", "mapped_file")
        if group.version == 1
        else ("memory.current", "file", "file_mapped")
    )
    return int((kept / usage).read_text()) - int(stat[cache]) + int(stat[mapped])


def _inside(group: MemoryGroup, *command: object) -> subprocess.CompletedProcess[str]:
    line = ["sh", "-c", f'echo 0 > {group.members} && exec "$@"', "sh", *map(str, command)]
    return subprocess.run(line, capture_output=True, text=True, timeout=600)


def test_a_run_fits_into_the_idle_process_and_the_certificate(bundle: Path, group: MemoryGroup, tmp_path: Path) -> None:
    """`movdc run` within what it holds when nothing is loaded, and the certificate, and 5 % of that."""
    clip, packed = tmp_path / "clip.mp4", tmp_path / "packed"
    run = ["run", bundle, "--packed-cache", packed, "--prompt", "a red circle", "--steps", 3, "-o", clip]
    idle = _inside(group, sys.executable, "-c", IDLE, group.folder, tmp_path, *run)
    assert idle.returncode == 0, idle.stderr
    peak_bytes = Bundle.read(bundle).manifest.peak_bytes
    group.limit(_idle_bytes(group, tmp_path) + int((1 + MARGIN) * peak_bytes))
    shutil.rmtree(packed)
    for _ in range(2):  # the first one packs
        clip.unlink()
        done = _inside(group, Path(sys.executable).with_name("movdc"), *run)
        assert done.returncode == 0, done.stdout + done.stderr
        assert clip.stat().st_size > 0


def _share_bytes(root: Path, packed: Path) -> int:
    command = [sys.executable, "-c", SHARE, str(root), str(packed)]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def test_the_certificate_is_close_to_what_is_held(bundle: Path, tmp_path: Path) -> None:
    variant = Bundle.read(bundle).stages["denoiser"].variants["plain"]
    shares = [_share_bytes(bundle, tmp_path / "packed") for _ in range(2)]  # the first one packs
    assert shares[1] == pytest.approx(variant.peak_bytes, rel=0.1)


def test_the_certificate_is_close_to_what_onnx_runtime_holds(onnx_bundle: Path, tmp_path: Path) -> None:
    variant = Bundle.read(onnx_bundle).stages["denoiser"].variants["plain"]
    assert _share_bytes(onnx_bundle, tmp_path) == pytest.approx(variant.peak_bytes, rel=0.1)
