"""Replaying: a bundle checks itself, by what it expects each partition, each stage and its sampler to make."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np

from movdc.runtime.bundle import NUMPY_DTYPES, Bundle, Sampler, TensorSpec
from movdc.runtime.errors import RunError
from movdc.runtime.executors import AnyExecutor
from movdc.runtime.expected import Check, Error, SamplerCheck, compare_with_digest, make_input, worst_of
from movdc.runtime.replay_sampler import SAMPLER, run_sampler

Array = np.ndarray[Any, Any]
Progress = Callable[[str, int, int], None]  # what is checked, done so far, in all
_SAMPLER_MIN_SQNR_DB = 80.0  # another order of summation in guidance and steps gives about 120


@dataclass(frozen=True)
class Finding:
    """What one check found."""

    kind: Literal["partition", "stage", "sampler"]
    name: str
    passed: bool | None  # None if there was nothing to compare with
    min_sqnr_db: float | None = None
    error: Error | None = None
    note: str = ""


def replay(bundle: Bundle, executor: AnyExecutor, on_progress: Progress) -> list[Finding]:
    """Every partition by itself, then every stage as a whole, then the sampler."""
    expected, manifest = bundle.manifest.expected, bundle.manifest
    of_partition = {check.name: check for check in expected.partitions}
    of_stage = {check.name: check for check in expected.stages}
    variants = [(stage, name) for stage in manifest.stages for name in stage.variants]
    found: list[Finding] = []
    for done, partition in enumerate(manifest.partitions):
        on_progress("partitions", done, len(manifest.partitions))
        found.append(
            _replayed(
                "partition",
                partition.name,
                of_partition.get(partition.name),
                partition.inputs,
                partial(executor.run_partition, partition.name),
            )
        )
    on_progress("partitions", len(manifest.partitions), len(manifest.partitions))
    for done, (stage, variant) in enumerate(variants):
        on_progress("stages", done, len(variants))
        found.append(
            _replayed(
                "stage",
                f"{stage.name}.{variant}",
                of_stage.get(f"{stage.name}.{variant}"),
                stage.variants[variant].inputs,
                partial(executor.run, stage.name, variant),
            )
        )
    on_progress("stages", len(variants), len(variants))
    return [*found, replay_sampler(manifest.sampler, expected.sampler)]


def inputs_of(check: Check, specs: Sequence[TensorSpec]) -> dict[str, Array]:
    """The inputs of a check; raises RunError where it names others than the manifest."""
    recipes = {recipe.name: recipe for recipe in check.inputs}
    if set(recipes) != {spec.name for spec in specs}:
        raise RunError(f"takes {', '.join(sorted(spec.name for spec in specs))}, and not {', '.join(sorted(recipes))}")
    return {
        spec.name: make_input(recipes[spec.name], check.name, spec.shape, NUMPY_DTYPES[spec.dtype]) for spec in specs
    }


def _replayed(
    kind: Literal["partition", "stage"],
    name: str,
    check: Check | None,
    specs: Sequence[TensorSpec],
    run: Callable[[Mapping[str, Array]], Mapping[str, Array]],
) -> Finding:
    if check is None:
        return Finding(kind, name, None, note="nothing recorded")
    try:
        outputs = run(inputs_of(check, specs))
    except RunError as failed:
        return Finding(kind, name, False, check.min_sqnr_db, note=str(failed))
    if set(outputs) != {one.name for one in check.outputs}:
        return Finding(kind, name, False, check.min_sqnr_db, note="makes other tensors than are expected")
    error = worst_of({one.name: compare_with_digest(outputs[one.name], one, name) for one in check.outputs})
    return Finding(kind, name, error.sqnr_db >= check.min_sqnr_db, check.min_sqnr_db, error)


def replay_sampler(sampler: Sampler, check: SamplerCheck | None) -> Finding:
    """The sampler's plan against what was recorded of it."""
    if check is None:
        return Finding("sampler", SAMPLER, None, note="nothing recorded")
    try:
        latents, evaluations, merged = run_sampler(sampler)
    except RunError as failed:
        return Finding("sampler", SAMPLER, False, _SAMPLER_MIN_SQNR_DB, note=str(failed))
    counts = (("evaluations", evaluations, check.evaluations), ("of them merged", merged, check.merged))
    note = ", ".join(f"{ours} {what}, not {right}" for what, ours, right in counts if ours != right)
    error = compare_with_digest(latents, check.latents, SAMPLER)
    passed = not note and error.sqnr_db >= _SAMPLER_MIN_SQNR_DB
    return Finding("sampler", SAMPLER, passed, _SAMPLER_MIN_SQNR_DB, error, note)
