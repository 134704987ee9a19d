"""ExecuTorch with Vulkan: what the delegate takes of a partition, and weights in the place of the stand-ins."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from movdc.compiler.cost import size_bytes
from movdc.compiler.methods import methods_of
from movdc.compiler.pieces import Piece
from movdc.compiler.target import Artifact
from movdc.targets.executorch_vulkan import ExecutorchVulkan

pytestmark = pytest.mark.slow  # lowering takes seconds
TARGET = ExecutorchVulkan()


@pytest.fixture(scope="module")
def pieces(pieces_of: Callable[..., dict[str, Piece]], merged_example: Path) -> dict[str, Piece]:
    return pieces_of(merged_example, TARGET)


@pytest.fixture(scope="module")
def names(pieces: dict[str, Piece]) -> tuple[str, str]:
    """Two partitions that share a program."""
    texts = {name: piece.text() for name, piece in pieces.items() if name.startswith("denoiser")}
    return next((one, two) for one in texts for two in texts if one < two and texts[one] == texts[two])


@pytest.fixture(scope="module")
def artifact(pieces: dict[str, Piece], names: tuple[str, str], tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return TARGET.emit(pieces[names[0]], tmp_path_factory.mktemp("emitted"))


def test_a_block_is_delegated_but_for_a_few_nodes(artifact: Artifact) -> None:
    assert artifact.delegated_nodes > 100
    assert sum(artifact.fallback.values()) <= artifact.delegated_nodes / 20


def test_each_partition_has_its_own_weights_in_the_template(
    artifact: Artifact, pieces: dict[str, Piece], names: tuple[str, str], tmp_path: Path
) -> None:
    template = np.frombuffer(artifact.program.read_bytes(), np.uint8)
    programs = []
    for name in names:
        refs = {weight.name: weight.ref for weight in pieces[name].weights}
        written = TARGET.fill(artifact.program, artifact.slots, refs, tmp_path / name)
        assert not written.constants, "they are in the program"
        program = np.frombuffer((tmp_path / name).read_bytes(), np.uint8)
        outside = np.ones(len(program), bool)
        for slot in artifact.slots:
            start = int(slot.key)
            found = torch.frombuffer(bytearray(program[start : start + slot.size_bytes]), dtype=torch.float32)
            assert torch.equal(found.reshape(slot.shape), refs[slot.weight].read()), slot
            outside[start : start + slot.size_bytes] = False
        assert np.array_equal(program[outside], template[outside])
        programs.append(program)
    assert not np.array_equal(*programs)
    weight_bytes = pieces[names[0]].weight_bytes
    assert weight_bytes <= sum(slot.size_bytes for slot in artifact.slots) <= 1.1 * weight_bytes


def test_methods_share_weights(pieces: dict[str, Piece], tmp_path: Path) -> None:
    stage = {
        variant: {name: piece for name, piece in pieces.items() if name.startswith(f"denoiser.{variant}.")}
        for variant in ("plain", "merged")
    }
    shared = (methods for methods in methods_of(stage, TARGET) if len(methods.pieces) == 2)
    both = min(shared, key=lambda methods: methods.nodes)
    artifacts = TARGET.emit_methods(both.pieces, tmp_path)
    assert artifacts["plain"].program == artifacts["merged"].program
    weight_bytes = sum(size_bytes(weight.node) for weight in both.weights)
    assert weight_bytes < 0.6 * sum(piece.weight_bytes for piece in both.pieces.values())
    assert weight_bytes <= sum(slot.size_bytes for slot in artifacts["plain"].slots) <= 1.1 * weight_bytes


def test_refuses_what_vulkan_computes_otherwise() -> None:
    graph = torch.fx.Graph()
    value = graph.placeholder("x")
    exact = graph.call_function(torch.ops.aten.gelu.default, (value,))
    tanh = graph.call_function(torch.ops.aten.gelu.default, (value,), {"approximate": "tanh"})
    assert "exact GELU" in (TARGET.refuse(exact) or "")
    assert TARGET.refuse(tanh) is None
    assert "conv3d-to-conv2d" in (TARGET.refuse(graph.call_function(torch.ops.aten.conv3d.default, (value,))) or "")
