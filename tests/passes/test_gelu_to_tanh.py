"""gelu-to-tanh: the approximation spelt out, the exact one left alone."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from movdc.compiler.printer import print_graph
from movdc.compiler.program import Graph, Program
from movdc.passes.gelu_to_tanh import GeluToTanh

X = torch.linspace(-6, 6, 64).reshape(4, 16)


def test_rewrites_to_the_same_numbers(
    graph_of: Callable[..., Graph], program_of: Callable[..., Program], run_graph: Callable[..., list[Tensor]]
) -> None:
    result = GeluToTanh()(program_of(d=graph_of(nn.GELU(approximate="tanh"), x=X)))
    graph = result.program.stages[0].variants["plain"]
    assert "gelu" not in [node.target._opname for node in graph.compute_nodes]
    torch.testing.assert_close(run_graph(graph, x=X)[0], F.gelu(X, approximate="tanh"), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("module", [nn.GELU(), nn.Tanh()], ids=["exact-gelu", "tanh"])
def test_refuses_what_is_no_tanh_gelu(
    module: nn.Module, graph_of: Callable[..., Graph], program_of: Callable[..., Program]
) -> None:
    assert not GeluToTanh()(program_of(d=graph_of(module, x=X))).modified


def test_modified_is_honest(graph_of: Callable[..., Graph], program_of: Callable[..., Program]) -> None:
    first = GeluToTanh()(program_of(d=graph_of(nn.GELU(approximate="tanh"), x=X)))
    assert first.modified
    assert not GeluToTanh()(first.program).modified


def test_golden_text(graph_of: Callable[..., Graph], program_of: Callable[..., Program]) -> None:
    graph = graph_of(nn.GELU(approximate="tanh"), x=X)
    assert print_graph(graph) == BEFORE
    assert print_graph(GeluToTanh()(program_of(d=graph)).program.stages[0].variants["plain"]) == AFTER


BEFORE = """\
  %x: f32[4,16] = input
  %gelu: f32[4,16] = aten.gelu(%x, approximate='tanh')  # 256 B
  return [%gelu]
"""
AFTER = """\
  %x: f32[4,16] = input
  %gelu_mul: f32[4,16] = aten.mul(%x, %x)  # 256 B
  %gelu_mul_1: f32[4,16] = aten.mul(%gelu_mul, 0.035677408136300125)  # 256 B
  %gelu_add: f32[4,16] = aten.add(%gelu_mul_1, 0.7978845608028654)  # 256 B
  %gelu_mul_2: f32[4,16] = aten.mul(%x, %gelu_add)  # 256 B
  %gelu_tanh: f32[4,16] = aten.tanh(%gelu_mul_2)  # 256 B
  %gelu_mul_3: f32[4,16] = aten.mul(%x, 0.5)  # 256 B
  %gelu_add_1: f32[4,16] = aten.add(%gelu_tanh, 1.0)  # 256 B
  %gelu_mul_4: f32[4,16] = aten.mul(%gelu_mul_3, %gelu_add_1)  # 256 B
  return [%gelu_mul_4]
"""
