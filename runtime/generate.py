"""Generating: a prompt through the four stages of a bundle to frames."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from movdc.runtime.bundle import Bundle
from movdc.runtime.errors import RunError
from movdc.runtime.prompt import prepare, tokenize
from movdc.runtime.sampler import Trajectory, initial_noise, sample
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


class Generator:
    """Makes videos with one bundle."""

    def __init__(self, bundle: Bundle, executor: StageRunner) -> None:
        self._manifest = bundle.manifest
        self._denoiser_variants = bundle.stages["denoiser"].variants
        self._executor = executor

    def generate(
        self,
        text: str,
        *,
        seed: int = 0,
        noise: Array | None = None,
        steps: int | None = None,
        on_progress: Progress = lambda stage, done, total: None,
    ) -> Result:
        """Make one video; raises RunError for a prompt or noise that cannot be used."""
        manifest, run = self._manifest, self._executor.run
        sampler = manifest.sampler
        if steps is not None:
            sampler = sampler.model_copy(update={"units": (steps,) * len(sampler.units)})
        noise = initial_noise(seed, sampler.latent) if noise is None else _checked_noise(noise, sampler.latent)
        tokenizer_json = self._executor.read_file(manifest.prompt.tokenizer)
        tokens = tokenize(prepare(text, manifest.prompt), manifest.prompt, tokenizer_json)
        seconds: dict[str, float] = {}
        text_mask = tokens.mask.astype(np.float32)

        on_progress("text_encoder", 0, 1)
        start = time.perf_counter()
        states = run("text_encoder", "plain", {"input_ids": tokens.ids, "text_mask": text_mask})["text"]
        on_progress("text_encoder", 1, 1)
        seconds["text_encoder"] = time.perf_counter() - start

        def variant(step: int) -> str | None:
            if step == sampler.units[0]:
                return None
            merged = step < sampler.merged_steps and "merged" in self._denoiser_variants
            return "merged" if merged else "plain"

        def denoise(z: Array, timestep: Array, step: int) -> Array:
            inputs = {"latents": z, "timestep": timestep, "text": states, "text_mask": text_mask}
            return run("denoiser", variant(step) or "plain", inputs, variant(step + 1))["velocity"]

        start = time.perf_counter()
        latents, trajectory = sample(denoise, noise, sampler, lambda done, total: on_progress("denoiser", done, total))
        seconds["denoiser"] = time.perf_counter() - start

        start = time.perf_counter()
        pixels = self._decode(latents, on_progress)
        seconds["vae"] = time.perf_counter() - start
        return Result(latents, to_frames(pixels), seconds, trajectory, tokens.dropped)

    def _decode(self, latents: Array, on_progress: Progress) -> Array:
        """Pixels [N, 3, H, W] fp32: chunks in time, then micro-batches of frames."""
        decode = self._manifest.decode
        chunks = []
        begin = 0
        for index, chunk in enumerate(decode.chunks):
            part = np.ascontiguousarray(latents[:, :, begin : begin + chunk.latent_frames])
            then = decode.chunks[index + 1].variant if index + 1 < len(decode.chunks) else None
            chunks.append(self._executor.run("vae_temporal", chunk.variant, {"latents": part}, then)["frames"])
            begin += chunk.latent_frames
            on_progress("vae_temporal", index + 1, len(decode.chunks))
        frames = np.concatenate(chunks, axis=2)[0].transpose(1, 0, 2, 3)  # [N, C, h, w]
        batch = decode.micro_batch_frames
        # Frames decode on their own, so a short last batch is filled up with anything and cut again.
        padded = np.concatenate([frames, np.repeat(frames[-1:], -len(frames) % batch, axis=0)])
        pixels = []
        for first in range(0, len(padded), batch):
            part = np.ascontiguousarray(padded[first : first + batch])
            then = "plain" if first + batch < len(padded) else None
            pixels.append(self._executor.run("vae_spatial", "plain", {"frames": part}, then)["pixels"])
            on_progress("vae_spatial", min(first + batch, len(frames)), len(frames))
        return np.concatenate(pixels)[: len(frames)]


def _checked_noise(noise: Array, shape: tuple[int, ...]) -> Array:
    if noise.shape != shape or noise.dtype != np.float32:
        raise RunError(f"the noise is {noise.dtype} {list(noise.shape)}; this bundle needs float32 {list(shape)}")
    return noise
