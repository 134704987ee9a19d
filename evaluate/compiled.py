"""Cells whose bundles are compiled: each is a setting of a pipeline."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path

from movdc.compiler.compile import compile_bundle
from movdc.compiler.device import known_profiles
from movdc.compiler.errors import MovdcError
from movdc.compiler.spec import SpecFile
from movdc.evaluate.cells import Cell
from movdc.evaluate.settings import Setting
from movdc.models.registry import FAMILIES
from movdc.passes.pipeline import default_pipeline, in_phases
from movdc.runtime.bundle import Bundle
from movdc.targets.registry import parse_target

Progress = Callable[[str, int, int], None]  # kind of work, done so far, in all


def compile_cells(
    spec_file: SpecFile,
    settings: Mapping[str, Setting],
    folder: Path,
    cache: Path,
    progress: Progress,
) -> list[Cell]:
    """Compile each setting to a folder below `folder`; what earlier compiles left in the cache comes from there."""
    cells: list[Cell] = []
    folders = {name: re.sub(r"[^\w.-]+", "-", name) for name in settings}
    if len(set(folders.values())) < len(folders):
        raise MovdcError(f"settings: two names make one folder, of {', '.join(folders)}; give names that differ more")
    progress("compile", 0, len(settings))
    for name, setting in settings.items():
        out = folder / folders[name]
        try:
            compile_spec(spec_file.with_spec(setting.applied(spec_file.spec)), out, cache)
        except MovdcError as error:
            raise MovdcError(f"setting {name}: {error}") from None
        cells.append(Cell(name, Bundle.read(out)))
        progress("compile", len(cells), len(settings))
    return cells


def compile_spec(spec_file: SpecFile, out: Path, cache: Path) -> None:
    """What `movdc compile` does without options; raises MovdcError."""
    spec = spec_file.spec
    target = parse_target(spec.target)
    for key, choices in (("family", list(FAMILIES)), ("device", list(known_profiles()))):
        if (name := getattr(spec, key)) not in choices:
            raise spec_file.error(key, f"unknown {key} {name!r}; there are {', '.join(choices)}")
    machine = target.machine(known_profiles()[spec.device], spec.memory_budget)
    resolved = spec_file.with_spec(spec.model_copy(update={"target": str(target), "memory_budget": spec.memory_budget}))
    phases = in_phases(default_pipeline(spec.passes, target))
    compile_bundle(
        resolved,
        out.resolve(),
        FAMILIES[spec.family](),
        target,
        machine,
        phases,
        None,
        lambda kind, done, total: None,
        lambda name, text: None,
        os.cpu_count() or 1,
        cache,
    )
