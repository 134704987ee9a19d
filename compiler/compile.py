"""Compiling: trace, passes, lowering, bundle."""

from __future__ import annotations

import platform
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path

from movdc.compiler.bundle_writer import new_bundle
from movdc.compiler.cache import open_cache
from movdc.compiler.checker import check_manifest
from movdc.compiler.device import Machine
from movdc.compiler.errors import BudgetError, InternalError, MovdcError
from movdc.compiler.family import Family
from movdc.compiler.lower import Progress, lower
from movdc.compiler.pass_base import Pass, PassResult, run_passes
from movdc.compiler.printer import print_program
from movdc.compiler.program import Program
from movdc.compiler.residency import most_bytes
from movdc.compiler.spec import SpecFile
from movdc.compiler.target import Target
from movdc.runtime.bundle import FORMAT_VERSION, Manifest, Partition, Stage, Video


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
    with new_bundle(out) as writer, open_cache(cache_root or writer.root / ".cache") as cache:
        program = _optimise(spec_file, family, machine, phases, dump, progress, note)
        _refuse(program, target)
        lowered = lower(program, target, writer, cache, progress, jobs)
        writer.add_bytes(program.prompt.tokenizer, program.tokenizer_json)
        manifest = Manifest(
            format_version=FORMAT_VERSION,
            family=family.name,
            target=target.name,
            device=program.spec.device,
            budget_bytes=machine.budget_bytes,
            peak_bytes=_peak_bytes(lowered.stages, lowered.partitions, machine),
            slab_bytes=machine.slab_bytes,
            video=_video(program),
            prompt=program.prompt,
            sampler=program.sampler,
            decode=program.decode,
            stages=lowered.stages,
            partitions=lowered.partitions,
            weights=tuple(writer.weights[path] for path in sorted(writer.weights)),
            quantization=lowered.quantization,
            files=tuple(writer.files[path] for path in sorted(writer.files)),
            spec=program.spec.model_dump(mode="json"),
            pipeline=",".join(str(one) for _, passes in phases for one in passes),
            versions={"movdc": version("movdc"), "python": platform.python_version()} | target.versions(),
        )
        check_manifest(manifest)
        writer.finish(manifest)
    return manifest


def _optimise(
    spec_file: SpecFile,
    family: Family,
    machine: Machine,
    phases: Sequence[tuple[str, Sequence[Pass]]],
    dump: Path | None,
    progress: Progress,
    note: Callable[[str, str], None],
) -> Program:
    """Trace and run the passes, with the largest micro-batch of the decoder that fits the budget."""
    passes = [one for _, some in phases for one in some]
    last_of = {some[-1]: phase for phase, some in phases}
    for micro_batch_frames in family.micro_batches:
        progress("trace", 0, 1)
        program = family.trace(spec_file, machine, micro_batch_frames)
        progress("trace", 1, 1)
        if dump is not None:
            _dump(dump, "0-trace", program)

        def after(one: Pass, result: PassResult) -> None:
            if dump is not None and one in last_of:
                names = [phase for phase, _ in phases]
                _dump(dump, f"{names.index(last_of[one]) + 1}-{last_of[one]}", result.program)
            note(one.name, result.note)
            progress("passes", passes.index(one) + 1, len(passes))

        try:
            return run_passes(program, passes, after)
        except BudgetError as error:
            if error.stage != "vae_spatial" or micro_batch_frames == family.micro_batches[-1]:
                raise
    raise InternalError(f"family {family.name} names no micro-batch")


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


def _refuse(program: Program, target: Target) -> None:
    for stage, _, graph in program.graphs():
        for node in graph.compute_nodes:
            if reason := target.refuse(node):
                raise MovdcError(f"{stage}: {target.name} cannot run %{node.name} ({node.target}): {reason}")
