"""ExecuTorch with Core ML: what the delegate gets is a whole partition, with the weights of that partition."""

from collections.abc import Callable
from pathlib import Path

import pytest
from mil_interpreter import DTYPES, Delegate, delegated
from module_source import ModuleSource
from torch import Tensor, nn

from movdc.compiler.cost import size_bytes
from movdc.compiler.methods import Methods, methods_of
from movdc.compiler.pieces import Piece, split
from movdc.compiler.target import Artifact
from movdc.compiler.trace import trace
from movdc.runtime.bundle import TensorSpec
from movdc.targets.executorch_coreml import ExecutorchCoreml

pytestmark = pytest.mark.slow  # a conversion takes seconds
TOLERANCE = 1e-4  # relative L2 error of fp32 against eager
TARGET = ExecutorchCoreml()


@pytest.fixture(scope="session")
def names(coreml_pieces: dict[str, Piece]) -> tuple[str, str]:
    """Two partitions that share a program."""
    texts = {name: piece.text() for name, piece in coreml_pieces.items() if name.startswith("denoiser")}
    return next((one, two) for one in texts for two in texts if one < two and texts[one] == texts[two])


@pytest.fixture(scope="session")
def artifact(
    coreml_pieces: dict[str, Piece], names: tuple[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Artifact:
    return TARGET.emit(coreml_pieces[names[0]], tmp_path_factory.mktemp("emitted"))


@pytest.fixture(scope="session")
def delegates(
    coreml_pieces: dict[str, Piece],
    names: tuple[str, str],
    artifact: Artifact,
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, Delegate]:
    """What the delegate of each of the two gets."""
    found = {}
    for name in names:
        root = tmp_path_factory.mktemp(name)
        refs = {weight.name: weight.ref for weight in coreml_pieces[name].weights}
        written = TARGET.fill(artifact.program, artifact.slots, refs, root / "program.pte")
        assert not written.constants
        (root / "delegate").mkdir()
        found[name] = delegated(root / "program.pte", root / "delegate")
    return found


def test_whole_partition_is_delegated(artifact: Artifact) -> None:
    assert artifact.fallback == {}
    assert artifact.delegated_nodes > 50


def test_delegate_computes_what_eager_does(
    delegates: dict[str, Delegate],
    coreml_pieces: dict[str, Piece],
    random_inputs: Callable[[Piece], list[Tensor]],
    run_eagerly: Callable[..., list[Tensor]],
) -> None:
    results = []
    for name, delegate in delegates.items():
        piece = coreml_pieces[name]
        inputs = random_inputs(piece)
        for got, wanted in zip(delegate.run(inputs), run_eagerly(piece, inputs), strict=True):
            assert float((got - wanted).norm() / wanted.norm()) <= TOLERANCE, name
        results.append(got)
    assert float((results[0] - results[1]).norm() / results[0].norm()) > 100 * TOLERANCE, "they differ in weights"


def test_each_program_has_an_identifier_of_its_own(delegates: dict[str, Delegate]) -> None:
    assert len({delegate.identifier for delegate in delegates.values()}) == 2, (
        "Core ML's compiled models are kept by it"
    )


def test_same_weights_give_the_same_program(
    coreml_pieces: dict[str, Piece], names: tuple[str, str], artifact: Artifact, tmp_path: Path
) -> None:
    refs = {weight.name: weight.ref for weight in coreml_pieces[names[0]].weights}
    made = [TARGET.fill(artifact.program, artifact.slots, refs, tmp_path / name).sha256 for name in ("a", "b")]
    assert made[0] == made[1]


def test_package_is_what_ios_18_takes(delegates: dict[str, Delegate]) -> None:
    for operation in next(iter(delegates.values())).package.operations("main"):
        for output in operation.outputs:
            assert output.type.tensorType.rank <= 5
            assert output.type.tensorType.dataType in DTYPES or operation.type == "const"


@pytest.fixture(scope="module")
def both(coreml_pieces: dict[str, Piece]) -> Methods:
    """A partition of the denoiser, plain and merged."""
    stage = {
        variant: {name: piece for name, piece in coreml_pieces.items() if name.startswith(f"denoiser.{variant}.")}
        for variant in ("plain", "merged")
    }
    return next(one for one in methods_of(stage, TARGET) if len(one.pieces) == 2)


@pytest.fixture(scope="module")
def program_of_both(both: Methods, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its program, with its weights."""
    root = tmp_path_factory.mktemp("both")
    artifact = TARGET.emit_methods(both.pieces, root)["plain"]
    refs = {weight.name: weight.ref for weight in both.weights}
    TARGET.fill(artifact.program, artifact.slots, refs, root / "filled.pte")
    return root / "filled.pte"


def test_variants_are_methods_that_share_weights(both: Methods, program_of_both: Path) -> None:
    weight_bytes = sum(size_bytes(weight.node) for weight in both.weights)
    own_bytes = [piece.weight_bytes for piece in both.pieces.values()]
    assert weight_bytes < 0.6 * sum(own_bytes)
    assert program_of_both.stat().st_size < 1.1 * weight_bytes + 400_000


def test_methods_compute_what_eager_does(
    both: Methods,
    program_of_both: Path,
    random_inputs: Callable[[Piece], list[Tensor]],
    run_eagerly: Callable[..., list[Tensor]],
    tmp_path: Path,
) -> None:
    identifiers = set()
    for method, piece in both.pieces.items():
        folder = tmp_path / method
        folder.mkdir()
        delegate = delegated(program_of_both, folder, method)
        assert delegate.function == method
        identifiers.add(delegate.identifier)
        inputs = random_inputs(piece)
        for got, wanted in zip(delegate.run(inputs), run_eagerly(piece, inputs), strict=True):
            assert float((got - wanted).norm() / wanted.norm()) <= TOLERANCE, method
    assert len(identifiers) == 1, "Core ML compiles one package"


class Halves(nn.Module):
    """Two products; one variant truncates between them, which Core ML does not."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(64, 64, bias=False), nn.Linear(64, 64, bias=False)
        self.truncates = False

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.one(x).trunc() if self.truncates else self.one(x))


@pytest.fixture
def halves() -> Methods:
    """Both variants of a small block."""
    module, stage = Halves(), {}
    refs, x = ModuleSource(module).refs(), TensorSpec(name="x", dtype="f32", shape=(4, 64))
    for variant in ("plain", "merged"):
        module.truncates = variant == "plain"
        (piece,) = split(trace(lambda: module, (x,), ("out",), refs), "denoiser")
        stage[variant] = {f"denoiser.{variant}.0": piece}
    (methods,) = methods_of(stage, TARGET)
    return methods


def test_methods_with_other_delegates_store_their_weights_again(halves: Methods, tmp_path: Path) -> None:
    artifacts = TARGET.emit_methods(halves.pieces, tmp_path)
    assert artifacts["plain"].fallback == {"aten.trunc.default": 1}
    assert artifacts["merged"].fallback == {}
    assert sorted(slot.weight for slot in artifacts["plain"].slots) == 2 * ["weights_0"] + 2 * ["weights_1"]


def test_the_same_pieces_give_the_same_bytes(halves: Methods, tmp_path: Path) -> None:
    merged = halves.pieces["merged"]
    alike = {"one": merged, "two": merged}
    assert TARGET.emit_methods(alike, tmp_path)["one"].sha256 == TARGET.emit_methods(alike, tmp_path)["one"].sha256
    assert TARGET.emit(merged, tmp_path).sha256 == TARGET.emit(merged, tmp_path).sha256
