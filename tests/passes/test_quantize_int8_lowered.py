"""quantize-int8 on the example's text encoder, and that XNNPACK runs it in int8."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from quantized import (
    GENERATOR,
    MAX_RELATIVE_ERROR,
    MIN_COSINE,
    GatedFeedForward,
    cosine,
    errors_of,
    relative_error,
    tokens,
)
from tokenizers import Tokenizer
from torch import Tensor, nn

from movdc.compiler.pieces import split
from movdc.compiler.program import Graph, Program
from movdc.passes.canonicalize import Canonicalize
from movdc.passes.quantize_int8 import QuantizeInt8

PROMPTS = (
    "a red circle moving down on a black background",
    "a green square moving left on a white background",
    "a blue triangle",
)


def test_numbers_of_the_example_text_encoder(example_program: Program, run_graph: Callable[..., list[Tensor]]) -> None:
    program = Canonicalize()(example_program).program
    plain = program.stages[0].variants["plain"]
    result = QuantizeInt8()(program)
    assert result.note == "14 weights in int8"
    assert [graph for _, _, graph in result.program.graphs()][1:] == [graph for _, _, graph in program.graphs()][1:]
    quantized = result.program.stages[0].variants["plain"]
    for ids, mask in _prompts(program):
        inputs = {"input_ids": ids, "text_mask": mask}
        assert cosine(run_graph(quantized, **inputs)[0], run_graph(plain, **inputs)[0]) >= MIN_COSINE
    # The linears alone take 0.257 of their bytes; the table of embeddings is 9 % of this small encoder (3 % of T5-XXL).
    full, stored = (sum(ref.read().nbytes for ref in graph.weights.values()) for graph in (plain, quantized))
    assert stored <= 0.34 * full
    errors = errors_of(result.program)
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
        constants = target.write_weights(artifact.slots, refs, tmp_path / "own.ptd").constants
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
    x = tokens(24, 128)
    graph = graph_of(GatedFeedForward(128, 512), x=x)
    after = quantize(graph)
    run, program, weight_bytes_ = lowered(after)
    weights, channels, norm = 3 * 128 * 512, 512 + 512 + 128, 2 * 128
    assert weight_bytes_ == weights + 4 * channels + 4 * norm, "one byte a weight, a scale a channel, no zero points"
    assert len(program) < 10_000
    assert b"quantized_decomposed" not in program, "all of it is in the delegate"
    change = run(x) - x
    assert relative_error(change, run_graph(after, x=x)[0] - x) < 1e-2, "but for roundings, what the graph says"
    assert relative_error(change, run_graph(graph, x=x)[0] - x) < MAX_RELATIVE_ERROR


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
    assert relative_error(run(x), run_graph(graph, x=x)[0]) < MAX_RELATIVE_ERROR


@pytest.mark.slow
def test_xnnpack_convolves_in_int8_what_a_norm_and_an_activation_make_of_stacked_frames(
    graph_of: Callable[..., Graph],
    quantize: Callable[..., Graph],
    run_graph: Callable[..., list[Tensor]],
    lowered: Callable[[Graph], Lowered],
) -> None:
    x = torch.randn(1, 2, 8, 12, 12, generator=GENERATOR)
    first, second = nn.Conv2d(8, 16, 3, padding=1), nn.Conv2d(16, 8, 3, padding=1)
    module = nn.Sequential(nn.Flatten(0, 1), first, nn.GroupNorm(4, 16), nn.SiLU(), second)
    graph = graph_of(module, x=x)
    run, _, weight_bytes_ = lowered(quantize(graph))
    stacked, activated = 4 * (8 * 16 * 9 + 16), 16 * 8 * 9 + 4 * 8 + 4 * 8  # fp32; int8, scales, biases
    assert weight_bytes_ == stacked + 2 * 4 * 16 + activated
    assert relative_error(run(x), run_graph(graph, x=x)[0]) < MAX_RELATIVE_ERROR


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
        assert cosine(run(ids, mask), run_graph(plain, input_ids=ids, text_mask=mask)[0]) >= MIN_COSINE
    full = sum(ref.read().nbytes for ref in plain.weights.values())
    print(f"{weight_bytes_} of {full} bytes: {weight_bytes_ / full:.3f}")
    assert weight_bytes_ <= 0.27 * full
