"""movdc fit --exact: the partitions, the peak and the size of the bundle that a compile then makes."""

import json
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import pytest
import yaml

from movdc.compiler import offers as choices
from movdc.compiler.device import known_profiles
from movdc.compiler.exact_fit import exact_fit
from movdc.compiler.fit import Fit
from movdc.compiler.spec import SpecFile, load_spec
from movdc.models.opensora import OpenSora
from movdc.models.opensora_layers import PUBLISHED, stages
from movdc.passes.pipeline import default_pipeline, in_phases
from movdc.runtime.bundle import Bundle
from movdc.targets.registry import parse_target

Movdc = Callable[..., CompletedProcess[str]]
REPOSITORY = Path(__file__).parents[2]
FAMILY = choices.FamilyLayers(stages, PUBLISHED)


def _exact(spec_file: SpecFile) -> Fit:
    spec = spec_file.spec
    target = parse_target(spec.target)
    machine = target.machine(known_profiles()[spec.device], spec.memory_budget)
    phases = in_phases(default_pipeline(spec.passes, target))
    return exact_fit(spec_file, OpenSora(), target, machine, phases, lambda *_: None, lambda *_: None)


@pytest.mark.slow
def test_it_is_what_a_compile_makes(bundle: Path, example: Path) -> None:
    made = Bundle.read(bundle).manifest
    found = _exact(load_spec(example))
    programs = {one.name: one.program for one in made.partitions}
    for stage in made.stages:
        names = [name for variant in stage.variants.values() for name in variant.order]
        one = found.stages[stage.name]
        assert one.partitions == len(names)
        assert one.programs == len({programs[name] for name in names})
    assert found.peak_bytes == pytest.approx(made.peak_bytes, rel=0.05)
    assert found.bundle_bytes == pytest.approx(sum(file.size_bytes for file in made.files), rel=0.01)


@pytest.mark.slow
def test_where_a_compile_estimates_too_nothing_differs(movdc: Movdc, shallow: Path, tmp_path: Path) -> None:
    spec = yaml.safe_load(shallow.read_text())
    config = json.loads((REPOSITORY / "examples/checkpoints/tiny/denoiser/config.json").read_text())
    spec["denoiser"] = {"weights": "random:0", "config": config | {"depth": 3}}
    spec |= {"passes": {"merge-tokens": {"steps": 10}}, "target": "null", "memory_budget": "6MB"}
    spec["video"] |= {"frames": 17, "height": 32, "width": 32}
    shallow.write_text(yaml.safe_dump(spec))
    done = movdc("compile", shallow, "-o", tmp_path / "null")
    assert done.returncode == 0, done.stderr
    made, found = Bundle.read(tmp_path / "null").manifest, _exact(load_spec(shallow))
    counts = {one.name: sum(len(variant.order) for variant in one.variants.values()) for one in made.stages}
    assert {name: one.partitions for name, one in found.stages.items()} == counts
    assert counts["denoiser"] > 4
    assert found.peak_bytes == made.peak_bytes


def test_weights_that_are_not_here_are_made_up(example: Path, tmp_path: Path) -> None:
    path = tmp_path / "other.yaml"
    path.write_text((example.parent / "opensora.yaml").read_text())
    spec = choices.without_weights(load_spec(path), FAMILY).spec
    assert {spec.text_encoder.weights, spec.denoiser.weights, spec.vae.weights} == {"random:0"}
    assert spec.text_encoder.config == PUBLISHED["DeepFloyd/t5-v1_1-xxl"]
    local = choices.without_weights(load_spec(example), FAMILY).spec
    assert local == load_spec(example).spec
