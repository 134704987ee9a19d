"""Device profiles, and the machine that partitions are planned for."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from movdc.compiler.units import parse_bytes
from movdc.runtime.bundle import DType

SLAB_BYTES = 256 * 1024  # a read of this size costs no more a byte than a larger one (docs/loading.md)

Bytes = Annotated[int, BeforeValidator(parse_bytes)]


class DeviceProfile(BaseModel):
    """One entry of devices.toml."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    usable_memory: Bytes
    load_rate: Bytes  # per second
    compute_flops_per_s: float = Field(gt=0)
    load_overhead_s: float = Field(ge=0)  # for each partition, whatever its size
    source: str


def read_profiles(path: Path) -> dict[str, DeviceProfile]:
    """The profiles of a devices.toml by name."""
    return {name: DeviceProfile.model_validate(entry) for name, entry in tomllib.loads(path.read_text()).items()}


@dataclass(frozen=True)
class Machine:
    """What partitions are planned for: the memory of a run, the device's rates, and how the target holds weights."""

    budget_bytes: int
    load_bytes_per_s: float
    compute_flops_per_s: float
    load_overhead_s: float
    load_copies: float  # bytes held while weights are loaded for the first time, per byte of weights
    value_copies: float = 1.0  # bytes that a running program takes, per byte of the values within it
    node_bytes: int = 0  # that a program takes for each of its nodes, as long as its stage runs
    slab_bytes: int = 0  # what the engine reads files through, held all the time
    held_as: Mapping[DType, DType] = field(default_factory=dict)  # types of weights that it holds as another one
    reserves: tuple[tuple[str, int], ...] = ()  # stages, and the bytes that estimates have missed there

    def planning(self, stage: str) -> Machine:
        """The machine with what a plan of a stage may fill by its estimates for a budget."""
        return replace(self, budget_bytes=self.budget_bytes - dict(self.reserves).get(stage, 0), reserves=())

    def reserving(self, stage: str, more_bytes: int) -> Machine:
        """The machine with so much more in reserve for a stage."""
        reserves = dict(self.reserves)
        reserves[stage] = reserves.get(stage, 0) + more_bytes
        return replace(self, reserves=tuple(reserves.items()))

    def load_s(self, weight_bytes: float) -> float:
        """Predicted seconds to load a partition."""
        return self.load_overhead_s + weight_bytes / self.load_bytes_per_s

    def run_s(self, flops: float) -> float:
        """Predicted seconds to run a partition."""
        return flops / self.compute_flops_per_s
