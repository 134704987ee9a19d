"""split-to-slices: one slice for each result that is read."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from movdc.compiler.printer import print_graph
from movdc.compiler.program import Graph, Program
from movdc.passes.split_to_slices import SplitToSlices

X = torch.arange(24.0).reshape(3, 8)


class Chunks(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        first, _, third = x.split(3, dim=-1)
        return first[:, :2] * third


class Uneven(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        first, second = x.split([1, 2])
        return first + second


class Normed(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.aten.native_layer_norm(x, [8], None, None, 1e-6)[0]


class Sorted(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        values, _ = x.sort(-1)
        return values


def _operators(graph: Graph) -> list[str]:
    return [getattr(node.target, "_opname", node.target.__name__) for node in graph.compute_nodes]


@pytest.mark.parametrize("module", [Chunks(), Uneven()], ids=["chunks", "uneven"])
def test_rewrites_to_the_same_numbers_and_modified_is_honest(
    module: nn.Module,
    graph_of: Callable[..., Graph],
    program_of: Callable[..., Program],
    run_graph: Callable[..., list[Tensor]],
) -> None:
    result = SplitToSlices()(program_of(denoiser=graph_of(module, x=X)))
    graph = result.program.stages[0].variants["plain"]
    assert result.modified
    assert "getitem" not in _operators(graph)
    assert _operators(graph).count("slice") >= 2
    assert torch.equal(run_graph(graph, x=X)[0], module(X))
    assert not SplitToSlices()(result.program).modified


@pytest.mark.parametrize("module", [Normed(), Sorted()], ids=["layer-norm", "sort"])
def test_refuses_other_operators_with_several_results(
    module: nn.Module, graph_of: Callable[..., Graph], program_of: Callable[..., Program]
) -> None:
    assert not SplitToSlices()(program_of(denoiser=graph_of(module, x=X))).modified


def test_golden_text(graph_of: Callable[..., Graph], program_of: Callable[..., Program]) -> None:
    graph = graph_of(Uneven(), x=X)
    assert print_graph(graph) == BEFORE
    assert print_graph(SplitToSlices()(program_of(denoiser=graph)).program.stages[0].variants["plain"]) == AFTER


BEFORE = """\
  %x: f32[3,8] = input
  %split_with_sizes: (f32[1,8], f32[2,8]) = aten.split_with_sizes(%x, [1, 2])
  %getitem: f32[1,8] = getitem(%split_with_sizes, 0)  # 32 B
  %getitem_1: f32[2,8] = getitem(%split_with_sizes, 1)  # 64 B
  %add: f32[2,8] = aten.add(%getitem, %getitem_1)  # 64 B
  return [%add]
"""
AFTER = """\
  %x: f32[3,8] = input
  %getitem_slice: f32[1,8] = aten.slice(%x, 0, 0, 1)  # 32 B
  %getitem_1_slice: f32[2,8] = aten.slice(%x, 0, 1, 3)  # 64 B
  %add: f32[2,8] = aten.add(%getitem_slice, %getitem_1_slice)  # 64 B
  return [%add]
"""
