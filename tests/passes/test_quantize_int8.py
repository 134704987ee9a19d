"""quantize-int8: what becomes int8, what stays, and how exact it is."""

from collections.abc import Callable, Mapping
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from quantized import (
    GENERATOR,
    LINEARS,
    MAX_RELATIVE_ERROR,
    GatedFeedForward,
    errors_of,
    relative_error,
    tokens,
)
from torch import Tensor, nn

from movdc.compiler.cost import flops, is_fused_with_users, size_bytes, weight_bytes
from movdc.compiler.errors import MovdcError
from movdc.compiler.int8 import Loss, channel_scales, to_int8
from movdc.compiler.printer import print_graph
from movdc.compiler.program import Graph, Program
from movdc.compiler.trace import trace
from movdc.compiler.weights import INT8, RandomSource, WeightRef
from movdc.passes.quantize_int8 import QuantizeInt8
from movdc.runtime.bundle import TensorSpec

AFTER = """\
  %p_weight_scale: f32[4] = weight(toy:weight int8-scale)
  %zeros_4: i32[4] = weight(zeros:4)
  %p_weight: i8[4,8] = weight(toy:weight int8)
  %p_bias: f32[4] = weight(toy:bias)
  %x: f32[3,8] = input
  %choose_qparams_per_token_asymmetric_default: (torch.float64[3,1], i64[3,1]) = \
quantized_decomposed.choose_qparams_per_token_asymmetric(%x, torch.int8)
  %getitem: torch.float64[3,1] = getitem(%choose_qparams_per_token_asymmetric_default, 0)  # 24 B
  %getitem_1: i64[3,1] = getitem(%choose_qparams_per_token_asymmetric_default, 1)  # 24 B
  %quantize_per_token_default: i8[3,8] = quantized_decomposed.quantize_per_token(%x, %getitem, %getitem_1, -128, 127, \
torch.int8)  # 24 B
  %dequantize_per_token_default: f32[3,8] = quantized_decomposed.dequantize_per_token(%quantize_per_token_default, %getitem, \
%getitem_1, -128, 127, torch.int8, torch.float32)  # 96 B
  %dequantize_per_channel_default: f32[4,8] = quantized_decomposed.dequantize_per_channel(%p_weight, %p_weight_scale, \
%zeros_4, 0, -127, 127, torch.int8)  # 128 B
  %linear: f32[3,4] = aten.linear(%dequantize_per_token_default, %dequantize_per_channel_default, %p_bias)  # 48 B
  return [%linear]
"""


class Tied(nn.Linear):
    """A weight that is looked up, or changed, and multiplied by too."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight) + self.weight[0]


class Twice(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, self.weight), self.weight)


class ComputedBias(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, x[0, : self.out_features] * 2)


class StackedFrames(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(torch.relu(x.reshape(-1, *x.shape[2:])))


class Lookup(nn.Embedding):
    def forward(self, x: Tensor) -> Tensor:
        return F.embedding(x, self.weight) + 1


def _operators(graph: Graph) -> list[str]:
    return [getattr(node.target, "_opname", "getitem") for node in graph.compute_nodes]


def test_every_linear_reads_int8_and_the_norm_stays(
    graph_of: Callable[..., Graph], quantize: Callable[..., Graph]
) -> None:
    graph = graph_of(GatedFeedForward(), x=tokens(4, 16))
    after = quantize(graph)
    before_counts, counts = _operators(graph), _operators(after)
    assert before_counts.count("linear") == counts.count("linear") == 3
    # Each product has an input of its own: a shared one would tear the kernel apart.
    for name in ("choose_qparams_per_token_asymmetric", "quantize_per_token", "dequantize_per_token"):
        assert counts.count(name) == 3
    assert counts.count("dequantize_per_channel") == 3
    kinds = {ref.key: ref.transforms for name, ref in after.weights.items() if not name.endswith("_scale")}
    assert [key for key, transforms in kinds.items() if transforms == (INT8,)] == [
        "wi_0.weight", "wi_1.weight", "wo.weight",
    ]  # fmt: skip
    assert kinds["norm.weight"] == kinds["norm.bias"] == ()
    linear = next(node for node in after.compute_nodes if node.target is torch.ops.aten.linear.default)
    assert all(node.meta["nn_module_stack"] == linear.meta["nn_module_stack"] for node in linear.all_input_nodes[:1])


def test_golden_text(graph_of: Callable[..., Graph], quantize: Callable[..., Graph]) -> None:
    assert print_graph(quantize(graph_of(nn.Linear(8, 4), x=torch.ones(3, 8)))) == AFTER


def test_modified_is_honest_and_a_second_time_changes_nothing(
    graph_of: Callable[..., Graph], program_of: Callable[..., Program]
) -> None:
    graph = graph_of(GatedFeedForward(), x=tokens(4, 16))
    both = program_of(toy=graph, other=graph)
    result = LINEARS(both)
    assert result.modified
    assert result.note == "3 weights in int8"
    assert result.program.stages[1].variants["plain"] is graph
    assert not LINEARS(result.program).modified


@pytest.mark.parametrize(
    ("module", "x"),
    [
        (Tied(8, 8, bias=False), torch.ones(3, 8)),
        (ComputedBias(8, 4, bias=False), torch.ones(3, 8)),
        (nn.Linear(8, 4), torch.ones(8)),
        (nn.Conv2d(4, 8, 3, groups=2), torch.ones(1, 4, 5, 5)),
        (nn.Conv3d(4, 8, 3), torch.ones(1, 4, 5, 5, 5)),
        (StackedFrames(4, 8, 3), torch.ones(1, 2, 4, 5, 5)),
        (Lookup(8, 4), torch.tensor([[1, 2]])),
    ],
    ids=[
        "read-by-something-else",
        "computed-bias",
        "no-tokens",
        "grouped-convolution",
        "conv3d",
        "behind-a-change-of-shape",
        "embedding",
    ],
)
def test_refuses_what_has_no_int8_kernel_or_would_be_stored_twice(
    module: nn.Module, x: Tensor, graph_of: Callable[..., Graph], program_of: Callable[..., Program]
) -> None:
    assert not LINEARS(program_of(toy=graph_of(module, x=x))).modified


def test_refuses_keys_that_keep_names(graph_of: Callable[..., Graph], quantize: Callable[..., Graph]) -> None:
    after = quantize(graph_of(GatedFeedForward(), x=tokens(4, 16)), QuantizeInt8(stages=("t*",), keep=("wi_*",)))
    assert [ref.key for ref in after.weights.values() if INT8 in ref.transforms] == ["wo.weight"]


@pytest.mark.parametrize(
    ("one", "said"),
    [
        (QuantizeInt8(stages=("text_enc",)), "stages: nothing matches 'text_enc'; there are toy"),
        (QuantizeInt8(stages=("toy",), keep=("*.wo",)), "keep: nothing matches '*.wo'; there are bias, weight"),
    ],
)
def test_refuses_a_pattern_that_means_nothing(
    one: QuantizeInt8, said: str, graph_of: Callable[..., Graph], program_of: Callable[..., Program]
) -> None:
    program = program_of(toy=graph_of(nn.Linear(8, 4), x=torch.ones(3, 8)))
    with pytest.raises(MovdcError) as caught:
        one(program)
    assert str(caught.value) == f"pass quantize-int8: {said}"


def test_a_weight_of_two_linears_is_stored_once(
    graph_of: Callable[..., Graph], quantize: Callable[..., Graph], run_graph: Callable[..., list[Tensor]]
) -> None:
    x = tokens(6, 16)[0]
    graph = graph_of(Twice(16, 16, bias=False), x=x)
    after = quantize(graph)
    assert sorted(map(str, after.weights.values())) == ["toy:weight int8", "toy:weight int8-scale", "zeros:16"]
    assert relative_error(run_graph(after, x=x)[0], run_graph(graph, x=x)[0]) < MAX_RELATIVE_ERROR


def test_variants_of_a_stage_share_their_weights(
    graph_of: Callable[..., Graph], program_of: Callable[..., Program]
) -> None:
    module = GatedFeedForward()
    plain, merged = (graph_of(module, x=tokens(count, 16)) for count in (8, 4))
    program = program_of(toy=plain)
    stage = replace(program.stages[0], variants={"plain": plain, "merged": merged})
    after = LINEARS(replace(program, stages=(stage,))).program.stages[0].variants
    texts = [{name: str(ref) for name, ref in graph.weights.items()} for graph in after.values()]
    assert texts[0] == texts[1]
    assert len(errors_of(replace(program, stages=(replace(stage, variants=after),)))) == 3


@pytest.mark.parametrize(
    ("module", "x"),
    [
        (GatedFeedForward(), tokens(8, 16)),
        (nn.Linear(16, 8), torch.zeros(4, 16)),
        (nn.Conv2d(8, 16, 3, padding=1), torch.randn(1, 8, 6, 6, generator=GENERATOR)),
        (Lookup(8, 16), torch.tensor([[1, 2, 7, 0]])),
    ],
    ids=["feed-forward", "input-of-zeros", "convolution", "embedding"],
)
def test_numbers_are_close(
    module: nn.Module,
    x: Tensor,
    graph_of: Callable[..., Graph],
    quantize: Callable[..., Graph],
    run_graph: Callable[..., list[Tensor]],
) -> None:
    graph = graph_of(module, x=x)
    after = quantize(graph, QuantizeInt8(stages=("toy",), embeddings=True))
    assert any(INT8 in ref.transforms for ref in after.weights.values())
    assert relative_error(run_graph(after, x=x)[0], run_graph(graph, x=x)[0]) < MAX_RELATIVE_ERROR


def test_numbers_of_a_channel_are_symmetric_and_zeros_stay_zeros() -> None:
    weight = torch.tensor([[0.0, 0.0, 0.0], [-2.0, 1.0, 0.5], [1e-45, 0.0, 0.0], [254.0, -3.0, 1.0]])
    scales, values = channel_scales(weight), to_int8(weight)
    assert values.dtype == torch.int8
    assert values.tolist()[1] == [-127, 64, 32]
    assert values.tolist()[3] == [127, -2, 0]  # -1.5 and 0.5 steps: to even
    assert not values[0].any()
    assert bool((scales >= torch.finfo(torch.float32).tiny).all()), "XNNPACK refuses zero and subnormal scales"
    assert bool(((values * scales[:, None] - weight).abs() <= scales[:, None] / 2).all())
    assert torch.equal(to_int8(weight.to(torch.bfloat16)), to_int8(weight.to(torch.bfloat16).float()))


def test_numbers_of_the_report_come_worst_first_and_each_tensor_is_read_once(
    program_of: Callable[..., Program],
) -> None:
    read: list[str] = []

    class Watched(RandomSource):
        def refs(self) -> Mapping[str, WeightRef]:
            return {key: replace(ref, source=self) for key, ref in super().refs().items()}

        def read(self, key: str) -> Tensor:
            read.append(key)
            tensor = super().read(key)
            if key == "wo.weight":
                tensor[0, 0] = 100  # an outlier, for which the other values of its channel pay
            return tensor

    module = GatedFeedForward()
    source = Watched(0, {key: tuple(tensor.shape) for key, tensor in module.state_dict().items()})
    spec = TensorSpec(name="x", dtype="f32", shape=(1, 4, 16))
    program = LINEARS(program_of(toy=trace(lambda: module, (spec,), ("out",), source.refs()))).program
    assert read == [], "nothing is read before it is lowered"
    errors = errors_of(program)
    assert sorted(read) == ["wi_0.weight", "wi_1.weight", "wo.weight"]
    assert [error.sqnr_db for error in errors] == sorted(error.sqnr_db for error in errors)
    assert all(35 < error.sqnr_db < 60 for error in errors)
    assert all(error.stage == "toy" for error in errors)
    weight = source.read("wi_0.weight")
    restored = to_int8(weight) * channel_scales(weight)[:, None]
    by_hand = 10 * torch.log10(weight.square().sum() / (weight - restored).square().sum())
    assert {error.key: error.sqnr_db for error in errors}["wi_0.weight"] == pytest.approx(float(by_hand), abs=0.01)
    nothing = Loss()
    assert not nothing.to_int8(torch.zeros(2, 3)).any()
    assert nothing.sqnr_db == 150


def test_costs_what_int8_costs(graph_of: Callable[..., Graph], quantize: Callable[..., Graph]) -> None:
    graph = graph_of(GatedFeedForward(), x=tokens(4, 16))
    after = quantize(graph)
    assert sum(flops(node) for node in after.compute_nodes) == sum(flops(node) for node in graph.compute_nodes) > 0
    weights, channels, norm = 3 * 16 * 32, 32 + 32 + 16, 2 * 16
    assert sum(weight_bytes(node, graph) for node in graph.compute_nodes) == 4 * (weights + norm)
    assert sum(weight_bytes(node, after) for node in after.compute_nodes) == weights + 8 * channels + 4 * norm
    restored = [node for node in after.compute_nodes if "dequantize" in node.target.__name__]
    assert len(restored) == 6
    assert sum(size_bytes(node) for node in restored) == 0, "no target stores what is restored"


def test_a_product_is_cut_off_only_as_a_whole(graph_of: Callable[..., Graph], quantize: Callable[..., Graph]) -> None:
    nodes = quantize(graph_of(GatedFeedForward(), x=tokens(4, 16))).compute_nodes
    fused = "".join("f" if is_fused_with_users(node) else "." for node in nodes)
    products = [index for index, node in enumerate(nodes) if node.target is torch.ops.aten.linear.default]
    for index in products:
        assert fused[index - 6 : index + 1] == "ffffff.", "six nodes, then the linear behind which a cut may come"
    assert fused.count("f") == 6 * len(products)
