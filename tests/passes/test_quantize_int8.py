"""quantize-int8: what becomes int8, what stays, how exact it is, and that XNNPACK runs it in int8."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor, nn

from movdc.compiler.cost import flops, is_fused_with_users, size_bytes, weight_bytes
from movdc.compiler.errors import MovdcError
from movdc.compiler.int8 import channel_scales, sqnr_db, to_int8
from movdc.compiler.layer_errors import layer_errors
from movdc.compiler.pieces import split
from movdc.compiler.printer import print_graph
from movdc.compiler.program import Graph, Program
from movdc.compiler.trace import trace
from movdc.compiler.weights import INT8, RandomSource, WeightRef
from movdc.passes.canonicalize import Canonicalize
from movdc.passes.quantize_int8 import QuantizeInt8
from movdc.runtime.bundle import TensorSpec

GENERATOR = torch.Generator().manual_seed(0)
MIN_COSINE = 0.999
MAX_RELATIVE_ERROR = 0.03
LINEARS = QuantizeInt8(stages=("toy",))
PROMPTS = (
    "a red circle moving down on a black background",
    "a green square moving left on a white background",
    "a blue triangle",
)

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


class GatedFeedForward(nn.Module):
    """As in T5: three weights without bias, two of which read one input."""

    def __init__(self, width: int = 16, inner: int = 32) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.wi_0, self.wi_1 = (nn.Linear(width, inner, bias=False) for _ in range(2))
        self.wo = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return x + self.wo(F.gelu(self.wi_0(y), approximate="tanh") * self.wi_1(y))


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


class Lookup(nn.Embedding):
    def forward(self, x: Tensor) -> Tensor:
        return F.embedding(x, self.weight) + 1


def _operators(graph: Graph) -> list[str]:
    return [getattr(node.target, "_opname", "getitem") for node in graph.compute_nodes]


def _tokens(count: int, width: int) -> Tensor:
    """Activations whose size differs from token to token."""
    return torch.randn(1, count, width, generator=GENERATOR) * torch.linspace(0.1, 5, count)[:, None]


def _relative_error(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


def _cosine(a: Tensor, b: Tensor) -> float:
    return float(F.cosine_similarity(a.flatten().double(), b.flatten().double(), dim=0))


@pytest.fixture
def quantize(program_of: Callable[..., Program]) -> Callable[..., Graph]:
    """Quantize a graph, under the contract of the base class (honest `modified`, idempotence, interfaces)."""

    def run(graph: Graph, one: QuantizeInt8 = LINEARS) -> Graph:
        return one(program_of(toy=graph)).program.stages[0].variants["plain"]

    return run


def test_every_linear_reads_int8_and_the_norm_stays(
    graph_of: Callable[..., Graph], quantize: Callable[..., Graph]
) -> None:
    graph = graph_of(GatedFeedForward(), x=_tokens(4, 16))
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
    graph = graph_of(GatedFeedForward(), x=_tokens(4, 16))
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
        (Lookup(8, 4), torch.tensor([[1, 2]])),
    ],
    ids=["read-by-something-else", "computed-bias", "no-tokens", "grouped-convolution", "conv3d", "embedding"],
)
def test_refuses_what_has_no_int8_kernel_or_would_be_stored_twice(
    module: nn.Module, x: Tensor, graph_of: Callable[..., Graph], program_of: Callable[..., Program]
) -> None:
    assert not LINEARS(program_of(toy=graph_of(module, x=x))).modified


def test_refuses_keys_that_keep_names(graph_of: Callable[..., Graph], quantize: Callable[..., Graph]) -> None:
    after = quantize(graph_of(GatedFeedForward(), x=_tokens(4, 16)), QuantizeInt8(stages=("t*",), keep=("wi_*",)))
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
    x = _tokens(6, 16)[0]
    graph = graph_of(Twice(16, 16, bias=False), x=x)
    after = quantize(graph)
    assert sorted(map(str, after.weights.values())) == ["toy:weight int8", "toy:weight int8-scale", "zeros:16"]
    assert _relative_error(run_graph(after, x=x)[0], run_graph(graph, x=x)[0]) < MAX_RELATIVE_ERROR


def test_variants_of_a_stage_share_their_weights(
    graph_of: Callable[..., Graph], program_of: Callable[..., Program]
) -> None:
    module = GatedFeedForward()
    plain, merged = (graph_of(module, x=_tokens(count, 16)) for count in (8, 4))
    program = program_of(toy=plain)
    stage = replace(program.stages[0], variants={"plain": plain, "merged": merged})
    after = LINEARS(replace(program, stages=(stage,))).program.stages[0].variants
    texts = [{name: str(ref) for name, ref in graph.weights.items()} for graph in after.values()]
    assert texts[0] == texts[1]
    assert len(layer_errors(replace(program, stages=(replace(stage, variants=after),)))) == 3


@pytest.mark.parametrize(
    ("module", "x"),
    [
        (GatedFeedForward(), _tokens(8, 16)),
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
    assert _relative_error(run_graph(after, x=x)[0], run_graph(graph, x=x)[0]) < MAX_RELATIVE_ERROR


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
    errors = layer_errors(program)
    assert sorted(read) == ["wi_0.weight", "wi_1.weight", "wo.weight"]
    assert [error.sqnr_db for error in errors] == sorted(error.sqnr_db for error in errors)
    assert all(35 < error.sqnr_db < 60 for error in errors)
    assert all(error.stage == "toy" for error in errors)
    weight = source.read("wi_0.weight")
    restored = to_int8(weight) * channel_scales(weight)[:, None]
    by_hand = 10 * torch.log10(weight.square().sum() / (weight - restored).square().sum())
    assert {error.key: error.sqnr_db for error in errors}["wi_0.weight"] == pytest.approx(float(by_hand), abs=0.01)
    assert sqnr_db(torch.zeros(2, 3)) == 150


def test_costs_what_int8_costs(graph_of: Callable[..., Graph], quantize: Callable[..., Graph]) -> None:
    graph = graph_of(GatedFeedForward(), x=_tokens(4, 16))
    after = quantize(graph)
    assert sum(flops(node) for node in after.compute_nodes) == sum(flops(node) for node in graph.compute_nodes) > 0
    weights, channels, norm = 3 * 16 * 32, 32 + 32 + 16, 2 * 16
    assert sum(weight_bytes(node, graph) for node in graph.compute_nodes) == 4 * (weights + norm)
    assert sum(weight_bytes(node, after) for node in after.compute_nodes) == weights + 8 * channels + 4 * norm
    restored = [node for node in after.compute_nodes if "dequantize" in node.target.__name__]
    assert len(restored) == 6
    assert sum(size_bytes(node) for node in restored) == 0, "no target stores what is restored"


def test_a_product_is_cut_off_only_as_a_whole(graph_of: Callable[..., Graph], quantize: Callable[..., Graph]) -> None:
    nodes = quantize(graph_of(GatedFeedForward(), x=_tokens(4, 16))).compute_nodes
    fused = "".join("f" if is_fused_with_users(node) else "." for node in nodes)
    products = [index for index, node in enumerate(nodes) if node.target is torch.ops.aten.linear.default]
    for index in products:
        assert fused[index - 6 : index + 1] == "ffffff.", "six nodes, then the linear behind which a cut may come"
    assert fused.count("f") == 6 * len(products)


def test_numbers_of_the_example_text_encoder(example_program: Program, run_graph: Callable[..., list[Tensor]]) -> None:
    program = Canonicalize()(example_program).program
    plain = program.stages[0].variants["plain"]
    result = QuantizeInt8()(program)
    assert result.note == "14 weights in int8"
    assert [graph for _, _, graph in result.program.graphs()][1:] == [graph for _, _, graph in program.graphs()][1:]
    quantized = result.program.stages[0].variants["plain"]
    for ids, mask in _prompts(program):
        inputs = {"input_ids": ids, "text_mask": mask}
        assert _cosine(run_graph(quantized, **inputs)[0], run_graph(plain, **inputs)[0]) >= MIN_COSINE
    # The linears alone take 0.257 of their bytes; the table of embeddings is 9 % of this small encoder (3 % of T5-XXL).
    full, stored = (sum(ref.read().nbytes for ref in graph.weights.values()) for graph in (plain, quantized))
    assert stored <= 0.34 * full
    errors = layer_errors(result.program)
    assert len(errors) == 14
    assert min(error.sqnr_db for error in errors) > 40


def _prompts(program: Program) -> list[tuple[Tensor, Tensor]]:
    tokenizer = Tokenizer.from_str(program.tokenizer_json.decode())
    length = program.prompt.max_tokens
    pairs = []
    for prompt in PROMPTS:
        ids = tokenizer.encode(prompt).ids[:length]
        mask = torch.zeros(1, length)
        mask[0, : len(ids)] = 1
        pairs.append((torch.tensor([ids + [program.prompt.pad_id] * (length - len(ids))]), mask))
    return pairs


Lowered = tuple[Callable[..., Tensor], bytes, int]


@pytest.fixture
def lowered(tmp_path: Path) -> Callable[[Graph], Lowered]:
    """Lower a graph as one partition: what runs it with its own weights, the program, the bytes of its weights."""

    def lower(graph: Graph) -> Lowered:
        from executorch.extension.pybindings.portable_lib import _load_for_executorch

        from movdc.targets.executorch_xnnpack import ExecutorchXnnpack

        target = ExecutorchXnnpack()
        (piece,) = split(graph)
        artifact = target.emit(piece, tmp_path)
        refs = {weight.name: weight.ref for weight in piece.weights}
        constants = target.write_weights(artifact.slots, refs, tmp_path / "own.ptd")
        module = _load_for_executorch(str(artifact.program), str(tmp_path / "own.ptd"))
        size = sum(constant.size_bytes for constant in constants)
        return lambda *inputs: module.forward(inputs)[0].clone(), artifact.program.read_bytes(), size

    return lower


@pytest.mark.slow
def test_xnnpack_multiplies_in_int8_with_the_weights_outside_the_program(
    graph_of: Callable[..., Graph],
    quantize: Callable[..., Graph],
    run_graph: Callable[..., list[Tensor]],
    lowered: Callable[[Graph], Lowered],
) -> None:
    x = _tokens(24, 128)
    graph = graph_of(GatedFeedForward(128, 512), x=x)
    after = quantize(graph)
    run, program, weight_bytes_ = lowered(after)
    weights, channels, norm = 3 * 128 * 512, 512 + 512 + 128, 2 * 128
    assert weight_bytes_ == weights + 4 * channels + 4 * norm, "one byte a weight, a scale a channel, no zero points"
    assert len(program) < 10_000
    assert b"quantized_decomposed" not in program, "all of it is in the delegate"
    change = run(x) - x
    assert _relative_error(change, run_graph(after, x=x)[0] - x) < 1e-2, "but for roundings, what the graph says"
    assert _relative_error(change, run_graph(graph, x=x)[0] - x) < MAX_RELATIVE_ERROR


@pytest.mark.slow
def test_xnnpack_convolves_in_int8(
    graph_of: Callable[..., Graph],
    quantize: Callable[..., Graph],
    run_graph: Callable[..., list[Tensor]],
    lowered: Callable[[Graph], Lowered],
) -> None:
    x = torch.randn(2, 8, 12, 12, generator=GENERATOR) * torch.tensor([1.0, 4.0])[:, None, None, None]
    graph = graph_of(nn.Conv2d(8, 16, 3, padding=1), x=x)
    run, program, weight_bytes_ = lowered(quantize(graph))
    assert weight_bytes_ == 8 * 16 * 9 + 4 * 16 + 4 * 16  # values, scales, biases
    assert b"quantized_decomposed" not in program
    assert _relative_error(run(x), run_graph(graph, x=x)[0]) < MAX_RELATIVE_ERROR


@pytest.mark.slow
def test_numbers_of_the_example_text_encoder_as_xnnpack_runs_it(
    example_program: Program,
    run_graph: Callable[..., list[Tensor]],
    lowered: Callable[[Graph], Lowered],
) -> None:
    program = Canonicalize()(example_program).program
    plain = program.stages[0].variants["plain"]
    after = QuantizeInt8(embeddings=True)(program).program.stages[0].variants["plain"]
    run, text, weight_bytes_ = lowered(after)
    assert len(text) < 64_000
    assert b"quantized_decomposed" not in text
    for ids, mask in _prompts(program):
        assert _cosine(run(ids, mask), run_graph(plain, input_ids=ids, text_mask=mask)[0]) >= MIN_COSINE
    full = sum(ref.read().nbytes for ref in plain.weights.values())
    print(f"{weight_bytes_} of {full} bytes: {weight_bytes_ / full:.3f}")
    assert weight_bytes_ <= 0.27 * full
