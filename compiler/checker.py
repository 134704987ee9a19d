"""The checker of certificates: tries every interleaving of the two lanes and counts the bytes that are held.

It shares nothing with the planner. It reads what a bundle says, plays both lanes through two runs of each variant in
every order that the rules of docs/bundle.md allow, and finds the most bytes that can be held at any moment.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate

from movdc.runtime.bundle import Manifest, Partition, Residency, TensorSpec, Variant

RUNS = 2  # what a run leaves loaded for the next is the same from the second on


class CertificateError(Exception):
    """A bundle promises what its schedule does not keep."""


@dataclass(frozen=True)
class Moment:
    """Where the lanes are: runs finished, whether the next one is going on, loads begun, whether one is going on."""

    finished: int
    running: bool
    begun: int
    loading: bool


def check_manifest(manifest: Manifest) -> None:
    """Raise CertificateError unless every level of every variant holds at most what it says."""
    partitions = {one.name: one for one in manifest.partitions}
    for stage in manifest.stages:
        for name, variant in stage.variants.items():
            where = f"{stage.name} ({name})"
            for level in variant.residency:
                held = most_held(variant, level, partitions, manifest.slab_bytes)
                most = max(held.values())
                if most > level.needs_bytes:
                    raise CertificateError(f"{where}: a level that needs {level.needs_bytes} bytes can hold {most}")
            _check_certificate(where, variant, partitions, manifest)


def _check_certificate(where: str, variant: Variant, partitions: Mapping[str, Partition], manifest: Manifest) -> None:
    fitting = [level for level in variant.residency if level.needs_bytes <= manifest.budget_bytes]
    if not fitting or variant.peak_bytes != fitting[-1].needs_bytes:
        raise CertificateError(f"{where}: its peak is not that of the last level within the budget")
    if not max(variant.peak_bytes, variant.first_needs_bytes) <= manifest.peak_bytes <= manifest.budget_bytes:
        raise CertificateError(f"{where}: its peak, or a first run, is over {manifest.peak_bytes} or the budget")
    first = most_held(variant, variant.residency[0], partitions, manifest.slab_bytes, first=True)
    if max(first.values()) > variant.first_needs_bytes:
        raise CertificateError(f"{where}: its first run can hold {max(first.values())} bytes")
    held = most_held(variant, fitting[-1], partitions, manifest.slab_bytes)
    stated: dict[tuple[str, str], int] = {(one.partition, one.phase): one.total_bytes for one in variant.certificate}
    for place, most in held.items():
        if not most <= stated.get(place, 0) <= variant.peak_bytes:
            raise CertificateError(f"{where}: {place[1]} {place[0]} can hold {most} bytes, not {stated.get(place, 0)}")


def most_held(
    variant: Variant, level: Residency, partitions: Mapping[str, Partition], slab_bytes: int, first: bool = False
) -> dict[tuple[str, str], int]:
    """The most bytes held until each partition has loaded ("load") and from then until it has run ("run")."""
    order = [partitions[name] for name in variant.order]
    runs = order * RUNS
    loads = [one for index, one in enumerate(runs) if one.name not in level.pinned or index < len(order)]
    load_of = _load_of_each_run(runs, loads, level)
    tensors, left_bytes = _tensors(order, variant.inputs)
    programs_bytes = sum(one.program_bytes for one in order) + max(one.planned_bytes for one in order)
    spaces = [0, *accumulate((one.workspace_bytes for one in order), max)]  # as they grow in the first run
    most: dict[tuple[str, str], int] = {}
    seen = set()
    ahead = [Moment(0, False, 0, False)]
    while ahead:
        now = ahead.pop()
        if now in seen:
            continue
        seen.add(now)
        done_loads = now.begun - now.loading
        over = {load_of[index] for index in range(now.finished) if runs[index].name not in level.pinned}
        there = [index for index in range(done_loads) if index not in over]
        transient = [loads[index] for index in there if loads[index].name not in level.pinned]
        if now.loading and loads[now.begun - 1].name not in level.pinned:
            transient.append(loads[now.begun - 1])
        if now.finished < len(runs):
            one = runs[now.finished]
            place = now.finished % len(order)
            held = slab_bytes + programs_bytes + sum(loads[index].held_bytes for index in there)
            held += (loads[now.begun - 1].load_bytes if first else loads[now.begun - 1].held_bytes) * now.loading
            held += spaces[-1]
            if first and now.running and spaces[place] < one.workspace_bytes:  # grows beside the one before
                held += max(spaces[place] + one.workspace_bytes - spaces[-1], 0)
            held += max(tensors[place][now.running], left_bytes if place == 0 and not now.running else 0)
            loaded = load_of[now.finished] < done_loads
            key = one.name, "run" if loaded else "load"
            most[key] = max(most.get(key, 0), held)
            if now.running:
                ahead.append(Moment(now.finished + 1, False, now.begun, now.loading))
            elif loaded:
                ahead.append(Moment(now.finished, True, now.begun, now.loading))
        if now.loading:
            ahead.append(Moment(now.finished, now.running, now.begun, False))
        elif now.begun < len(loads) and _may_start(loads[now.begun], transient, level):
            ahead.append(Moment(now.finished, now.running, now.begun + 1, True))
    if missing := [one.name for one in order if (one.name, "run") not in most]:
        raise CertificateError(f"{missing[0]} never runs")
    return most


def _may_start(one: Partition, transient: list[Partition], level: Residency) -> bool:
    if one.name in level.pinned:
        return True
    if one.name in level.waits:
        return not transient
    return len(transient) <= level.prefetch and one.name not in [other.name for other in transient]


def _load_of_each_run(runs: list[Partition], loads: list[Partition], level: Residency) -> list[int]:
    """The index of the load that each run uses: its own for a transient partition, the first for a pinned one."""
    places: dict[str, list[int]] = {}
    for index, one in enumerate(loads):
        places.setdefault(one.name, []).append(index)
    return [places[one.name][0] if one.name in level.pinned else places[one.name].pop(0) for one in runs]


def _tensors(order: list[Partition], inputs: tuple[TensorSpec, ...]) -> tuple[list[tuple[int, int]], int]:
    """For each run, the bytes of tensors before it and while it goes on; and those that are left at the end.

    Raises CertificateError if one is read that does not exist.
    """
    live = {spec.name: spec.size_bytes for spec in inputs}
    kept = set(live)
    found = []
    for index, one in enumerate(order):
        for spec in one.inputs:
            if live.get(spec.name) != spec.size_bytes:
                raise CertificateError(f"{one.name}: tensor {spec.name} does not exist")
        before = sum(live.values())
        live.update({spec.name: spec.size_bytes for spec in one.outputs})
        found.append((before, sum(live.values())))
        later = {spec.name for other in order[index + 1 :] for spec in other.inputs}
        read = {spec.name for other in order for spec in other.inputs}
        live = {name: size for name, size in live.items() if name in later or name in kept or name not in read}
    return found, sum(live.values())
