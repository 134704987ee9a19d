"""share-templates: equal partitions get one template, and one program runs them all."""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from movdc.compiler.printer import print_graph
from movdc.compiler.program import Graph, Program
from movdc.passes.share_templates import ShareTemplates

X = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))


class Block(nn.Module):
    def __init__(self, width: int = 8, factor: float = 2.0) -> None:
        super().__init__()
        self.linear = nn.Linear(8, width)
        self.back = nn.Linear(width, 8, bias=False)
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return x + self.back(torch.tanh(self.linear(x) * self.factor))


def _cut(graph: Graph) -> Graph:
    """Cut behind each residual sum but the last."""
    sums = [node.name for node in graph.compute_nodes if node.target is torch.ops.aten.add.Tensor]
    return replace(graph, cuts=tuple(sums[:-1]))


def _templates(program: Program) -> tuple[str, ...]:
    return ShareTemplates()(program).program.stages[0].variants["plain"].templates


def test_equal_blocks_share_one_template(graph_of: Callable[..., Graph], program_of: Callable[..., Program]) -> None:
    graph = _cut(graph_of(nn.Sequential(*(Block() for _ in range(4))), x=X))
    result = ShareTemplates()(program_of(denoiser=graph))
    templates = result.program.stages[0].variants["plain"].templates
    assert len(templates) == 4
    assert len(set(templates)) == 1
    assert result.modified
    assert result.note == "4 partitions, 1 programs"


def test_refuses_blocks_of_another_shape(graph_of: Callable[..., Graph], program_of: Callable[..., Program]) -> None:
    first, second, third = _templates(program_of(d=_cut(graph_of(nn.Sequential(Block(), Block(9), Block()), x=X))))
    assert first == third != second


def test_refuses_blocks_with_another_number(graph_of: Callable[..., Graph], program_of: Callable[..., Program]) -> None:
    first, second = _templates(program_of(d=_cut(graph_of(nn.Sequential(Block(), Block(factor=3.0)), x=X))))
    assert first != second


class Pick(nn.Module):
    """An index table, which lowering may look at."""

    def __init__(self, *rows: int) -> None:
        super().__init__()
        self.rows = nn.Parameter(torch.tensor(rows), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + x[self.rows]


def test_refuses_integer_tables_of_other_values(
    graph_of: Callable[..., Graph], program_of: Callable[..., Program]
) -> None:
    module = nn.Sequential(Pick(0, 1, 2), Pick(2, 1, 0), Pick(0, 1, 2))
    first, second, third = _templates(program_of(d=_cut(graph_of(module, x=X))))
    assert first == third != second


def test_templates_go_across_stages(graph_of: Callable[..., Graph], program_of: Callable[..., Program]) -> None:
    program = program_of(one=graph_of(Block(), x=X), two=graph_of(Block(), x=X))
    assert ShareTemplates()(program).note == "2 partitions, 1 programs"


def test_modified_is_honest(graph_of: Callable[..., Graph], program_of: Callable[..., Program]) -> None:
    first = ShareTemplates()(program_of(denoiser=_cut(graph_of(nn.Sequential(Block(), Block()), x=X))))
    assert first.modified
    assert not ShareTemplates()(first.program).modified


def test_numbers_are_the_same(
    graph_of: Callable[..., Graph], program_of: Callable[..., Program], run_graph: Callable[..., list[Tensor]]
) -> None:
    module = nn.Sequential(Block(), Block())
    graph = ShareTemplates()(program_of(d=_cut(graph_of(module, x=X)))).program.stages[0].variants["plain"]
    assert torch.equal(run_graph(graph, x=X)[0], module(X))


def test_golden_text(graph_of: Callable[..., Graph], program_of: Callable[..., Program]) -> None:
    graph = _cut(graph_of(nn.Sequential(Block(), Block()), x=X))
    assert print_graph(graph) == BEFORE
    assert print_graph(ShareTemplates()(program_of(denoiser=graph)).program.stages[0].variants["plain"]) == AFTER


BEFORE = """\
  %p_0_linear_weight: f32[8,8] = weight(toy:0.linear.weight)
  %p_0_linear_bias: f32[8] = weight(toy:0.linear.bias)
  %p_0_back_weight: f32[8,8] = weight(toy:0.back.weight)
  %p_1_linear_weight: f32[8,8] = weight(toy:1.linear.weight)
  %p_1_linear_bias: f32[8] = weight(toy:1.linear.bias)
  %p_1_back_weight: f32[8,8] = weight(toy:1.back.weight)
  %x: f32[3,8] = input
  %linear: f32[3,8] = aten.linear(%x, %p_0_linear_weight, %p_0_linear_bias)  # 96 B
  %mul: f32[3,8] = aten.mul(%linear, 2.0)  # 96 B
  %tanh: f32[3,8] = aten.tanh(%mul)  # 96 B
  %linear_1: f32[3,8] = aten.linear(%tanh, %p_0_back_weight)  # 96 B
  %add: f32[3,8] = aten.add(%x, %linear_1)  # 96 B
  ---- cut ----
  %linear_2: f32[3,8] = aten.linear(%add, %p_1_linear_weight, %p_1_linear_bias)  # 96 B
  %mul_1: f32[3,8] = aten.mul(%linear_2, 2.0)  # 96 B
  %tanh_1: f32[3,8] = aten.tanh(%mul_1)  # 96 B
  %linear_3: f32[3,8] = aten.linear(%tanh_1, %p_1_back_weight)  # 96 B
  %add_1: f32[3,8] = aten.add(%add, %linear_3)  # 96 B
  return [%add_1]
"""
AFTER = """\
  ---- template 2bbb306f26198205 ----
  %p_0_linear_weight: f32[8,8] = weight(toy:0.linear.weight)
  %p_0_linear_bias: f32[8] = weight(toy:0.linear.bias)
  %p_0_back_weight: f32[8,8] = weight(toy:0.back.weight)
  %p_1_linear_weight: f32[8,8] = weight(toy:1.linear.weight)
  %p_1_linear_bias: f32[8] = weight(toy:1.linear.bias)
  %p_1_back_weight: f32[8,8] = weight(toy:1.back.weight)
  %x: f32[3,8] = input
  %linear: f32[3,8] = aten.linear(%x, %p_0_linear_weight, %p_0_linear_bias)  # 96 B
  %mul: f32[3,8] = aten.mul(%linear, 2.0)  # 96 B
  %tanh: f32[3,8] = aten.tanh(%mul)  # 96 B
  %linear_1: f32[3,8] = aten.linear(%tanh, %p_0_back_weight)  # 96 B
  %add: f32[3,8] = aten.add(%x, %linear_1)  # 96 B
  ---- cut ---- template 2bbb306f26198205 ----
  %linear_2: f32[3,8] = aten.linear(%add, %p_1_linear_weight, %p_1_linear_bias)  # 96 B
  %mul_1: f32[3,8] = aten.mul(%linear_2, 2.0)  # 96 B
  %tanh_1: f32[3,8] = aten.tanh(%mul_1)  # 96 B
  %linear_3: f32[3,8] = aten.linear(%tanh_1, %p_1_back_weight)  # 96 B
  %add_1: f32[3,8] = aten.add(%add, %linear_3)  # 96 B
  return [%add_1]
"""
