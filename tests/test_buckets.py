"""Lengths of prompts: a short prompt runs short variants, with the same weights and the same bits."""

from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import numpy as np
import pytest
import yaml

from movdc.runtime.bundle import Bundle, Manifest
from movdc.runtime.executor import Executor
from movdc.runtime.generate import Generator, Result

Movdc = Callable[..., CompletedProcess[str]]
PROMPTS = {8: "a red circle", 16: "a red circle moving down on a black background", 24: "red " * 20}
pytestmark = pytest.mark.slow


@pytest.fixture
def bucketed(movdc: Movdc, shallow: Path, tmp_path: Path) -> Bundle:
    """The shallow pipeline compiled for three lengths."""
    spec = yaml.safe_load(shallow.read_text())
    spec["text_encoder"]["buckets"] = [8, 16]
    shallow.write_text(yaml.safe_dump(spec))
    done = movdc("compile", shallow, "-o", tmp_path / "out")
    assert done.returncode == 0, done.stdout + done.stderr
    return Bundle.read(tmp_path / "out")


def _run(bundle: Bundle, packed: Path, prompt: str) -> tuple[Result, int]:
    """A run of two steps, and the bytes of its encoder's inputs and outputs."""
    executor = Executor(bundle, mode="sequential", packed_cache=packed)
    made = Generator(bundle, executor).generate(prompt, seed=3, steps=2)
    return made, executor.reports["text_encoder"][0].peak_bytes


def _without_buckets(manifest: Manifest) -> Manifest:
    return manifest.model_copy(update={"prompt": manifest.prompt.model_copy(update={"buckets": ()})})


def test_lengths_share_their_weights_and_give_the_same_bits(bucketed: Bundle, tmp_path: Path) -> None:
    packed, longest = tmp_path / "packed", Bundle(bucketed.root, _without_buckets(bucketed.manifest))
    for length, prompt in PROMPTS.items():
        for bundle in (bucketed, longest):  # the first run of each packs
            _run(bundle, packed, prompt)
        made, made_bytes = _run(bucketed, packed, prompt)
        expected, expected_bytes = _run(longest, packed, prompt)
        assert np.array_equal(made.latents, expected.latents)
        assert np.array_equal(made.frames, expected.frames)
        assert (made_bytes < expected_bytes) == (length < 24)
    for stage in ("text_encoder", "denoiser"):
        variants = bucketed.stages[stage].variants
        assert set(variants) == {"plain", "plain-8", "plain-16"}
        weights = [[bucketed.partitions[name].weights[0] for name in one.order] for one in variants.values()]
        assert weights[0] == weights[1] == weights[2]
    files = {one.weights[0] for one in bucketed.partitions.values() if one.weights}
    assert len(list(packed.glob("*.packed"))) == len(files)
