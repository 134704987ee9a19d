"""Checkpoints from the Hugging Face hub: one commit of a repository, and what its licence is."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

_FILES = ["*.json", "*.safetensors", "*.bin", "*.model", "README.md"]


@dataclass(frozen=True)
class Snapshot:
    """The files of one commit, on this machine."""

    folder: Path
    commit: str
    licence: str  # as the repository's README says it


@cache  # each call asks the hub
def snapshot(repository: str, revision: str | None) -> Snapshot:
    """Fetch what is not here yet; raises what the hub client and its transport raise."""
    from huggingface_hub import metadata_load, snapshot_download

    folder = Path(snapshot_download(repository, revision=revision, allow_patterns=_FILES))
    readme = folder / "README.md"
    facts = (metadata_load(readme) or {}) if readme.is_file() else {}
    licence = facts.get("license_name") or facts.get("license") or "not stated"
    return Snapshot(folder, folder.name, str(licence))
