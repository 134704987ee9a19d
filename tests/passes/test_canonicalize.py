"""canonicalize: tables folded, masks finite, dead rows dropped, the same numbers."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from movdc.compiler.printer import print_graph
from movdc.compiler.program import Graph, Program
from movdc.passes.canonicalize import Canonicalize

X = torch.linspace(-1, 1, 24).reshape(3, 8)


class Half(nn.Module):
    """A projection of which half the channels are read, behind views as in unpatchify."""

    def __init__(self, channels_read: int = 2) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 12)
        self.channels_read = channels_read

    def forward(self, x: Tensor) -> Tensor:
        patches = self.linear(x).reshape(3, 3, 4).transpose(1, 2)  # [row, channel, column]
        return patches[:, : self.channels_read]


class Table(nn.Module):
    """Tables that depend on no input, one of them repeated by an expansion."""

    def __init__(self) -> None:
        super().__init__()
        self.freqs = nn.Parameter(torch.arange(8.0))

    def forward(self, x: Tensor) -> Tensor:
        angles = (torch.arange(3.0)[:, None] * self.freqs).cos()
        return torch.maximum(x + angles, self.freqs.sin().expand(3, 8))


class Masked(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return (torch.where(x > 0, x, -float("inf")) * 1.0).softmax(-1)


def _apply(program: Program) -> Graph:
    result = Canonicalize()(program)
    assert result.modified
    return result.program.stages[0].variants["plain"]


def _targets(graph: Graph) -> list[str]:
    return [node.target._opname for node in graph.compute_nodes]


def test_folds_tables_and_keeps_the_expansion(
    graph_of: Callable[..., Graph], program_of: Callable[..., Program], run_graph: Callable[..., list[Tensor]]
) -> None:
    module = Table()
    graph = graph_of(module, x=X)
    assert {"arange", "cos", "sin", "expand"} <= set(_targets(graph))
    folded = _apply(program_of(denoiser=graph))
    assert _targets(folded) == ["add", "expand", "maximum"]
    assert [ref.source.label for ref in folded.weights.values()].count("folded") == 2
    assert torch.equal(run_graph(folded, x=X)[0], module(X))


def test_drops_the_rows_that_no_output_reads(
    graph_of: Callable[..., Graph], program_of: Callable[..., Program], run_graph: Callable[..., list[Tensor]]
) -> None:
    module = Half()
    narrowed = _apply(program_of(denoiser=graph_of(module, x=X)))
    assert "slice" not in _targets(narrowed)
    linear = narrowed.compute_nodes[0]
    assert linear.meta["val"].shape == (3, 6)
    assert torch.equal(run_graph(narrowed, x=X)[0], module(X))


def test_masks_become_finite_and_factors_of_one_go(
    graph_of: Callable[..., Graph], program_of: Callable[..., Program], run_graph: Callable[..., list[Tensor]]
) -> None:
    graph = _apply(program_of(denoiser=graph_of(Masked(), x=X)))
    assert "inf" not in print_graph(graph)
    assert "-1000000000.0" in print_graph(graph)
    assert "mul" not in _targets(graph)
    rows = X[1:]  # the first row is masked as a whole: no number, before and after
    assert torch.equal(run_graph(graph, x=X)[0][1:], Masked()(rows))


class TwoReaders(Half):
    def forward(self, x: Tensor) -> Tensor:
        projected = self.linear(x)
        return projected.reshape(3, 3, 4)[:, :, :2] + projected.sum()


class Between(Half):
    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x).reshape(3, 3, 4).softmax(-1)[:, :, :2]


class Tokens(Half):
    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x).reshape(3, 3, 4)[:, :2]


@pytest.mark.parametrize(
    "module", [TwoReaders(), Between(), Tokens(), Half(channels_read=4)], ids=lambda m: type(m).__name__
)
def test_refuses_rows_that_are_read_otherwise(
    module: nn.Module, graph_of: Callable[..., Graph], program_of: Callable[..., Program]
) -> None:
    result = Canonicalize()(program_of(denoiser=graph_of(module, x=X)))
    assert not result.modified


class ViewOfWeight(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(8, 3))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.weight.t()


def test_refuses_a_mere_view_of_a_weight(graph_of: Callable[..., Graph], program_of: Callable[..., Program]) -> None:
    assert not Canonicalize()(program_of(denoiser=graph_of(ViewOfWeight(), x=X))).modified


def test_modified_is_honest_and_the_second_time_false(
    graph_of: Callable[..., Graph], program_of: Callable[..., Program]
) -> None:
    program = program_of(denoiser=graph_of(Half(), x=X), other=graph_of(nn.Linear(8, 2), x=X))
    first = Canonicalize()(program)
    assert first.modified
    assert first.program.stages[1] == program.stages[1]
    second = Canonicalize()(first.program)
    assert not second.modified
    assert second.note == "0 folded, 0 masks, 0 factors of 1, 0 dead rows"


def test_golden_text(graph_of: Callable[..., Graph], program_of: Callable[..., Program]) -> None:
    graph = graph_of(Half(), x=X)
    assert print_graph(graph) == BEFORE
    assert print_graph(_apply(program_of(denoiser=graph))) == AFTER


def test_every_stage_of_the_example_gives_the_same_numbers(
    example_program: Program, run_graph: Callable[..., list[Tensor]]
) -> None:
    result = Canonicalize()(example_program)
    generator = torch.Generator().manual_seed(0)
    for stage, variant, before in example_program.graphs():
        after = dict(((s, v), g) for s, v, g in result.program.graphs())[stage, variant]
        assert len(after.compute_nodes) <= len(before.compute_nodes)
        inputs: dict[str, Any] = {
            spec.name: torch.randint(3, 100, spec.shape, generator=generator)
            if spec.dtype == "i64"
            else torch.rand(spec.shape, generator=generator).round()
            if spec.name == "text_mask"
            else torch.randn(spec.shape, generator=generator)
            for spec in before.inputs
        }
        for old, new in zip(run_graph(before, **inputs), run_graph(after, **inputs), strict=True):
            assert torch.linalg.vector_norm(new - old) <= 1e-6 * torch.linalg.vector_norm(old)


BEFORE = """\
  %p_linear_weight: f32[12,8] = weight(toy:linear.weight)
  %p_linear_bias: f32[12] = weight(toy:linear.bias)
  %x: f32[3,8] = input
  %linear: f32[3,12] = aten.linear(%x, %p_linear_weight, %p_linear_bias)  # 144 B
  %view: f32[3,3,4] = aten.reshape(%linear, [3, 3, 4])  # 144 B
  %transpose: f32[3,4,3] = aten.transpose(%view, 1, 2)  # 144 B
  %slice_1: f32[3,2,3] = aten.slice(%transpose, 1, 0, 2)  # 72 B
  return [%slice_1]
"""
AFTER = """\
  %p_linear_weight: f32[6,8] = weight(toy:linear.weight rows[4,0,2])
  %p_linear_bias: f32[6] = weight(toy:linear.bias rows[4,0,2])
  %x: f32[3,8] = input
  %linear: f32[3,6] = aten.linear(%x, %p_linear_weight, %p_linear_bias)  # 72 B
  %view: f32[3,3,2] = aten.reshape(%linear, [3, 3, 2])  # 72 B
  %transpose: f32[3,2,3] = aten.transpose(%view, 1, 2)  # 72 B
  return [%transpose]
"""
