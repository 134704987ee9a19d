"""What a lowered program takes in memory, measured by the engine itself in a process of its own.

Where the system lets one library go before another (Linux), allocations are counted one by one, and delegated kernels
take their memory and compute nothing.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from importlib import resources
from pathlib import Path
from typing import Any

from movdc.compiler.errors import InternalError
from movdc.compiler.target import Memory
from movdc.runtime.bundle import Constant, TensorSpec


def measure(
    program: Path,
    weights: Path | None,
    constants: Sequence[Constant],
    inputs: Sequence[TensorSpec],
    outputs: Sequence[TensorSpec],
) -> Memory:
    """Load and run a program; its weights, if it has any, lie in a file beside it."""
    request = {
        "program": program.name,
        "weights": weights.name if weights else None,
        "constants": [constant.model_dump() for constant in constants],
        "inputs": [spec.model_dump() for spec in inputs],
        "outputs": [spec.model_dump() for spec in outputs],
    }
    dry_run = resources.files("movdc.runtime").joinpath("libdry_run.so")
    preload = {"LD_PRELOAD": str(dry_run)} if dry_run.is_file() else {}
    # In the program's folder and by its bare name: figures must not depend on how long a path is.
    found = subprocess.run(
        [sys.executable, "-m", "movdc.targets.footprint"],
        input=json.dumps(request),
        capture_output=True,
        text=True,
        cwd=program.parent,
        env=os.environ | preload,
    )
    if found.returncode != 0:
        raise InternalError(f"the memory of {program} cannot be measured: {found.stderr}")
    return Memory(**json.loads(found.stdout))


def _measure_here(request: dict[str, Any]) -> Memory:
    from movdc.runtime import _engine

    files = [_file(name) for name in (request["program"], request["weights"]) if name]
    with tempfile.TemporaryDirectory(dir=".") as packed_cache:
        found = _engine.measure(
            root=".",
            files=files,
            program=request["program"],
            weights=request["weights"] or "",
            constants=[
                _values(one, "key", "offset_bytes", "size_bytes", "dtype", "shape") for one in request["constants"]
            ],
            inputs=[_values(one, "name", "dtype", "shape") for one in request["inputs"]],
            outputs=[_values(one, "name", "dtype", "shape") for one in request["outputs"]],
            packed_cache=packed_cache,
        )
    return Memory(found.held_bytes, found.program_bytes, found.workspace_bytes, found.planned_bytes)


def _values(record: dict[str, Any], *keys: str) -> tuple[Any, ...]:
    return tuple(record[key] for key in keys)


def _file(name: str) -> tuple[str, int, str]:
    with Path(name).open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return name, Path(name).stat().st_size, digest


if __name__ == "__main__":
    print(json.dumps(asdict(_measure_here(json.load(sys.stdin)))))
