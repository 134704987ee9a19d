"""A piece lowered to ONNX with its own weights, as a bundle has it, for the tests that run it."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from movdc.compiler.pieces import Piece
from movdc.compiler.target import Artifact
from movdc.runtime.bundle import NUMPY_DTYPES, Constant, File, Partition
from movdc.runtime.checked_files import CheckedFiles
from movdc.runtime.onnx_partition import OnnxPartition
from movdc.targets.onnx import Onnx


class LoweredOnnx:
    """The files of a piece below a folder, and what runs them."""

    def __init__(self, piece: Piece, folder: Path) -> None:
        self.folder = folder
        target = Onnx()
        self.artifact: Artifact = target.emit(piece, folder)
        self.constants: dict[str, tuple[Constant, ...]] = {}
        (folder / "weights").mkdir()
        for group in ("weights", "tables"):
            refs = {weight.name: weight.ref for weight in piece.weights if weight.group == group}
            if slots := [slot for slot in self.artifact.slots if slot.weight in refs]:
                written = target.write_weights(slots, refs, folder / "written")
                path = f"weights/{written.sha256[:16]}.bin"
                (folder / "written").rename(folder / path)
                self.constants[path] = written.constants
        self.record = Partition(
            name="piece.plain.0",
            program=self.artifact.program.name,
            method="forward",
            weights=tuple(self.constants),
            inputs=tuple(piece.tensor(node) for node in piece.inputs),
            outputs=tuple(piece.tensor(node) for node in piece.outputs),
            weight_bytes=piece.weight_bytes,
            held_bytes=self.artifact.memory.held_bytes,
            load_bytes=0,
            program_bytes=self.artifact.memory.program_bytes,
            workspace_bytes=self.artifact.memory.workspace_bytes,
            planned_bytes=0,
            flops=piece.flops,
        )
        files = tuple(_file(folder, path) for path in (self.record.program, *self.constants))
        self._partition = OnnxPartition(self.record, self.constants, CheckedFiles(folder, files))

    def __call__(self, *inputs: Tensor) -> list[Tensor]:
        """Run it on the inputs of the piece."""
        return run(self._partition, self.record, inputs)


def run(partition: OnnxPartition, record: Partition, inputs: Sequence[Tensor]) -> list[Tensor]:
    """The outputs of a partition."""
    outputs = [np.empty(spec.shape, NUMPY_DTYPES[spec.dtype]) for spec in record.outputs]
    partition.run([one.contiguous().numpy() for one in inputs], outputs)
    return [torch.from_numpy(one) for one in outputs]


def eager(piece: Piece, inputs: Sequence[Tensor], folder: Path) -> list[Tensor]:
    """The outputs of a piece with its own weights, by torch."""
    module = piece.module(folder)
    for weight in piece.weights:
        module.get_parameter(weight.name).data = weight.ref.read()
    with torch.no_grad():
        return list(module(*inputs))


def random_inputs(record: Partition, seed: int) -> list[Tensor]:
    """Inputs of a partition: normal ones, and small integers."""
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randint(2, 100, spec.shape, generator=generator)
        if spec.dtype == "i64"
        else torch.randn(spec.shape, generator=generator)
        for spec in record.inputs
    ]


def _file(folder: Path, path: str) -> File:
    data = (folder / path).read_bytes()
    return File(path=path, size_bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
