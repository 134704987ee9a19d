"""What an .onnx program takes in memory, measured by preparing it and running it once, in a process of its own.

Allocations are counted one by one: the heap's own figures differ from one process to the next.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path

from movdc.compiler.errors import InternalError
from movdc.compiler.target import Memory
from movdc.runtime.bundle import FORWARD, Constant, Partition, TensorSpec


def measure(
    program: Path,
    constants: Mapping[str, Sequence[Constant]],
    inputs: Sequence[TensorSpec],
    outputs: Sequence[TensorSpec],
) -> Memory:
    """Prepare and run a program; its weights files, by name with what is in them, lie beside it."""
    record = Partition(
        name="measured.0",
        program=program.name,
        method=FORWARD,
        weights=tuple(constants),
        inputs=tuple(inputs),
        outputs=tuple(outputs),
        weight_bytes=sum(one.size_bytes for some in constants.values() for one in some),
        held_bytes=0,
        load_bytes=0,
        program_bytes=0,
        workspace_bytes=0,
        planned_bytes=0,
        flops=0,
    )
    request = {
        "record": record.model_dump(mode="json"),
        "constants": {path: [one.model_dump() for one in some] for path, some in constants.items()},
    }
    counter = resources.files("movdc.runtime").joinpath("libdry_run.so")
    # In the program's folder and by its bare name: figures must not depend on how long a path is.
    found = subprocess.run(
        [sys.executable, "-m", "movdc.runtime.onnx_footprint"],
        input=json.dumps(request),
        capture_output=True,
        text=True,
        cwd=program.parent,
        env=os.environ | {"LD_PRELOAD": str(counter)},
    )
    if found.returncode != 0:
        raise InternalError(f"the memory of {program} cannot be measured: {found.stderr}")
    return Memory(**json.loads(found.stdout))
