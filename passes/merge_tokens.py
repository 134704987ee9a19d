"""merge-tokens: a variant of the denoiser whose attentions see pairs of frames as one (TDTM)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar, Literal

import torch
from torch import Tensor

from movdc.compiler.errors import MovdcError
from movdc.compiler.pass_base import Pass, PassResult
from movdc.compiler.program import Graph, Program, TokenLayout
from movdc.compiler.regions import TwoTraces
from movdc.runtime.bundle import Sampler

Odd = Literal["singleton", "drop"]


def merged_frames(frames: int, odd: Odd = "singleton") -> int:
    """How many frames are left of `frames`."""
    return frames // 2 + (frames % 2 if odd == "singleton" else 0)


def merge_frames(x: Tensor, odd: Odd = "singleton") -> Tensor:
    """The mean of frames 2i and 2i + 1 of x [B, T, ...]; a last odd frame stays as it is, or is dropped."""
    frames = x.shape[1]
    paired = frames // 2 * 2
    merged = (x[:, 0:paired:2] + x[:, 1:paired:2]) * 0.5
    return torch.cat((merged, x[:, paired:frames]), dim=1) if frames > paired and odd == "singleton" else merged


def unmerge_frames(y: Tensor, frames: int, odd: Odd = "singleton") -> Tensor:
    """Each merged frame of y [B, T', S, C] twice; a last odd frame is the singleton, or a copy of the last pair's."""
    pairs, merged = frames // 2, y.shape[1]
    of_pairs = y[:, 0:pairs] if pairs < merged else y
    frames_of_pairs = of_pairs[:, :, None].expand(-1, -1, 2, -1, -1).flatten(1, 2)
    return torch.cat((frames_of_pairs, y[:, merged - 1 : merged]), dim=1) if frames % 2 else frames_of_pairs


def mixed_pairs(frame_mask: Sequence[bool], odd: Odd = "singleton") -> list[tuple[int, ...]]:
    """The groups of frames of which the mask holds some and not others."""
    frames = len(frame_mask)
    groups = [(frame, frame + 1) for frame in range(0, frames - 1, 2)]
    groups += [(frames - 2, frames - 1)] if frames % 2 and frames > 1 and odd == "drop" else []
    return [group for group in groups if len({frame_mask[frame] for frame in group}) > 1]


def merge_positions(positions: Tensor, odd: Odd = "singleton") -> Tensor:
    """Merged frames are at the mean of their positions [T]."""
    return merge_frames(positions[None], odd).squeeze(0)


def key_bias(query: Tensor, frames: int) -> Tensor:
    """log(size) of each key [..., T'], as the query's dtype and rank, where the last of T (odd) frames is by itself."""
    pairs = torch.full((1,) * (query.dim() - 1) + (frames // 2,), math.log(2), dtype=query.dtype)
    return torch.cat((pairs, torch.zeros_like(pairs[..., :1])), dim=-1)


@dataclass(frozen=True)
class MergeTokens(Pass):
    """Add the variant "merged" of the denoiser, which the first steps of sampling run instead of the plain one.

    Before:  %v: f32[B,T,S,C] = ...                  (modulated input of an attention; T frames of S patches)
             %a: f32[B,T,S,C] = attention(%v)
             %y: f32[B,T,S,C] = aten.mul(%gate, %a)
    After:   %v_merged: f32[B,T/2,S,C] = aten.mul(frames 0, 2, .. of %v + frames 1, 3, .. of %v, 0.5)
             %a: f32[B,T/2,S,C] = attention(%v_merged)          (retraced with T/2 frames; the same weights)
             %a_unmerged: f32[B,T,S,C] = each frame of %a twice
             %y: f32[B,T,S,C] = aten.mul(%gate, %a_unmerged)

    Leaves as it is: 1. one frame, which has no pair; 2. text keys and values, norms, gates, the residual stream.
    Refuses: 1. a pipeline that declares no token layout: tokens could not be told apart; 2. a frame mask that differs
    inside a pair, or that only the run knows: half of a merged frame would be noise and half not; 3. an attention
    whose input is no [B,T,S,C] behind reshapes; 4. positions or keys that an option cannot find; 5. more steps than
    there are; 6. a stage merged with other options.
    Cost: a merged step has 1/1.283 of the FLOPs at 256x256, 68 frames; variants share weights; motion gets weaker
    (VBench dynamic degree 0.23 plain, 0.12 with 15 of 30 steps merged, 0.06 with all; its other six within 0.01).
    Paper: arXiv 2502.04363, section 3.2; keys that count by their size are from ToMe, arXiv 2210.09461.
    """

    name: ClassVar[str] = "merge-tokens"
    exact: ClassVar[bool] = False
    figure: ClassVar[str] = "relative L2 <= 1e-5 of the reference's merged outputs; equal to plain for equal pairs"
    paper: ClassVar[str] = "arXiv 2502.04363, section 3.2"
    plan_options: ClassVar[tuple[str, ...]] = ("steps",)

    steps: int | None = None  # of each unit, from its first; None is half of the shortest unit's
    rope: Literal["compressed", "midpoint"] = "compressed"  # merged frames at 0, 1, 2, ... or at 0.5, 2.5, 4.5, ...
    proportional: bool = False  # a key that stands for two frames counts twice beside one that stands for one
    scope: Literal["attention", "block"] = "attention"  # block: the MLPs too
    odd: Odd = "singleton"  # a last odd frame stays; "drop", as the reference: unseen, it gets what the last pair gets
    mixed_pairs: bool = False  # merge whatever the frame mask says, as the reference does

    def requires(self, program: Program) -> None:
        """A layout, known and equal masks in pairs, no more steps than there are, nothing merged otherwise."""
        self.plan(program.sampler)
        layouts = {stage.name: stage.layout for stage in program.stages if stage.layout}
        if not layouts:
            raise MovdcError("pass merge-tokens: no stage declares a token layout; leave the pass out for this family")
        for name, layout in layouts.items():
            mixed = layout.frame_mask_input or mixed_pairs(layout.frame_mask or (), self.odd)
            if mixed and layout.frames > 1 and not self.mixed_pairs:
                held = f"{name} may hold half a pair as condition ({mixed})"
                raise MovdcError(f"pass merge-tokens: {held}; set mixed_pairs=true")
        for name, variant, graph in program.graphs():
            if graph.layout and graph.layout.merged_by not in ("", str(self)):
                raise MovdcError(f"pass merge-tokens: {graph.layout.merged_by} made {name} ({variant}); merge once")

    def apply(self, program: Program) -> PassResult:
        """Add the variant to every stage with a layout, and give it its steps."""
        stages, notes = [], []
        for stage in program.stages:
            for variant, plain in stage.variants.items() if "merged" not in stage.variants else ():
                if plain.layout and plain.layout.frames > 1:
                    merged, sites = self._merged(plain, plain.layout)
                    name = variant.replace("plain", "merged")  # one for each length of prompts
                    stage = replace(stage, variants={**stage.variants, name: merged})
                    notes.append(f"{stage.name} ({variant}): {sites} sites merged")
            stages.append(stage)
        if not notes:
            return PassResult(program, False, "nothing to merge")
        sampler = self.plan(program.sampler)
        return PassResult(replace(program, stages=tuple(stages), sampler=sampler), True, ", ".join(notes))

    def plan(self, sampler: Sampler) -> Sampler:
        """The first steps run the variant; refuses more of them than there are."""
        if self.steps is not None and not 1 <= self.steps <= max(sampler.units):
            raise MovdcError(f"pass merge-tokens: steps={self.steps}; the sampler allows 1 to {max(sampler.units)}")
        return sampler.model_copy(update={"merged_steps": self.steps or max(1, min(sampler.units) // 2)})

    def _merged(self, plain: Graph, layout: TokenLayout) -> tuple[Graph, int]:
        """The merged variant, and in how many places frames are merged."""
        after = merged_frames(layout.frames, self.odd)
        traces = TwoTraces(plain, layout.retrace(after), (layout.frames, after))
        merge = partial(merge_frames, odd=self.odd)
        unmerge = partial(unmerge_frames, frames=layout.frames, odd=self.odd)
        positions, bias = partial(merge_positions, odd=self.odd), partial(key_bias, frames=layout.frames)
        weigh = self.proportional and layout.frames % 2 and self.odd == "singleton"  # else all keys weigh the same
        regions = traces.regions(layout.attentions + (layout.mlps if self.scope == "block" else ()))
        for region in regions:
            if self.rope == "midpoint":
                traces.map_positions(region, positions)
            traces.resize(region, merge, unmerge)
            if weigh:
                traces.bias_keys(region, bias)
        return replace(traces.result(), layout=replace(layout, merged_by=str(self))), len(regions)
