"""Device profiles, and the machine that partitions are planned for."""

from __future__ import annotations

import json
import math
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from importlib.resources import as_file, files
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from movdc.compiler.units import parse_bytes
from movdc.runtime.bundle import DType
from movdc.runtime.rates import Rates

SLAB_BYTES = 256 * 1024  # a read of this size costs no more a byte than a larger one (docs/loading.md)

_SIZES = ("usable_memory", "load_rate", "touch_rate", "free_rate")  # that are written with a unit

Bytes = Annotated[int, BeforeValidator(parse_bytes)]


class DeviceProfile(BaseModel):
    """One entry of devices.toml."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    usable_memory: Bytes
    load_rate: Bytes  # per second
    load_overhead_s: float = Field(ge=0)  # for each partition, whatever its size
    fp32_flops_per_s: float = Field(gt=0)
    fp16_flops_per_s: float = Field(gt=0)
    int8_flops_per_s: float = Field(gt=0)
    contention: float = Field(ge=0)  # how much longer a run takes while something loads: 0.1 is a tenth
    load_contention: float = Field(default=0, ge=0)  # and a load while something runs
    run_overhead_s: float = Field(default=0, ge=0)  # for each run of a partition, whatever it computes
    touch_rate: Bytes | None = None  # per second: a run on weights that were just loaded takes so much longer
    free_rate: Bytes | None = None  # per second, when weights go; without a rate neither takes time
    source: dict[str, str]  # where each of the numbers comes from

    @model_validator(mode="after")
    def _each_number_has_its_source(self) -> DeviceProfile:
        if self.source.keys() != self.numbers.keys():
            wrong = min(self.source.keys() ^ self.numbers.keys())
            raise ValueError(f"source has not exactly one entry for each number: {wrong}")
        return self

    @property
    def touch_bytes_per_s(self) -> float:
        """The rate, infinite where there is none."""
        return math.inf if self.touch_rate is None else self.touch_rate

    @property
    def free_bytes_per_s(self) -> float:
        """The rate, infinite where there is none."""
        return math.inf if self.free_rate is None else self.free_rate

    @property
    def numbers(self) -> dict[str, float]:
        """The figures that it gives, by their names."""
        given = self.model_fields_set - {"source"}
        return {name: getattr(self, name) for name in type(self).model_fields if name in given}


def read_profiles(path: Path) -> dict[str, DeviceProfile]:
    """The profiles of a devices.toml by name."""
    return {name: DeviceProfile.model_validate(entry) for name, entry in tomllib.loads(path.read_text()).items()}


def known_profiles() -> dict[str, DeviceProfile]:
    """Those of targets/devices.toml."""
    with as_file(files("movdc.targets") / "devices.toml") as path:
        return read_profiles(path)


def print_profile(name: str, profile: DeviceProfile) -> str:
    """An entry of devices.toml."""
    numbers: dict[str, object] = {**profile.numbers}
    numbers |= {key: _print_bytes(size) for key, size in profile.numbers.items() if key in _SIZES}
    lines = [f"[{name}]", *(f"{key} = {_toml(value)}" for key, value in numbers.items())]
    lines += ["", f"[{name}.source]", *(f"{key} = {_toml(text)}" for key, text in profile.source.items())]
    return "\n".join(lines)


def _print_bytes(size_bytes: float) -> str:
    for unit in ("B", "KB", "MB"):
        if size_bytes < 1000:
            return f"{size_bytes:.4g}{unit}"
        size_bytes /= 1000
    return f"{size_bytes:.4g}GB" if size_bytes < 1000 else f"{size_bytes:.0f}GB"


def _toml(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else json.dumps(value, ensure_ascii=False)


@dataclass(frozen=True)
class Machine:
    """What partitions are planned for: the memory of a run, the device's rates, and how the target holds weights."""

    budget_bytes: int
    load_bytes_per_s: float
    compute_flops_per_s: float  # of products in floating point
    load_overhead_s: float
    load_copies: float  # bytes held while weights are loaded for the first time, per byte of weights
    value_copies: float = 1.0  # bytes that a running program takes, per byte of the values within it
    node_bytes: int = 0  # that a program takes for each of its nodes, as long as its stage runs
    slab_bytes: int = 0  # what the engine reads files through, held all the time
    int8_flops_per_s: float | None = None  # of products with int8 weights; None is as the others
    contention: float = 0.0  # how much longer a run takes while something loads
    load_contention: float = 0.0  # and a load while something runs
    run_overhead_s: float = 0.0  # for each run of a partition
    touch_bytes_per_s: float = math.inf  # of weights that were just loaded, when they run
    free_bytes_per_s: float = math.inf  # of weights that go
    held_as: Mapping[DType, DType] = field(default_factory=dict)  # types of weights that it holds as another one
    reserves: tuple[tuple[str, int], ...] = ()  # stages, and the bytes that estimates have missed there

    def planning(self, stage: str) -> Machine:
        """The machine with what a plan of a stage may fill by its estimates for a budget."""
        return replace(self, budget_bytes=self.budget_bytes - dict(self.reserves).get(stage, 0), reserves=())

    def reserving(self, stage: str, least_bytes: int, more_bytes: int) -> Machine:
        """The machine with at least so much in reserve for a stage, and so much more than it had."""
        reserves = dict(self.reserves)
        reserves[stage] = max(least_bytes, reserves.get(stage, 0) + more_bytes)
        return replace(self, reserves=tuple(reserves.items()))

    @property
    def rates(self) -> Rates:
        """What the simulator goes by."""
        return Rates(
            load_bytes_per_s=self.load_bytes_per_s,
            compute_flops_per_s=self.compute_flops_per_s,
            int8_flops_per_s=self.int8_flops_per_s,
            load_overhead_s=self.load_overhead_s,
            run_overhead_s=self.run_overhead_s,
            contention=self.contention,
            load_contention=self.load_contention,
            touch_bytes_per_s=self.touch_bytes_per_s,
            free_bytes_per_s=self.free_bytes_per_s,
        )

    def load_s(self, weight_bytes: float) -> float:
        """Predicted seconds to load a partition."""
        return self.load_overhead_s + weight_bytes / self.load_bytes_per_s

    def run_s(self, flops: float, int8_flops: float = 0) -> float:
        """Predicted seconds to run a partition, some of whose FLOPs are products with int8 weights."""
        int8_s = int8_flops / (self.int8_flops_per_s or self.compute_flops_per_s)
        return (flops - int8_flops) / self.compute_flops_per_s + int8_s

    @property
    def lost_s(self) -> float:
        """Seconds that a run takes longer for each second of a load beside it."""
        return self.contention / (1 + self.contention)
