"""Finished compiles in the cache: one that differs in nothing but the sampler's plan needs no trace and no lowering."""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from movdc.compiler.bundle_writer import BundleWriter
from movdc.compiler.cache import CompileCache, Entry, key_of
from movdc.compiler.checkpoints import Checkpoint
from movdc.compiler.device import Machine
from movdc.compiler.identity import code_identity
from movdc.compiler.pass_base import Pass
from movdc.compiler.spec import PipelineSpec
from movdc.compiler.target import Target
from movdc.compiler.weights import file_identity
from movdc.runtime.bundle import Manifest, Sampler

_RUNTIME = tuple(f"movdc.runtime.{name}" for name in ("bundle", "expected", "rates", "simulate", "simulated_loader"))
_READ = (".json", ".safetensors", ".bin", ".model")  # the files of a checkpoint that a compile may read


def compile_key(
    spec: PipelineSpec,
    checkpoints: Sequence[Checkpoint],
    target: Target,
    machine: Machine,
    passes: Sequence[Pass],
) -> str:
    """The key of a compile, from all that its graphs, programs and weights depend on."""
    kept = spec.model_dump(mode="json", exclude={"sampler", "passes"})
    files = [file for one in checkpoints if one.folder is not None for file in _files(one.folder)]
    return key_of(
        "compile",
        json.dumps(kept, sort_keys=True),
        *(one.identity for one in passes),
        repr(machine),
        target.program_identity,
        code_identity("movdc.compiler", "movdc.models", "movdc.passes", *_RUNTIME),
        *(f"{name} {version(name)}" for name in ("diffusers", "tokenizers", "transformers")),
        *map(file_identity, files),
    )


def _files(folder: Path) -> list[Path]:
    return sorted(file for file in folder.rglob("*") if file.suffix in _READ and file.is_file())


def remember(key: str, manifest: Manifest, planners: Sequence[str], writer: BundleWriter, cache: CompileCache) -> None:
    """Keep a manifest, the entries that its files came from, and which passes wrote into the sampler's plan."""
    cache.put_bytes(key, manifest.model_dump_json().encode(), {"files": writer.entries, "planners": list(planners)})


def recall(
    key: str, sampler: Sampler, passes: Sequence[Pass], writer: BundleWriter, cache: CompileCache
) -> Manifest | None:
    """Put the files of an earlier compile into the bundle; its manifest with the plan that passes make of `sampler`.

    None if there was none, or if any of its files has gone. Raises MovdcError for a plan that a pass refuses.
    """
    entry = cache.get(key)
    if entry is None:
        return None
    manifest = Manifest.model_validate_json(entry.path.read_bytes())
    files: dict[str, Entry | None] = {path: cache.get(own) for path, own in entry.note["files"].items()}
    for one in passes:
        if one.name in entry.note["planners"]:
            sampler = one.plan(sampler)
    for path, own in files.items():
        if own is None:
            return None
        writer.add_entry(path, own)
    return manifest.model_copy(update={"sampler": sampler})
