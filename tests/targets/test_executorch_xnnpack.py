"""The target executorch-xnnpack: what it refuses, and what it says of nodes that XNNPACK leaves to other kernels."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from movdc.compiler.errors import RefusedError
from movdc.compiler.pieces import split
from movdc.compiler.program import Graph, Program
from movdc.compiler.refusals import check_runs
from movdc.targets.executorch_xnnpack import ExecutorchXnnpack


class Block(nn.Module):
    """A product, which XNNPACK runs, and a norm, which it does not."""

    def __init__(self) -> None:
        super().__init__()
        self.project, self.norm = nn.Linear(8, 8), nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.project(x))


class Stack(nn.Module):
    """Blocks that it refuses, twice each."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Sequential(nn.Conv3d(2, 2, 1), nn.GELU("tanh")) for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def test_refuses_everything_at_once_with_its_module(
    graph_of: Callable[..., Graph], program_of: Callable[..., Program]
) -> None:
    program = program_of(net=graph_of(Stack(), x=torch.zeros(1, 2, 3, 4, 4)))
    with pytest.raises(
        RefusedError, match=r"cannot run 4 of the nodes.*first is %conv3d \(aten.conv3d.default\) of net"
    ) as caught:
        check_runs(program, ExecutorchXnnpack())
    found = [(one.operator, one.module, one.count) for one in caught.value.refusals]
    assert found == [("aten.conv3d.default", "blocks.*.*", 2), ("aten.gelu.default", "blocks.*.*", 2)]
    assert "gelu-to-tanh" in caught.value.refusals[1].reason


def test_says_what_is_not_delegated(graph_of: Callable[..., Graph], tmp_path: Path) -> None:
    (piece,) = split(graph_of(Block(), x=torch.zeros(2, 8)))
    artifact = ExecutorchXnnpack().emit(piece, tmp_path)
    assert artifact.delegated_nodes == 1
    assert artifact.fallback == {"aten.native_layer_norm.default": 1}
