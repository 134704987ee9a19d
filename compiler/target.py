"""The Target protocol: what turns a partition of a graph into files that a device runs."""

from __future__ import annotations

import hashlib
import inspect
import math
import platform
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import ClassVar, Literal

import torch
from torch import Tensor, fx

from movdc.compiler.abilities import Abilities
from movdc.compiler.configured import Configured
from movdc.compiler.cost import held_bytes
from movdc.compiler.device import SLAB_BYTES, DeviceProfile, Machine
from movdc.compiler.errors import InternalError, MovdcError
from movdc.compiler.hashed_file import HashedFile
from movdc.compiler.identity import code_identity, library_identity
from movdc.compiler.int8 import Loss
from movdc.compiler.pieces import Piece
from movdc.compiler.weights import INT8, WeightRef
from movdc.runtime.bundle import ITEM_BYTES, Constant, DType

ALIGNMENT_BYTES = 64  # of each tensor in a file of weights: a cache line, and what vector loads want
_WRITES_WEIGHTS = ("pieces", "weights", "int8", "folded", "target")  # modules of the compiler


@dataclass(frozen=True)
class Slot:
    """A constant that a lowered program asks for by key, and the weight of a piece that fills it."""

    key: str
    weight: str  # PieceWeight.name
    layout: Literal["plain", "channels-last", "transposed"]
    dtype: DType | None  # None where the target asks for bytes; u8 of an int8 weight is 128 above its values
    shape: tuple[int, ...]

    @property
    def size_bytes(self) -> int:
        """Bytes of its data."""
        return math.prod(self.shape) * ITEM_BYTES[self.dtype or "u8"]

    def parts(self, ref: WeightRef, loss: Loss | None) -> Iterator[Tensor]:
        """The weight's data, as the program wants it; `loss` gets what int8 loses."""
        parts = ref.parts(loss)
        if self.layout != "plain":
            whole = torch.cat(list(parts))
            parts = iter([whole.T if self.layout == "transposed" else whole.permute(0, 2, 3, 1)])
        for part in parts:
            if self.dtype == "u8" and part.dtype == torch.int8:
                part = part.view(torch.uint8) ^ 128
            yield (part.half() if self.dtype == "f16" else part).contiguous()


@dataclass(frozen=True)
class Memory:
    """What a lowered program takes on the device, in bytes."""

    held_bytes: int  # by its weights, while it is loaded
    program_bytes: int  # by the program itself, as long as its stage runs
    workspace_bytes: int  # while it runs; the programs of a stage share one workspace
    planned_bytes: int  # planned ahead for values on the way; the programs of a stage share that, too


@dataclass(frozen=True)
class Artifact:
    """A lowered template: one program, or one method of it, for all partitions of the same text."""

    program: Path
    sha256: str  # of the program
    slots: tuple[Slot, ...]
    memory: Memory
    delegated_nodes: int  # operators that the target's own kernels run
    fallback: Mapping[str, int] = field(default_factory=dict)  # operators that run elsewhere, and how many of each


@dataclass(frozen=True)
class Written:
    """A file of weights: where each constant lies in it, in the order of the keys, and what was noticed on the way."""

    constants: tuple[Constant, ...]
    sha256: str
    sqnr_db: Mapping[str, float]  # of each weight that became int8


@dataclass(frozen=True)
class Target(Configured, ABC):
    """An emitter; subclasses import their SDK inside the methods, so that listing targets needs none."""

    kind: ClassVar[str] = "target"
    abilities: ClassVar[Abilities]
    packages: ClassVar[tuple[str, ...]]  # of the SDK: with other versions, programs and weights are made anew
    rewrites: ClassVar[tuple[str, ...]] = ()  # passes that turn what it would refuse into what it runs
    program_suffix: ClassVar[str]
    weights_suffix: ClassVar[str] = ".bin"
    # Programs have weights inside: a program is its template's, with these in the place of the stand-ins. Partitions
    # of several variants that read the same weights share it, each with a method of its own.
    weights_in_program: ClassVar[bool] = False
    load_copies: ClassVar[float] = 2.0  # bytes held while weights are loaded for the first time, per byte as held
    value_copies: ClassVar[float] = 1.0  # bytes that a running program takes, per byte of the values within it
    node_bytes: ClassVar[int] = 0  # that a loaded program takes for each of its nodes

    @abstractmethod
    def refuse(self, node: fx.Node) -> str | None:
        """Why this target cannot run an ATen node well, or None."""

    @abstractmethod
    def emit(self, piece: Piece, directory: Path) -> Artifact:
        """Lower a piece with stand-ins for its weights; reads no weight."""

    def emit_methods(self, pieces: Mapping[str, Piece], directory: Path) -> dict[str, Artifact]:
        """Lower pieces of the same weights to methods of one program, where weights are in it; an artifact for each."""
        raise InternalError(
            f"{self.name} has weights in its programs, and no emit_methods for variants that share them"
        )

    def write_weights(self, slots: Sequence[Slot], refs: Mapping[str, WeightRef], path: Path) -> Written:
        """Write the weights of one piece (by name) under the keys of its program, a part of a tensor at a time."""
        return write_plain(slots, refs, path)

    def fill(self, program: Path, slots: Sequence[Slot], refs: Mapping[str, WeightRef], path: Path) -> Written:
        """Write a template's program again with weights inside, where they belong there; it has no constants."""
        raise InternalError(f"{self.name} keeps weights outside of programs")

    def held_as(self) -> Mapping[DType, DType]:
        """The types of weights that the device holds as another one, such as int8 restored to fp32."""
        return {}

    def computes_in(self) -> Literal["f32", "f16"]:
        """The type that most products of floating point are computed in."""
        return "f32"

    def through_int8(self, rows: Tensor) -> Tensor:
        """What is left of an input [rows, items] that a product with int8 weights reads; all of it, if as floats."""
        return rows

    def min_sqnr_db(self) -> float | None:
        """The ratio of signal to error that its programs keep where nothing is rounded to int8; None if it makes none.

        Another order of summation in fp32 gives 95 to 130; the figure for fp16 is assumed, for no device was measured.
        """
        return 80.0 if self.computes_in() == "f32" else 40.0

    def estimate(self, piece: Piece) -> Memory:
        """What a program takes by the planner's own figures, for targets whose programs cannot be measured here."""
        return Memory(
            held_bytes=sum(held_bytes(weight.node, self.held_as()) for weight in piece.weights),
            program_bytes=self.node_bytes * len(piece.nodes),
            workspace_bytes=int(self.value_copies * piece.working_bytes),
            planned_bytes=0,
        )

    def machine(self, profile: DeviceProfile, budget_bytes: int | None) -> Machine:
        """What partitions are planned for; a budget given explicitly replaces the profile's."""
        floating = {"f32": profile.fp32_flops_per_s, "f16": profile.fp16_flops_per_s}[self.computes_in()]
        return Machine(
            budget_bytes=budget_bytes or profile.usable_memory,
            load_bytes_per_s=profile.load_rate,
            compute_flops_per_s=floating,
            int8_flops_per_s=profile.int8_flops_per_s if self.abilities.int8_products == "int8" else floating,
            load_overhead_s=profile.load_overhead_s,
            run_overhead_s=profile.run_overhead_s,
            contention=profile.contention,
            load_contention=profile.load_contention,
            touch_bytes_per_s=profile.touch_bytes_per_s,
            free_bytes_per_s=profile.free_bytes_per_s,
            load_copies=self.load_copies,
            value_copies=self.value_copies,
            node_bytes=self.node_bytes,
            slab_bytes=SLAB_BYTES,
            held_as=self.held_as(),
        )

    def versions(self) -> dict[str, str]:
        """The SDK's packages with their versions; raises MovdcError saying how to install what is missing."""
        found = {name: _version(name) for name in self.packages}
        if missing := [name for name, installed in found.items() if installed is None]:
            raise MovdcError(
                f"target {self.name} needs {' and '.join(missing)}, which this environment lacks; install with "
                f"`pip install -c constraints.txt {' '.join(missing)}`"
            )
        return {name: installed for name, installed in found.items() if installed is not None}

    @property
    def identity(self) -> str:
        """What weights depend on beside the checkpoint: our code and the SDK."""
        ours = [one for one in type(self).__mro__ if issubclass(one, Target)]
        sources = [inspect.getsource(inspect.getmodule(one) or one) for one in ours]
        code = code_identity("movdc.targets", *(f"movdc.compiler.{name}" for name in _WRITES_WEIGHTS))
        own = hashlib.sha256("".join(sources).encode()).hexdigest()
        return f"{self} {own} {code} {sorted(self.versions().items())} {platform.machine()}"

    @property
    def program_identity(self) -> str:
        """What programs depend on beside the piece: the same, and the engine that measures them."""
        return f"{self.identity} {library_identity('movdc.runtime')}"


def write_plain(slots: Sequence[Slot], refs: Mapping[str, WeightRef], path: Path) -> Written:
    """Write tensors one behind the other, aligned, in the order of the refs: what is read twice is read in a row."""
    order = {name: index for index, name in enumerate(refs)}
    losses: dict[str, Loss] = {slot.weight: Loss() for slot in slots if INT8 in refs[slot.weight].transforms}
    constants = []
    with HashedFile(path) as file:
        for slot in sorted(slots, key=lambda slot: (order[slot.weight], slot.key)):
            file.pad_to(-(-file.size_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES)
            constants.append(
                Constant(
                    key=slot.key,
                    offset_bytes=file.size_bytes,
                    size_bytes=slot.size_bytes,
                    dtype=slot.dtype or "u8",
                    shape=slot.shape,
                )
            )
            end_bytes = file.size_bytes + slot.size_bytes
            for part in slot.parts(refs[slot.weight], losses.get(slot.weight)):
                file.write_tensor(part)
            if file.size_bytes != end_bytes:
                raise InternalError(f"{refs[slot.weight]} does not have the {slot.size_bytes} bytes of its slot")
    constants.sort(key=lambda constant: constant.key)
    return Written(tuple(constants), file.sha256, {name: loss.sqnr_db for name, loss in losses.items()})


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
