"""The generator: which variant of the denoiser each step runs, and what it reports of the sampler."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from movdc.runtime.bundle import Bundle, Decode, LeapRule, Manifest, Prompt, Residency, Sampler, Stage, Variant
from movdc.runtime.generate import Array, Generator

REPOSITORY = Path(__file__).parents[2]
TOKENIZER = (REPOSITORY / "examples/checkpoints/tiny/text_encoder/tokenizer.json").read_bytes()
LATENT = (1, 4, 1, 2, 2)
EMPTY = Variant(
    inputs=(),
    outputs=(),
    order=(),
    residency=(Residency(needs_bytes=0, prefetch=0),),
    first_needs_bytes=0,
    certificate=(),
    peak_bytes=0,
)


class Straight:
    """Runs every stage without weights: a drift that is one everywhere, and frames of one grey."""

    def __init__(self) -> None:
        self.ran: list[str] = []  # the denoiser's variants

    def read_file(self, path: str) -> bytes:
        return TOKENIZER

    def run(self, stage: str, variant: str, inputs: Mapping[str, Array], then: str | None = None) -> dict[str, Array]:
        if stage == "denoiser":
            self.ran.append(variant)
        return {
            "text_encoder": {"text": np.zeros((1, 24, 8), np.float32)},
            "denoiser": {"velocity": np.ones((2, *LATENT[1:]), np.float32)},
            "vae_temporal": {"frames": np.zeros(LATENT, np.float32)},
            "vae_spatial": {"pixels": np.zeros((1, 3, 16, 16), np.float32)},
        }[stage]


def _bundle(variants: tuple[str, ...], **sampler: Any) -> Bundle:
    plan = {"solver": "euler", "prediction": "rectified_flow", "units": (8,), "shift": 1.0, "rounded": False}
    manifest = Manifest.model_construct(
        stages=(Stage(name="denoiser", cadence="per_step", variants=dict.fromkeys(variants, EMPTY)),),
        sampler=Sampler.model_validate(plan | {"guidance": 4.0, "latent": LATENT} | sampler),
        prompt=Prompt(tokenizer="tokenizer.json", max_tokens=24, pad_id=0, aesthetic=None, cleaning="open-sora"),
        decode=Decode.model_validate(
            {"chunks": ({"variant": "frames1", "latent_frames": 1, "frames": 1},), "micro_batch_frames": 1}
        ),
    )
    return Bundle(Path("nowhere"), manifest)


@pytest.mark.parametrize(
    ("variants", "merged_steps", "steps", "expected"),
    [
        (("plain", "merged"), 3, None, ["merged"] * 3 + ["plain"] * 5),
        (("plain", "merged"), 0, None, ["plain"] * 8),
        (("plain",), 3, None, ["plain"] * 8),
        (("plain", "merged"), 3, 2, ["merged"] * 2),
    ],
)
def test_the_first_steps_run_the_merged_variant(
    variants: tuple[str, ...], merged_steps: int, steps: int | None, expected: list[str]
) -> None:
    executor = Straight()
    made = Generator(_bundle(variants, merged_steps=merged_steps), executor).generate("a red circle", steps=steps)
    assert executor.ran == expected
    assert made.trajectory.evaluations == len(expected)


def test_a_short_prompt_runs_the_variants_of_its_length() -> None:
    variants = ("plain", "merged", "plain-8", "merged-8")
    bundle = _bundle(variants, merged_steps=3)
    prompt = bundle.manifest.prompt.model_copy(update={"buckets": (8,)})
    bundle = Bundle(bundle.root, bundle.manifest.model_copy(update={"prompt": prompt}))
    for text, ending in (("a red circle", "-8"), ("a red circle moving down on a black background", "")):
        executor = Straight()
        Generator(bundle, executor).generate(text)
        assert executor.ran == [f"merged{ending}"] * 3 + [f"plain{ending}"] * 5


def test_a_leap_by_half_follows_the_steps_of_the_run() -> None:
    generator = Generator(_bundle(("plain",), leap=LeapRule(mode="fixed")), Straight())
    assert [generator.generate("a red circle", steps=n).trajectory.leap_step for n in (None, 4, 2)] == [4, 2, None]
