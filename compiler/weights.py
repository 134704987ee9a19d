"""Weights by reference: where a tensor lies and how it is transformed; read only when a partition is lowered."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from movdc.compiler.errors import MovdcError
from movdc.compiler.int8 import Loss, channel_scales, to_int8


class Source(Protocol):
    """Something that holds tensors under published keys."""

    @property
    def label(self) -> str:
        """A name for people and for the printed program."""

    def refs(self) -> Mapping[str, WeightRef]:
        """Every tensor's shape and dtype, without its data."""

    def read(self, key: str) -> Tensor:
        """One tensor's data, mapped rather than copied where that is possible."""

    def identity(self, key: str) -> str:
        """What tells one content of a tensor from another without reading it: equal identities have equal data."""


@dataclass(frozen=True)
class Transform:
    """A change of layout or type done when the tensor is read."""

    op: Literal["permute", "reshape", "rows", "int8", "int8-scale"]
    args: tuple[int, ...] = ()  # of rows: (period, low, high) keeps the rows r with low <= r % period < high

    def __str__(self) -> str:
        return f"{self.op}[{','.join(map(str, self.args))}]" if self.args else self.op

    def apply(self, tensor: Tensor) -> Tensor:
        """The transformed tensor (of data or fake)."""
        if self.op == "rows":
            period, low, high = self.args
            return tensor.reshape(-1, period, *tensor.shape[1:])[:, low:high].flatten(0, 1)
        if self.op == "int8":
            return to_int8(tensor)
        if self.op == "int8-scale":
            return channel_scales(tensor)
        return tensor.permute(self.args) if self.op == "permute" else tensor.reshape(self.args)


INT8 = Transform("int8")
INT8_SCALE = Transform("int8-scale")
PART_BYTES = 4 << 20  # of a tensor that is transformed at a time: what the caches of a core hold


@dataclass(frozen=True)
class WeightRef:
    """A tensor of a checkpoint; `shape` is that of the stored tensor, before the transforms."""

    source: Source
    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    transforms: tuple[Transform, ...] = ()

    def then(self, *transforms: Transform) -> WeightRef:
        """The same tensor with more transforms after those it has."""
        return replace(self, transforms=self.transforms + transforms)

    @property
    def identity(self) -> str:
        """What tells its data from any other's, transforms included."""
        return " ".join([self.source.identity(self.key), *map(str, self.transforms)])

    def parts(self, loss: Loss | None = None) -> Iterator[Tensor]:
        """The data in its order, contiguous, in fp32 where it is floating point; `loss` gets what int8 loses.

        A large tensor comes as several parts, so that no more of it is held than is being worked on.
        """
        tensor, rest = self.source.read(self.key), self.transforms
        while not set(rest) <= {INT8, INT8_SCALE}:  # these two work on each row by itself
            tensor, rest = rest[0].apply(tensor), rest[1:]
        for part in torch.split(tensor, _rows(tensor)) if tensor.dim() else (tensor,):
            for transform in rest:
                part = loss.to_int8(part) if loss is not None and transform == INT8 else transform.apply(part)
            yield (part.float() if part.is_floating_point() else part).contiguous()

    def read(self) -> Tensor:
        """The whole of the data at once."""
        parts = list(self.parts())
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def __str__(self) -> str:
        return " ".join([f"{self.source.label}:{self.key}", *map(str, self.transforms)])


@dataclass(frozen=True)
class Zeros:
    """The zero points of symmetric int8 values, of as many channels as the key says; no target stores them."""

    label = "zeros"

    def refs(self) -> Mapping[str, WeightRef]:
        return {}

    def ref(self, channels: int) -> WeightRef:
        """As many zeros; int32, because pieces read such integers when they are lowered, and int8 are weights."""
        return WeightRef(self, str(channels), (channels,), torch.int32)

    def read(self, key: str) -> Tensor:
        return torch.zeros(int(key), dtype=torch.int32)

    def identity(self, key: str) -> str:
        return f"zeros {key}"


class SafetensorsSource:
    """The *.safetensors files of a checkpoint folder."""

    def __init__(self, folder: Path, files: list[Path]) -> None:
        self.label = folder.name
        self._files: dict[str, Path] = {}
        self._refs: dict[str, WeightRef] = {}
        for file in files:
            try:
                with safe_open(file, framework="pt") as tensors:
                    for key in tensors.keys():  # noqa: SIM118  # safe_open is no mapping: it has no __iter__
                        part = tensors.get_slice(key)
                        dtype = _SAFETENSORS_DTYPES[part.get_dtype()]
                        self._files[key] = file
                        self._refs[key] = WeightRef(self, key, tuple(part.get_shape()), dtype)
            except (SafetensorError, OSError, KeyError) as error:
                raise MovdcError(f"{file}: is not a readable safetensors file ({error}); fetch it again") from None

    def refs(self) -> Mapping[str, WeightRef]:
        return self._refs

    def read(self, key: str) -> Tensor:
        with safe_open(self._files[key], framework="pt") as tensors:
            tensor: Tensor = tensors.get_tensor(key)
            return tensor

    def identity(self, key: str) -> str:
        return f"{file_identity(self._files[key])} {key}"


class PickleSource:
    """The sharded pytorch_model-*.bin files of a checkpoint folder, always loaded with weights_only=True."""

    def __init__(self, folder: Path, index: Path) -> None:
        self.label = folder.name
        self._tensors: dict[str, Tensor] = {}
        self._files: dict[str, Path] = {}
        for name in sorted(set(json.loads(index.read_text())["weight_map"].values())):
            try:
                # mmap: a tensor's bytes are read when it is used, not here.
                found = torch.load(folder / name, map_location="cpu", weights_only=True, mmap=True)
            except Exception as error:  # noqa: BLE001  # torch.load raises a dozen unrelated types on bad files
                reason = str(error).splitlines()[0]
                raise MovdcError(
                    f"{folder / name}: cannot be loaded as weights only ({reason}); fetch it again"
                ) from None
            self._tensors |= found
            self._files |= dict.fromkeys(found, folder / name)

    def refs(self) -> Mapping[str, WeightRef]:
        return {key: WeightRef(self, key, tuple(t.shape), t.dtype) for key, t in self._tensors.items()}

    def read(self, key: str) -> Tensor:
        return self._tensors[key]

    def identity(self, key: str) -> str:
        return f"{file_identity(self._files[key])} {key}"


class RandomSource:
    """Seeded weights for a model without a checkpoint: each tensor depends on (seed, key, shape) alone."""

    def __init__(self, seed: int, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self.label = f"random:{seed}"
        self._seed = seed
        self._refs = {key: WeightRef(self, key, shape, torch.float32) for key, shape in shapes.items()}

    def refs(self) -> Mapping[str, WeightRef]:
        return self._refs

    def read(self, key: str) -> Tensor:
        shape = self._refs[key].shape
        if len(shape) < 2:  # gains near one, biases near zero: signals keep their size through deep stacks
            return torch.zeros(shape) if key.endswith("bias") else torch.ones(shape)
        digest = hashlib.sha256(f"{self._seed}:{key}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
        return torch.randn(shape, generator=generator) / math.sqrt(math.prod(shape[1:]))

    def identity(self, key: str) -> str:
        return f"{self.label} {key} {list(self._refs[key].shape)}"


def open_checkpoint(folder: Path) -> Source:
    """The weights of a folder in a published layout; raises MovdcError that names the files wanted."""
    index = folder / "pytorch_model.bin.index.json"
    if files := sorted(folder.glob("*.safetensors")):
        return SafetensorsSource(folder, files)
    if index.is_file():
        return PickleSource(folder, index)
    raise MovdcError(f"{folder}: holds no weights; expected *.safetensors or {index.name} with its shards")


def file_identity(path: Path) -> str:
    """Path, size, time of change and inode: a file that keeps these keeps its content, so that no compile hashes it."""
    real = path.resolve()
    status = real.stat()
    return f"{real} {status.st_size} {status.st_mtime_ns} {status.st_ino}"


def _rows(tensor: Tensor) -> int:
    """How many rows of a tensor make a part."""
    row_bytes = tensor[:1].numel() * max(tensor.element_size(), 4)
    return max(1, PART_BYTES // max(row_bytes, 1))


_SAFETENSORS_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
