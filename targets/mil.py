"""From a piece to Core ML's program: converted with stand-ins for its weights, which then leave it.

A converted program refers to a file of weights by offsets. The file is laid out anew from the slots of the piece's
weights alone, so one program serves every partition of the same text, each with a file of its own.
"""

from __future__ import annotations

import hashlib
import io
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import fx

from movdc.compiler.errors import InternalError
from movdc.compiler.pieces import Piece
from movdc.compiler.program import DTYPES, value_of
from movdc.compiler.target import Slot
from movdc.targets.mil_blobs import RECORD_BYTES, constants_of
from movdc.targets.mil_halves import Halves

aten = torch.ops.aten
_EPSILON = torch.finfo(torch.float32).eps  # of norms that name none

GROUPS = ("weights", "tables")  # each a file of its own: variants of a stage share the first
BLOB_FOLDER = "@model_path/weights"
# Passes of the converter that would compute new constants from weights, which other partitions could not have.
FOLDING = (
    "common::fuse_conv_batchnorm",
    "common::fuse_conv_bias",
    "common::fuse_conv_scale",
    "common::fuse_elementwise_to_batchnorm",
    "common::fuse_linear_bias",
    "common::fuse_matmul_weight_bias",
    "common::merge_affine_dequantize_with_consecutive_ops",
    "common::reduce_transposes",
)


def convert(piece: Piece, directory: Path, fp32: Sequence[str] | None = None) -> tuple[Any, tuple[Slot, ...]]:
    """The model (a coremltools Model message) of a piece for iOS 18, and the slots of its weights, group by group.

    It computes in fp32, or in fp16 except for weights whose keys match one of the patterns `fp32`, where these are
    given. Inputs and outputs are fp32 and int32 either way.
    """
    logging.getLogger("coremltools").setLevel(logging.ERROR)
    import coremltools as ct

    pipeline = ct.PassPipeline.DEFAULT
    pipeline.remove_passes(FOLDING)
    precision = ct.precision.FLOAT32
    if fp32 is not None:
        precision = ct.transform.FP16ComputePrecision(op_selector=Halves(piece, fp32))
    with warnings.catch_warnings(), redirect_stderr(io.StringIO()):  # where it shows bars of its progress
        warnings.simplefilter("ignore")
        model = ct.convert(
            exported_piece(piece, directory),
            source="pytorch",
            convert_to="mlprogram",
            minimum_deployment_target=ct.target.iOS18,
            compute_precision=precision,
            inputs=[_io(ct, f"input_{index}", node) for index, node in enumerate(piece.inputs)],
            outputs=[ct.TensorType(name=f"output_{index}", dtype=np.float32) for index in range(len(piece.outputs))],
            pass_pipeline=pipeline,
            skip_model_load=True,
        )
    spec = model.get_spec()
    return spec, _externalise(spec, Path(model.weights_dir), piece)


def exported_piece(piece: Piece, directory: Path) -> torch.export.ExportedProgram:
    """The subgraph exported as ATen operators; Core ML computes in floating point with int8 weights."""
    arguments = tuple(torch.zeros(value_of(node).shape, dtype=value_of(node).dtype) for node in piece.inputs)
    module = piece.module(directory)
    for node in module.graph.nodes:
        if rewrite := _REWRITES.get(str(node.target)):
            with module.graph.inserting_before(node):
                rewrite(node)
    module.graph.eliminate_dead_code()
    module.recompile()
    exported = torch.export.export(module, arguments, strict=False)
    decomposed: torch.export.ExportedProgram = exported.run_decompositions({})
    return decomposed


def _read_unquantized(node: fx.Node) -> None:
    node.replace_all_uses_with(node.args[0].args[0])


def _rename_and(node: fx.Node) -> None:
    node.target = aten.bitwise_and.Tensor


def _choose_by_products(node: fx.Node) -> None:
    """where(c, x, s) as c x + (1 - c) s, which is exact; the converter would store x and s for each place."""
    condition, x, other = node.args
    call = node.graph.call_function
    chosen = call(aten.to.dtype, (condition, torch.float32))
    rest = call(aten.mul.Tensor, (call(aten.rsub.Scalar, (chosen, 1.0)), other))
    node.replace_all_uses_with(call(aten.add.Tensor, (call(aten.mul.Tensor, (chosen, x)), rest)))


def _norm_by_parts(node: fx.Node) -> None:
    """RMS norm spelt out; the converter divides by the largest value first, and adds epsilon to something else then."""
    x, shape, weight, epsilon = (*node.args, None, None)[:4]
    call = node.graph.call_function
    squares = call(aten.mean.dim, (call(aten.mul.Tensor, (x, x)), list(range(-len(shape), 0)), True))
    scale = call(aten.rsqrt.default, (call(aten.add.Tensor, (squares, _EPSILON if epsilon is None else epsilon)),))
    normed = call(aten.mul.Tensor, (x, scale))
    node.replace_all_uses_with(normed if weight is None else call(aten.mul.Tensor, (normed, weight)))


# What the converter does not know, or converts to other numbers, by name: not every caller registers the first.
_REWRITES: dict[str, Callable[[fx.Node], None]] = {
    "quantized_decomposed.dequantize_per_token.default": _read_unquantized,
    "aten.__and__.Tensor": _rename_and,
    "aten.rms_norm.default": _norm_by_parts,
    "aten.where.ScalarOther": _choose_by_products,
}


def _io(ct: Any, name: str, node: fx.Node) -> Any:
    value = value_of(node)
    return ct.TensorType(name, tuple(value.shape), np.float32 if value.is_floating_point() else np.int32)


def values_of(spec: Any) -> Iterator[Any]:
    """Every constant (a MIL Value message) in a model's program."""
    for function in spec.mlProgram.functions.values():
        for block in function.block_specializations.values():
            for operation in block.operations:
                yield from operation.attributes.values()
                for argument in operation.inputs.values():
                    yield from (one.value for one in argument.arguments if one.WhichOneof("binding") == "value")


def _externalise(spec: Any, folder: Path, piece: Piece) -> tuple[Slot, ...]:
    """Refer to a file for each group of weights instead of the converter's one; gives the slots in their order."""
    known = _stand_ins(piece)
    found: dict[Slot, list[Any]] = {}
    for value in values_of(spec):
        data = _data(value, folder)
        if data is None:
            continue
        if slot := known.get(_digest(data)):
            found.setdefault(slot, []).append(value)
        elif data.dtype.kind == "f" and data.size > 1 and np.ptp(data) > 0:  # biases of zeros are the converter's own
            raise InternalError(f"a constant {data.dtype}{list(data.shape)} of a converted partition is no weight")
        elif value.WhichOneof("value") == "blobFileValue":
            tensor = value.immediateValue.tensor
            (tensor.floats if data.dtype.kind == "f" else tensor.ints).values.extend(data.ravel().tolist())
    slots: list[Slot] = []
    for group in GROUPS:
        own = [slot for slot in known.values() if slot in found and slot.weight.startswith(group)]
        for slot, constant in zip(own, constants_of(own), strict=True):
            for value in found[slot]:
                value.blobFileValue.fileName = f"{BLOB_FOLDER}/{group}.bin"
                value.blobFileValue.offset = constant.offset_bytes - RECORD_BYTES
        slots += own
    return tuple(slots)


def _stand_ins(piece: Piece) -> dict[bytes, Slot]:
    """What each stand-in becomes, by a digest of its data: itself, or the half-precision numbers nearest to it."""
    known: dict[bytes, Slot] = {}
    for weight in piece.weights:
        if weight.is_read_by_lowering:
            continue
        data = weight.stand_in()
        shape = tuple(data.shape)
        if data.dtype == torch.float32:
            known[_digest(data.half().numpy())] = Slot(f"{weight.name}:f16", weight.name, "plain", "f16", shape)
        known[_digest(data.numpy())] = Slot(weight.name, weight.name, "plain", DTYPES[data.dtype], shape)
    return known


def _data(value: Any, folder: Path) -> np.ndarray[Any, Any] | None:
    """The numbers of a constant that may be a weight: those in a file, and those of floating point in the program."""
    import coremltools as ct

    tensor = value.type.tensorType
    dtype = _numpy_dtypes(ct).get(tensor.dataType)
    if dtype is None:
        return None
    shape = [dimension.constant.size for dimension in tensor.dimensions]
    if value.WhichOneof("value") == "blobFileValue":
        path = folder / Path(value.blobFileValue.fileName).name
        offset_bytes = value.blobFileValue.offset + RECORD_BYTES
        return np.memmap(path, dtype, "r", offset_bytes, tuple(shape))
    stored = value.immediateValue.tensor
    if stored.WhichOneof("value") == "floats":
        return np.array(stored.floats.values, dtype).reshape(shape)
    if stored.WhichOneof("value") == "bytes" and dtype.kind == "f":
        return np.frombuffer(stored.bytes.values, dtype).reshape(shape)
    return None


def _numpy_dtypes(ct: Any) -> dict[int, np.dtype[Any]]:
    mil = ct.proto.MIL_pb2
    names = {"float16": mil.FLOAT16, "float32": mil.FLOAT32, "int8": mil.INT8, "uint8": mil.UINT8, "int32": mil.INT32}
    return {number: np.dtype(name) for name, number in names.items()}


def _digest(data: np.ndarray[Any, Any]) -> bytes:
    return hashlib.sha256(np.ascontiguousarray(data).data).digest()
