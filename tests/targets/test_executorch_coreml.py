"""ExecuTorch with Core ML: what the delegate gets is a whole partition, with the weights of that partition."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mil_interpreter import DTYPES, Package, delegated
from torch import Tensor

from movdc.compiler.pieces import Piece
from movdc.compiler.target import Artifact
from movdc.targets.executorch_coreml import ExecutorchCoreml

Delegate = tuple[Package, dict[str, Any]]
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
def packages(
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
    packages: dict[str, Delegate],
    coreml_pieces: dict[str, Piece],
    random_inputs: Callable[[Piece], list[Tensor]],
    run_eagerly: Callable[..., list[Tensor]],
) -> None:
    results = []
    for name, (package, metadata) in packages.items():
        piece = coreml_pieces[name]
        inputs, order = random_inputs(piece), metadata["inputNames"]
        for got, wanted in zip(
            package.run(dict(zip(order, inputs, strict=True))), run_eagerly(piece, inputs), strict=True
        ):
            assert float((got - wanted).norm() / wanted.norm()) <= TOLERANCE, name
        results.append(got)
    assert float((results[0] - results[1]).norm() / results[0].norm()) > 100 * TOLERANCE, "they differ in weights"


def test_each_partition_has_an_identifier_of_its_own(packages: dict[str, Delegate]) -> None:
    identifiers = {metadata["identifier"] for _, metadata in packages.values()}
    assert len(identifiers) == 2, "Core ML's compiled models are kept by it"


def test_same_weights_give_the_same_program(
    coreml_pieces: dict[str, Piece], names: tuple[str, str], artifact: Artifact, tmp_path: Path
) -> None:
    refs = {weight.name: weight.ref for weight in coreml_pieces[names[0]].weights}
    made = [TARGET.fill(artifact.program, artifact.slots, refs, tmp_path / name).sha256 for name in ("a", "b")]
    assert made[0] == made[1]


def test_package_is_what_ios_18_takes(packages: dict[str, Delegate]) -> None:
    package, _ = next(iter(packages.values()))
    for operation in package.operations("main"):
        for output in operation.outputs:
            assert output.type.tensorType.rank <= 5
            assert output.type.tensorType.dataType in DTYPES or operation.type == "const"
