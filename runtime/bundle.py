"""The bundle format: the dataclasses of bundle.json, and the reader that trusts no file (docs/bundle.md)."""

from __future__ import annotations

import hashlib
import json
import os
import stat
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import AfterValidator, Field, ValidationError, model_validator

from movdc.runtime.errors import BundleError
from movdc.runtime.expected import Expected
from movdc.runtime.record import Record

FORMAT_VERSION = 1
MANIFEST = "bundle.json"
SEAL = "bundle.sha256"
REPORT = "report.html"  # for people
FORWARD = "forward"  # the method of a program that has one

DType = Literal["f32", "f16", "bf16", "i64", "i32", "i8", "u8", "bool"]
ITEM_BYTES: dict[DType, int] = {"f32": 4, "f16": 2, "bf16": 2, "i64": 8, "i32": 4, "i8": 1, "u8": 1, "bool": 1}
NUMPY_DTYPES: dict[str, np.dtype[Any]] = {
    "f32": np.dtype(np.float32),
    "f16": np.dtype(np.float16),
    "i64": np.dtype(np.int64),
    "i32": np.dtype(np.int32),
    "i8": np.dtype(np.int8),
    "u8": np.dtype(np.uint8),
    "bool": np.dtype(np.bool_),
}


def _inside(path: str) -> str:
    parts = PurePosixPath(path).parts
    if not parts or path.startswith("/") or "\\" in path or ".." in parts or "/".join(parts) != path:
        raise ValueError(f"{path!r} is not a plain path inside the bundle")
    return path


BundlePath = Annotated[str, AfterValidator(_inside)]


class TensorSpec(Record):
    """One named tensor between stages or partitions."""

    name: str
    dtype: DType
    shape: tuple[int, ...]

    @property
    def size_bytes(self) -> int:
        """Bytes of the contiguous row-major tensor."""
        return int(np.prod(self.shape, dtype=np.int64)) * ITEM_BYTES[self.dtype]


class File(Record):
    """A file of the bundle, checked before anything parses it."""

    path: BundlePath
    size_bytes: int = Field(ge=0)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


class Constant(Record):
    """A tensor inside a weights file: bytes [offset_bytes, offset_bytes + size_bytes) of that file."""

    key: str  # the name the program asks for
    offset_bytes: int = Field(ge=0)
    size_bytes: int = Field(ge=0)
    dtype: DType
    shape: tuple[int, ...]


class WeightsFile(Record):
    """A content-addressed file of tensors, shared by every partition that names it."""

    path: BundlePath
    constants: tuple[Constant, ...]


class Partition(Record):
    """A piece of a stage that is loaded, run and freed as one."""

    name: str = Field(pattern=r"^[\w.-]+$")  # STAGE.VARIANT.INDEX
    program: BundlePath
    method: str = Field(pattern=r"^\w+$")  # of the program
    weights: tuple[BundlePath, ...]  # WeightsFile.path of each file that it reads constants from
    inputs: tuple[TensorSpec, ...]  # in the order of the program's arguments
    outputs: tuple[TensorSpec, ...]
    weight_bytes: int  # as stored
    held_bytes: int  # as the target holds them once loaded
    load_bytes: int  # while they are loaded for the first time, which packs them
    program_bytes: int  # what the program takes beside them, as long as its stage runs
    workspace_bytes: int  # of its kernels; the programs of a variant share one workspace, of the largest size
    planned_bytes: int  # of values on the way; shared in the same way
    flops: int  # 2 x multiply-adds of matrix products and convolutions
    int8_flops: int = 0  # those with int8 weights
    # For people: how many operators the target's own kernels run, and which run elsewhere, with how many of each.
    delegated_nodes: int = 0
    fallback: dict[str, int] = {}


class Residency(Record):
    """One level of memory, and how a variant runs within it.

    Partitions of `pinned` stay loaded from run to run. The others are *transient*: each is loaded, run once and freed,
    and at most 1 + `prefetch` of them are loaded or loading at a time; one of `waits` is loaded only when no other
    transient one is there. Loads happen in the order of the runs and go on with the first partitions of the next run.
    """

    needs_bytes: int  # the most bytes held at any moment of any interleaving of the two lanes
    prefetch: int = Field(ge=0)
    pinned: tuple[str, ...] = ()
    waits: tuple[str, ...] = ()


class Interval(Record):
    """One row of the certificate: what is held until a partition has loaded, or from then until it has run."""

    partition: str
    phase: Literal["load", "run"]
    weights_bytes: int  # of the partitions that are loaded, as held
    loading_bytes: int  # of the one that may be loading meanwhile, and the slab that files are read through
    activation_bytes: int  # tensors of the stage and between partitions
    lasting_bytes: int  # programs, their workspace and what they plan: as long as the variant runs

    @property
    def total_bytes(self) -> int:
        """Everything held."""
        return self.weights_bytes + self.loading_bytes + self.activation_bytes + self.lasting_bytes


class Variant(Record):
    """One way to run a stage; a tensor lives from the run that makes it to the last run that reads it."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    order: tuple[str, ...]  # the partitions, as they run
    residency: tuple[Residency, ...] = Field(min_length=1)  # from the least memory to the most; the first pins nothing
    first_needs_bytes: int  # as Residency.needs_bytes, for a first run by the first level
    certificate: tuple[Interval, ...]  # of the last row of residency that fits the budget
    peak_bytes: int  # its needs_bytes


class Stage(Record):
    """One model of the pipeline."""

    name: str
    cadence: Literal["once", "per_step", "per_chunk"]
    variants: dict[str, Variant]


class LeapRule(Record):
    """When a unit goes from the time of one step straight to t = 0, by that step's drift (runtime/sampler.py)."""

    mode: Literal["fixed", "dynamic"]
    # fixed: the step that leaps, from 0 in each unit; None is half of the unit's steps, rounded down, whatever their
    # number is in the run. In a unit that it is the last step of, or that has no such step, nothing is left out.
    step: int | None = Field(default=None, ge=0)
    # dynamic: the first step whose drift counts as compared with the one before; None is half, rounded up.
    min_steps: int | None = Field(default=None, ge=1)
    # dynamic: a cosine is better if it exceeds the best by more than this
    tol: float = Field(default=1e-4, ge=0, allow_inf_nan=False)
    patience: int = Field(default=3, ge=1)  # dynamic: the step with this many cosines in a row not better leaps
    # dynamic: the cosine over all elements, or the mean of those of the rows of the first channel of the first frame
    metric: Literal["all", "first_frame_rows"] = "all"
    # dynamic: the best cosine before the first that counts; None lets any first one be better
    best: float | None = Field(default=None, allow_inf_nan=False)
    # dynamic: for each step but the first, the least cosine of any prompt that the model was measured on; a prompt that
    # falls below at any step so far does not leap, nor does a run of another number of steps. Empty refuses nothing.
    floor: tuple[Annotated[float, Field(ge=-1, le=1)], ...] = ()

    def fixed_step(self, steps: int) -> int:
        """The step that leaps in a unit of so many steps, by a fixed rule."""
        return steps // 2 if self.step is None else self.step

    def first_compared(self, steps: int) -> int:
        """The first step that counts in a unit of so many steps, by a dynamic rule."""
        return (steps + 1) // 2 if self.min_steps is None else self.min_steps


class Sampler(Record):
    """How noise becomes latents, by guided evaluations of the denoiser from t = 1 to t = 0."""

    solver: Literal["euler", "heun", "ddim", "unipc", "dpm"]  # only euler is run
    # rectified_flow: v = data - noise; flow_match: v = noise - data; only these two are run
    prediction: Literal["rectified_flow", "flow_match", "v_prediction", "epsilon"]
    # The denoising steps of each unit; a unit goes from its own t = 1 to 0 and leaps on its own. Open-Sora has one,
    # Pyramidal Flow one for each (temporal unit, stage).
    units: tuple[Annotated[int, Field(ge=1)], ...] = Field(min_length=1)
    merged_steps: int = Field(default=0, ge=0)  # the first steps of each unit that run the variant "merged"
    leap: LeapRule | None = None
    shift: float = Field(gt=0)  # r of t' = r t / (1 + (r - 1) t)
    rounded: bool  # timesteps rounded to integers before the shift
    guidance: float
    latent: tuple[int, int, int, int, int]  # [1, C, T, H, W]


class Chunk(Record):
    """A run of latent frames that the temporal decoder turns into frames, on its own."""

    variant: str
    latent_frames: int
    frames: int


class Decode(Record):
    """How latents become frames: chunks through vae_temporal, then micro-batches of frames through vae_spatial."""

    chunks: tuple[Chunk, ...]
    micro_batch_frames: int


class Prompt(Record):
    """How text becomes tokens."""

    tokenizer: BundlePath  # a `tokenizers` JSON file
    max_tokens: int
    # Shorter lengths, the shortest first. A prompt of at most so many tokens is padded to that length, and runs the
    # variants of text_encoder and denoiser for it (`variant`), whose weights are the same.
    buckets: tuple[int, ...] = ()
    pad_id: int
    aesthetic: float | None  # the score appended to a prompt that names none; None appends nothing
    cleaning: Literal["open-sora"]

    @property
    def lengths(self) -> tuple[int, ...]:
        """The lengths that prompts are padded to; max_tokens first."""
        return self.max_tokens, *self.buckets

    def length_for(self, tokens: int) -> int:
        """The shortest length that holds so many tokens, max_tokens if none does."""
        return min((length for length in self.lengths if tokens <= length), default=self.max_tokens)

    def variant(self, name: str, length: int) -> str:
        """What the variant `name` ("plain", "merged") is called for prompts of a length: plain-64."""
        return name if length == self.max_tokens else f"{name}-{length}"


class Video(Record):
    """What comes out."""

    frames: int
    height: int
    width: int
    fps: int


class LayerError(Record):
    """What quantizing one tensor lost, to be read by people: nothing at run time depends on it."""

    stage: str
    key: str  # the tensor's name in the checkpoint
    sqnr_db: float = Field(allow_inf_nan=False)  # 10 log10(sum w^2 / sum (w - restored w)^2)


class Manifest(Record):
    """bundle.json."""

    format_version: Literal[1]
    family: str
    target: str
    device: str
    budget_bytes: int
    peak_bytes: int
    slab_bytes: int = Field(ge=4096)  # the buffer that the engine reads files through
    video: Video
    prompt: Prompt
    sampler: Sampler
    decode: Decode
    stages: tuple[Stage, ...]
    partitions: tuple[Partition, ...]
    weights: tuple[WeightsFile, ...]
    files: tuple[File, ...]
    spec: dict[str, Any]  # the resolved YAML, for people
    quantization: tuple[LayerError, ...] = ()  # of each quantized tensor, the worst first
    expected: Expected = Expected()  # what partitions, stages and the sampler make of inputs that follow from a rule
    pipeline: str  # the passes that ran, as they parse back
    versions: dict[str, str]

    @model_validator(mode="after")
    def _names_exist(self) -> Manifest:
        """Every name leads somewhere, so that no reader has to ask."""
        files, weights = {file.path for file in self.files}, {file.path for file in self.weights}
        partitions = {partition.name for partition in self.partitions}
        wanted = {self.prompt.tokenizer, *weights, *(partition.program for partition in self.partitions)}
        steps = {name for stage in self.stages for variant in stage.variants.values() for name in variant.order}
        unknown = (wanted - files) | ({path for one in self.partitions for path in one.weights} - weights)
        unknown |= steps - partitions
        if unknown:
            raise ValueError(f"{min(unknown)} is named and not described")
        return self


class Bundle:
    """A bundle directory whose manifest has been checked against its seal."""

    def __init__(self, root: Path, manifest: Manifest, sha256: str = "") -> None:
        self.root = root
        self.manifest = manifest
        self.sha256 = sha256  # of bundle.json, which has that of every other file

    @classmethod
    def read(cls, root: Path) -> Bundle:
        """Read the manifest; raises BundleError naming the file that is missing, damaged or foreign."""
        if not root.is_dir():
            raise BundleError(f"{root}: no such bundle; make one with `movdc compile SPEC -o {root}`")
        seal = _read_plain(root / SEAL).decode("ascii", "replace")
        text = _read_plain(root / MANIFEST)
        if seal != seal_of(text):
            raise BundleError(f"{root / MANIFEST}: does not match {SEAL}; compile the bundle again")
        try:
            version = json.loads(text)["format_version"]
            if version != FORMAT_VERSION:
                raise BundleError(
                    f"{root / MANIFEST}: format_version {version}, this movdc reads {FORMAT_VERSION}; compile again"
                )
            return cls(root, Manifest.model_validate_json(text), hashlib.sha256(text).hexdigest())
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"])) or "it"
            raise BundleError(
                f"{root / MANIFEST}: not a manifest of this movdc: {where}: {first['msg']}; compile the bundle again"
            ) from error
        except (ValueError, KeyError, TypeError) as error:
            raise BundleError(f"{root / MANIFEST}: not a movdc manifest ({error}); compile the bundle again") from error

    @cached_property
    def partitions(self) -> dict[str, Partition]:
        """Partitions by name."""
        return {partition.name: partition for partition in self.manifest.partitions}

    @cached_property
    def stages(self) -> dict[str, Stage]:
        """Stages by name."""
        return {stage.name: stage for stage in self.manifest.stages}


def seal_of(manifest_text: bytes) -> str:
    """The whole content of bundle.sha256, in the form that `sha256sum -c` checks."""
    return f"{hashlib.sha256(manifest_text).hexdigest()}  {MANIFEST}\n"


def _read_plain(path: Path) -> bytes:
    """Read a file that must be a plain file and not a link."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)  # a pipe would block
    except FileNotFoundError:
        raise BundleError(f"{path}: missing; compile the bundle again") from None
    except OSError as error:
        raise BundleError(f"{path}: cannot be opened as a plain file ({error.strerror})") from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise BundleError(f"{path}: not a plain file")
    with os.fdopen(descriptor, "rb") as file:
        return file.read()
