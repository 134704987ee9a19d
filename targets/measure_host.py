"""The figures of a device profile, measured on the machine this runs on, with the engine and XNNPACK.

A stack of equal linear layers, each a partition of its own, is lowered in fp32 and in int8 and run by the engine:
one after the other for the rates, then with loads beside runs for the contention. Before each pass the packed weights
are dropped from the page cache, so that a load reads them from the disk, as it must where memory is short.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np
import torch
from pydantic_core import to_json
from torch import Tensor, nn

from movdc.compiler.device import SLAB_BYTES, DeviceProfile, Machine
from movdc.compiler.int8_readers import quantized_graph
from movdc.compiler.levels import variant_of
from movdc.compiler.pieces import Piece, piece_of
from movdc.compiler.program import Graph
from movdc.compiler.residency import Chain
from movdc.compiler.trace import trace
from movdc.compiler.weights import RandomSource
from movdc.runtime.bundle import (
    FORMAT_VERSION,
    FORWARD,
    MANIFEST,
    SEAL,
    File,
    Partition,
    Stage,
    TensorSpec,
    WeightsFile,
    seal_of,
)
from movdc.targets.executorch_xnnpack import ExecutorchXnnpack

WIDTH, TOKENS, LAYERS, PASSES = 2048, 512, 8, 5
TOLD_APART = 0.25  # of the time of a load, by which the other one has to differ
_ROOMY = Machine(1 << 40, 1e9, 1e9, 0.0, ExecutorchXnnpack.load_copies)
_STAGE, _VARIANT = "stack", "plain"


@dataclass(frozen=True)
class _Times:
    """What a stack took, in seconds: the first load, which packs, and medians of the passes after it."""

    pack_s: float
    load_s: float
    run_s: float
    slower_s: float  # that runs take longer beside loads
    beside_s: float  # of loads beside runs
    weight_bytes: int
    flops: int


def measure_host(folder: Path, width: int = WIDTH) -> DeviceProfile:
    """The profile of this machine; writes a few hundred megabytes into a folder."""
    fp32, int8 = (_times(folder / name, width, is_int8=name == "int8") for name in ("fp32", "int8"))
    # Loads take an overhead for each partition and a time for each byte; the two stacks tell them apart, where loads of
    # four times the bytes take noticeably longer. Where they do not, all of it counts as reading.
    rate = fp32.weight_bytes / fp32.load_s
    if (longer_s := fp32.load_s - int8.load_s) > TOLD_APART * fp32.load_s:
        rate = max(rate, (fp32.weight_bytes - int8.weight_bytes) / longer_s)
    overhead_s = max(fp32.load_s - fp32.weight_bytes / rate, 0) / LAYERS
    lost = min(max(fp32.slower_s / max(fp32.beside_s, 1e-9), 0.0), 0.9)
    memory_bytes = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    how = f"measured with {LAYERS} linear layers of {width} x {width} and {TOKENS} tokens"
    fp32_rate = fp32.flops / fp32.run_s
    return DeviceProfile(
        usable_memory=memory_bytes // 2,
        load_rate=round(rate),
        load_overhead_s=round(overhead_s, 5),
        fp32_flops_per_s=fp32_rate,
        fp16_flops_per_s=fp32_rate,
        int8_flops_per_s=int8.flops / int8.run_s,
        contention=round(lost / (1 - lost), 2),
        source={
            "usable_memory": f"estimate: half of {memory_bytes / 1e9:.1f} GB",
            "load_rate": f"{how}: packed weights from the disk; packing them first took {fp32.pack_s:.2f} s",
            "load_overhead_s": "measured: what loads of fp32 and int8 weights do not owe to their bytes",
            "fp32_flops_per_s": how,
            "fp16_flops_per_s": "estimate: as fp32, which programs compute in",
            "int8_flops_per_s": how,
            "contention": f"measured: runs took {fp32.slower_s:.3f} s longer beside {fp32.beside_s:.3f} s of loads",
        },
    )


class _Stack(nn.Module):
    """Layers that keep the size of what they are given."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(*[nn.Linear(width, width) for _ in range(LAYERS)])

    def forward(self, x: Tensor) -> Tensor:
        """[TOKENS, width] to the same."""
        y: Tensor = self.layers(x)
        return y


def _times(root: Path, width: int, is_int8: bool) -> _Times:
    """Lower a stack into a bundle of its own, and time it."""
    from movdc.runtime import _engine

    root.mkdir()
    pieces = _pieces(width, is_int8)
    _write_bundle(root, pieces)
    x = np.random.default_rng(0).standard_normal((TOKENS, width), np.float32)
    out = np.empty_like(x)
    packed = root / "packed"

    def report(mode: _engine.Mode, passes: int) -> list[_engine.RunReport]:
        options = _engine.Options(mode, 1 << 40, str(packed), 1 << 40, keeps_trace=False)
        engine = _engine.Engine(str(root), options)
        found = []
        for _ in range(passes):
            _drop_from_page_cache(packed)
            engine.run(_STAGE, _VARIANT, {"x": x}, {"out": out}, "")
            found.append(engine.report(_STAGE))
        return found

    first, _, *alone = report(_engine.Mode.sequential, 2 + PASSES)  # the second meets pages for the first time
    _, *beside = report(_engine.Mode.concurrent, 1 + PASSES)
    run_s, load_s = median(one.run_s for one in alone), median(one.load_s for one in alone)
    return _Times(
        pack_s=first.load_s,
        load_s=load_s,
        run_s=run_s,
        slower_s=median(one.run_s for one in beside) - run_s,
        beside_s=median(one.load_s - one.wait_s for one in beside),
        weight_bytes=sum(piece.weight_bytes for piece in pieces),
        flops=sum(piece.flops for piece in pieces),
    )


def _pieces(width: int, is_int8: bool) -> list[Piece]:
    """The layers, each as a partition."""
    with torch.device("meta"):
        shapes = {key: tuple(tensor.shape) for key, tensor in _Stack(width).state_dict().items()}
    spec = TensorSpec(name="x", dtype="f32", shape=(TOKENS, width))
    graph: Graph = trace(lambda: _Stack(width), (spec,), ("out",), RandomSource(0, shapes).refs())
    layers = [node.name for node in graph.compute_nodes]
    if is_int8:
        graph = quantized_graph(graph, [name for name, ref in graph.weights.items() if len(ref.shape) == 2])
    pieces, group = [], []
    for node in graph.compute_nodes:
        group.append(node)
        if node.name in layers:
            pieces.append(piece_of(graph, group))
            group = []
    return pieces


def _write_bundle(root: Path, pieces: list[Piece]) -> None:
    """What the engine reads of a bundle; all else in its manifest is null."""
    target = ExecutorchXnnpack()
    artifact = target.emit(pieces[0], root)  # the others have the same text
    program = artifact.program
    records = [File(path=program.name, size_bytes=program.stat().st_size, sha256=artifact.sha256)]
    partitions, weights = [], []
    for index, piece in enumerate(pieces):
        path = root / f"{index}.ptd"
        refs = {weight.name: weight.ref for weight in piece.weights}
        written = target.write_weights(artifact.slots, refs, path)
        records.append(File(path=path.name, size_bytes=path.stat().st_size, sha256=written.sha256))
        weights.append(WeightsFile(path=path.name, constants=written.constants))
        memory = artifact.memory
        partitions.append(
            Partition(
                name=str(index),
                program=program.name,
                method=FORWARD,
                weights=(path.name,),
                inputs=tuple(map(piece.tensor, piece.inputs)),
                outputs=tuple(map(piece.tensor, piece.outputs)),
                weight_bytes=piece.weight_bytes,
                held_bytes=memory.held_bytes,
                load_bytes=memory.held_bytes + piece.weight_bytes,
                program_bytes=memory.program_bytes,
                workspace_bytes=memory.workspace_bytes,
                planned_bytes=memory.planned_bytes,
                flops=piece.flops,
            )
        )
    inputs, outputs = partitions[0].inputs, partitions[-1].outputs
    chain = Chain.of(partitions, inputs, SLAB_BYTES)
    variant = variant_of(chain, _ROOMY, "per_step", PASSES, _STAGE, inputs, outputs)
    others = ("family", "target", "device", "video", "prompt", "sampler", "decode", "spec", "pipeline", "versions")
    text = to_json(
        dict.fromkeys(others)
        | {
            "format_version": FORMAT_VERSION,
            "budget_bytes": 0,
            "peak_bytes": 0,
            "slab_bytes": SLAB_BYTES,
            "stages": [Stage(name=_STAGE, cadence="per_step", variants={_VARIANT: variant})],
            "partitions": partitions,
            "weights": weights,
            "files": records,
        }
    )
    (root / MANIFEST).write_bytes(text)
    (root / SEAL).write_text(seal_of(text))


def _drop_from_page_cache(folder: Path) -> None:
    """So that the next load reads from the disk; where the system has no such call (macOS), loads are warm."""
    if not hasattr(os, "posix_fadvise"):
        return
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())  # pages that are not written yet would stay
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
