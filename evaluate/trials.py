"""What tuning asks of a pipeline's settings: the loss that is measured, and the time that is predicted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from movdc.compiler.device import DeviceProfile
from movdc.compiler.spec import SpecFile
from movdc.evaluate.cells import Cell
from movdc.evaluate.compiled import Progress, compile_cells
from movdc.evaluate.results import frame_of, summary_of
from movdc.evaluate.settings import Setting
from movdc.evaluate.sweep import Pool, evaluate_cells
from movdc.evaluate.tune import Summary, predicted_s
from movdc.targets.registry import parse_target


@dataclass(frozen=True)
class Trials:
    """A pipeline, a device, and the clips that settings are measured by."""

    spec_file: SpecFile
    profile: DeviceProfile
    prompts: Sequence[str]
    seeds: int
    folder: Path  # for bundles and finished clips
    cache: Path  # of compiles
    pool: Pool
    progress: Progress

    _cells: dict[Setting, Cell] = field(default_factory=dict)  # that are compiled

    def measure(self, settings: Sequence[Setting]) -> Mapping[Setting, Summary]:
        """The summary of each setting; the first one is the reference."""
        cells = self._compiled(settings)
        named = {cell.name: setting for cell, setting in zip(cells, settings, strict=True)}
        rows = evaluate_cells(cells, self.prompts, self.seeds, self.folder, self.pool, self.progress)
        return {named[row["setting"]]: row for row in summary_of(frame_of(rows)).iter_rows(named=True)}

    def predict(self, setting: Setting, evaluations: int) -> float:
        """Seconds of one clip on the device, with so many evaluations of the denoiser."""
        merges = self.spec_file.spec.sampler.steps if setting.merge_steps else 0
        [cell] = self._compiled([Setting(int8=setting.int8, merge_steps=merges)])
        target = parse_target(self.spec_file.spec.target)
        rates = target.machine(self.profile, self.spec_file.spec.memory_budget).rates
        return predicted_s(cell.bundle.manifest, rates, setting, evaluations)

    def _compiled(self, settings: Sequence[Setting]) -> list[Cell]:
        missing = {str(one): one for one in settings if one not in self._cells}
        if missing:
            made = compile_cells(self.spec_file, missing, self.folder / "bundles", self.cache, self.progress)
            self._cells.update(zip(missing.values(), made, strict=True))
        return [self._cells[one] for one in settings]
