"""group-norm-to-rows: norms of clips over rows, those of images left alone."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from movdc.compiler.printer import print_graph
from movdc.compiler.program import Graph, Program
from movdc.passes.group_norm_to_rows import GroupNormToRows

X = torch.randn(2, 8, 3, 4, 5, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def norm() -> nn.Module:
    """A group norm whose gains and biases differ from channel to channel."""
    module = nn.GroupNorm(4, 8, eps=1e-3)
    with torch.no_grad():
        module.weight.copy_(torch.linspace(0.5, 2, 8))
        module.bias.copy_(torch.linspace(-1, 1, 8))
    return module


def test_rewrites_to_the_same_numbers(
    norm: nn.Module,
    graph_of: Callable[..., Graph],
    program_of: Callable[..., Program],
    run_graph: Callable[..., list[Tensor]],
) -> None:
    graph = GroupNormToRows()(program_of(d=graph_of(norm, x=X))).program.stages[0].variants["plain"]
    assert [node.target._opname for node in graph.compute_nodes] == ["reshape", "group_norm", "reshape"]
    torch.testing.assert_close(run_graph(graph, x=X)[0], norm(X), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("module", "x"),
    [(nn.GroupNorm(4, 8), X[:, :, 0]), (nn.GroupNorm(4, 8), X[:, :, 0, 0]), (nn.LayerNorm(5), X)],
    ids=["of-images", "of-rows", "layer-norm"],
)
def test_refuses_what_has_few_dimensions(
    module: nn.Module, x: Tensor, graph_of: Callable[..., Graph], program_of: Callable[..., Program]
) -> None:
    assert not GroupNormToRows()(program_of(d=graph_of(module, x=x))).modified


def test_modified_is_honest(
    norm: nn.Module, graph_of: Callable[..., Graph], program_of: Callable[..., Program]
) -> None:
    first = GroupNormToRows()(program_of(d=graph_of(norm, x=X)))
    assert first.modified
    assert not GroupNormToRows()(first.program).modified


def test_golden_text(norm: nn.Module, graph_of: Callable[..., Graph], program_of: Callable[..., Program]) -> None:
    graph = GroupNormToRows()(program_of(d=graph_of(norm, x=X))).program.stages[0].variants["plain"]
    assert print_graph(graph) == AFTER


AFTER = """\
  %p_weight: f32[8] = weight(toy:weight)
  %p_bias: f32[8] = weight(toy:bias)
  %x: f32[2,8,3,4,5] = input
  %group_norm_reshape: f32[2,8,60] = aten.reshape(%x, [2, 8, -1])  # 3.8 KiB
  %group_norm_group_norm: f32[2,8,60] = aten.group_norm(%group_norm_reshape, 4, %p_weight, %p_bias, 0.001, False)  # 3.8 KiB
  %group_norm_reshape_1: f32[2,8,3,4,5] = aten.reshape(%group_norm_group_norm, [2, 8, 3, 4, 5])  # 3.8 KiB
  return [%group_norm_reshape_1]
"""
