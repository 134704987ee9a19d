"""The target null: a whole plan without an SDK."""

import json
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

from movdc.compiler.checker import check_manifest
from movdc.runtime.bundle import Bundle

Movdc = Callable[..., CompletedProcess[str]]


def test_a_plan_without_weights(movdc: Movdc, shallow: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = movdc("compile", shallow, "--target", "null", "-o", out)
    assert done.returncode == 0, done.stdout + done.stderr
    bundle = Bundle.read(out)
    manifest = bundle.manifest
    check_manifest(manifest)
    assert not manifest.weights
    for one in manifest.partitions:
        sizes = json.loads((out / one.program).read_text())
        assert (sizes["weight_bytes"], sizes["flops"], sizes["nodes"]) == (
            one.weight_bytes,
            one.flops,
            one.delegated_nodes,
        )
        assert one.held_bytes == one.weight_bytes
        assert one.workspace_bytes == sizes["working_bytes"]
    assert sum(file.size_bytes for file in manifest.files) < 2_000_000, "sizes and the tokenizer"
