"""A reference interpreter of MIL programs, for the operators that movdc's conversions give: Core ML runs on no Linux.

Each operator is written down from the MIL specification and computed by torch, in the types that the program says.
"""

from __future__ import annotations

import json
import mmap
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import coremltools as ct
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

MIL = ct.proto.MIL_pb2
DTYPES = {
    MIL.FLOAT16: torch.float16, MIL.FLOAT32: torch.float32, MIL.INT8: torch.int8, MIL.UINT8: torch.uint8,
    MIL.INT16: torch.int16, MIL.UINT16: torch.uint16, MIL.INT32: torch.int32, MIL.BOOL: torch.bool,
}  # fmt: skip
NAMES = {
    "fp16": torch.float16, "fp32": torch.float32, "int32": torch.int32, "bool": torch.bool, "int16": torch.int16,
    "int8": torch.int8, "uint8": torch.uint8,
}  # fmt: skip
_REFERENCE = b"CMJR"  # begins what ExecuTorch's delegate gets instead of a package that methods share


class Package:
    """An .mlpackage folder: its model, and the tensors that its constants refer to."""

    def __init__(self, folder: Path) -> None:
        self.data = folder / "Data" / "com.apple.CoreML"
        self.spec = ct.proto.Model_pb2.Model.FromString((self.data / "model.mlmodel").read_bytes())
        self._maps: dict[Path, mmap.mmap] = {}

    def operations(self, function: str) -> list[Any]:
        """The operations of a function, in order."""
        (block,) = self.spec.mlProgram.functions[function].block_specializations.values()
        return list(block.operations)

    def run(self, inputs: Mapping[str, Tensor], function: str = "main") -> list[Tensor]:
        """The outputs of a function, in their order."""
        (block,) = self.spec.mlProgram.functions[function].block_specializations.values()
        values: dict[str, Any] = dict(inputs)
        last_reads = {name: index for index, one in enumerate(block.operations) for name in _reads(one)}
        for index, operation in enumerate(block.operations):
            outputs = self._compute(operation, values)
            for output, result in zip(operation.outputs, outputs, strict=True):
                _check(operation, output, result)
                values[output.name] = result
            for name in _reads(operation):
                if last_reads[name] == index and name not in block.outputs:
                    del values[name]  # at full width a block's values would take tens of gigabytes
        return [values[name] for name in block.outputs]

    def constant(self, value: Any) -> Any:
        """A tensor, or a string."""
        kind = value.type.tensorType
        if kind.dataType == MIL.STRING:
            return value.immediateValue.tensor.strings.values[0]
        shape = [dimension.constant.size for dimension in kind.dimensions]
        dtype = DTYPES[kind.dataType]
        if value.WhichOneof("value") == "blobFileValue":
            return self._blob(value.blobFileValue, dtype, shape)
        stored = value.immediateValue.tensor
        which = stored.WhichOneof("value")
        if which == "bytes":
            return torch.frombuffer(bytearray(stored.bytes.values), dtype=dtype).reshape(shape)
        return torch.tensor(list(getattr(stored, which).values), dtype=dtype).reshape(shape)

    def _blob(self, value: Any, dtype: torch.dtype, shape: list[int]) -> Tensor:
        assert value.fileName.startswith("@model_path/")
        path = self.data / value.fileName.removeprefix("@model_path/")
        if path not in self._maps:
            with path.open("rb") as file:
                self._maps[path] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        sentinel, _, size_bytes, offset_bytes = struct.unpack_from("<IIQQ", self._maps[path], value.offset)
        assert sentinel == 0xDEADBEEF
        assert size_bytes == dtype.itemsize * int(np.prod(shape))
        count = size_bytes // dtype.itemsize
        return torch.frombuffer(self._maps[path], dtype=dtype, count=count, offset=offset_bytes).reshape(shape)

    def _compute(self, operation: Any, values: Mapping[str, Any]) -> list[Any]:
        if operation.type == "const":
            return [self.constant(operation.attributes["val"])]

        def bound(one: Any) -> Any:
            return values[one.name] if one.WhichOneof("binding") == "name" else self.constant(one.value)

        arguments: dict[str, Any] = {}
        for name, argument in operation.inputs.items():
            several = [bound(one) for one in argument.arguments]
            arguments[name] = several if name == "values" else several[0]
        result = OPERATORS[operation.type](**arguments)
        return list(result) if isinstance(result, (list, tuple)) else [result]


def _reads(operation: Any) -> set[str]:
    """The names of the values that an operation reads."""
    bound = (one for argument in operation.inputs.values() for one in argument.arguments)
    return {one.name for one in bound if one.WhichOneof("binding") == "name"}


def _check(operation: Any, output: Any, result: Any) -> None:
    """What is computed has the type and the shape that the program says."""
    if isinstance(result, Tensor):
        kind = output.type.tensorType
        shape = [dimension.constant.size for dimension in kind.dimensions]
        said, made = (DTYPES[kind.dataType], shape), (result.dtype, list(result.shape))
        assert said == made, f"{operation.type} {output.name} is {said}, computed {made}"


@dataclass(frozen=True)
class Delegate:
    """What Core ML gets of a method of a .pte."""

    package: Package
    function: str
    input_names: tuple[str, ...]
    identifier: str  # by which what Core ML compiles is kept

    def run(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """The outputs, in their order."""
        return self.package.run(dict(zip(self.input_names, inputs, strict=True)), self.function)


def delegated(program: Path, folder: Path, method: str = "forward") -> Delegate:
    """The package that Core ML runs for a method, which it has whole, laid out in a folder."""
    from executorch.backends.apple.coreml import executorchcoreml
    from executorch.exir._serialize._program import deserialize_pte_binary

    file = deserialize_pte_binary(program.read_bytes())
    (plan,) = (one for one in file.program.execution_plan if one.name == method)
    (delegate,) = plan.delegates
    assert delegate.id == "CoreMLBackend"
    data, function = file.program.backend_delegate_data[delegate.processed.index].data, "main"
    if data.startswith(_REFERENCE):  # to a package of several functions
        said = json.loads(data.removeprefix(_REFERENCE))
        function = said["functionName"]
        data = file.named_data.buffers[file.named_data.pte_data[said["key"]].buffer_index]
    assert executorchcoreml.unflatten_directory_contents(data, str(folder))
    (found,), (path,) = folder.rglob("model.mlpackage"), folder.rglob("metadata.json")
    metadata = json.loads(path.read_text())
    its = metadata["methods"][function] if function != "main" else metadata
    return Delegate(Package(found), function, tuple(its["inputNames"]), metadata["identifier"])


def _ints(tensor: Tensor) -> list[int]:
    return [int(value) for value in tensor.flatten()]


def _slice_by_index(x: Tensor, begin: Tensor, end: Tensor, **options: Tensor) -> Tensor:
    """Python's slices, an axis each; masks say where begin or end is open, and which axes go."""
    rank = x.dim()
    stride = _ints(options["stride"]) if "stride" in options else [1] * rank
    masks = {name: [bool(one) for one in options[name]] if name in options else [False] * rank
             for name in ("begin_mask", "end_mask", "squeeze_mask")}  # fmt: skip
    index: list[Any] = []
    for axis, (low, high) in enumerate(zip(_ints(begin), _ints(end), strict=True)):
        if masks["squeeze_mask"][axis]:
            index.append(low)
        else:
            open_low, open_high = masks["begin_mask"][axis], masks["end_mask"][axis]
            index.append(slice(None if open_low else low, None if open_high else high, stride[axis]))
    return x[tuple(index)]


def _conv(x: Tensor, weight: Tensor, bias: Tensor | None = None, **options: Any) -> Tensor:
    """Any rank; `pad` has the sizes before and behind each axis."""
    axes = x.dim() - 2
    pads = _ints(options["pad"]) if options["pad_type"] == "custom" else [0] * 2 * axes
    assert options["pad_type"] in ("custom", "valid")
    backwards = [size for axis in reversed(range(axes)) for size in pads[2 * axis : 2 * axis + 2]]
    convolve = (F.conv1d, F.conv2d, F.conv3d)[axes - 1]
    strides, dilations = _ints(options["strides"]), _ints(options["dilations"])
    return convolve(F.pad(x, backwards), weight, bias, strides, 0, dilations, int(options["groups"]))


def _matmul(x: Tensor, y: Tensor, transpose_x: Any = False, transpose_y: Any = False) -> Tensor:
    return torch.matmul(x.mT if transpose_x else x, y.mT if transpose_y else y)


def _layer_norm(x: Tensor, axes: Tensor, epsilon: Tensor, gamma: Any = None, beta: Any = None) -> Tensor:
    assert _ints(axes) in ([-1], [x.dim() - 1])
    return F.layer_norm(x, x.shape[-1:], gamma, beta, float(epsilon))


def _gelu(x: Tensor, mode: str = "EXACT") -> Tensor:
    return F.gelu(x, approximate={"EXACT": "none", "TANH_APPROXIMATION": "tanh"}[mode])


def _gather(x: Tensor, indices: Tensor, axis: Tensor, batch_dims: Any = 0, validate_indices: Any = False) -> Tensor:
    assert int(batch_dims) == 0
    flat = torch.index_select(x, int(axis), indices.flatten().long())
    place = int(axis) % x.dim()
    return flat.reshape(*x.shape[:place], *indices.shape, *x.shape[place + 1 :])


def _gather_nd(x: Tensor, indices: Tensor, batch_dims: Any = 0, validate_indices: Any = False) -> Tensor:
    """The last axis of the indices names places along the first axes of x."""
    assert int(batch_dims) == 0
    return x[tuple(indices.long().unbind(-1))]


def _upsample(x: Tensor, scale_factor_height: Tensor, scale_factor_width: Tensor) -> Tensor:
    factors = (float(scale_factor_height), float(scale_factor_width))
    return F.interpolate(x, scale_factor=factors, mode="nearest")


def _pad(x: Tensor, pad: Tensor, mode: str = "constant", constant_val: Any = 0.0) -> Tensor:
    sizes = _ints(pad)
    backwards = [size for axis in reversed(range(len(sizes) // 2)) for size in sizes[2 * axis : 2 * axis + 2]]
    assert mode == "constant"
    return F.pad(x, backwards, value=float(constant_val))


def _shift_scale(data: Tensor, scale: Tensor, offset: Any = None) -> Tensor:
    """constexpr_blockwise_shift_scale: scale x (data - offset), each scale for a block of the data."""
    assert data.dtype == torch.int8
    for axis, (size, blocks) in enumerate(zip(data.shape, scale.shape, strict=True)):
        if blocks not in (1, size):
            scale = scale.repeat_interleave(size // blocks, axis)
    shifted = data.to(scale.dtype) if offset is None else data.to(scale.dtype) - offset.to(scale.dtype)
    return shifted * scale


def _attention(query: Tensor, key: Tensor, value: Tensor, attn_mask: Any = None) -> Tensor:
    return F.scaled_dot_product_attention(query, key, value, attn_mask)


def _split(x: Tensor, axis: Tensor, num_splits: Any = None, split_sizes: Any = None) -> list[Tensor]:
    if split_sizes is not None:
        return list(torch.split(x, _ints(split_sizes), int(axis)))
    return list(torch.chunk(x, int(num_splits), int(axis)))


def _squeeze(x: Tensor, axes: Tensor) -> Tensor:
    return x.squeeze(tuple(_ints(axes)))


def _expand_dims(x: Tensor, axes: Tensor) -> Tensor:
    for axis in sorted(_ints(axes)):
        x = x.unsqueeze(axis)
    return x


def _reduce(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda x, axes, keep_dims: function(x, dim=_ints(axes), keepdim=bool(keep_dims))


OPERATORS: dict[str, Callable[..., Any]] = {
    "add": lambda x, y: x + y,
    "sub": lambda x, y: x - y,
    "mul": lambda x, y: x * y,
    "real_div": lambda x, y: x / y,
    "pow": lambda x, y: torch.pow(x, y),
    "maximum": lambda x, y: torch.maximum(x, y),
    "greater_equal": lambda x, y: x >= y,
    "less": lambda x, y: x < y,
    "logical_and": lambda x, y: x & y,
    "select": lambda cond, a, b: torch.where(cond, a, b),
    "exp": lambda x: torch.exp(x),
    "sin": lambda x: torch.sin(x),
    "cos": lambda x: torch.cos(x),
    "tanh": lambda x: torch.tanh(x),
    "sigmoid": lambda x: torch.sigmoid(x),
    "silu": lambda x: F.silu(x),
    "sqrt": lambda x: torch.sqrt(x),
    "square": lambda x: torch.square(x),
    "rsqrt": lambda x, epsilon: torch.rsqrt(x + epsilon),
    "identity": lambda x: x,
    "cast": lambda x, dtype: x.to(NAMES[dtype]),
    "concat": lambda values, axis, interleave=False: torch.cat(values, int(axis)),
    "reshape": lambda x, shape: x.reshape(_ints(shape)),
    "transpose": lambda x, perm: x.permute(_ints(perm)),
    "tile": lambda x, reps: x.repeat(_ints(reps)),
    "softmax": lambda x, axis: torch.softmax(x, int(axis)),
    "linear": lambda x, weight, bias=None: F.linear(x, weight, bias),
    "abs": lambda x: torch.abs(x),
    "stack": lambda values, axis: torch.stack(values, int(axis)),
    "reduce_max": _reduce(torch.amax),
    "reduce_mean": _reduce(torch.mean),
    "reduce_sum": _reduce(torch.sum),
    "conv": _conv,
    "constexpr_blockwise_shift_scale": _shift_scale,
    "expand_dims": _expand_dims,
    "gather": _gather,
    "gather_nd": _gather_nd,
    "gelu": _gelu,
    "layer_norm": _layer_norm,
    "matmul": _matmul,
    "pad": _pad,
    "scaled_dot_product_attention": _attention,
    "slice_by_index": _slice_by_index,
    "split": _split,
    "squeeze": _squeeze,
    "upsample_nearest_neighbor": _upsample,
}  # fmt: skip
