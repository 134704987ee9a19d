"""The checkpoints that a spec names: where each is, what its config says, and whether it has its model's tensors."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from movdc.compiler.hub import snapshot
from movdc.compiler.spec import ModelSpec, SpecFile
from movdc.compiler.weights import RandomSource, Source, WeightRef, open_checkpoint

Shapes = Mapping[str, tuple[int, ...]]
_WANTED = "config.json and *.safetensors, or pytorch_model.bin.index.json with its shards"


@dataclass(frozen=True)
class Checkpoint:
    """Where the weights of a section of the spec come from."""

    section: str
    folder: Path | None  # None of random weights
    commit: str | None = None  # of a repository of the hub
    licence: str | None = None


def checkpoint_of(spec_file: SpecFile, section: str) -> Checkpoint:
    """The folder relative to the YAML, or one that is fetched from the hub."""
    model: ModelSpec = getattr(spec_file.spec, section)
    folder = spec_file.path.parent / model.weights
    named_on_hub = model.weights.count("/") == 1 and not model.weights.startswith((".", "/"))
    if model.revision is not None and (folder.is_dir() or not named_on_hub):
        raise spec_file.error(f"{section}.revision", f"{model.weights} is no repository of the hub; leave it out")
    if model.weights.startswith("random:"):
        return Checkpoint(section, None)
    if folder.is_dir():
        return Checkpoint(section, folder)
    if not named_on_hub:
        raise spec_file.error(f"{section}.weights", f"no folder {folder}; give one that holds {_WANTED}")
    try:
        fetched = snapshot(model.weights, model.revision)
    except Exception as error:  # noqa: BLE001  # the hub client raises its transport's errors too
        at = f" at {model.revision}" if model.revision else ""
        raise spec_file.error(
            f"{section}.weights",
            f"no folder {folder}, and the hub did not give {model.weights!r}{at} ({type(error).__name__}); fetch its "
            f"{_WANTED} on a machine that can, and write that folder's path here",
        ) from None
    return Checkpoint(section, fetched.folder, fetched.commit, fetched.licence)


def folder_of(spec_file: SpecFile, section: str) -> Path:
    """The folder of a checkpoint that has one."""
    folder = checkpoint_of(spec_file, section).folder
    if folder is None:
        raise spec_file.error(f"{section}.weights", "random weights have no folder")
    return folder


def config_of(spec_file: SpecFile, section: str) -> dict[str, Any]:
    """The model's config: inline in the spec, or the checkpoint's config.json."""
    model: ModelSpec = getattr(spec_file.spec, section)
    if model.config is not None:
        return model.config
    folder = checkpoint_of(spec_file, section).folder
    if folder is None:
        raise spec_file.error(
            f"{section}.config", "random weights need the model's sizes; write them as an inline config"
        )
    path = folder / "config.json"
    try:
        config: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise spec_file.error(f"{section}.weights", f"{path} cannot be read ({error}); fetch it again") from None
    return config


def source_of(spec_file: SpecFile, section: str, shapes: Shapes) -> Source:
    """The weights of a section; `shapes` are those that random ones get."""
    model: ModelSpec = getattr(spec_file.spec, section)
    folder = checkpoint_of(spec_file, section).folder
    if folder is not None:
        return open_checkpoint(folder)
    seed = model.weights.removeprefix("random:")
    if not seed.isdigit():
        raise spec_file.error(f"{section}.weights", f"{model.weights!r}: write random:SEED with a whole number")
    return RandomSource(int(seed), shapes)


def check_tensors(
    spec_file: SpecFile,
    section: str,
    wanted: Shapes,
    unread: tuple[str, ...] = (),
    tied: Mapping[str, str] | None = None,
) -> None:
    """Refuse a checkpoint that lacks a tensor, has one of another shape, or has one that means another model.

    `unread` are patterns of tensors that a published file holds beside the model's; `tied` are keys that may be stored
    under another one. A config in the spec may take part of a checkpoint, so what is left over is no error then.
    """
    refs = source_of(spec_file, section, wanted).refs()
    bind(spec_file, section, wanted, refs, tied)
    if getattr(spec_file.spec, section).config is None:
        for key in refs:
            if key not in wanted and not any(fnmatchcase(key, pattern) for pattern in unread):
                raise spec_file.error(
                    f"{section}.weights",
                    f"tensor {key} is none of the model that config.json describes; fetch both from one release",
                )


def bind(
    spec_file: SpecFile,
    section: str,
    wanted: Shapes,
    refs: Mapping[str, WeightRef],
    tied: Mapping[str, str] | None = None,
) -> dict[str, WeightRef]:
    """Each wanted tensor's reference; a missing or misshapen tensor is an error."""
    bound = {}
    for name, shape in wanted.items():
        key = name if name in refs else (tied or {}).get(name, name)
        if key not in refs:
            raise spec_file.error(f"{section}.weights", f"tensor {key} is missing from the checkpoint; fetch it again")
        if refs[key].shape != shape:
            raise spec_file.error(
                f"{section}.weights",
                f"tensor {key} has shape {list(refs[key].shape)}, the config asks for {list(shape)}",
            )
        bound[name] = refs[key]
    return bound
