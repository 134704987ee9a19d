"""Core ML packages from a bundle: one for all partitions that share weights, with a function for each variant."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import tempfile
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from movdc.compiler.errors import MovdcError
from movdc.compiler.folders import make_parent
from movdc.compiler.hashed_file import HashedFile
from movdc.runtime.bundle import MANIFEST, Bundle, Partition
from movdc.targets.coreml import Coreml
from movdc.targets.mil import BLOB_FOLDER, values_of
from movdc.targets.mil_blobs import RECORD_BYTES, aligned, header, record

TABLE = "packages.json"
_COPY_BYTES = 4 << 20
_AUTHOR = "com.apple.CoreML"  # as Core ML's own tools write it


def write_packages(bundle: Bundle, out: Path) -> int:
    """Write a folder of packages, the table of what runs which partition, and what of the bundle an app reads.

    Gives the number of packages. Raises MovdcError if the bundle is for another target, if a file of it is damaged,
    or if the folder exists.
    """
    target = bundle.manifest.target
    if target != "coreml":
        raise MovdcError(f"{bundle.root}: is for {target}; packages are made of bundles compiled with --target coreml")
    if out.exists():
        raise MovdcError(f"{out}: exists; choose another -o, or remove it")
    Coreml().versions()  # says what to install where it is missing
    for name in ("coremltools", "torch", "torchao"):  # what they lack is nothing that packages need
        logging.getLogger(name).setLevel(logging.ERROR)
    groups = _groups(bundle)
    make_parent(out)
    root = Path(tempfile.mkdtemp(prefix=f".{out.name}.partial-", dir=out.parent))
    try:
        table = {}
        for partitions in groups:
            package = f"{partitions[0].name}.mlpackage"
            functions = write_package(bundle, partitions, root / package)
            for partition, function in zip(partitions, functions, strict=True):
                table[partition.name] = {"package": package, "function": function}
        (root / TABLE).write_text(json.dumps(table, indent=1) + "\n")
        for path in (MANIFEST, bundle.manifest.prompt.tokenizer):
            (root / path).parent.mkdir(exist_ok=True)
            shutil.copyfile(bundle.root / path, root / path)
        root.chmod(0o755)
        root.rename(out)
    except BaseException:
        shutil.rmtree(root, ignore_errors=True)
        raise
    return len(groups)


def _groups(bundle: Bundle) -> list[list[Partition]]:
    """Partitions that share weights of the checkpoint, at most one of each variant."""
    groups: dict[str, list[Partition]] = {}
    for partition in bundle.manifest.partitions:
        shared = [path for path in partition.weights if _group(bundle, path) == "weights"]
        key = shared[0] if shared else partition.name
        if _function_name(partition) in map(_function_name, groups.get(key, ())):
            key = partition.name
        groups.setdefault(key, []).append(partition)
    return list(groups.values())


def write_package(bundle: Bundle, partitions: Sequence[Partition], folder: Path) -> list[str | None]:
    """Write one package; gives the function that runs each partition, None where the package has one alone."""
    data = folder / "Data" / _AUTHOR
    (data / "weights").mkdir(parents=True)
    moved = _write_weights(bundle, partitions, data / "weights" / "weight.bin")
    specs = [_program(bundle, partition, moved) for partition in partitions]
    spec, functions = specs[0], [_function_name(partition) for partition in partitions]
    description = spec.description
    if len(specs) > 1:
        for name, one in zip(functions, specs, strict=True):
            described = description.functions.add(name=name)
            described.input.extend(one.description.input)
            described.output.extend(one.description.output)
        bodies = [one.mlProgram.functions["main"].SerializeToString(deterministic=True) for one in specs]
        for field in ("input", "output"):
            description.ClearField(field)
        description.defaultFunctionName = functions[0]
        del spec.mlProgram.functions["main"]
        for name, body in zip(functions, bodies, strict=True):
            spec.mlProgram.functions[name].ParseFromString(body)
    description.metadata.shortDescription = f"{', '.join(one.name for one in partitions)} of {bundle.manifest.family}"
    (data / "model.mlmodel").write_bytes(spec.SerializeToString(deterministic=True))
    (folder / "Manifest.json").write_text(_manifest(partitions[0].name))
    return list(functions) if len(specs) > 1 else [None]


def _function_name(partition: Partition) -> str:
    return partition.name.split(".")[-2].replace("-", "_")


def _program(bundle: Bundle, partition: Partition, moved: dict[tuple[str, int], int]) -> Any:
    """A partition's model, which refers to the package's file of weights, with its tensors' names as descriptions."""
    import coremltools as ct

    spec = ct.proto.Model_pb2.Model.FromString(_checked(bundle, partition.program).read_bytes())
    files = {_group(bundle, path): path for path in partition.weights}
    for value in values_of(spec):
        if value.WhichOneof("value") == "blobFileValue":
            blob = value.blobFileValue
            blob.offset = moved[files[Path(blob.fileName).stem], blob.offset]
            blob.fileName = f"{BLOB_FOLDER}/weight.bin"
    for features, tensors in ((spec.description.input, partition.inputs), (spec.description.output, partition.outputs)):
        for feature, tensor in zip(features, tensors, strict=True):
            feature.shortDescription = f"{tensor.name} {list(tensor.shape)}"
    return spec


def _write_weights(bundle: Bundle, partitions: Sequence[Partition], path: Path) -> dict[tuple[str, int], int]:
    """Gather files of weights in one; gives the new offset of the record at each (file, offset)."""
    files = list(dict.fromkeys(path for partition in partitions for path in partition.weights))
    constants = {file: _constants(bundle, file) for file in files}
    moved = {}
    with HashedFile(path) as written:
        written.write(header(sum(map(len, constants.values()))))
        for file in files:
            with _checked(bundle, file).open("rb") as source:
                for constant in constants[file]:
                    written.pad_to(aligned(written.size_bytes))
                    moved[file, constant.offset_bytes - RECORD_BYTES] = written.size_bytes
                    written.write(record(constant, written.size_bytes + RECORD_BYTES))
                    source.seek(constant.offset_bytes)
                    left_bytes = constant.size_bytes
                    while left_bytes:
                        data = source.read(min(left_bytes, _COPY_BYTES))
                        written.write(data)
                        left_bytes -= len(data)
    return moved


def _constants(bundle: Bundle, path: str) -> Sequence[Any]:
    return next(one.constants for one in bundle.manifest.weights if one.path == path)


def _group(bundle: Bundle, path: str) -> str:
    return str(_constants(bundle, path)[0].key).partition("_")[0]


def _checked(bundle: Bundle, path: str) -> Path:
    """A file of the bundle that is as it was written."""
    (said,) = (file for file in bundle.manifest.files if file.path == path)
    try:
        with (bundle.root / path).open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() == said.sha256:
                return bundle.root / path
    except OSError:
        pass
    raise MovdcError(f"{bundle.root / path}: missing or damaged; compile the bundle again")


def _manifest(name: str) -> str:
    """What names the parts of a package; a package of the same name has the same identifiers."""
    parts = {
        "model.mlmodel": (f"{_AUTHOR}/model.mlmodel", "CoreML Model Specification"),
        "weights": (f"{_AUTHOR}/weights", "CoreML Model Weights"),
    }
    identifiers = {part: str(uuid.uuid5(uuid.NAMESPACE_OID, f"{name} {part}")).upper() for part in parts}
    entries = {
        identifiers[part]: {"author": _AUTHOR, "description": text, "name": part, "path": path}
        for part, (path, text) in parts.items()
    }
    manifest = {
        "fileFormatVersion": "1.0.0",
        "itemInfoEntries": entries,
        "rootModelIdentifier": identifiers["model.mlmodel"],
    }
    return json.dumps(manifest, indent=4) + "\n"
