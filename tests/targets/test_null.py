"""The target null: a whole plan without an SDK."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.resources import as_file, files
from pathlib import Path
from subprocess import CompletedProcess

import torch
from torch import nn

from movdc.compiler.chain import chain_of
from movdc.compiler.checker import check_manifest
from movdc.compiler.device import read_profiles
from movdc.compiler.pieces import split
from movdc.compiler.program import Graph
from movdc.runtime.bundle import Bundle, DType
from movdc.targets.null import Null

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


@dataclass(frozen=True)
class Halves(Null):
    """A device that holds weights in half precision."""

    def held_as(self) -> Mapping[DType, DType]:
        return {"f32": "f16"}


def test_the_planner_counts_weights_as_the_device_holds_them(graph_of: Callable[..., Graph]) -> None:
    graph = graph_of(nn.Linear(8, 4), x=torch.zeros(2, 8))
    (piece,) = split(graph)
    target = Halves()
    held_bytes = target.estimate(piece).held_bytes
    assert (piece.weight_bytes, held_bytes) == (4 * (8 * 4 + 4), 2 * (8 * 4 + 4))
    with as_file(files("movdc.targets") / "devices.toml") as path:
        machine = target.machine(read_profiles(path)["host"], None)
    assert sum(chain_of(graph, machine.held_as).weight_bytes) == held_bytes
    assert sum(chain_of(graph).weight_bytes) == piece.weight_bytes
