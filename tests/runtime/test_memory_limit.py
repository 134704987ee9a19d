"""The certificate against the kernel: what a run holds is what its bundle says, and a limit of so much is enough."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.cgroup import MemoryGroup, memory_group
from movdc.runtime.bundle import Bundle

pytestmark = pytest.mark.slow
MARGIN = 0.05

# All that `movdc run` imports and opens, and nothing run: what it holds by then, in bytes.
IDLE = """
import sys
from pathlib import Path
import movdc.compiler.cli
from movdc.runtime import video
from movdc.runtime.bundle import Bundle
from movdc.runtime.executor import Executor
from movdc.runtime.generate import Generator
bundle = Bundle.read(Path(sys.argv[1]))
generator = Generator(bundle, Executor(bundle, packed_cache=Path(sys.argv[2])))
video.write_mp4(sys.argv[3])
print(Path(sys.argv[4]).read_text())
"""

# The most that a process holds while it runs a stage, less what it held before, in bytes; one stage, no other before.
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
variant = bundle.stages["denoiser"].variants["plain"]
inputs = {spec.name: np.ones(spec.shape, NUMPY_DTYPES[spec.dtype]) for spec in variant.inputs}
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
