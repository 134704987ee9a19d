"""Stages of bundles for Core ML on machines without it, by the tests' interpreter of MIL (tests/targets)."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from movdc.runtime.bundle import Bundle, Partition
from movdc.runtime.executors import Array
from movdc.targets.mlpackage import TABLE, write_packages

sys.path.append(str(Path(__file__).parents[1] / "tests" / "targets"))
from mil_interpreter import Package, delegated


class MilStages:
    """Runs stages of a bundle for coreml or executorch-coreml; its packages are laid out in a folder beside it."""

    def __init__(self, bundle: Bundle) -> None:
        self._bundle = bundle
        self._folder = bundle.root.with_name(f"{bundle.root.name}-packages")
        shutil.rmtree(self._folder, ignore_errors=True)
        self._is_coreml = bundle.manifest.target == "coreml"
        if self._is_coreml:
            write_packages(bundle, self._folder)

    def run(self, stage: str, variant: str, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """The outputs of a stage."""
        plan = self._bundle.stages[stage].variants[variant]
        tensors = {name: torch.from_numpy(array) for name, array in inputs.items()}
        with torch.inference_mode():
            for name in plan.order:
                record = self._bundle.partitions[name]
                made = self._partition(record, [tensors[spec.name] for spec in record.inputs])
                tensors |= {spec.name: one for spec, one in zip(record.outputs, made, strict=True)}
        return {spec.name: tensors[spec.name].numpy() for spec in plan.outputs}

    def _partition(self, record: Partition, inputs: list[Tensor]) -> list[Tensor]:
        as_said = [one.int() if one.dtype == torch.int64 else one for one in inputs]  # Core ML's ids are int32
        if self._is_coreml:
            row = json.loads((self._folder / TABLE).read_text())[record.name]
            named = {f"input_{index}": one for index, one in enumerate(as_said)}
            return Package(self._folder / row["package"]).run(named, row["function"] or "main")
        folder = self._folder / record.name
        folder.mkdir(parents=True)
        return delegated(self._bundle.root / record.program, folder, record.method).run(as_said)
