"""Generating: a prompt through the four stages of a bundle to frames."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from movdc.runtime.bundle import Bundle, Sampler
from movdc.runtime.errors import RunError
from movdc.runtime.journal import Journal
from movdc.runtime.prompt import prepare, tokenize
from movdc.runtime.prompt_cache import PromptCache
from movdc.runtime.sampler import Point, Trajectory, initial_noise, is_over, sample
from movdc.runtime.video import Frames, to_frames

Array = np.ndarray[Any, Any]
Progress = Callable[[str, int, int], None]  # stage, done so far, in all


class StageRunner(Protocol):
    """What a generator needs of an executor."""

    def run(self, stage: str, variant: str, inputs: Mapping[str, Array], then: str | None = None) -> dict[str, Array]:
        """Run one stage; `then` is the variant of the same stage that runs next, if one does."""

    def read_file(self, path: str) -> bytes:
        """The checked bytes of a file of the bundle."""


@dataclass(frozen=True)
class Result:
    """What one prompt became."""

    latents: Array  # [1, C, T, H, W] fp32
    frames: Frames  # [N, H, W, 3] uint8
    seconds: dict[str, float]  # wall time by stage
    trajectory: Trajectory  # of the sampler
    dropped_tokens: int  # of a prompt that was too long


@dataclass(frozen=True)
class Denoised:
    """What a prompt's noise became, before it is decoded; as in Result."""

    latents: Array
    seconds: dict[str, float]
    trajectory: Trajectory
    dropped_tokens: int


class Generator:
    """Makes videos with one bundle."""

    def __init__(self, bundle: Bundle, executor: StageRunner, prompts: PromptCache | None = None) -> None:
        self._bundle = bundle
        self._manifest = bundle.manifest
        self._prompts = prompts
        self._denoiser_variants = bundle.stages["denoiser"].variants
        self._executor = executor

    def generate(
        self,
        prompt: str,
        *,
        seed: int = 0,
        noise: Array | None = None,
        steps: int | None = None,
        journal: Journal | None = None,
        on_progress: Progress = lambda stage, done, total: None,
    ) -> Result:
        """Make one video, from where the run of the journal stood; raises RunError for what cannot be used."""
        sampler = self._manifest.sampler
        if steps is not None:
            sampler = sampler.model_copy(update={"units": (steps,) * len(sampler.units)})
        noise = initial_noise(seed, sampler.latent) if noise is None else _checked_noise(noise, sampler.latent)
        done = self.denoise(prompt, noise, sampler, journal, on_progress)
        start = time.perf_counter()
        frames = self._decode(done.latents, journal, on_progress)
        seconds = done.seconds | {"vae": time.perf_counter() - start}
        return Result(done.latents, frames, seconds, done.trajectory, done.dropped_tokens)

    def denoise(
        self,
        prompt: str,
        noise: Array,
        sampler: Sampler,
        journal: Journal | None = None,
        on_progress: Progress = lambda stage, done, total: None,
    ) -> Denoised:
        """Latents of a prompt from noise, by a plan that need not be the bundle's own."""
        manifest, run = self._manifest, self._executor.run
        point = Point(noise) if journal is None or journal.point is None else journal.point
        tokenizer_json = self._executor.read_file(manifest.prompt.tokenizer)
        tokens = tokenize(prepare(prompt, manifest.prompt), manifest.prompt, tokenizer_json)
        seconds: dict[str, float] = {}
        text_mask = tokens.mask.astype(np.float32)
        length = text_mask.shape[1]

        start = time.perf_counter()
        text: dict[str, Array] = {}
        if not is_over(point, sampler):
            on_progress("text_encoder", 0, 1)
            text = self._encode(
                manifest.prompt.variant("plain", length), {"input_ids": tokens.ids, "text_mask": text_mask}
            )
            on_progress("text_encoder", 1, 1)
        seconds["text_encoder"] = time.perf_counter() - start

        def variant(step: int) -> str:
            merged = step < sampler.merged_steps and "merged" in self._denoiser_variants
            return manifest.prompt.variant("merged" if merged else "plain", length)

        def denoise(z: Array, timestep: Array, step: int) -> Array:
            inputs = {"latents": z, "timestep": timestep, "text_mask": text_mask, **text}
            then = variant(step + 1) if step + 1 < sampler.units[0] else None
            return run("denoiser", variant(step), inputs, then)["velocity"]

        start = time.perf_counter()
        latents, trajectory = sample(
            denoise,
            point,
            sampler,
            lambda done, total: on_progress("denoiser", done, total),
            None if journal is None else journal.keep_point,
        )
        seconds["denoiser"] = time.perf_counter() - start
        return Denoised(latents, seconds, trajectory, tokens.dropped)

    def _encode(self, variant: str, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """The text encoder's outputs, kept ones if there are any."""
        outputs = None if self._prompts is None else self._prompts.find(self._bundle, variant, inputs)
        if outputs is None:
            outputs = self._executor.run("text_encoder", variant, inputs)
            if self._prompts is not None:
                self._prompts.keep(self._bundle, variant, inputs, outputs)
        return outputs

    def _decode(self, latents: Array, journal: Journal | None, on_progress: Progress) -> Frames:
        """Frames [N, H, W, 3]: chunks in time, then micro-batches of frames."""
        decode = self._manifest.decode
        chunks = []
        begin = 0
        for index, chunk in enumerate(decode.chunks):
            made = None if journal is None else journal.kept("vae_temporal", index)
            if made is None:
                part = np.ascontiguousarray(latents[:, :, begin : begin + chunk.latent_frames])
                then = decode.chunks[index + 1].variant if index + 1 < len(decode.chunks) else None
                made = self._executor.run("vae_temporal", chunk.variant, {"latents": part}, then)["frames"]
                if journal is not None:
                    journal.keep("vae_temporal", index, made)
            chunks.append(made)
            begin += chunk.latent_frames
            on_progress("vae_temporal", index + 1, len(decode.chunks))
        frames = np.concatenate(chunks, axis=2)[0].transpose(1, 0, 2, 3)  # [N, C, h, w]
        batch = decode.micro_batch_frames
        # Frames decode on their own, so a short last batch is filled up with anything and cut again.
        padded = np.concatenate([frames, np.repeat(frames[-1:], -len(frames) % batch, axis=0)])
        pictures = []
        for index, first in enumerate(range(0, len(padded), batch)):
            made = None if journal is None else journal.kept("vae_spatial", index)
            if made is None:
                part = np.ascontiguousarray(padded[first : first + batch])
                then = "plain" if first + batch < len(padded) else None
                made = to_frames(self._executor.run("vae_spatial", "plain", {"frames": part}, then)["pixels"])
                if journal is not None:
                    journal.keep("vae_spatial", index, made)
            pictures.append(made)
            on_progress("vae_spatial", min(first + batch, len(frames)), len(frames))
        return np.concatenate(pictures)[: len(frames)]


def _checked_noise(noise: Array, shape: tuple[int, ...]) -> Array:
    if noise.shape != shape or noise.dtype != np.float32:
        raise RunError(f"the noise is {noise.dtype} {list(noise.shape)}; this bundle needs float32 {list(shape)}")
    return noise
