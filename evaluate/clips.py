"""A clip of one bundle, prompt and seed: made once, kept under a digest of all that it depends on, and measured.

What is kept is in two folders: `clips`, the frames and what making them took, and `measured`, the metrics of a clip
against its reference. Files are written aside and renamed, so that a process that is killed leaves nothing half.
"""

from __future__ import annotations

import atexit
import hashlib
import io
import json
import os
import tempfile
import threading
import time
import zipfile
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from platformdirs import user_cache_path

from movdc.compiler.identity import code_identity, library_identity
from movdc.evaluate import metrics
from movdc.evaluate.shape_clips import ATTRIBUTES, FRAMES, PIXELS, judge, read_caption
from movdc.runtime.bundle import Bundle
from movdc.runtime.errors import RunError
from movdc.runtime.executors import AnyExecutor, open_executor
from movdc.runtime.generate import Generator
from movdc.runtime.video import Frames

LEAST_FRAMES = 3  # of a clip, for VBench
_ONE_AT_A_TIME = threading.Lock()  # an executor is for one thread, and a cluster's worker has several


@dataclass(frozen=True)
class Made:
    """What making a clip took."""

    evaluations: int  # of the denoiser
    leap_step: int | None
    seconds: float  # in all; what is loaded is freed after each clip, as at the end of `movdc run`
    denoiser_s: float
    vae_s: float
    read_bytes: int
    peak_bytes: int  # by the engine's books


@dataclass(frozen=True)
class Measured:
    """The metrics of a clip; None where one does not apply."""

    psnr_db: float | None  # this and the next are against the reference, of which they are None
    ssim: float | None
    temporal_flickering: float | None
    dynamics: float | None
    colour: bool | None  # this and the next three are whether the clip shows what its caption names
    background: bool | None
    shape: bool | None
    direction: bool | None
    frames_sha256: str
    subject_consistency: float | None = None  # this and the rest are VBench's, with the weights of its networks
    background_consistency: float | None = None
    motion_smoothness: float | None = None
    dynamic_degree: float | None = None
    aesthetic_quality: float | None = None
    imaging_quality: float | None = None


@dataclass(frozen=True)
class Clip:
    """What a clip is made from."""

    bundle: Path
    bundle_sha256: str
    prompt: str
    seed: int

    @property
    def key(self) -> str:
        """The digest that it is kept under; where the bundle lies is no part of it."""
        return _digest(self.bundle_sha256, self.prompt, self.seed, runtime_identity())


@dataclass(frozen=True)
class MetricWeights:
    """A folder of the networks that VBench's dimensions need, and a digest of them."""

    folder: Path
    sha256: str


@dataclass(frozen=True)
class Task:
    """A clip to make and to measure against a reference, which may be itself."""

    clip: Clip
    reference: Clip
    folder: Path  # where clips and measurements are kept
    code: str  # that the results are of
    weights: MetricWeights | None = None

    @property
    def path(self) -> Path:
        """The file of the result."""
        weights = "" if self.weights is None else self.weights.sha256
        key = _digest(self.clip.key, self.reference.key, weights, evaluate_identity())
        return self.folder / "measured" / f"{key}.json"


def identity() -> str:
    """Digest of the code that results depend on."""
    return _digest(runtime_identity(), evaluate_identity())


def runtime_identity() -> str:
    """Digest of what makes clips."""
    return _digest(code_identity("movdc.runtime"), library_identity("movdc.runtime"))


def evaluate_identity() -> str:
    """Digest of what measures them."""
    return code_identity(*(f"movdc.evaluate.{name}" for name in ("clips", "metrics", "shape_clips", "vbench_networks")))


def finished(task: Task) -> tuple[Made, Measured] | None:
    """The result of a task that was done before."""
    try:
        kept = json.loads(task.path.read_bytes())
    except FileNotFoundError:
        return None
    return Made(**kept["made"]), Measured(**kept["measured"])


def evaluate(task: Task) -> tuple[Made, Measured]:
    """Make the clip, and its reference if that is not there, and measure it; raises RunError."""
    if task.code != identity():
        raise RunError("a worker has another movdc than the one that sends it work; install the same on both")
    if (done := finished(task)) is not None:
        return done
    with _ONE_AT_A_TIME:
        reference = None if task.reference.key == task.clip.key else _frames(task.reference, task.folder)[0]
        frames, made = _frames(task.clip, task.folder)
    measured = _measure(task, frames, reference)
    _write(task.path, json.dumps({"made": asdict(made), "measured": asdict(measured)}).encode())
    return made, measured


def _measure(task: Task, frames: Frames, reference: Frames | None) -> Measured:
    clip = task.clip
    named = read_caption(clip.prompt) if frames.shape == (FRAMES, PIXELS, PIXELS, 3) else None
    seen = None if named is None else judge(frames)
    shown = {one: None if seen is None else getattr(seen, one) == getattr(named, one) for one in ATTRIBUTES}
    if reference is not None and reference.shape != frames.shape:
        raise RunError(
            f"{clip.bundle}: its clips are {list(frames.shape)}, those of the reference {list(reference.shape)}; "
            "compare bundles of one video size"
        )
    fps = Bundle.read(clip.bundle).manifest.video.fps
    return Measured(
        psnr_db=None if reference is None else metrics.psnr_db(frames, reference),
        ssim=None if reference is None else metrics.ssim(frames, reference),
        temporal_flickering=metrics.temporal_flickering(frames),
        dynamics=metrics.dynamics(frames, fps),
        frames_sha256=hashlib.sha256(frames.tobytes()).hexdigest(),
        **shown,
        **({} if task.weights is None else _vbench(clip, frames, fps, task.weights.folder)),
    )


def _vbench(clip: Clip, frames: Frames, fps: int, folder: Path) -> dict[str, Any]:
    from movdc.evaluate.vbench_networks import scores  # torch, which nothing else here needs

    if len(frames) < LEAST_FRAMES:
        raise RunError(f"{clip.bundle}: its clips have {len(frames)} frames; --metric-weights needs {LEAST_FRAMES}")
    return scores(frames, fps, folder)


def _frames(clip: Clip, folder: Path) -> tuple[Frames, Made]:
    """The clip's frames [N, H, W, 3], made if they are not there or damaged."""
    path = folder / "clips" / f"{clip.key}.npz"
    try:
        with np.load(path, allow_pickle=False) as kept:
            return kept["frames"], Made(**json.loads(kept["made"].item()))
    except (FileNotFoundError, zipfile.BadZipFile, KeyError, ValueError, EOFError):
        frames, made = _make(clip)
    data = io.BytesIO()
    np.savez_compressed(data, frames=frames, made=np.array(json.dumps(asdict(made))))
    _write(path, data.getvalue())
    return frames, made


def _make(clip: Clip) -> tuple[Frames, Made]:
    generator, executor = _opened(clip.bundle, clip.bundle_sha256)
    before = {stage: len(some) for stage, some in executor.reports.items()}
    start_s = time.perf_counter()
    result = generator.generate(clip.prompt, seed=clip.seed)
    seconds = time.perf_counter() - start_s
    reports = [one for stage, some in executor.reports.items() for one in some[before.get(stage, 0) :]]
    executor.release()
    return result.frames, Made(
        evaluations=result.trajectory.evaluations,
        leap_step=result.trajectory.leap_step,
        seconds=seconds,
        denoiser_s=result.seconds["denoiser"],
        vae_s=result.seconds["vae"],
        read_bytes=sum(one.read_bytes for one in reports),
        peak_bytes=max(one.peak_bytes for one in reports),
    )


@cache
def _opened(bundle: Path, sha256: str) -> tuple[Generator, AnyExecutor]:
    """What makes clips with a bundle; it holds nothing between them."""
    read = Bundle.read(bundle)
    if read.sha256 != sha256:
        raise RunError(f"{bundle}: is another bundle than when the evaluation began; start it again")
    executor = open_executor(read, packed_cache=user_cache_path("movdc") / "packed")
    return Generator(read, executor), executor


atexit.register(_opened.cache_clear)  # the engine's library complains of what is left when it is unloaded


def _digest(*parts: object) -> str:
    return hashlib.sha256(json.dumps([str(part) for part in parts]).encode()).hexdigest()


def _write(path: Path, data: bytes) -> None:
    """A file that is there whole or not at all, whoever else writes the same."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, partial = tempfile.mkstemp(dir=path.parent, prefix=".partial-")
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
    os.replace(partial, path)
