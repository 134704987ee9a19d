"""Methods: which partitions one program runs, and what it calls their weights."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from module_source import ModuleSource
from torch import Tensor, nn

from movdc.compiler.methods import Methods, methods_of
from movdc.compiler.pieces import Piece, split
from movdc.compiler.program import Graph
from movdc.compiler.trace import trace
from movdc.runtime.bundle import TensorSpec
from movdc.targets.executorch_coreml import ExecutorchCoreml
from movdc.targets.executorch_xnnpack import ExecutorchXnnpack

INSIDE, OUTSIDE = ExecutorchCoreml(), ExecutorchXnnpack()
Stage = dict[str, dict[str, Piece]]


class Block(nn.Module):
    """Two products; the second weight is read first where asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(8, 8), nn.Linear(8, 8, bias=False)
        self.turned = False

    def forward(self, x: Tensor) -> Tensor:
        return self.one(self.two(x)) if self.turned else self.two(self.one(x))


@pytest.fixture
def stage() -> Stage:
    """Two variants of a block, of which each sees another number of rows and reads the weights in another order."""
    block, variants = Block(), {}
    refs = ModuleSource(block).refs()
    for variant, rows in (("plain", 4), ("plain-64", 2)):
        block.turned = variant != "plain"
        x = TensorSpec(name="x", dtype="f32", shape=(rows, 8))
        (piece,) = split(trace(lambda: block, (x,), ("out",), refs), "denoiser")
        variants[variant] = {f"denoiser.{variant}.0": piece}
    return variants


def _refs(methods: Methods, method: str) -> dict[str, str]:
    return {str(weight.ref): weight.name for weight in methods.pieces[method].weights}


def test_variants_of_the_same_weights_are_methods_of_one_program(stage: Stage) -> None:
    (methods,) = methods_of(stage, INSIDE)
    assert methods.partitions == {"plain": "denoiser.plain.0", "plain_64": "denoiser.plain-64.0"}
    assert _refs(methods, "plain") == _refs(methods, "plain_64"), "a weight has one name"
    assert len(methods.weights) == 3
    assert "plain_64\n%input_0: f32[2,8]" in methods.text()


def test_what_only_one_of_them_reads_has_a_name_of_its_own(stage: Stage) -> None:
    for variant, pieces in stage.items():
        for name, piece in pieces.items():
            bias = next(weight for weight in piece.weights if weight.ref.key.endswith("bias"))
            own = replace(bias, ref=replace(bias.ref, key=variant), group="tables", ordinal=0)
            kept = tuple(weight for weight in piece.weights if weight is not bias)
            pieces[name] = replace(piece, weights=(*kept, own))
    (methods,) = methods_of(stage, INSIDE)
    assert {weight.name for weight in methods.weights} == {"weights_0", "weights_1", "tables_0", "tables_1"}


def test_a_variant_that_reads_weights_again_has_another_program_for_it(stage: Stage) -> None:
    (piece,) = stage["plain"].values()
    stage["plain"]["denoiser.plain.1"] = piece
    names = [list(methods.partitions.items()) for methods in methods_of(stage, INSIDE)]
    assert names == [
        [("plain", "denoiser.plain.0"), ("plain_64", "denoiser.plain-64.0")],
        [("forward", "denoiser.plain.1")],
    ]


def test_partitions_of_other_weights_are_programs_of_their_own(stage: Stage, graph_of: Callable[..., Graph]) -> None:
    (other,) = split(graph_of(Block(), x=torch.zeros(4, 8)), "denoiser")
    stage["plain-64"] = {"denoiser.plain-64.0": other}
    assert [list(methods.pieces) for methods in methods_of(stage, INSIDE)] == [["forward"], ["forward"]]


def test_partitions_without_weights_are_programs_of_their_own(stage: Stage) -> None:
    bare = {
        variant: {name: replace(piece, weights=()) for name, piece in pieces.items()}
        for variant, pieces in stage.items()
    }
    assert [list(methods.pieces) for methods in methods_of(bare, INSIDE)] == [["forward"], ["forward"]]


def test_weights_outside_of_programs_leave_each_partition_its_own(stage: Stage) -> None:
    found = methods_of(stage, OUTSIDE)
    assert [methods.partitions for methods in found] == [
        {"forward": "denoiser.plain.0"},
        {"forward": "denoiser.plain-64.0"},
    ]
