"""Variants of a stage read one copy of their weights in a bundle, whatever the target."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from movdc.compiler.bundle_writer import BundleWriter
from movdc.compiler.cache import passing_cache
from movdc.compiler.lower import lower
from movdc.compiler.program import Program
from movdc.compiler.target import Target
from movdc.runtime.bundle import Bundle, Partition
from movdc.targets.registry import parse_target

pytestmark = pytest.mark.slow  # a conversion takes seconds
MORE = 1.25  # files have programs in them, too, and what is folded for one variant


def _weight_bytes(partitions: tuple[Partition, ...]) -> int:
    """Of the plain denoiser, when the merged one has as many."""
    plain_bytes, merged_bytes = (
        sum(one.weight_bytes for one in partitions if one.name.startswith(f"denoiser.{variant}."))
        for variant in ("plain", "merged")
    )
    assert merged_bytes > 0.9 * plain_bytes > 10**6
    return plain_bytes


def test_bundles_for_xnnpack_and_coreml_have_the_bytes_of_one(traded_bundle: Path, coreml_bundle: Path) -> None:
    for bundle in (traded_bundle, coreml_bundle):
        manifest = Bundle.read(bundle).manifest
        of_denoiser = [one for one in manifest.partitions if one.name.startswith("denoiser.")]
        paths = {path for one in of_denoiser for path in (one.program, *one.weights)}
        size_bytes = sum(one.size_bytes for one in manifest.files if one.path in paths)
        assert size_bytes < MORE * _weight_bytes(manifest.partitions), manifest.target


@pytest.mark.parametrize("target", ["onnx", "executorch-coreml"])
def test_what_is_lowered_has_the_bytes_of_one(
    target: str, shallow: Path, program_for: Callable[[Path, Target], Program], tmp_path: Path
) -> None:
    spec = yaml.safe_load(shallow.read_text()) | {"passes": {"merge-tokens": {}}}
    spec["video"] |= {"frames": 17}  # time is what tokens are merged along
    shallow.write_text(yaml.safe_dump(spec))
    program = program_for(shallow, parse_target(target))
    denoiser = tuple(stage for stage in program.stages if stage.name == "denoiser")
    writer = BundleWriter(tmp_path / "out")
    with passing_cache(tmp_path) as cache:
        lowered = lower(replace(program, stages=denoiser), parse_target(target), writer, cache, lambda *_: None)
    assert sum(file.size_bytes for file in writer.files.values()) < MORE * _weight_bytes(lowered.partitions)
