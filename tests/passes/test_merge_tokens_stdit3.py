"""merge-tokens on STDiT3: outputs recorded from the reference, equal pairs of frames, FLOPs at full size."""

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, fx, nn

from movdc.compiler.cost import flops
from movdc.compiler.program import Graph, Program, value_of
from movdc.compiler.weights import RandomSource
from movdc.models.stdit3 import STDiT3, STDiT3Config
from movdc.passes.merge_tokens import MergeTokens

GOLDEN = Path(__file__).parents[1] / "golden"
FAMILY = {"attentions": ("stdit.*_blocks.*.attn", "stdit.*_blocks.*.cross_attn"), "mlps": ("stdit.*_blocks.*.mlp",)}
aten = torch.ops.aten
SDPA = aten.scaled_dot_product_attention.default

ProgramOf = Callable[..., Program]
GraphWithLayout = Callable[..., Graph]
RunGraph = Callable[..., list[Tensor]]


class Recorded(nn.Module):
    """An STDiT3 as the recorded cases call it; `scalars` are its fps, height and width."""

    def __init__(self, config: STDiT3Config, scalars: dict[str, float]) -> None:
        super().__init__()
        self.stdit, self.scalars = STDiT3(config), scalars

    def forward(self, x: Tensor, timestep: Tensor, y: Tensor, *masks: Tensor) -> Tensor:
        out: Tensor = self.stdit(x, timestep, y, *masks, **self.scalars)
        return out


def recorded(case: str, graph_with_layout: GraphWithLayout) -> tuple[Graph, dict[str, Tensor], dict[str, Tensor]]:
    """The plain graph of a recorded case, its inputs, and every recorded tensor."""
    meta = json.loads((GOLDEN / f"tdtm_{case}.json").read_text())
    # The text mask is recorded as whole numbers; the model takes it as it takes any number.
    tensors = {
        name: tensor if tensor.dtype == torch.bool else tensor.float()
        for name, tensor in load_file(GOLDEN / f"tdtm_{case}.safetensors").items()
    }
    scalars = {key: float(tensors[f"in.{key}"][0]) for key in ("fps", "height", "width")}
    module = Recorded(STDiT3Config.from_dict(meta["model_config"]), scalars).eval()
    module.stdit.load_state_dict({key: t.float() for key, t in load_file(GOLDEN / meta["weights_file"]).items()})
    names = [name for name in ("x", "timestep", "y", "mask", "x_mask") if f"in.{name}" in tensors]
    inputs = {name: tensors[f"in.{name}"] for name in names}
    axes, mask = ({"x": 2, "x_mask": 1}, "x_mask") if "x_mask" in inputs else ({"x": 2}, None)
    shapes = {name: tuple(tensor.shape) for name, tensor in inputs.items()}
    graph = graph_with_layout(lambda: module, shapes, axes, **FAMILY, frame_mask_input=mask)
    return graph, inputs, tensors


def distance(ours: Tensor, expected: Tensor) -> float:
    assert ours.shape == expected.shape
    return float(torch.linalg.vector_norm(ours - expected) / torch.linalg.vector_norm(expected))


def values_of(graph: Graph, inputs: dict[str, Tensor], run_graph: RunGraph) -> dict[str, Tensor]:
    """Every tensor that a graph computes, by name."""
    copied = graph.copy()
    nodes = [node for node in copied.nodes if node.op == "call_function" and isinstance(node.meta["val"], Tensor)]
    next(iter(reversed(copied.nodes))).args = (nodes,)
    return dict(zip([node.name for node in nodes], run_graph(replace(graph, graph=copied), **inputs), strict=True))


@pytest.mark.parametrize("case", ["b1_T4", "b2_T8_xmask", "b3_T7_odd", "b4_T6", "b5_T30"])
def test_numbers_are_those_of_the_reference(
    case: str, graph_with_layout: GraphWithLayout, program_of: ProgramOf, run_graph: RunGraph
) -> None:
    graph, inputs, tensors = recorded(case, graph_with_layout)
    result = MergeTokens(odd="drop", mixed_pairs="x_mask" in inputs)(program_of(denoiser=graph))
    merged = result.program.stages[0].variants["merged"]
    values = values_of(merged, inputs, run_graph)
    for group, part in product(("spatial", "temporal"), ("attn", "cross_attn")):
        path = f"stdit.{group}_blocks.0.{part}.proj"
        found = [n for n in merged.compute_nodes if path in paths(n)]
        name = next(node.name for node in found if node.target is aten.linear.default)
        assert distance(values[name], tensors[f"mid.{group}.0.{part}"]) <= 1e-5, path
    (out,) = run_graph(merged, **inputs)
    assert distance(out, tensors["out"]) <= 1e-5
    (plain,) = run_graph(graph, **inputs)
    assert distance(plain, tensors["out_without_tdtm"]) <= 1e-5
    assert distance(out, plain) > 1e-3, "the case would not tell merged from plain"

    frames = graph.layout.frames if graph.layout else 0
    assert all(queries(one) * (frames // 2) == queries(two) * frames for one, two in attentions(graph, merged))
    assert [node.name for node, _ in attentions(graph, merged)] == [node.name for _, node in attentions(graph, merged)]
    assert merged.weights.keys() == graph.weights.keys()
    assert all(merged.weights[name] is reference for name, reference in graph.weights.items())
    tables = {node.name for node in graph.compute_nodes if "stdit.rope" in paths(node)}
    assert {node.name for node in graph.compute_nodes} - {node.name for node in merged.compute_nodes} == tables


def paths(node: fx.Node) -> list[str]:
    """The module that a node comes from, and those that hold it."""
    return [path for path, _ in node.meta["nn_module_stack"].values()]


def attentions(graph: Graph, merged: Graph) -> list[tuple[fx.Node, fx.Node]]:
    """The attentions of both variants, in order."""
    found = [[node for node in one.compute_nodes if node.target is SDPA] for one in (graph, merged)]
    assert found[0]
    return list(zip(*found, strict=True))


def queries(node: fx.Node) -> int:
    assert isinstance(node.args[0], fx.Node)
    return value_of(node.args[0]).numel()


# Equal pairs: what merging loses is nothing, so the merged graph must be the plain one. Not bit by bit, because a
# softmax adds half as many terms, and each linear has half as many rows, for which the BLAS may choose other blocks.
@pytest.mark.parametrize(("frames", "options"), [(6, {}), (7, {"proportional": True}), (7, {})])
def test_numbers_are_plain_for_equal_pairs_without_rope(
    frames: int, options: dict[str, Any], graph_with_layout: GraphWithLayout, program_of: ProgramOf, run_graph: RunGraph
) -> None:
    torch.manual_seed(0)
    config = STDiT3Config(hidden_size=32, depth=1, num_heads=2, caption_channels=8, model_max_length=5)
    module = Recorded(config, {"fps": 24.0, "height": 64.0, "width": 64.0}).eval()
    module.stdit.rope.freqs.zero_()
    pairs = torch.randn(2, 4, frames - frames // 2, 4, 4)
    inputs = {
        "x": pairs.repeat_interleave(2, dim=2)[:, :, :frames],
        "timestep": torch.tensor([700.0, 700.0]),
        "y": torch.randn(2, 1, 5, 8),
    }
    shapes = {name: tuple(tensor.shape) for name, tensor in inputs.items()}
    graph = graph_with_layout(lambda: module, shapes, {"x": 2}, **FAMILY)
    merged = MergeTokens(**options)(program_of(denoiser=graph)).program.stages[0].variants["merged"]
    error = distance(run_graph(merged, **inputs)[0], run_graph(graph, **inputs)[0])
    if frames % 2 and not options:
        assert error > 1e-4, "the singleton counts too much without proportional"
    else:
        assert error <= 1e-6, error


def test_flops_fall_as_published_at_full_size(graph_with_layout: GraphWithLayout, program_of: ProgramOf) -> None:
    """STDiT3-XL/2, 68 frames of 256x256, 35 text tokens in 2 rows; blocks are equal, so two depths tell those of 28."""
    ours, packed = [], []
    for depth in (1, 2):
        build = partial(Recorded, STDiT3Config(depth=depth), {"fps": 24.0, "height": 256.0, "width": 256.0})
        with torch.device("meta"):
            shapes = {key: tuple(tensor.shape) for key, tensor in build().state_dict().items()}
        inputs = {"x": (2, 4, 20, 32, 32), "timestep": (2,), "y": (2, 1, 35, 4096)}
        graph = graph_with_layout(build, inputs, {"x": 2}, RandomSource(0, shapes), **FAMILY)
        variants = MergeTokens()(program_of(denoiser=graph)).program.stages[0].variants
        graphs = variants["plain"], variants["merged"]
        # The reference packs the text of both rows into one sequence of 70 and masks the other row's; ours sees its own.
        cross = [
            sum(flops(node) for node in one.compute_nodes if node.target is SDPA and keys(node) == 35) for one in graphs
        ]
        ours.append([sum(flops(node) for node in one.compute_nodes) for one in graphs])
        packed.append([count + again for count, again in zip(ours[-1], cross, strict=True)])
    for counts, ratio in ((packed, 1.285), (ours, 1.283)):
        plain, merged = (one + 27 * (two - one) for one, two in zip(*counts, strict=True))
        assert plain / merged == pytest.approx(ratio, abs=0.0005)
        assert counts is ours or (plain / 1e12, merged / 1e12) == pytest.approx((21.88, 17.03), abs=0.005)


def keys(node: fx.Node) -> int:
    assert isinstance(node.args[1], fx.Node)
    return int(value_of(node.args[1]).shape[-2])
