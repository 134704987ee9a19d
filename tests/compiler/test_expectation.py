"""What programs with int8 products are held to: the same arithmetic in PyTorch, and what rounding alone does to it."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from movdc.compiler.alone import NAME, lower_alone
from movdc.compiler.eager import evaluate
from movdc.compiler.expectation import expectation
from movdc.compiler.pieces import Piece, split
from movdc.compiler.program import Graph, Program
from movdc.compiler.target import Target
from movdc.passes.quantize_int8 import QuantizeInt8
from movdc.runtime.bundle import Bundle
from movdc.runtime.executors import open_executor
from movdc.runtime.expected import compare
from movdc.targets.coreml import Coreml
from movdc.targets.executorch_xnnpack import ExecutorchXnnpack
from movdc.targets.onnx import Onnx

EXACT_DB = 80.0  # what fp32 is held to
INT8 = QuantizeInt8(stages=("toy",))
GENERATOR = torch.Generator().manual_seed(0)
TOKENS = torch.randn(3, 16, generator=GENERATOR) * torch.tensor([[0.1], [1.0], [5.0]]) + 0.3
IMAGES = torch.rand(2, 4, 6, 6, generator=GENERATOR) * torch.tensor([1.0, 4.0])[:, None, None, None]


@pytest.fixture
def piece_of_int8(graph_of: Callable[..., Graph], program_of: Callable[..., Program]) -> Callable[..., Piece]:
    """A module with int8 weights as one piece."""

    def make(module: nn.Module, x: Tensor) -> Piece:
        (piece,) = split(INT8(program_of(toy=graph_of(module.eval(), x=x))).program.stages[0].variants["plain"])
        return piece

    return make


def _chain(length: int) -> nn.Module:
    layers = [layer for _ in range(length) for layer in (nn.Linear(64, 64), nn.Tanh())]
    return nn.Sequential(*layers)


def _sqnr_db(ours: Tensor, right: Tensor) -> float:
    return compare(ours.numpy(), right.numpy(), "out").sqnr_db


@pytest.mark.slow
@pytest.mark.parametrize("target", [ExecutorchXnnpack(), Onnx()], ids=str)
@pytest.mark.parametrize(
    ("module", "x"), [(nn.Linear(16, 8), TOKENS), (nn.Conv2d(4, 8, 3, padding=1), IMAGES)], ids=["linear", "conv2d"]
)
def test_int8_is_evaluated_as_the_target_computes_it(
    piece_of_int8: Callable[..., Piece], bundle: Path, tmp_path: Path, target: Target, module: nn.Module, x: Tensor
) -> None:
    piece = piece_of_int8(module, x)
    manifest = Bundle.read(bundle).manifest.model_copy(update={"target": target.name})
    executor = open_executor(lower_alone(piece, target, manifest, tmp_path).bundle, memory_budget=10**9)
    (ours,) = executor.run_partition(NAME, {"x": x.numpy()}).values()
    made = torch.from_numpy(ours.copy())
    right, figure_db = expectation(piece, {"x": x}, target)
    assert _sqnr_db(made, right["out"]) > 100
    assert _sqnr_db(made, evaluate(piece, {"x": x})["out"]) < 60, "fp32 is something else"
    assert _sqnr_db(made, right["out"]) > figure_db


def test_the_figure_is_what_rounding_does_to_a_piece(piece_of_int8: Callable[..., Piece]) -> None:
    torch.manual_seed(0)
    x = torch.randn(32, 64, generator=GENERATOR)
    deep, target = piece_of_int8(_chain(6), x), ExecutorchXnnpack()
    right, figure_db = expectation(deep, {"x": x}, target)
    assert 20 < figure_db < EXACT_DB
    other = x * (1 + 1e-7 * torch.randn(x.shape, generator=GENERATOR))  # as out of other sums
    disturbed = evaluate(deep, {"x": other}, target.through_int8)["out"]
    assert _sqnr_db(disturbed, right["out"]) > figure_db
    assert expectation(deep, {"x": x}, target)[1] == figure_db, "each time the same"


def test_what_is_not_rounded_is_held_to_the_figure_of_fp32(
    piece_of_int8: Callable[..., Piece], graph_of: Callable[..., Graph]
) -> None:
    x = torch.randn(4, 64, generator=GENERATOR)
    (plain,) = split(graph_of(_chain(1).eval(), x=x))
    assert expectation(plain, {"x": x}, ExecutorchXnnpack())[1] == EXACT_DB
    quantized = piece_of_int8(_chain(1), x)
    restored, figure_db = expectation(quantized, {"x": x}, Coreml())  # int8 weights, products of floats
    assert figure_db == EXACT_DB
    assert 35 < _sqnr_db(restored["out"], evaluate(quantized, {"x": x})["out"]) < 60, "its weights are int8"
