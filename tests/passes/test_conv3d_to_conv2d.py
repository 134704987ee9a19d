"""conv3d-to-conv2d: stacked frames, the same numbers."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from movdc.compiler.printer import print_graph
from movdc.compiler.program import Graph, Program
from movdc.passes.conv3d_to_conv2d import Conv3dToConv2d

X = torch.randn(2, 4, 5, 6, 6, generator=torch.Generator().manual_seed(0))


def _operators(graph: Graph) -> list[str]:
    return [node.target._opname for node in graph.compute_nodes]


@pytest.mark.parametrize(
    "module",
    [
        nn.Conv3d(4, 3, 3, padding=(0, 1, 1)),
        nn.Conv3d(4, 3, (1, 2, 2), stride=(1, 2, 2)),
        nn.Conv3d(4, 3, (2, 3, 3), stride=(2, 1, 1), bias=False),
        nn.Conv3d(4, 3, 1),
    ],
    ids=["causal", "patches", "time-stride", "pointwise"],
)
def test_rewrites_to_the_same_numbers_and_modified_is_honest(
    module: nn.Module,
    graph_of: Callable[..., Graph],
    program_of: Callable[..., Program],
    run_graph: Callable[..., list[Tensor]],
) -> None:
    result = Conv3dToConv2d()(program_of(vae=graph_of(module, x=X)))
    graph = result.program.stages[0].variants["plain"]
    assert result.modified
    assert "conv3d" not in _operators(graph)
    assert _operators(graph).count("conv2d") == 1
    torch.testing.assert_close(run_graph(graph, x=X)[0], module(X), rtol=1e-5, atol=1e-6)
    assert not Conv3dToConv2d()(result.program).modified


class WeightOnTheFly(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3, 4, 1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.conv3d(x, self.weight * 2)


@pytest.mark.parametrize(
    "module",
    [
        nn.Conv3d(4, 4, 3, groups=2, padding=(0, 1, 1)),
        nn.Conv3d(4, 3, 3, dilation=2, padding=(0, 2, 2)),
        nn.Conv3d(4, 3, 3, padding=1),
        WeightOnTheFly(),
    ],
    ids=["groups", "dilation", "padding-in-time", "computed-weight"],
)
def test_refuses_what_stacking_would_change(
    module: nn.Module, graph_of: Callable[..., Graph], program_of: Callable[..., Program]
) -> None:
    result = Conv3dToConv2d()(program_of(vae=graph_of(module, x=X)))
    assert not result.modified
    assert result.note == "0 convolutions rewritten"


def test_a_weight_used_twice_is_rewritten_once(
    graph_of: Callable[..., Graph], program_of: Callable[..., Program], run_graph: Callable[..., list[Tensor]]
) -> None:
    convolution = nn.Conv3d(4, 4, 3, padding=(0, 1, 1))
    module = nn.Sequential(convolution, convolution)
    graph = Conv3dToConv2d()(program_of(vae=graph_of(module, x=X))).program.stages[0].variants["plain"]
    assert len(graph.weights) == 2
    torch.testing.assert_close(run_graph(graph, x=X)[0], module(X), rtol=1e-5, atol=1e-6)


def test_golden_text(graph_of: Callable[..., Graph], program_of: Callable[..., Program]) -> None:
    graph = graph_of(nn.Conv3d(4, 3, 3, padding=(0, 1, 1)), x=X)
    assert print_graph(graph) == BEFORE
    assert print_graph(Conv3dToConv2d()(program_of(vae=graph)).program.stages[0].variants["plain"]) == AFTER


BEFORE = """\
  %p_weight: f32[3,4,3,3,3] = weight(toy:weight)
  %p_bias: f32[3] = weight(toy:bias)
  %x: f32[2,4,5,6,6] = input
  %conv3d: f32[2,3,3,6,6] = aten.conv3d(%x, %p_weight, %p_bias, [1, 1, 1], [0, 1, 1])  # 2.5 KiB
  return [%conv3d]
"""
AFTER = """\
  %p_weight: f32[3,12,3,3] = weight(toy:weight permute[0,2,1,3,4] reshape[3,12,3,3])
  %p_bias: f32[3] = weight(toy:bias)
  %x: f32[2,4,5,6,6] = input
  %conv3d_permute: f32[2,5,4,6,6] = aten.permute(%x, [0, 2, 1, 3, 4])  # 5.6 KiB
  %conv3d_slice: f32[2,3,4,6,6] = aten.slice(%conv3d_permute, 1, 0, 3, 1)  # 3.4 KiB
  %conv3d_slice_1: f32[2,3,4,6,6] = aten.slice(%conv3d_permute, 1, 1, 4, 1)  # 3.4 KiB
  %conv3d_slice_2: f32[2,3,4,6,6] = aten.slice(%conv3d_permute, 1, 2, 5, 1)  # 3.4 KiB
  %conv3d_cat: f32[2,3,12,6,6] = aten.cat([%conv3d_slice, %conv3d_slice_1, %conv3d_slice_2], 2)  # 10.1 KiB
  %conv3d_reshape: f32[6,12,6,6] = aten.reshape(%conv3d_cat, [6, -1, 6, 6])  # 10.1 KiB
  %conv3d_conv2d: f32[6,3,6,6] = aten.conv2d(%conv3d_reshape, %p_weight, %p_bias, [1, 1], [1, 1])  # 2.5 KiB
  %conv3d_reshape_1: f32[2,3,3,6,6] = aten.reshape(%conv3d_conv2d, [2, 3, 3, 6, 6])  # 2.5 KiB
  %conv3d_permute_1: f32[2,3,3,6,6] = aten.permute(%conv3d_reshape_1, [0, 2, 1, 3, 4])  # 2.5 KiB
  %conv3d_contiguous: f32[2,3,3,6,6] = aten.contiguous(%conv3d_permute_1)  # 2.5 KiB
  return [%conv3d_contiguous]
"""
