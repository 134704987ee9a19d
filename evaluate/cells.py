"""A cell of an evaluation: a bundle under a name."""

from __future__ import annotations

from dataclasses import dataclass

from movdc.runtime.bundle import Bundle


@dataclass(frozen=True)
class Cell:
    """What clips are made with."""

    name: str
    bundle: Bundle

    @property
    def description(self) -> dict[str, object]:
        """What the bundle gives up, as columns of a table."""
        manifest = self.bundle.manifest
        weights = {file.path for file in manifest.weights}
        return {
            "setting": self.name,
            "steps": manifest.sampler.units[0],
            "leap": "none" if manifest.sampler.leap is None else manifest.sampler.leap.mode,
            "merge_steps": manifest.sampler.merged_steps,
            "int8": "+".join(sorted({one.stage for one in manifest.quantization})) or "none",
            "weight_bytes": sum(file.size_bytes for file in manifest.files if file.path in weights),
            "bundle_sha256": self.bundle.sha256,
        }
