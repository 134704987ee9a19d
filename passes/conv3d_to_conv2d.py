"""conv3d-to-conv2d: a 3-D convolution as one 2-D convolution over stacked frames."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import fx

from movdc.compiler.pass_base import Pass, PassResult
from movdc.compiler.program import Graph, Program, value_of
from movdc.compiler.trace import insert_after
from movdc.compiler.weights import Transform, WeightRef

aten = torch.ops.aten


@dataclass(frozen=True)
class Conv3dToConv2d(Pass):
    """Rewrite aten.conv3d so that targets without 3-D kernels run it.

    Before:  %y: f32[B,O,T',H',W'] = aten.conv3d(%x, %w, %b, [st, sh, sw], [0, ph, pw])
    After:   frames t, t+1, ... of each output frame are stacked as channels, [B*T', kt*C, H, W], and
             %y = aten.conv2d(frames, %w as [O, kt*C, kh, kw], %b, [sh, sw], [ph, pw]), put back to [B,O,T',H',W']

    Refuses (leaves as it is): 1. dilation or groups other than 1; 2. padding in time, which adapters write as an
    explicit pad; 3. a weight that is not a parameter. Cost: kt copies of the input for a moment; FLOPs are the same.
    """

    name: ClassVar[str] = "conv3d-to-conv2d"
    exact: ClassVar[bool] = True
    # Merging traces the stage again and aligns the two traces, so the plain one must still be as traced.
    after: ClassVar[tuple[str, ...]] = ("merge-tokens",)

    def apply(self, program: Program) -> PassResult:
        """Rewrite every convolution that qualifies."""
        rewritten: dict[tuple[str, str], Graph] = {}
        count = 0
        for stage, variant, graph in program.graphs():
            names = [node.name for node in graph.compute_nodes if _qualifies(node, graph)]
            if names:
                rewritten[stage, variant] = _rewrite(graph, names)
                count += len(names)
        return PassResult(program.map_graphs(rewritten), bool(rewritten), f"{count} convolutions rewritten")


def _settings(node: fx.Node) -> tuple[Any, ...]:
    """x, weight, bias, stride, padding, dilation, groups with the operator's defaults filled in."""
    defaults = (None, None, None, (1, 1, 1), (0, 0, 0), (1, 1, 1), 1)
    given = (*node.args, *defaults[len(node.args) :])
    return tuple([_triple(value) if index in (3, 4, 5) else value for index, value in enumerate(given)])


def _triple(value: Any) -> tuple[int, ...]:
    return (value,) * 3 if isinstance(value, int) else tuple(value) * (3 // len(value))


def _qualifies(node: fx.Node, graph: Graph) -> bool:
    if node.target is not aten.conv3d.default:
        return False
    _, weight, _, _, padding, dilation, groups = _settings(node)
    return padding[0] == 0 and dilation == (1, 1, 1) and groups == 1 and weight.name in graph.weights


def _rewrite(graph: Graph, names: list[str]) -> Graph:
    copied = graph.copy()
    weights = dict(graph.weights)
    for node in [node for node in copied.nodes if node.name in names]:
        _, weight, *_ = _settings(node)
        kernel = value_of(weight)
        if kernel.dim() == 5:  # not yet rewritten for an earlier use of the same weight
            weights[weight.name] = _as_2d(weights[weight.name], kernel)
            weight.meta["val"] = kernel.permute(0, 2, 1, 3, 4).flatten(1, 2).contiguous()
            weight.meta["taps"] = int(kernel.shape[2])
        node.replace_all_uses_with(_conv2d(node, weight.meta["taps"]))
        copied.erase_node(node)
    copied.lint()
    return replace(graph, graph=copied, weights=weights)


def _as_2d(reference: WeightRef, kernel: torch.Tensor) -> WeightRef:
    out, channels, taps, height, width = (int(size) for size in kernel.shape)
    return reference.then(
        Transform("permute", (0, 2, 1, 3, 4)), Transform("reshape", (out, taps * channels, height, width))
    )


def _conv2d(node: fx.Node, taps: int) -> fx.Node:
    x, weight, bias, stride, padding, *_ = _settings(node)
    call = insert_after(node)
    batch, _, _, height, width = (int(size) for size in value_of(x).shape)
    _, out_channels, out_frames, out_height, out_width = (int(size) for size in value_of(node).shape)
    frames_first = call(aten.permute.default, x, [0, 2, 1, 3, 4])  # [B, T, C, H, W]
    span = (out_frames - 1) * stride[0] + 1
    stacked = frames_first
    if taps > 1 or stride[0] > 1:  # a slice of everything would be a node that passes its input through
        windows = [call(aten.slice.Tensor, frames_first, 1, tap, tap + span, stride[0]) for tap in range(taps)]
        stacked = call(aten.cat.default, windows, 2)
    images = call(aten.reshape.default, stacked, [batch * out_frames, -1, height, width])
    result = call(aten.conv2d.default, images, weight, bias, list(stride[1:]), list(padding[1:]))
    unfolded = call(aten.reshape.default, result, [batch, out_frames, out_channels, out_height, out_width])
    channels_first = call(aten.permute.default, unfolded, [0, 2, 1, 3, 4])
    # Contiguous for all who read it: ExecuTorch would add a copy for some, and XNNPACK refuses to return both.
    return call(aten.contiguous.default, channels_first)
