"""A piece by itself: lowered with its weights into a folder that an executor opens like any bundle."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from movdc.compiler.pieces import Piece
from movdc.compiler.target import Artifact, Slot, Target
from movdc.runtime.bundle import FORWARD, MANIFEST, SEAL, Bundle, File, Manifest, Partition, WeightsFile, seal_of
from movdc.runtime.expected import Expected

NAME = "alone"
_DIGITS = 16  # of a name in a bundle: programs of ONNX have room for so many


@dataclass(frozen=True)
class Alone:
    """A bundle of no stage and one partition, and what the program's constants are."""

    bundle: Bundle
    program_sha256: str
    slots: tuple[Slot, ...]
    weights: tuple[WeightsFile, ...]


def lower_alone(piece: Piece, target: Target, manifest: Manifest, folder: Path) -> Alone:
    """Lower a piece below a folder; what no program needs is as in the manifest."""
    artifact = target.emit(piece, folder)
    program = f"program{target.program_suffix}"
    artifact.program.rename(folder / program)
    weights = _write_weights(piece, artifact, target, folder)
    tokenizer = "tokenizer.json"
    (folder / tokenizer).write_text("{}")
    partition = Partition(
        name=NAME,
        program=program,
        method=FORWARD,
        weights=tuple(file.path for file in weights),
        inputs=tuple(piece.tensor(node) for node in piece.inputs),
        outputs=tuple(piece.tensor(node) for node in piece.outputs),
        weight_bytes=piece.weight_bytes,
        held_bytes=artifact.memory.held_bytes,
        load_bytes=artifact.memory.held_bytes + piece.weight_bytes,
        program_bytes=artifact.memory.program_bytes,
        workspace_bytes=artifact.memory.workspace_bytes,
        planned_bytes=artifact.memory.planned_bytes,
        flops=piece.flops,
    )
    made = manifest.model_copy(
        update={
            "prompt": manifest.prompt.model_copy(update={"tokenizer": tokenizer}),
            "stages": (),
            "partitions": (partition,),
            "weights": weights,
            "files": tuple(_file(folder, path) for path in (program, tokenizer, *(file.path for file in weights))),
            "expected": Expected(),
        }
    )
    text = json.dumps(made.model_dump(mode="json")).encode()
    (folder / MANIFEST).write_bytes(text)
    (folder / SEAL).write_text(seal_of(text))
    return Alone(Bundle.read(folder), artifact.sha256, artifact.slots, weights)


def _write_weights(piece: Piece, artifact: Artifact, target: Target, folder: Path) -> tuple[WeightsFile, ...]:
    files = []
    for group in ("weights", "tables"):
        refs = {weight.name: weight.ref for weight in piece.weights if weight.group == group}
        if own := [slot for slot in artifact.slots if slot.weight in refs]:
            path = f"{group:_<{_DIGITS}}{target.weights_suffix}"
            written = target.write_weights(own, refs, folder / path)
            files.append(WeightsFile(path=path, constants=written.constants))
    return tuple(files)


def _file(folder: Path, path: str) -> File:
    with (folder / path).open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return File(path=path, size_bytes=(folder / path).stat().st_size, sha256=digest)
