"""What is compared: bundles as they are, and settings of a pipeline that are compiled; the YAML of a sweep."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from movdc.compiler.errors import MovdcError
from movdc.compiler.spec import Option, PipelineSpec

LeapMode = Literal["none", "fixed", "dynamic", "reference"]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Setting(_Section):
    """What a pipeline gives up; nothing by default."""

    steps: Annotated[int, Field(ge=1)] | None = None  # denoising steps; None is as the pipeline has it
    leap: LeapMode = "none"
    merge_steps: int = Field(default=0, ge=0)  # the first steps whose attentions see pairs of frames as one
    int8: tuple[str, ...] = Field(default=(), strict=False)  # stages whose weights are in int8

    def __str__(self) -> str:
        parts = (
            f"int8 {'+'.join(self.int8)}" if self.int8 else "",
            f"merge {self.merge_steps}" if self.merge_steps else "",
            f"leap {self.leap}" if self.leap != "none" else "",
            f"{self.steps} steps" if self.steps else "",
        )
        return ", ".join(filter(None, parts)) or "full"

    def applied(self, spec: PipelineSpec) -> PipelineSpec:
        """The pipeline with this setting in place of what it gives up itself; other options of the passes stay."""
        own = {"merge-tokens": self.merge_steps > 0, "leap": self.leap != "none", "quantize-int8": bool(self.int8)}
        passes = {name: dict(options) for name, options in spec.passes.items() if own.get(name, True)}
        if passes.get("leap", {}).get("mode", "fixed") != self.leap:  # each mode has options of its own
            passes.pop("leap", None)
        named: dict[str, dict[str, Option]] = {
            "merge-tokens": {"steps": self.merge_steps},
            "leap": {"mode": self.leap},
            "quantize-int8": {"stages": list(self.int8)},
        }
        passes |= {name: passes.get(name, {}) | options for name, options in named.items() if own[name]}
        sampler = spec.sampler if self.steps is None else spec.sampler.model_copy(update={"steps": self.steps})
        return spec.model_copy(update={"passes": passes, "sampler": sampler})


class Grid(_Section):
    """Every combination of these."""

    steps: list[int | None] = [None]
    leap: list[LeapMode] = ["none"]
    merge_steps: list[int] = [0]
    int8: list[list[str]] = [[]]

    def settings(self) -> list[Setting]:
        """The combinations, the last key changing fastest."""
        return [
            Setting(steps=steps, leap=leap, merge_steps=merge_steps, int8=tuple(int8))
            for steps, leap, merge_steps, int8 in product(self.steps, self.leap, self.merge_steps, self.int8)
        ]


class Sweep(_Section):
    """A sweep, as written in its YAML; paths are relative to it."""

    spec: str
    prompts: str  # a file with one prompt a line
    seeds: int = Field(default=1, ge=1)  # 0, 1, ... of each prompt
    settings: dict[str, Setting] = {"full": Setting()}  # the first is what all others are compared with
    grid: Grid | None = None

    @model_validator(mode="after")
    def _has_settings(self) -> Sweep:
        if not self.settings:
            raise ValueError("settings has none; give one, such as `full: {}`")
        return self

    def named_settings(self) -> dict[str, Setting]:
        """Those with a name, and those of the grid that are none of them, named by what they are."""
        named = dict(self.settings)
        for one in self.grid.settings() if self.grid else []:
            if one not in named.values():
                named[str(one)] = one
        return named


def load_sweep(path: Path) -> Sweep:
    """Read a sweep's YAML; raises MovdcError naming the file, the key and what is allowed."""
    try:
        data: Any = yaml.safe_load(path.read_text(encoding="utf-8"))
        return Sweep.model_validate(data)
    except OSError as error:
        raise MovdcError(f"{path}: cannot be read ({error.strerror}); give the path of a sweep's YAML") from None
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        allowed = f"; the keys are {', '.join(Sweep.model_fields)}, of a setting {', '.join(Setting.model_fields)}"
        hint = allowed if first["type"] in ("extra_forbidden", "missing") else f", got {first['input']!r}"
        raise MovdcError(f"{path}: {key or 'the whole'}: {first['msg']}{hint}") from None
    except (yaml.YAMLError, ValueError) as error:
        raise MovdcError(f"{path}: is not YAML ({str(error).splitlines()[0]}); see docs/evaluate.md") from None


def load_prompts(path: Path) -> list[str]:
    """The prompts of a file, one a line; empty lines and those that start with # are none."""
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "no UTF-8 text"
        raise MovdcError(f"{path}: cannot be read ({reason}); give a text file with one prompt a line") from None
    prompts = [line for line in lines if line and not line.startswith("#")]
    if not prompts:
        raise MovdcError(f"{path}: has no prompts; write one a line")
    return prompts
