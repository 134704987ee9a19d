"""attention-to-bmm: attention as batched products, the same numbers."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from movdc.compiler.printer import print_graph
from movdc.compiler.program import Graph, Program
from movdc.passes.attention_to_bmm import AttentionToBmm

GENERATOR = torch.Generator().manual_seed(0)
Q, K, V = (torch.randn(2, 3, rows, 8, generator=GENERATOR) for rows in (5, 4, 4))
MASK = torch.tensor([[0.0, 0.0, 0.0, -1e9], [0.0, 0.0, -1e9, -1e9]])[:, None, None]


class Attention(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v)


class Masked(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


class Scaled(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.matmul(F.scaled_dot_product_attention(q, k, v, scale=0.25), v.transpose(2, 3))


class BooleanMask(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask > -1)


class Causal(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)


class Grouped(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k[:, :1], v[:, :1], enable_gqa=True)


class Repeated(nn.Module):
    def forward(self, q: Tensor, k: Tensor) -> Tensor:
        return torch.matmul(q, k[:, :1].transpose(2, 3))


def _operators(graph: Graph) -> list[str]:
    return [node.target._opname for node in graph.compute_nodes]


@pytest.mark.parametrize(
    ("module", "inputs"),
    [
        (Attention(), {"q": Q, "k": K, "v": V}),
        (Masked(), {"q": Q, "k": K, "v": V, "mask": MASK}),
        (Scaled(), {"q": Q, "k": K, "v": V}),
    ],
    ids=["plain", "masked", "scaled-and-a-product"],
)
def test_rewrites_to_the_same_numbers_and_modified_is_honest(
    module: nn.Module,
    inputs: dict[str, Tensor],
    graph_of: Callable[..., Graph],
    program_of: Callable[..., Program],
    run_graph: Callable[..., list[Tensor]],
) -> None:
    result = AttentionToBmm()(program_of(denoiser=graph_of(module, **inputs)))
    graph = result.program.stages[0].variants["plain"]
    assert result.modified
    assert {"scaled_dot_product_attention", "matmul"}.isdisjoint(_operators(graph))
    torch.testing.assert_close(run_graph(graph, **inputs)[0], module(**inputs), rtol=1e-5, atol=1e-6)
    assert not AttentionToBmm()(result.program).modified


@pytest.mark.parametrize(
    ("module", "inputs"),
    [
        (BooleanMask(), {"q": Q, "k": K, "v": V, "mask": MASK}),
        (Causal(), {"q": Q, "k": K, "v": V}),
        (Grouped(), {"q": Q, "k": K, "v": V}),
        (Repeated(), {"q": Q, "k": K}),
    ],
    ids=["boolean", "causal", "grouped", "repeated"],
)
def test_refuses_what_bmm_would_change(
    module: nn.Module, inputs: dict[str, Tensor], graph_of: Callable[..., Graph], program_of: Callable[..., Program]
) -> None:
    result = AttentionToBmm()(program_of(denoiser=graph_of(module, **inputs)))
    assert not result.modified
    assert result.note == "0 attentions and products rewritten"


def test_golden_text(graph_of: Callable[..., Graph], program_of: Callable[..., Program]) -> None:
    graph = graph_of(Attention(), q=Q, k=K, v=V)
    assert print_graph(graph) == BEFORE
    assert print_graph(AttentionToBmm()(program_of(denoiser=graph)).program.stages[0].variants["plain"]) == AFTER


BEFORE = """\
  %q: f32[2,3,5,8] = input
  %k: f32[2,3,4,8] = input
  %v: f32[2,3,4,8] = input
  %scaled_dot_product_attention: f32[2,3,5,8] = aten.scaled_dot_product_attention(%q, %k, %v)  # 960 B
  return [%scaled_dot_product_attention]
"""
AFTER = """\
  %q: f32[2,3,5,8] = input
  %k: f32[2,3,4,8] = input
  %v: f32[2,3,4,8] = input
  %scaled_dot_product_attention_reshape: f32[6,5,8] = aten.reshape(%q, [-1, 5, 8])  # 960 B
  %scaled_dot_product_attention_reshape_1: f32[6,4,8] = aten.reshape(%k, [-1, 4, 8])  # 768 B
  %scaled_dot_product_attention_reshape_2: f32[6,4,8] = aten.reshape(%v, [-1, 4, 8])  # 768 B
  %scaled_dot_product_attention_mul: f32[6,5,8] = aten.mul(%scaled_dot_product_attention_reshape, 0.35355339059327373)  # 960 B
  %scaled_dot_product_attention_transpose: f32[6,8,4] = aten.transpose(%scaled_dot_product_attention_reshape_1, 1, 2)  # 768 B
  %scaled_dot_product_attention_bmm: f32[6,5,4] = aten.bmm(%scaled_dot_product_attention_mul, %scaled_dot_product_attention_transpose)  # 480 B
  %scaled_dot_product_attention_softmax: f32[6,5,4] = aten.softmax(%scaled_dot_product_attention_bmm, -1)  # 480 B
  %scaled_dot_product_attention_bmm_1: f32[6,5,8] = aten.bmm(%scaled_dot_product_attention_softmax, %scaled_dot_product_attention_reshape_2)  # 960 B
  %scaled_dot_product_attention_reshape_3: f32[2,3,5,8] = aten.reshape(%scaled_dot_product_attention_bmm_1, [2, 3, 5, 8])  # 960 B
  return [%scaled_dot_product_attention_reshape_3]
"""
