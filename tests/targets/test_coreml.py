"""Core ML: packages of the whole example, read back and computed without a Mac."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import coremltools as ct
import pytest
import torch
from coremltools.converters.mil.frontend.milproto.load import load as load_mil
from mil_interpreter import DTYPES, MIL, OPERATORS, Package
from torch import Tensor

from movdc.compiler.pieces import Piece
from movdc.runtime.bundle import Bundle
from movdc.targets.coreml import Coreml
from movdc.targets.mil import GROUPS

Movdc = Callable[..., Any]
Run = Callable[..., list[Tensor]]
pytestmark = pytest.mark.slow  # a conversion takes seconds
TOLERANCE = 1e-4  # relative L2 error of fp32 against eager


@pytest.fixture(scope="session")
def packages(movdc: Movdc, coreml_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its packages."""
    out = tmp_path_factory.mktemp("packages") / "tiny"
    done = movdc("package", coreml_bundle, "-o", out)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


def _run(packages: Path, name: str, inputs: list[Tensor]) -> list[Tensor]:
    """Run a partition as an app does: from the table and the order of its tensors."""
    row = json.loads((packages / "packages.json").read_text())[name]
    # Core ML has no int64: ids are int32 there
    named = {f"input_{i}": one.int() if one.dtype == torch.int64 else one for i, one in enumerate(inputs)}
    return Package(packages / row["package"]).run(named, row["function"] or "main")


def _error(got: Tensor, wanted: Tensor) -> float:
    assert got.shape == wanted.shape
    return float((got - wanted).norm() / wanted.norm())


def test_every_partition_computes_what_eager_does(
    packages: Path,
    coreml_pieces: dict[str, Piece],
    coreml_bundle: Path,
    random_inputs: Callable[[Piece], list[Tensor]],
    run_eagerly: Run,
) -> None:
    assert list(coreml_pieces) == [one.name for one in Bundle.read(coreml_bundle).manifest.partitions]
    assert sum("merged" in name for name in coreml_pieces) >= 3
    for name, piece in coreml_pieces.items():
        inputs = random_inputs(piece)
        for got, wanted in zip(_run(packages, name, inputs), run_eagerly(piece, inputs), strict=True):
            assert _error(got, wanted) <= TOLERANCE, name


def test_another_partitions_weights_are_noticed(
    packages: Path,
    coreml_pieces: dict[str, Piece],
    random_inputs: Callable[[Piece], list[Tensor]],
    run_eagerly: Run,
) -> None:
    one, another = "denoiser.plain.1", "denoiser.plain.2"
    assert coreml_pieces[one].text() == coreml_pieces[another].text(), "they share a program"
    inputs = random_inputs(coreml_pieces[one])
    (got,), (wanted,) = _run(packages, another, inputs), run_eagerly(coreml_pieces[one], inputs)
    assert _error(got, wanted) > 100 * TOLERANCE


def test_every_function_is_what_ios_18_takes(packages: Path, coreml_bundle: Path) -> None:
    manifest = Bundle.read(coreml_bundle).manifest
    table = json.loads((packages / "packages.json").read_text())
    assert set(table) == {one.name for one in manifest.partitions}
    for partition in manifest.partitions:
        row = table[partition.name]
        package = Package(packages / row["package"])
        assert package.spec.specificationVersion == ct.target.iOS18
        for operation in package.operations(row["function"] or "main"):
            assert operation.type in OPERATORS or operation.type == "const"
            for output in operation.outputs:
                kind = output.type.tensorType
                assert kind.rank <= 5, f"{partition.name}: {output.name}"
                assert kind.dataType in DTYPES or kind.dataType == MIL.STRING, f"{partition.name}: {output.name}"
        described = package.spec.description
        if row["function"]:
            (described,) = (one for one in described.functions if one.name == row["function"])
        for features, tensors, prefix in (
            (described.input, partition.inputs, "input"),
            (described.output, partition.outputs, "output"),
        ):
            assert [one.name for one in features] == [f"{prefix}_{index}" for index in range(len(tensors))]
            for feature, tensor in zip(features, tensors, strict=True):
                array = feature.type.multiArrayType
                assert tuple(array.shape) == tensor.shape
                said = {"f32": array.FLOAT32, "i64": array.INT32}[tensor.dtype]
                assert array.dataType == said
                assert feature.shortDescription.startswith(f"{tensor.name} ")


def test_variants_are_functions_of_one_package_that_share_weights(packages: Path, coreml_bundle: Path) -> None:
    table = json.loads((packages / "packages.json").read_text())
    plain, merged = table["denoiser.plain.1"], table["denoiser.merged.1"]
    assert plain["package"] == merged["package"]
    assert {plain["function"], merged["function"]} == {"plain", "merged"}
    package = Package(packages / plain["package"])

    def blobs(function: str) -> set[int]:
        constants = [one.attributes["val"] for one in package.operations(function) if one.type == "const"]
        return {one.blobFileValue.offset for one in constants if one.WhichOneof("value") == "blobFileValue"}

    shared = blobs("plain") & blobs("merged")
    assert len(shared) >= 20
    partition = Bundle.read(coreml_bundle).partitions["denoiser.plain.1"]
    stored_bytes = (package.data / "weights" / "weight.bin").stat().st_size
    assert partition.weight_bytes < stored_bytes < 1.1 * partition.weight_bytes
    assert [path.name for path in (package.data / "weights").iterdir()] == ["weight.bin"]


def test_int8_weights_are_stored_once_and_restored_by_the_program(packages: Path, coreml_bundle: Path) -> None:
    package = Package(packages / "text_encoder.plain.0.mlpackage")
    restored = [one for one in package.operations("main") if one.type == "constexpr_blockwise_shift_scale"]
    assert len(restored) == 14, "every product of two layers"
    for operation in restored:
        data = operation.inputs["data"].arguments[0].value
        assert data.type.tensorType.dataType == MIL.INT8
        assert data.WhichOneof("value") == "blobFileValue"
    partition = Bundle.read(coreml_bundle).partitions["text_encoder.plain.0"]
    stored_bytes = (package.data / "weights" / "weight.bin").stat().st_size
    assert stored_bytes < 1.05 * partition.weight_bytes, "no weight is stored in fp32 as well"


def test_half_precision_leaves_norms_and_chosen_weights_in_fp32(
    coreml_pieces: dict[str, Piece], tmp_path: Path, random_inputs: Callable[[Piece], list[Tensor]], run_eagerly: Run
) -> None:
    piece = coreml_pieces["denoiser.plain.1"]
    kept = next(weight for weight in piece.weights if weight.ref.key.endswith("mlp.fc2.weight"))
    target = Coreml(fp16=("denoiser",), fp32=(kept.ref.key,))
    artifact = target.emit(piece, tmp_path)
    dtypes = {slot.weight: slot.dtype for slot in artifact.slots}
    assert dtypes[kept.name] == "f32"
    assert sum(dtype == "f16" for dtype in dtypes.values()) > 20
    data = tmp_path / "half" / "Data" / "com.apple.CoreML"
    (data / "weights").mkdir(parents=True)
    artifact.program.rename(data / "model.mlmodel")
    for group in GROUPS:
        refs = {weight.name: weight.ref for weight in piece.weights if weight.group == group}
        own = [slot for slot in artifact.slots if slot.weight in refs]
        if own:
            target.write_weights(own, refs, data / "weights" / f"{group}.bin")
    package = Package(tmp_path / "half")
    computed = {
        kind: {one.outputs[0].type.tensorType.dataType for one in package.operations("main") if one.type == kind}
        for kind in ("linear", "layer_norm", "reduce_mean")
    }
    assert computed["linear"] == {MIL.FLOAT16, MIL.FLOAT32}
    assert computed["layer_norm"] == computed["reduce_mean"] == {MIL.FLOAT32}
    inputs = random_inputs(piece)
    results = package.run({f"input_{index}": one for index, one in enumerate(inputs)})
    for got, wanted in zip(results, run_eagerly(piece, inputs), strict=True):
        assert got.dtype == torch.float32
        assert _error(got, wanted) < 5e-3


def test_coremltools_reads_the_packages(packages: Path) -> None:
    for folder in packages.glob("*.mlpackage"):
        model = ct.models.MLModel(str(folder), skip_model_load=True)
        program = load_mil(model.get_spec(), ct.target.iOS18, str(folder / "Data/com.apple.CoreML/weights"))
        program.validate()
        for row in program.functions.values():
            assert row.outputs


def test_program_has_no_weights(coreml_bundle: Path) -> None:
    for program in (coreml_bundle / "programs").iterdir():
        assert program.suffix == ".mlmodel"
        assert program.stat().st_size < 150_000


def test_is_refused_where_a_package_cannot_be_made(
    movdc: Movdc, refused: Callable[..., str], coreml_bundle: Path, tmp_path: Path
) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(coreml_bundle, damaged)
    victim = sorted((damaged / "weights").iterdir())[0]
    victim.chmod(0o644)
    victim.write_bytes(bytes(victim.stat().st_size))
    out = tmp_path / "packages"
    assert victim.name in refused(movdc("package", damaged, "-o", out))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["damaged"], "nothing is half written"
    out.mkdir()
    assert "exists" in refused(movdc("package", coreml_bundle, "-o", out))
