"""What the tests of targets share: the example's partitions, and what they compute in eager PyTorch."""

from collections.abc import Callable, Sequence
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor, fx

from movdc.compiler.device import read_profiles
from movdc.compiler.pass_base import run_passes
from movdc.compiler.pieces import Piece, split
from movdc.compiler.program import Program, value_of
from movdc.compiler.spec import load_spec
from movdc.compiler.target import Target
from movdc.models.opensora import OpenSora
from movdc.passes.pipeline import default_pipeline
from movdc.targets.coreml import Coreml


@pytest.fixture(scope="session")
def merged_example(example: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example with the merged variant of its denoiser beside the plain one, and its text encoder in int8."""
    spec = yaml.safe_load(example.read_text())
    for model in ("text_encoder", "denoiser", "vae"):
        spec[model]["weights"] = str(example.parent / spec[model]["weights"])
    spec["memory_budget"] = "10MB"  # so that partitions share programs
    spec["passes"] = {"merge-tokens": {}, "quantize-int8": {}}
    path = tmp_path_factory.mktemp("merged") / "merged.yaml"
    path.write_text(yaml.safe_dump(spec))
    return path


@pytest.fixture(scope="session")
def coreml_bundle(
    movdc: Callable[..., CompletedProcess[str]], merged_example: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The example compiled for Core ML, with both variants of its denoiser."""
    out = tmp_path_factory.mktemp("coreml") / "tiny"
    done = movdc("compile", merged_example, "-o", out, "--target", "coreml")
    assert done.returncode == 0, done.stdout + done.stderr
    return out


@pytest.fixture(scope="session")
def program_for() -> Callable[[Path, Target], Program]:
    """What a compile of a YAML lowers for a target."""

    def make(path: Path, target: Target) -> Program:
        spec_file = load_spec(path)
        spec = spec_file.spec
        profile = read_profiles(Path(__file__).parents[2] / "targets" / "devices.toml")[spec.device]
        machine = target.machine(profile, spec.memory_budget)
        traced = OpenSora().trace(spec_file, machine, OpenSora().micro_batches[0])
        return run_passes(traced, default_pipeline(spec.passes, target), lambda *_: None)

    return make


@pytest.fixture(scope="session")
def pieces_of(program_for: Callable[[Path, Target], Program]) -> Callable[..., dict[str, Piece]]:
    """The partitions that a compile of a YAML for a target has, by name."""

    def make(path: Path, target: Target) -> dict[str, Piece]:
        return {
            f"{stage}.{variant}.{index}": piece
            for stage, variant, graph in program_for(path, target).graphs()
            for index, piece in enumerate(split(graph, stage))
        }

    return make


@pytest.fixture(scope="session")
def coreml_pieces(pieces_of: Callable[..., dict[str, Piece]], merged_example: Path) -> dict[str, Piece]:
    """What both targets for Core ML lower."""
    return pieces_of(merged_example, Coreml())


@pytest.fixture(scope="session")
def random_inputs() -> Callable[[Piece], list[Tensor]]:
    """Numbers for the inputs of a partition, the same whenever they are asked for."""

    def make(piece: Piece) -> list[Tensor]:
        generator = torch.Generator().manual_seed(0)
        values = [value_of(node) for node in piece.inputs]
        return [
            torch.randn(value.shape, generator=generator)
            if value.is_floating_point()
            else torch.randint(1, 100, value.shape, generator=generator)
            for value in values
        ]

    return make


@pytest.fixture(scope="session")
def run_eagerly() -> Callable[..., list[Tensor]]:
    """The outputs of a partition with its weights, node by node; int8 is that of the weights, not of what they meet."""

    def run(piece: Piece, inputs: Sequence[Tensor]) -> list[Tensor]:
        values: dict[fx.Node, Any] = dict(zip(piece.inputs, inputs, strict=True))
        values |= {weight.node: weight.ref.read() for weight in piece.weights}
        for node in piece.nodes:
            if node.target is torch.ops.quantized_decomposed.dequantize_per_token.default:
                values[node] = values[node.args[0].args[0]]
                continue
            arguments = fx.map_arg((node.args, node.kwargs), lambda source: values[source])
            values[node] = node.target(*arguments[0], **arguments[1])
        return [values[node] for node in piece.outputs]

    return run
