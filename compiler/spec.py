"""PipelineSpec: the YAML a user writes, and errors that point at the line that is wrong."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from movdc.compiler.errors import MovdcError
from movdc.compiler.units import parse_bytes

Bytes = Annotated[int, BeforeValidator(parse_bytes)]
Option = bool | int | float | str | list[str] | None
Path_ = tuple[str, ...]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class ModelSpec(_Section):
    """Where a model's weights are: a folder relative to the YAML, a hub id, or random:SEED with an inline config."""

    weights: str
    config: dict[str, Any] | None = None
    revision: str | None = None  # of a hub id: a commit, a tag or a branch; None is the newest


class TextEncoderSpec(ModelSpec):
    """The text encoder, and how many tokens a prompt may have."""

    max_tokens: int = Field(ge=1)
    # Shorter lengths that are compiled too: a prompt runs at the shortest that holds it, with the same result.
    buckets: list[Annotated[int, Field(ge=1)]] = []
    tokenizer: str | None = None  # a folder relative to the YAML; None is where the weights are


class VideoSpec(_Section):
    """The video to make, in frames, pixels and frames per second."""

    frames: int = Field(ge=1)
    height: int = Field(ge=16)
    width: int = Field(ge=16)
    fps: int = Field(ge=1)


class SamplerSpec(_Section):
    """The denoising loop."""

    steps: int = Field(default=30, ge=1)
    guidance: float = Field(default=7.0, allow_inf_nan=False)
    rounded: bool = False  # the phone app of the paper rounds timesteps to integers; Open-Sora 1.2 does not


class PromptSpec(_Section):
    """What is done to a prompt before it is tokenized."""

    aesthetic: float | None = 6.5


class PipelineSpec(_Section):
    """A whole pipeline, as written in the YAML."""

    movdc: Literal[1]
    family: str
    text_encoder: TextEncoderSpec
    denoiser: ModelSpec
    vae: ModelSpec
    video: VideoSpec
    sampler: SamplerSpec = SamplerSpec()
    prompt: PromptSpec = PromptSpec()
    passes: dict[str, dict[str, Option]] = {}  # pass name -> options, on top of the default pipeline
    target: str = "executorch-xnnpack"
    device: str = "host"
    memory_budget: Bytes | None = None


class SpecFile:
    """A spec with the file it came from, so that later errors can name the line too."""

    def __init__(self, path: Path, spec: PipelineSpec, lines: dict[Path_, int]) -> None:
        self.path = path
        self.spec = spec
        self._lines = lines

    def with_spec(self, spec: PipelineSpec) -> SpecFile:
        """Another spec that was made of this file's."""
        return SpecFile(self.path, spec, self._lines)

    def error(self, key: str, message: str) -> MovdcError:
        """A MovdcError that names the file and the line of a dotted key."""
        return MovdcError(f"{self.path}:{_line(self._lines, tuple(key.split('.')))}: {key}: {message}")


def load_spec(path: Path) -> SpecFile:
    """Read a YAML spec; raises MovdcError with file, line, key and what is allowed."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise MovdcError(f"{path}: cannot be read ({error.strerror}); give the path of a pipeline YAML") from None
    except UnicodeDecodeError:
        raise MovdcError(f"{path}: is not UTF-8 text; give the path of a pipeline YAML") from None
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        data = yaml.safe_load(text)
        keys = list(_walk(root, ())) if isinstance(root, yaml.MappingNode) else None
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise MovdcError(f"{path}:{line}: is not YAML ({error.problem}); mind the indentation and the colons") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # control characters, impossible dates, loops
        reason = str(error).splitlines()[0]
        raise MovdcError(f"{path}:1: is not YAML ({reason}); quote what is meant as text") from None
    if keys is None:
        raise MovdcError(f"{path}:1: holds no keys; start with `movdc: 1` and see examples/tiny.yaml")
    lines: dict[Path_, int] = {}
    for key, line in keys:
        if key in lines:
            raise MovdcError(f"{path}:{line}: {'.'.join(key)}: is given twice (first on line {lines[key]}); keep one")
        lines[key] = line
    try:
        return SpecFile(path, PipelineSpec.model_validate(data), lines)
    except ValidationError as error:
        raise MovdcError(_explain(path, error, lines)) from None


def _walk(node: yaml.MappingNode, prefix: Path_) -> Iterator[tuple[Path_, int]]:
    for key, value in node.value:
        path = (*prefix, str(key.value))
        yield path, key.start_mark.line + 1
        if isinstance(value, yaml.MappingNode):
            yield from _walk(value, path)


def _line(lines: dict[Path_, int], key: Path_) -> int:
    """The line of a key, or of the nearest section around it."""
    while key and key not in lines:
        key = key[:-1]
    return lines.get(key, 1)


def _explain(path: Path, error: ValidationError, lines: dict[Path_, int]) -> str:
    """One sentence for the first thing that is wrong."""
    # A misspelt key is an unknown one and a missing one: the unknown one says what to do.
    first = min(error.errors(), key=lambda one: one["type"] != "extra_forbidden")
    key = tuple(
        str(part) for part in first["loc"] if str(part) in {p for k in lines for p in k} or first["type"] == "missing"
    )
    dotted = ".".join(key)
    where = f"{path}:{_line(lines, key)}: {dotted}"
    if first["type"] == "extra_forbidden":
        allowed = _fields(key[:-1])
        near = difflib.get_close_matches(key[-1], allowed, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}? " if near else ""
        return f"{where}: unknown key; {hint}Allowed here: {', '.join(allowed)}"
    if first["type"] == "missing":
        return f"{where}: is required but missing; add it (see examples/tiny.yaml)"
    message = first["msg"].removeprefix("Value error, ").removeprefix("Input ")
    got = "" if first["type"] == "value_error" else f", got {first['input']!r}"
    return f"{where}: {message}{got}"


def _fields(section: Path_) -> list[str]:
    """The keys allowed in a section."""
    model: type[BaseModel] = PipelineSpec
    for part in section:
        annotation = model.model_fields[part].annotation
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            return []
        model = annotation
    return list(model.model_fields)
