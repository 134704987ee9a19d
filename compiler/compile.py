"""Compiling: trace, passes, lowering, bundle."""

from __future__ import annotations

import platform
from collections.abc import Callable, Sequence
from functools import partial
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import TypeVar

from movdc.compiler.bundle_writer import BundleWriter, new_bundle
from movdc.compiler.cache import CompileCache, key_of, open_cache, passing_cache
from movdc.compiler.checker import check_manifest
from movdc.compiler.checkpoints import Checkpoint
from movdc.compiler.device import Machine
from movdc.compiler.errors import BudgetError, InternalError, MovdcError
from movdc.compiler.family import Family
from movdc.compiler.finished import compile_key, recall, remember
from movdc.compiler.levels import count_calls, variant_of
from movdc.compiler.lower import Progress, lower
from movdc.compiler.pass_base import Pass, PassResult, run_passes
from movdc.compiler.printer import print_program
from movdc.compiler.program import Program
from movdc.compiler.record import record
from movdc.compiler.refusals import check_runs
from movdc.compiler.report import render
from movdc.compiler.residency import Chain, most_bytes
from movdc.compiler.spec import SpecFile
from movdc.compiler.target import Target
from movdc.compiler.units import format_bytes
from movdc.runtime.bundle import FORMAT_VERSION, REPORT, Manifest, Partition, Sampler, Stage, Video
from movdc.runtime.replay_sampler import sampler_check

Made = TypeVar("Made")
_PLANS = 4  # that are tried, each with more in reserve than the one before


def compile_bundle(
    spec_file: SpecFile,
    out: Path,
    family: Family,
    target: Target,
    machine: Machine,
    phases: Sequence[tuple[str, Sequence[Pass]]],
    dump: Path | None,
    progress: Progress,
    note: Callable[[str, str], None],
    jobs: int = 1,
    cache_root: Path | None = None,
) -> Manifest:
    """Compile a spec into the bundle `out` and return its manifest; `note` gets what each pass (by name) has to say.

    What is finished goes to the cache and is taken from there; without one, everything is made and nothing is kept.
    """
    passes = [one for _, some in phases for one in some]
    versions = target.versions()
    _check_abilities(spec_file, passes, target)
    with new_bundle(out) as writer, open_cache(cache_root) if cache_root else passing_cache(writer.root) as cache:
        checkpoints = family.checkpoints(spec_file)
        _pin(spec_file, checkpoints, note)
        key = compile_key(spec_file.spec, checkpoints, target, machine, passes)
        made = None if dump else recall(key, family.sampler(spec_file), passes, writer, cache)
        if made is None:
            make = partial(
                _lower,
                family=family,
                target=target,
                passes=passes,
                writer=writer,
                cache=cache,
                progress=progress,
                jobs=jobs,
            )
            lowered, planners = plan(spec_file, family, target, machine, phases, dump, progress, note, make)
            remember(key, lowered, planners, writer, cache)
            made = lowered
        else:
            made = _replanned(made, machine)
        manifest = made.model_copy(
            update={
                "expected": made.expected.model_copy(update={"sampler": sampler_check(made.sampler)}),
                "spec": spec_file.spec.model_dump(mode="json"),
                "pipeline": ",".join(map(str, passes)),
                "versions": {"movdc": version("movdc"), "python": platform.python_version()} | versions,
            }
        )
        check_manifest(manifest)
        report = writer.add_text(REPORT, render(manifest, machine.rates, machine.budget_bytes))
        manifest = manifest.model_copy(update={"files": (*manifest.files, report)})
        writer.finish(manifest)
    return manifest


def _check_abilities(spec_file: SpecFile, passes: Sequence[Pass], target: Target) -> None:
    """Raise MovdcError for the first thing that the spec asks for and the target cannot do."""
    for one in passes:
        if reason := one.unable(target.abilities):
            message = f"{one.name} is not for target {target.name}: {reason}; leave it out, or choose another target"
            asked = one.name in spec_file.spec.passes
            raise spec_file.error(f"passes.{one.name}", message) if asked else MovdcError(f"--passes: {message}")


def _pin(spec_file: SpecFile, checkpoints: Sequence[Checkpoint], note: Callable[[str, str], None]) -> None:
    """Say what came from the hub, and write its commit into the spec, so that the bundle names it."""
    for one in checkpoints:
        if one.commit is not None:
            model = getattr(spec_file.spec, one.section)
            note(one.section, f"{model.weights} at commit {one.commit}, licence {one.licence}")
            pinned = model.model_copy(update={"revision": one.commit})
            spec_file.spec = spec_file.spec.model_copy(update={one.section: pinned})


def plan(
    spec_file: SpecFile,
    family: Family,
    target: Target,
    machine: Machine,
    phases: Sequence[tuple[str, Sequence[Pass]]],
    dump: Path | None,
    progress: Progress,
    note: Callable[[str, str], None],
    make: Callable[[Program], Made],
) -> tuple[Made, list[str]]:
    """What `make` makes of the planned program, and the passes that wrote into the sampler's plan.

    The planner estimates what programs take, and lowering measures it: where that is more than the budget, it is
    planned again with what the estimate missed in reserve, and what is cut as before comes from the cache.
    """
    passes = [one for _, some in phases for one in some]
    for left in range(_PLANS - 1, -1, -1):
        program, planners = _optimise(spec_file, family, machine, phases, dump, progress, note)
        check_runs(program, target)
        try:
            return make(program), planners
        except BudgetError as error:
            if left == 0 or not any(one.name == "partition" for one in passes):
                raise
            # The excess alone may leave room for the same cuts: most plans do not fill the budget.
            estimates = [graph.estimated_bytes for stage, _, graph in program.graphs() if stage == error.stage]
            missed_bytes = machine.budget_bytes + error.excess_bytes - max(estimates)
            machine = machine.reserving(error.stage, missed_bytes, error.excess_bytes)
            note("lower", f"{error.stage} takes {format_bytes(error.excess_bytes)} more than there is: planned again")
    raise InternalError("nothing was planned")


def _lower(
    program: Program,
    family: Family,
    target: Target,
    passes: Sequence[Pass],
    writer: BundleWriter,
    cache: CompileCache,
    progress: Progress,
    jobs: int,
) -> Manifest:
    """Programs and weights into the bundle, and the manifest that describes them."""
    lowered = lower(program, target, writer, cache, progress, jobs)
    tokenizer = cache.put_bytes(key_of("tokenizer", program.tokenizer_json.decode()), program.tokenizer_json)
    writer.add_entry(program.prompt.tokenizer, tokenizer)
    return Manifest(
        format_version=FORMAT_VERSION,
        family=family.name,
        target=target.name,
        device=program.spec.device,
        budget_bytes=program.machine.budget_bytes,
        peak_bytes=_peak_bytes(lowered.stages, lowered.partitions, program.machine),
        slab_bytes=program.machine.slab_bytes,
        video=_video(program),
        prompt=program.prompt,
        sampler=program.sampler,
        decode=program.decode,
        stages=lowered.stages,
        partitions=lowered.partitions,
        weights=tuple(writer.weights[path] for path in sorted(writer.weights)),
        quantization=lowered.quantization,
        expected=record(program, passes, target, cache, partial(progress, "expected")),
        files=tuple(writer.files[path] for path in sorted(writer.files)),
        spec={},
        pipeline="",
        versions={},
    )


def _optimise(
    spec_file: SpecFile,
    family: Family,
    machine: Machine,
    phases: Sequence[tuple[str, Sequence[Pass]]],
    dump: Path | None,
    progress: Progress,
    note: Callable[[str, str], None],
) -> tuple[Program, list[str]]:
    """Trace and run the passes, with the largest micro-batch of the decoder that fits the budget.

    Also gives the names of the passes that wrote into the sampler's plan.
    """
    passes = [one for _, some in phases for one in some]
    last_of = {some[-1]: phase for phase, some in phases}
    seen: list[tuple[str, Sampler]] = []  # the sampler's plan after each pass
    for micro_batch_frames in family.micro_batches:
        progress("trace", 0, 1)
        program = family.trace(spec_file, machine, micro_batch_frames)
        progress("trace", 1, 1)
        if dump is not None:
            _dump(dump, "0-trace", program)
        seen[:] = [("", program.sampler)]

        def after(one: Pass, result: PassResult) -> None:
            if dump is not None and one in last_of:
                names = [phase for phase, _ in phases]
                _dump(dump, f"{names.index(last_of[one]) + 1}-{last_of[one]}", result.program)
            seen.append((one.name, result.program.sampler))
            note(one.name, result.note)
            progress("passes", passes.index(one) + 1, len(passes))

        progress("passes", 0, len(passes))
        try:
            program = run_passes(program, passes, after)
            return program, [name for (_, before), (name, now) in pairwise(seen) if now != before]
        except BudgetError as error:
            if error.stage != "vae_spatial" or micro_batch_frames == family.micro_batches[-1]:
                raise
    raise InternalError(f"family {family.name} names no micro-batch")


def _replanned(manifest: Manifest, machine: Machine) -> Manifest:
    """A finished compile whose levels are chosen anew: they go by how often the sampler's plan calls each variant."""
    named = {one.name: one for one in manifest.partitions}
    stages = []
    for stage in manifest.stages:
        variants = {}
        for name, one in stage.variants.items():
            chain = Chain.of([named[part] for part in one.order], one.inputs, manifest.slab_bytes)
            calls = count_calls(manifest.sampler, manifest.decode, manifest.stages, stage.name, name)
            variants[name] = variant_of(chain, machine, stage.cadence, calls, stage.name, one.inputs, one.outputs)
        stages.append(stage.model_copy(update={"variants": variants}))
    peak_bytes = _peak_bytes(stages, manifest.partitions, machine)
    return manifest.model_copy(update={"stages": tuple(stages), "peak_bytes": peak_bytes})


def _peak_bytes(stages: Sequence[Stage], partitions: Sequence[Partition], machine: Machine) -> int:
    named = {one.name: one for one in partitions}
    variants = [variant for stage in stages for variant in stage.variants.values()]
    return max(most_bytes(one, [named[name] for name in one.order], machine.budget_bytes) for one in variants)


def _video(program: Program) -> Video:
    """What comes out: sizes are those of the decoder's pixels, which whole latents make."""
    asked = program.spec.video
    pixels = {stage.name: stage for stage in program.stages}["vae_spatial"].variants["plain"].outputs[0]
    height, width = pixels.shape[-2:]
    return Video(frames=asked.frames, height=height, width=width, fps=asked.fps)


def _dump(folder: Path, name: str, program: Program) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.txt").write_text(print_program(program))
