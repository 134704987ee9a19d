"""What a user may give up so that a pipeline fits, or is faster: each with what it brings."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from movdc.compiler.device import SLAB_BYTES, DeviceProfile, Machine
from movdc.compiler.errors import MovdcError
from movdc.compiler.fit import Choice, Fit, StagesOf, fit
from movdc.compiler.layers import StageLayers
from movdc.compiler.spec import ModelSpec, PipelineSpec, SpecFile, VideoSpec, load_spec
from movdc.runtime.bundle import LeapRule

Config = Mapping[str, Any]
SECTIONS = ("text_encoder", "denoiser", "vae")
LOAD_COPIES, VALUE_COPIES, NODE_BYTES = 2.1, 2.5, 2400  # a test holds them to the target's
_CHUNK_FRAMES, _PIXELS = 17, 16  # what frames and sides of a video are multiples of


@dataclass(frozen=True)
class Offer:
    """One thing to give up, and what there is then."""

    what: str
    fit: Fit


@dataclass(frozen=True)
class FamilyLayers:
    """What a family says without torch: its layers, and the configs that its publishers gave out."""

    stages: Callable[[Config, Config, Config, VideoSpec, int, int, bool], Sequence[StageLayers]]
    published: Mapping[str, Config]


def machine_of(profile: DeviceProfile, budget_bytes: int | None) -> Machine:
    """What is planned for, with the memory figures of executorch-xnnpack: its own module imports torch."""
    return Machine(
        budget_bytes=budget_bytes or profile.usable_memory,
        load_bytes_per_s=profile.load_rate,
        compute_flops_per_s=profile.fp32_flops_per_s,
        int8_flops_per_s=profile.int8_flops_per_s,
        load_overhead_s=profile.load_overhead_s,
        run_overhead_s=profile.run_overhead_s,
        contention=profile.contention,
        load_contention=profile.load_contention,
        touch_bytes_per_s=profile.touch_bytes_per_s,
        free_bytes_per_s=profile.free_bytes_per_s,
        load_copies=LOAD_COPIES,
        value_copies=VALUE_COPIES,
        node_bytes=NODE_BYTES,
        slab_bytes=SLAB_BYTES,
    )


def read(path: Path) -> SpecFile:
    """A pipeline YAML, a folder that has one, or a folder of the three models (for the paper's video)."""
    if not path.is_dir():
        return load_spec(path)
    if len(found := sorted(path.glob("*.yaml"))) == 1:
        return load_spec(found[0])
    if missing := [name for name in SECTIONS if not (path / name / "config.json").is_file()]:
        raise MovdcError(
            f"{path}: has no {missing[0]}/config.json and not one YAML; give a pipeline YAML, or a folder with "
            f"{', '.join(SECTIONS)}"
        )
    spec = PipelineSpec.model_validate(
        {"movdc": 1, "family": "opensora-1.2"}
        | {name: {"weights": name} for name in SECTIONS}
        | {"text_encoder": {"weights": "text_encoder", "max_tokens": 300}}
        | {"video": {"frames": 68, "height": 256, "width": 256, "fps": 24}}
    )
    return SpecFile(path / "spec", spec, {})


def stages_of(spec_file: SpecFile, family: FamilyLayers) -> StagesOf:
    """The layers of a spec's models for any choice; raises MovdcError where a config is not here."""
    configs = [_config(spec_file, section, family.published) for section in SECTIONS]
    text = spec_file.spec.text_encoder

    def layers(choice: Choice) -> Sequence[StageLayers]:
        video = VideoSpec(frames=choice.frames, height=choice.height, width=choice.width, fps=spec_file.spec.video.fps)
        merges = choice.merged_steps > 0
        try:
            return family.stages(configs[0], configs[1], configs[2], video, text.max_tokens, choice.batch, merges)
        except KeyError as error:
            raise MovdcError(f"{spec_file.path}: a config lacks {error}; take it from the published release") from None

    return layers


def without_weights(spec_file: SpecFile, family: FamilyLayers) -> SpecFile:
    """The spec with made-up weights of the right sizes in the place of those that are not here."""
    spec = spec_file.spec
    for section in SECTIONS:
        model: ModelSpec = getattr(spec, section)
        if not (spec_file.path.parent / model.weights).is_dir():
            update = {"weights": "random:0", "config": dict(_config(spec_file, section, family.published))}
            spec = spec.model_copy(update={section: model.model_copy(update={**update, "revision": None})})
    return SpecFile(spec_file.path, spec, {})


def choice_of(spec: PipelineSpec) -> Choice:
    """What the spec asks for; a dynamic leap is taken as late as it may come."""
    int8, merge, leap = (spec.passes.get(name) for name in ("quantize-int8", "merge-tokens", "leap"))
    steps = spec.sampler.steps
    rule = (
        None if leap is None or leap.get("mode", "fixed") != "fixed" else LeapRule(mode="fixed", step=leap.get("step"))
    )
    stages = ["text_encoder"] if int8 is None else int8.get("stages", ["text_encoder"])
    return Choice(
        frames=spec.video.frames,
        height=spec.video.height,
        width=spec.video.width,
        steps=steps,
        merged_steps=0 if merge is None else int(str(merge.get("steps") or max(1, steps // 2))),
        leap_step=None if rule is None else rule.fixed_step(steps),
        int8=() if int8 is None or not isinstance(stages, list) else tuple(stages),
        embeddings=bool(int8 and int8.get("embeddings")),
    )


def offers(layers: StagesOf, choice: Choice, machine: Machine) -> list[Offer]:
    """Each thing that can still be given up by itself; what fits and gains the most first."""
    made = [Offer(what, fit(layers, other, machine)) for what, other in _others(choice)]
    return sorted(made, key=lambda one: (one.fit.seconds, one.fit.needs_bytes))


def _others(choice: Choice) -> Iterator[tuple[str, Choice]]:
    for stage in ("text_encoder", "denoiser"):
        if stage not in choice.int8:
            yield f"int8 {stage}", replace(choice, int8=(*choice.int8, stage))
    if choice.frames > _CHUNK_FRAMES:
        frames = max(choice.frames // 2 // _CHUNK_FRAMES, 1) * _CHUNK_FRAMES
        yield f"{frames} frames", replace(choice, frames=frames)
    height, width = (max(side * 3 // 4 // _PIXELS, 1) * _PIXELS for side in (choice.height, choice.width))
    if (height, width) != (choice.height, choice.width):
        yield f"{height}x{width}", replace(choice, height=height, width=width)
    if choice.steps > 1 and not choice.merged_steps:
        yield f"merge-tokens, {choice.steps // 2} steps", replace(choice, merged_steps=choice.steps // 2)
    if choice.steps > 3 and choice.leap_step is None:
        yield f"leap at step {choice.steps // 2}", replace(choice, leap_step=choice.steps // 2)
    elif choice.steps > 1:
        steps = choice.steps * 2 // 3
        leap_step = None if choice.leap_step is None else choice.leap_step * 2 // 3
        merged_steps = min(choice.merged_steps, steps)
        yield f"{steps} steps", replace(choice, steps=steps, leap_step=leap_step, merged_steps=merged_steps)


def _config(spec_file: SpecFile, section: str, published: Mapping[str, Config]) -> Config:
    model: ModelSpec = getattr(spec_file.spec, section)
    if model.config is not None:
        return model.config
    folder = spec_file.path.parent / model.weights
    if not folder.is_dir() and model.weights in published:
        return published[model.weights]
    path = folder / "config.json"
    try:
        config: dict[str, Any] = json.loads(path.read_text())
        spatial = folder / "spatial" / "config.json"
        return config | ({"spatial": json.loads(spatial.read_text())} if spatial.is_file() else {})
    except (OSError, ValueError):
        raise spec_file.error(
            f"{section}.weights",
            f"no readable {path}; fetch that file alone, or write the model's sizes as an inline config",
        ) from None
