"""ONNX Runtime: CPUs of hosts and phones."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from movdc.compiler.abilities import Abilities
from movdc.compiler.hashed_file import HashedFile
from movdc.compiler.identity import code_identity
from movdc.compiler.pieces import Piece
from movdc.compiler.target import ALIGNMENT_BYTES, Artifact, Slot, Target
from movdc.runtime.bundle import Constant
from movdc.runtime.onnx_location import location_of
from movdc.targets.onnx_footprint import measure
from movdc.targets.onnx_module import OnnxModule, onnx_module
from movdc.targets.onnx_products import OFFSET, quantized

OPSET = 20  # the first with GELU, in both of its forms


@dataclass(frozen=True)
class Onnx(Target):
    """A small .onnx program and plain files with all its weights, which stock ONNX Runtime runs too."""

    name: ClassVar[str] = "onnx"
    abilities: ClassVar[Abilities] = Abilities(int8_products="int8", int8_rows=True)
    packages: ClassVar[tuple[str, ...]] = ("torch", "onnx", "onnxscript", "onnxruntime")
    program_suffix: ClassVar[str] = ".onnx"
    load_copies: ClassVar[float] = 1.0  # weights are used where their file is mapped
    value_copies: ClassVar[float] = (
        2.0  # what attention and GELU are made of stands beside it, as does what kernels take
    )
    node_bytes: ClassVar[int] = 7000

    @property
    def program_identity(self) -> str:
        """What programs depend on beside the piece: the same, and what measures them."""
        names = ("onnx_footprint", "onnx_location", "onnx_partition")
        return f"{super().program_identity} {code_identity(*(f'movdc.runtime.{name}' for name in names))}"

    def refuse(self, node: fx.Node) -> str | None:
        """Why ONNX cannot say what a node computes."""
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor) and value.is_complex():
            return "complex numbers have no kernels; write them as pairs of real ones"
        return None

    def emit(self, piece: Piece, directory: Path) -> Artifact:
        """Export with every weight as external data: the program says where in a partition's own file it lies."""
        import onnx
        from onnx_ir.serde import serialize_model

        made = onnx_module(piece)
        model = _export(piece, made)
        nodes = len(model.graph)
        constants = {group: list(_constants(slots)) for group, slots in _groups(made.slots).items()}
        _move_outside(model, constants)
        path = directory / "program.onnx"
        with HashedFile(path) as written:
            written.write(serialize_model(model).SerializeToString(deterministic=True))
        for group, some in constants.items():  # the checker and a dry run open them
            with (directory / location_of(group)).open("xb") as file:
                file.truncate(some[-1].offset_bytes + some[-1].size_bytes)
        onnx.checker.check_model(str(path), full_check=True)
        inputs, outputs = ([piece.tensor(node) for node in some] for some in (piece.inputs, piece.outputs))
        memory = measure(path, {location_of(group): some for group, some in constants.items()}, inputs, outputs)
        for group in constants:
            (directory / location_of(group)).unlink()
        return Artifact(path, written.sha256, made.slots, memory, delegated_nodes=nodes)

    def through_int8(self, rows: Tensor) -> Tensor:
        """A row in 127 steps on each side of zero."""
        stored, step = quantized(rows, (-1,))
        return (stored.float() - OFFSET) * step


def _export(piece: Piece, made: OnnxModule) -> Any:
    """The model of torch.onnx, whose weights are still inputs: no optimisation can look at them."""
    logging.getLogger("torch").setLevel(logging.ERROR)
    names = [*(f"input_{index}" for index in range(len(piece.inputs))), *(slot.key for slot in made.slots)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            torch.export.export(made.module, made.inputs, strict=False),
            input_names=names,
            output_names=[f"output_{index}" for index in range(len(piece.outputs))],
            opset_version=OPSET,
            dynamo=True,
            optimize=True,
            verbose=False,
        )
    assert program is not None
    return program.model


def _move_outside(model: Any, constants: dict[str, list[Constant]]) -> None:
    """Make the inputs that are weights initializers in a file of their group, and drop where all of it came from."""
    import onnx_ir

    places = {one.key: (group, one) for group, some in constants.items() for one in some}
    for value in [value for value in model.graph.inputs if value.name in places]:
        group, one = places[value.name]
        value.const_value = onnx_ir.ExternalTensor(
            location_of(group), one.offset_bytes, one.size_bytes, value.dtype, shape=value.shape, name=value.name
        )
        model.graph.inputs.remove(value)
        model.graph.register_initializer(value)
    for node in model.graph:
        node.metadata_props.clear()  # where the nodes came from, with paths of this machine
        node.doc_string = None
    for one in (model, model.graph, *model.graph.inputs, *model.graph.initializers.values()):
        one.metadata_props.clear()


def _groups(slots: Iterable[Slot]) -> dict[str, list[Slot]]:
    """The slots by the file that they are in, as compiler/weights_files.py has it."""
    groups: dict[str, list[Slot]] = {}
    for slot in slots:
        groups.setdefault(slot.weight.rpartition("_")[0], []).append(slot)
    return groups


def _constants(slots: Iterable[Slot]) -> Iterable[Constant]:
    """Where each slot lies in a file, as write_plain writes it."""
    end_bytes = 0
    for slot in slots:
        offset_bytes = -(-end_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
        yield Constant(
            key=slot.key,
            offset_bytes=offset_bytes,
            size_bytes=slot.size_bytes,
            dtype=slot.dtype or "u8",
            shape=slot.shape,
        )
        end_bytes = offset_bytes + slot.size_bytes
