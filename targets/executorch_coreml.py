"""ExecuTorch with the Core ML delegate: iPhones and Macs, through ExecuTorch's own interface."""

from __future__ import annotations

import hashlib
import io
import json
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
from movdc.compiler.errors import InternalError
from movdc.compiler.heap import give_back_memory
from movdc.compiler.pieces import Piece
from movdc.compiler.target import Artifact, Slot, Target, Written
from movdc.compiler.weights import WeightRef
from movdc.runtime.bundle import FORWARD, DType
from movdc.targets.coreml import Coreml
from movdc.targets.delegation import delegation, program_of
from movdc.targets.inside import fill_weights, write_program
from movdc.targets.mil import FOLDING, exported_piece

_IDENTIFIER = re.compile(rb"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}")  # of packages and of their files
_MANIFEST = re.compile(rb'\{\s*"fileFormatVersion":.*?"rootModelIdentifier":[^}]*\}', re.DOTALL)  # of a package


@dataclass(frozen=True)
class ExecutorchCoreml(Target):
    """A .pte with a Core ML package for iOS 18 inside, a method a variant, which stock ExecuTorch runs.

    A delegate for Core ML takes its weights from nowhere else, so a program is its template's with the weights in the
    place of the stand-ins, and with another identifier: the delegate keeps what Core ML compiles by it.
    """

    name: ClassVar[str] = "executorch-coreml"
    abilities: ClassVar[Abilities] = Abilities(int8_products="float", int8_rows=True)
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
        """Lower a program of one method."""
        return self.emit_methods({FORWARD: piece}, directory)[FORWARD]

    def emit_methods(self, pieces: Mapping[str, Piece], directory: Path) -> dict[str, Artifact]:
        """Lower through to_edge_transform_and_lower, with stand-ins that are found again in the program.

        The delegate makes the methods functions of one package, which has each weight once.
        """
        for name in ("torch", "coremltools", "executorch"):
            logging.getLogger(name).setLevel(logging.ERROR)
        with warnings.catch_warnings(), redirect_stderr(io.StringIO()):  # where it shows bars of its progress
            warnings.simplefilter("ignore")
            try:
                data, found = self._lower(pieces, directory, shares=True)
            except ValueError as error:
                if "POSITIONAL" not in str(error):
                    raise
                # The delegate pairs packages of methods, and one has more of them than another.
                data, found = self._lower(pieces, directory, shares=False)
        give_back_memory()  # what was exported is a knot of references, and holds copies of all the stand-ins
        _sort_manifests(data)
        _rename(data, b"template")
        return write_program(self, pieces, data, found, directory)

    def _lower(
        self, pieces: Mapping[str, Piece], directory: Path, *, shares: bool
    ) -> tuple[bytearray, dict[str, tuple[int, dict[str, int]]]]:
        """A program, and of each method its delegated nodes and its fallback nodes."""
        import coremltools as ct
        from executorch.backends.apple.coreml.compiler import CoreMLBackend
        from executorch.backends.apple.coreml.compiler.coreml_preprocess import MULTIMETHOD_WEIGHT_SHARING_STRATEGY
        from executorch.backends.apple.coreml.partition import CoreMLPartitioner
        from executorch.exir import to_edge_transform_and_lower

        stage = next(iter(pieces.values())).stage
        half = any(fnmatchcase(stage, pattern) for pattern in self.fp16)
        specs = CoreMLBackend.generate_compile_specs(
            minimum_deployment_target=ct.target.iOS18,
            compute_precision=ct.precision.FLOAT16 if half else ct.precision.FLOAT32,
            pass_names=[name for name in ct.PassPipeline.DEFAULT.passes if name not in FOLDING],
        )
        strategy = MULTIMETHOD_WEIGHT_SHARING_STRATEGY["POSITIONAL" if shares else "DISABLED"]
        specs.append(CoreMLBackend.generate_multimethod_weight_sharing_strategy_compile_spec(strategy))
        exported = {method: exported_piece(piece, directory) for method, piece in pieces.items()}
        partitioner = {method: [CoreMLPartitioner(compile_specs=specs)] for method in pieces}
        edge = to_edge_transform_and_lower(exported, partitioner=partitioner)
        found = {method: delegation(edge.exported_program(method).graph_module) for method in pieces}
        return program_of(edge), found  # which changes the graphs

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
    """Replace random identifiers by ones that depend on the seed and on their order, the same wherever one is named."""
    names: dict[bytes, bytes] = {}
    for match in list(_IDENTIFIER.finditer(data)):
        name = uuid.UUID(bytes=hashlib.sha256(seed + bytes([len(names)])).digest()[:16])
        start, end = match.span()
        data[start:end] = names.setdefault(bytes(match[0]), str(name).encode())


def _sort_manifests(data: bytearray) -> None:
    """Put the files of each package in the order of their names; Core ML's tools have that of random identifiers."""
    for match in list(_MANIFEST.finditer(data)):
        manifest = json.loads(match[0])
        manifest["itemInfoEntries"] = dict(sorted(manifest["itemInfoEntries"].items(), key=lambda one: one[1]["name"]))
        text, (start, end) = json.dumps(manifest, indent=4).encode(), match.span()
        if len(text) != end - start:
            raise InternalError("the manifest of a Core ML package does not fit into its place in the program")
        data[start:end] = text
