"""Expected outputs: inputs that any runtime can make, and in a few numbers what is right to make of them.

Every number follows from SplitMix64 (Steele, Lea and Flood, OOPSLA 2014), counted and not iterated: item i of a tensor
has bits(i) = mix(seed + (i + 1) * 0x9E3779B97F4A7C15), all modulo 2^64, with its seed the first 8 bytes (little-endian)
of the SHA-256 of "OWNER TENSOR". docs/bundle.md has the whole of it.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from movdc.runtime.record import Record

Array = np.ndarray[Any, Any]
PROJECTIONS = 16
MAX_DB = 150.0  # fp32 itself resolves 144 dB
_STEP_ITEMS = 1 << 18  # that are worked on at a time
_SIGNS = "signs of "  # before the owner, for the seed of the projections
_DIGITS = 9  # of a recorded number: what fp32 has


class Recipe(Record):
    """How to make an input: an item of `uniform` or `integers` is from [low, high); `prefix` is 1 in the first `high`
    places of the last axis, and 0 in the others."""

    name: str
    rule: Literal["uniform", "integers", "prefix"]
    low: float = 0.0
    high: float


class Digest(Record):
    """A tensor in a few numbers."""

    name: str
    shape: tuple[int, ...]
    l2: float  # its Euclidean length
    peak: float  # its largest magnitude
    projections: tuple[float, ...]  # sums of its items, each with a sign that follows from a rule


class Check(Record):
    """What a partition, or a whole variant of a stage, makes of its inputs."""

    name: str  # of the partition, or STAGE.VARIANT
    inputs: tuple[Recipe, ...]
    outputs: tuple[Digest, ...]
    min_sqnr_db: float  # that its passes and its target are held to


class SamplerCheck(Record):
    """What the sampler's plan makes of velocities that are known in closed form (runtime/replay.py)."""

    evaluations: int
    merged: int  # of them, by the variant `merged`
    latents: Digest


class Expected(Record):
    """Everything that a runtime can check itself by; what is not recorded is not there."""

    partitions: tuple[Check, ...] = ()
    stages: tuple[Check, ...] = ()
    sampler: SamplerCheck | None = None


@dataclass(frozen=True)
class Error:
    """How far a tensor is from the right one."""

    tensor: str
    relative_l2: float  # |ours - right| / |right|, infinite if ours is not finite or has another shape
    max_abs: float | None  # None where only a digest of the right one is known
    psnr_db: float  # of the largest magnitude of the right one

    @property
    def sqnr_db(self) -> float:
        """Signal to error in decibels, at most MAX_DB."""
        return _db(1 / self.relative_l2) if self.relative_l2 else MAX_DB


def make_input(recipe: Recipe, owner: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
    """The input of a partition or stage (the owner)."""
    if recipe.rule == "prefix":
        row = np.arange(shape[-1]) < recipe.high
        return np.broadcast_to(row, shape).astype(dtype)
    parts = []
    for bits in _bits(f"{owner} {recipe.name}", math.prod(shape)):
        # The upper 24 bits are a fraction that fp32 has; with the range it is computed in fp64 and rounded once.
        span = recipe.low + (recipe.high - recipe.low) * ((bits >> np.uint64(40)).astype(np.float64) / 2**24)
        parts.append((np.floor(span) if recipe.rule == "integers" else span).astype(dtype))
    return np.concatenate(parts).reshape(shape) if parts else np.zeros(shape, dtype)


def digest_of(array: Array, name: str, owner: str) -> Digest:
    """A tensor's digest, computed in fp64."""
    return Digest(
        name=name,
        shape=array.shape,
        l2=_rounded(float(np.linalg.norm(array.astype(np.float64)))),
        peak=_rounded(float(np.max(np.abs(array.astype(np.float64)), initial=0.0))),
        projections=tuple(map(_rounded, _projections(array, f"{_SIGNS}{owner} {name}"))),
    )


def compare_with_digest(array: Array, right: Digest, owner: str) -> Error:
    """How far a tensor is from the one of a digest, by its projections.

    Each is a sum of the differences with random signs, whose square is on average that of the distance; of 16 the mean
    is within 1.5 dB of it two times out of three.
    """
    if array.shape != right.shape or not np.isfinite(array.astype(np.float64)).all():
        return Error(right.name, math.inf, None, -math.inf)
    ours = np.array(_projections(array, f"{_SIGNS}{owner} {right.name}"))
    distance = float(np.sqrt(np.mean((ours - np.array(right.projections)) ** 2)))
    return _error(right.name, distance, None, right.l2, right.peak, array.size)


def compare(array: Array, right: Array, name: str) -> Error:
    """How far a tensor is from the right one."""
    if array.shape != right.shape or not np.isfinite(array.astype(np.float64)).all():
        return Error(name, math.inf, math.inf, -math.inf)
    difference = array.astype(np.float64) - right.astype(np.float64)
    peak = float(np.max(np.abs(right.astype(np.float64)), initial=0.0))
    worst = float(np.max(np.abs(difference), initial=0.0))
    length = float(np.linalg.norm(right.astype(np.float64)))
    return _error(name, float(np.linalg.norm(difference)), worst, length, peak, array.size)


def worst_of(errors: Mapping[str, Error]) -> Error:
    """The error of the output that is furthest from right."""
    return max(errors.values(), key=lambda one: one.relative_l2)


def _error(name: str, distance: float, worst: float | None, length: float, peak: float, items: int) -> Error:
    if distance == 0:
        return Error(name, 0.0, worst, MAX_DB)
    if length == 0:
        return Error(name, math.inf, worst, -math.inf)
    return Error(name, distance / length, worst, _db(peak / (distance / math.sqrt(items))))


def _projections(array: Array, seed: str) -> list[float]:
    """Sums of all items, each as it is or negated: bit j of item i says which, for projection j."""
    flat = array.reshape(-1)
    sums = np.zeros(PROJECTIONS)
    begin = 0
    for bits in _bits(seed, flat.size):
        part = flat[begin : begin + len(bits)].astype(np.float64)
        begin += len(bits)
        for index in range(PROJECTIONS):
            negative = ((bits >> np.uint64(index)) & np.uint64(1)).astype(bool)
            sums[index] += part.sum() - 2 * part[negative].sum()
    return [float(one) for one in sums]


def _bits(seed: str, items: int) -> Iterator[np.ndarray[Any, np.dtype[np.uint64]]]:
    """64 bits for each item, some items at a time."""
    start = int.from_bytes(hashlib.sha256(seed.encode()).digest()[:8], "little")
    for begin in range(0, items, _STEP_ITEMS):
        yield split_mix(start, begin, min(begin + _STEP_ITEMS, items))


def split_mix(seed: int, begin: int, end: int) -> np.ndarray[Any, np.dtype[np.uint64]]:
    """Numbers `begin` to `end`, from 0, of the generator SplitMix64 with a seed below 2^64."""
    counts = np.arange(begin + 1, end + 1, dtype=np.uint64)
    bits = np.uint64(seed) + counts * np.uint64(0x9E3779B97F4A7C15)  # modulo 2^64, as arrays of numpy are
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return bits ^ (bits >> np.uint64(31))


def _db(ratio: float) -> float:
    return min(20 * math.log10(ratio), MAX_DB) if ratio > 0 else -math.inf


def _rounded(number: float) -> float:
    return float(f"{number:.{_DIGITS}g}")
