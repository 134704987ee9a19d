"""ExecuTorch with the Core ML delegate: iPhones and Macs, through ExecuTorch's own interface."""

from __future__ import annotations

import hashlib
import io
import logging
import re
import uuid
import warnings
from collections.abc import Mapping, Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, ClassVar, Literal

from torch import fx

from movdc.compiler.abilities import Abilities
from movdc.compiler.heap import give_back_memory
from movdc.compiler.pieces import Piece
from movdc.compiler.target import Artifact, Slot, Target, Written
from movdc.compiler.weights import WeightRef
from movdc.runtime.bundle import DType
from movdc.targets.coreml import Coreml
from movdc.targets.delegation import delegation
from movdc.targets.inside import fill_weights, find_weights
from movdc.targets.mil import FOLDING, exported_piece

_IDENTIFIER = re.compile(rb"executorch_[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}")


@dataclass(frozen=True)
class ExecutorchCoreml(Target):
    """A .pte for each partition with a Core ML package for iOS 18 inside, which stock ExecuTorch runs.

    A delegate for Core ML takes its weights from nowhere else, so a partition's program is its template's with the
    weights in the place of the stand-ins, and with another identifier: the delegate keeps what Core ML compiles by it.
    """

    name: ClassVar[str] = "executorch-coreml"
    abilities: ClassVar[Abilities] = Abilities(int8_products="float", int8_rows=True, shared_weights=False)
    packages: ClassVar[tuple[str, ...]] = ("torch", "executorch", "coremltools")
    rewrites: ClassVar[tuple[str, ...]] = Coreml.rewrites
    program_suffix: ClassVar[str] = ".pte"
    weights_in_program: ClassVar[bool] = True
    node_bytes: ClassVar[int] = Coreml.node_bytes

    fp16: tuple[str, ...] = ()  # patterns of stage names that compute in half precision, all of each

    def refuse(self, node: fx.Node) -> str | None:
        """Why Core ML cannot run a node."""
        return Coreml().refuse(node)

    def emit(self, piece: Piece, directory: Path) -> Artifact:
        """Lower through to_edge_transform_and_lower, with stand-ins that are found again in the program."""
        for name in ("torch", "coremltools", "executorch"):
            logging.getLogger(name).setLevel(logging.ERROR)
        import coremltools as ct
        from executorch.backends.apple.coreml.compiler import CoreMLBackend
        from executorch.backends.apple.coreml.partition import CoreMLPartitioner
        from executorch.exir import ExecutorchBackendConfig, to_edge_transform_and_lower
        from executorch.exir.passes import MemoryPlanningPass

        half = any(fnmatchcase(piece.stage, pattern) for pattern in self.fp16)
        specs = CoreMLBackend.generate_compile_specs(
            minimum_deployment_target=ct.target.iOS18,
            compute_precision=ct.precision.FLOAT16 if half else ct.precision.FLOAT32,
            pass_names=[name for name in ct.PassPipeline.DEFAULT.passes if name not in FOLDING],
        )
        with warnings.catch_warnings(), redirect_stderr(io.StringIO()):  # where it shows bars of its progress
            warnings.simplefilter("ignore")
            exported = exported_piece(piece, directory)
            edge = to_edge_transform_and_lower(exported, partitioner=[CoreMLPartitioner(compile_specs=specs)])
            delegated, fallback = delegation(edge.exported_program().graph_module)
            program = edge.to_executorch(
                # Inputs and outputs are the caller's buffers, so that none is copied between partitions.
                ExecutorchBackendConfig(
                    memory_planning_pass=MemoryPlanningPass(alloc_graph_input=False, alloc_graph_output=False)
                )
            )
        path = directory / "program.pte"
        data = bytearray(program.buffer)
        del exported, edge, program
        give_back_memory()  # what was exported is a knot of references, and holds copies of all the stand-ins
        _rename(data, b"template")
        path.write_bytes(data)
        sha256 = hashlib.sha256(data).hexdigest()
        return Artifact(path, sha256, tuple(find_weights(piece, data)), self.estimate(piece), delegated, fallback)

    def fill(self, program: Path, slots: Sequence[Slot], refs: Mapping[str, WeightRef], path: Path) -> Written:
        """Copy a template's program, with weights in the place of its stand-ins."""
        return fill_weights(program, slots, refs, path, _rename)

    def computes_in(self) -> Literal["f32", "f16"]:
        """What the denoiser computes in, which has most of the products."""
        return "f16" if any(fnmatchcase("denoiser", pattern) for pattern in self.fp16) else "f32"

    def held_as(self) -> Mapping[DType, DType]:
        """Core ML restores int8 weights when it loads a model."""
        return Coreml().held_as()


def _rename(data: Any, seed: bytes) -> None:
    """Give each package in a program an identifier that depends on the seed and on its place."""
    for index, match in enumerate(list(_IDENTIFIER.finditer(data))):
        name = uuid.UUID(bytes=hashlib.sha256(seed + bytes([index])).digest()[:16])
        start, end = match.span()
        data[start:end] = f"executorch_{name}".encode()
