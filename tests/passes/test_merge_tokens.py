"""merge-tokens on toys: what it makes, for every option, and what it refuses."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from movdc.compiler.errors import InternalError, MovdcError
from movdc.compiler.printer import print_graph
from movdc.compiler.program import Graph, Program
from movdc.passes.merge_tokens import MergeTokens, merge_frames, merged_frames, mixed_pairs, unmerge_frames

ProgramOf = Callable[..., Program]
ToyGraph = Callable[..., Graph]
RunGraph = Callable[..., list[Tensor]]


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.freqs = nn.Linear(8, 24), nn.Parameter(torch.randn(8))

    def forward(self, x: Tensor, positions: Tensor, bias: Tensor | None = None) -> Tensor:
        query, key, value = self.qkv(x).chunk(3, -1)
        angles = positions[:, None] * self.freqs
        return F.scaled_dot_product_attention(query * angles.cos(), key * angles.cos(), value, bias)


class Toy(nn.Module):
    """A temporal attention and an MLP over x [B, T, S, 8]."""

    def __init__(self) -> None:
        super().__init__()
        self.attn, self.mlp = Attention(), nn.Linear(8, 8)

    def attend(self, x: Tensor, positions: Tensor, bias: Tensor | None = None) -> Tensor:
        rows = x.transpose(1, 2).flatten(0, 1)
        return self.attn(rows, positions, bias).unflatten(0, (x.shape[0], x.shape[2])).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attend(x, torch.arange(x.shape[1], dtype=torch.float32))
        return x + self.mlp(x).tanh()


@pytest.fixture(scope="session")
def toy(graph_with_layout: Callable[..., Graph]) -> ToyGraph:
    """The graph of a toy over x [2, frames, 3, 8]."""

    def make(module: nn.Module, frames: int, **layout: Any) -> Graph:
        declared = {"attentions": ("attn",), "mlps": ("mlp",)} | layout
        return graph_with_layout(lambda: module, {"x": (2, frames, 3, 8)}, {"x": 1}, **declared)

    return make


ONE_BY_ONE: list[dict[str, Any]] = [
    {},
    {"odd": "drop"},
    {"rope": "midpoint"},
    {"proportional": True},
    {"scope": "block"},
]
TOGETHER = {"odd": "drop", "rope": "midpoint", "proportional": True, "scope": "block"}


@pytest.mark.parametrize(
    ("frames", "options"), [(2, {}), (6, {}), (3, TOGETHER), (6, TOGETHER), *[(5, one) for one in ONE_BY_ONE]]
)
def test_numbers_are_those_of_merging_in_the_module(
    frames: int, options: dict[str, Any], toy: ToyGraph, program_of: ProgramOf, run_graph: RunGraph
) -> None:
    torch.manual_seed(0)
    module, x, odd = Toy(), torch.randn(2, frames, 3, 8), options.get("odd", "singleton")
    graph = toy(module, frames)
    merged = MergeTokens(**options)(program_of(denoiser=graph)).program.stages[0].variants["merged"]

    count = frames // 2 + (frames % 2 if odd == "singleton" else 0)
    positions, bias = torch.arange(count, dtype=torch.float32), None
    if options.get("rope"):
        positions = torch.tensor([2 * index + 0.5 for index in range(frames // 2)])
        positions = torch.cat((positions, torch.tensor([frames - 1.0])))[:count]
    if options.get("proportional") and frames % 2 and odd == "singleton":
        bias = torch.tensor([2.0] * (count - 1) + [1.0]).log()[None, None]
    with torch.no_grad():
        middle = x + unmerge_frames(module.attend(merge_frames(x, odd), positions, bias), frames, odd)
        after = module.mlp(middle)
        if options.get("scope"):
            after = unmerge_frames(module.mlp(merge_frames(middle, odd)), frames, odd)
        expected = middle + after.tanh()
    error = torch.linalg.vector_norm(run_graph(merged, x=x)[0] - expected) / torch.linalg.vector_norm(expected)
    assert error <= 1e-6


@given(frames=st.integers(1, 33), odd=st.sampled_from(["singleton", "drop"]), seed=st.integers(0, 99))
def test_merge_and_unmerge_are_a_projector(frames: int, odd: Any, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    if count := merged_frames(frames, odd):
        merged = torch.randn(2, count, 3, 4, generator=generator)
        unmerged = unmerge_frames(merged, frames, odd)
        assert unmerged.shape[1] == frames
        assert torch.equal(merge_frames(unmerged, odd), merged)
        x = torch.randn(2, frames, 3, 4, generator=generator)
        once = unmerge_frames(merge_frames(x, odd), frames, odd)
        assert torch.equal(unmerge_frames(merge_frames(once, odd), frames, odd), once)
        assert frames < 2 or torch.equal(once[:, 0], (x[:, 0] + x[:, 1]) * 0.5)
        assert frames % 2 == 0 or torch.equal(once[:, -1], x[:, -1] if odd == "singleton" else once[:, -2])


def test_mixed_pairs_names_groups_of_which_some_frames_are_held() -> None:
    assert mixed_pairs([True, True, False, False]) == []
    assert mixed_pairs([True, False, False, True, True]) == [(0, 1), (2, 3)]
    assert mixed_pairs([True, True, False]) == []
    assert mixed_pairs([True, True, False], "drop") == [(1, 2)]


def test_modified_is_honest_and_steps_go_to_the_sampler(toy: ToyGraph, program_of: ProgramOf) -> None:
    plain = program_of(denoiser=toy(Toy(), 4), other=toy(Toy(), 4))
    other = replace(plain.stages[1], variants={"plain": replace(plain.stages[1].variants["plain"], layout=None)})
    plain = replace(plain, stages=(plain.stages[0], other))
    first = MergeTokens()(plain)
    assert (first.modified, first.program.sampler.merged_steps) == (True, 15)
    assert [list(stage.variants) for stage in first.program.stages] == [["plain", "merged"], ["plain"]]
    assert first.program.stages[0].variants["plain"] is plain.stages[0].variants["plain"]
    again = MergeTokens()(first.program)
    assert not again.modified
    assert again.program is first.program
    assert MergeTokens(steps=7)(plain).program.sampler.merged_steps == 7
    one_frame = MergeTokens()(program_of(denoiser=toy(Toy(), 1)))
    assert not one_frame.modified
    assert one_frame.program.sampler.merged_steps == 0
    units = plain.sampler.model_copy(update={"units": (20, 10)})
    assert MergeTokens()(replace(plain, sampler=units)).program.sampler.merged_steps == 5


def test_each_length_of_prompts_gets_its_merged_variant(toy: ToyGraph, program_of: ProgramOf) -> None:
    plain = program_of(denoiser=toy(Toy(), 4))
    (stage,) = plain.stages
    two = replace(plain, stages=(replace(stage, variants={**stage.variants, "plain-64": toy(Toy(), 4)}),))
    first = MergeTokens()(two).program
    assert list(first.stages[0].variants) == ["plain", "plain-64", "merged", "merged-64"]
    assert not MergeTokens()(first).modified


@pytest.mark.parametrize(
    ("options", "layout", "why"),
    [
        ({"steps": 31}, {}, "1 to 30"),
        ({"steps": 0}, {}, "1 to 30"),
        ({}, {"frame_mask": (True, True, True, False)}, r"\(2, 3\)"),
        ({}, {"frame_mask_input": "x_mask"}, "x_mask"),
    ],
)
def test_refuses_steps_and_masks(
    options: dict[str, Any], layout: dict[str, Any], why: str, toy: ToyGraph, program_of: ProgramOf
) -> None:
    program = program_of(denoiser=toy(Toy(), 4, **layout))
    with pytest.raises(MovdcError, match=why):
        MergeTokens(**options)(program)
    if layout:
        assert MergeTokens(mixed_pairs=True)(program).modified


def test_refuses_no_layout_and_a_stage_merged_otherwise(toy: ToyGraph, program_of: ProgramOf) -> None:
    graph = toy(Toy(), 4)
    with pytest.raises(MovdcError, match="token layout"):
        MergeTokens()(program_of(denoiser=replace(graph, layout=None)))
    merged = MergeTokens(scope="block")(program_of(denoiser=graph)).program
    with pytest.raises(MovdcError, match=r"merge-tokens\{scope=block\} made denoiser"):
        MergeTokens()(merged)


class Flat(Toy):
    """Tokens stay [B, T * S, C] around the attention."""

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(1, 2) * 2
        return self.mlp(rows + self.attn(rows, torch.arange(rows.shape[1], dtype=torch.float32)))


class Joint(Toy):
    """Keys are the tokens of all frames."""

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(1, 2)
        return x + self.attn(rows, torch.arange(rows.shape[1], dtype=torch.float32)).unflatten(1, x.shape[1:3])


@pytest.mark.parametrize(
    ("module", "options", "why"),
    [
        (Flat, {}, r"attn reads %mul.*\[2,15,8\].*\[B, 5, S, C\]"),
        (Joint, {"proportional": True}, "9 keys after 15"),
        (Joint, {"rope": "midpoint"}, "no positions"),
    ],
)
def test_refuses_an_attention_that_cannot_be_merged(
    module: type[nn.Module], options: dict[str, Any], why: str, toy: ToyGraph, program_of: ProgramOf
) -> None:
    with pytest.raises(MovdcError, match=why):
        MergeTokens(**options)(program_of(denoiser=toy(module(), 5)))


def test_two_traces_that_differ_are_a_bug_of_the_family(toy: ToyGraph, program_of: ProgramOf) -> None:
    graph = toy(Toy(), 4)
    assert graph.layout
    other = replace(graph.layout, retrace=toy(Flat(), 4).layout.retrace)  # type: ignore[union-attr]
    with pytest.raises(InternalError, match="differ in more than sizes"):
        MergeTokens()(program_of(denoiser=replace(graph, layout=other)))


def test_golden_text(toy: ToyGraph, program_of: ProgramOf) -> None:
    graph = toy(Toy(), 4, mlps=())
    merged = MergeTokens()(program_of(denoiser=graph)).program.stages[0].variants["merged"]
    assert print_graph(graph) == BEFORE
    assert print_graph(merged) == AFTER


BEFORE = """\
  %p_attn_freqs: f32[8] = weight(toy:attn.freqs)
  %p_attn_qkv_weight: f32[24,8] = weight(toy:attn.qkv.weight)
  %p_attn_qkv_bias: f32[24] = weight(toy:attn.qkv.bias)
  %p_mlp_weight: f32[8,8] = weight(toy:mlp.weight)
  %p_mlp_bias: f32[8] = weight(toy:mlp.bias)
  %x: f32[2,4,3,8] = input
  %arange: f32[4] = aten.arange(4, dtype=torch.float32, device=device(type='cpu'), pin_memory=False)  # 16 B
  %transpose: f32[2,3,4,8] = aten.transpose(%x, 1, 2)  # 768 B
  %_unsafe_view: f32[6,4,8] = aten.reshape(%transpose, [6, 4, 8])  # 768 B
  %linear: f32[6,4,24] = aten.linear(%_unsafe_view, %p_attn_qkv_weight, %p_attn_qkv_bias)  # 2.2 KiB
  %split: (f32[6,4,8], f32[6,4,8], f32[6,4,8]) = aten.split(%linear, 8, -1)
  %getitem: f32[6,4,8] = getitem(%split, 0)  # 768 B
  %getitem_1: f32[6,4,8] = getitem(%split, 1)  # 768 B
  %getitem_2: f32[6,4,8] = getitem(%split, 2)  # 768 B
  %unsqueeze: f32[4,1] = aten.unsqueeze(%arange, 1)  # 16 B
  %mul: f32[4,8] = aten.mul(%unsqueeze, %p_attn_freqs)  # 128 B
  %cos: f32[4,8] = aten.cos(%mul)  # 128 B
  %mul_1: f32[6,4,8] = aten.mul(%getitem, %cos)  # 768 B
  %cos_1: f32[4,8] = aten.cos(%mul)  # 128 B
  %mul_2: f32[6,4,8] = aten.mul(%getitem_1, %cos_1)  # 768 B
  %scaled_dot_product_attention: f32[6,4,8] = aten.scaled_dot_product_attention(%mul_1, %mul_2, %getitem_2)  # 768 B
  %view: f32[2,3,4,8] = aten.reshape(%scaled_dot_product_attention, [2, 3, 4, 8])  # 768 B
  %transpose_1: f32[2,4,3,8] = aten.transpose(%view, 1, 2)  # 768 B
  %add: f32[2,4,3,8] = aten.add(%x, %transpose_1)  # 768 B
  %linear_1: f32[2,4,3,8] = aten.linear(%add, %p_mlp_weight, %p_mlp_bias)  # 768 B
  %tanh: f32[2,4,3,8] = aten.tanh(%linear_1)  # 768 B
  %add_1: f32[2,4,3,8] = aten.add(%add, %tanh)  # 768 B
  return [%add_1]
"""

AFTER = """\
  %p_attn_freqs: f32[8] = weight(toy:attn.freqs)
  %p_attn_qkv_weight: f32[24,8] = weight(toy:attn.qkv.weight)
  %p_attn_qkv_bias: f32[24] = weight(toy:attn.qkv.bias)
  %p_mlp_weight: f32[8,8] = weight(toy:mlp.weight)
  %p_mlp_bias: f32[8] = weight(toy:mlp.bias)
  %x: f32[2,4,3,8] = input
  %arange_merged: f32[2] = aten.arange(2, dtype=torch.float32, device=device(type='cpu'), pin_memory=False)  # 8 B
  %x_merged_slice_1: f32[2,2,3,8] = aten.slice(%x, 1, 0, 4, 2)  # 384 B
  %x_merged_slice_2: f32[2,2,3,8] = aten.slice(%x, 1, 1, 4, 2)  # 384 B
  %x_merged_add: f32[2,2,3,8] = aten.add(%x_merged_slice_1, %x_merged_slice_2)  # 384 B
  %x_merged: f32[2,2,3,8] = aten.mul(%x_merged_add, 0.5)  # 384 B
  %transpose: f32[2,3,2,8] = aten.transpose(%x_merged, 1, 2)  # 384 B
  %_unsafe_view: f32[6,2,8] = aten.reshape(%transpose, [6, 2, 8])  # 384 B
  %linear: f32[6,2,24] = aten.linear(%_unsafe_view, %p_attn_qkv_weight, %p_attn_qkv_bias)  # 1.1 KiB
  %split: (f32[6,2,8], f32[6,2,8], f32[6,2,8]) = aten.split(%linear, 8, -1)
  %getitem: f32[6,2,8] = getitem(%split, 0)  # 384 B
  %getitem_1: f32[6,2,8] = getitem(%split, 1)  # 384 B
  %getitem_2: f32[6,2,8] = getitem(%split, 2)  # 384 B
  %unsqueeze: f32[2,1] = aten.unsqueeze(%arange_merged, 1)  # 8 B
  %mul: f32[2,8] = aten.mul(%unsqueeze, %p_attn_freqs)  # 64 B
  %cos: f32[2,8] = aten.cos(%mul)  # 64 B
  %mul_1: f32[6,2,8] = aten.mul(%getitem, %cos)  # 384 B
  %cos_1: f32[2,8] = aten.cos(%mul)  # 64 B
  %mul_2: f32[6,2,8] = aten.mul(%getitem_1, %cos_1)  # 384 B
  %scaled_dot_product_attention: f32[6,2,8] = aten.scaled_dot_product_attention(%mul_1, %mul_2, %getitem_2)  # 384 B
  %view: f32[2,3,2,8] = aten.reshape(%scaled_dot_product_attention, [2, 3, 2, 8])  # 384 B
  %transpose_1: f32[2,2,3,8] = aten.transpose(%view, 1, 2)  # 384 B
  %transpose_1_unmerged_unsqueeze: f32[2,2,1,3,8] = aten.unsqueeze(%transpose_1, 2)  # 384 B
  %transpose_1_unmerged_expand: f32[2,2,2,3,8] = aten.expand(%transpose_1_unmerged_unsqueeze, [-1, -1, 2, -1, -1])  # 768 B
  %transpose_1_unmerged: f32[2,4,3,8] = aten.reshape(%transpose_1_unmerged_expand, [2, 4, 3, 8])  # 768 B
  %add: f32[2,4,3,8] = aten.add(%x, %transpose_1_unmerged)  # 768 B
  %linear_1: f32[2,4,3,8] = aten.linear(%add, %p_mlp_weight, %p_mlp_bias)  # 768 B
  %tanh: f32[2,4,3,8] = aten.tanh(%linear_1)  # 768 B
  %add_1: f32[2,4,3,8] = aten.add(%add, %tanh)  # 768 B
  return [%add_1]
"""
