"""The family opensora-1.2: checkpoints, stages, timestep shift, decode chunks, prompt rules (arXiv 2412.20404)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, T5Config, T5EncoderModel

from movdc.compiler.checkpoints import (
    Checkpoint,
    bind,
    check_tensors,
    checkpoint_of,
    config_of,
    folder_of,
    source_of,
)
from movdc.compiler.device import Machine
from movdc.compiler.family import Family
from movdc.compiler.program import Graph, Program, Stage, TokenLayout
from movdc.compiler.spec import SpecFile, VideoSpec
from movdc.compiler.trace import trace
from movdc.models.opensora_vae import OpenSoraVAEConfig, SpatialDecode, TemporalDecode, decode_chunks, latent_frames
from movdc.models.stdit3 import STDiT3, STDiT3Config
from movdc.runtime.bundle import Chunk, Decode, Prompt, Sampler, TensorSpec

Config = TypeVar("Config")
LATENT_CHANNELS = 4
PIXELS_PER_LATENT = 8
BASE_PIXELS = 512 * 512  # the resolution at which the timestep shift is 1
TOKENIZER = "tokenizer/tokenizer.json"
_TIED = {"encoder.embed_tokens.weight": "shared.weight"}  # tensors that may be stored under the other name only
# What published files hold and no stage needs: the rest of a whole T5, and the encoders of both autoencoders.
_UNREAD = {
    "text_encoder": ("decoder.*", "lm_head.*"),
    "denoiser": (),
    "vae": ("*encoder*", "*.quant_conv.*"),
}


class TextEncoder(nn.Module):
    """Stage: token ids [1, L] and mask [1, L] to text states [1, L, D] (T5 v1.1, arXiv 1910.10683)."""

    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.t5 = T5EncoderModel(config)

    def forward(self, input_ids: Tensor, text_mask: Tensor) -> Tensor:
        """Encode; padded positions are not attended to."""
        states: Tensor = self.t5(input_ids=input_ids, attention_mask=text_mask).last_hidden_state
        return states


class Denoiser(nn.Module):
    """Stage: one guided evaluation, the caption in row 0 and the null caption in row 1."""

    def __init__(self, config: STDiT3Config, video: VideoSpec) -> None:
        super().__init__()
        self.stdit = STDiT3(config)
        self.video = video

    def forward(self, latents: Tensor, timestep: Tensor, text: Tensor, text_mask: Tensor) -> Tensor:
        """Latents [1, 4, T, H, W], timestep [1], text [1, L, D], mask [1, L] to velocities [2, 4, T, H, W]."""
        # The null caption keeps the prompt's mask: it is as long as the prompt (as in training).
        null = self.stdit.y_embedder.y_embedding[None, : text.shape[1]]
        velocity: Tensor = self.stdit(
            torch.cat((latents, latents)),
            torch.cat((timestep, timestep)),
            torch.cat((text, null))[:, None],
            text_mask,
            fps=float(self.video.fps),
            height=self.video.height,
            width=self.video.width,
        )
        return velocity[:, :LATENT_CHANNELS]


class OpenSora(Family):
    """Open-Sora 1.2: T5 encoder, STDiT3, spatial VAE behind a temporal VAE."""

    name = "opensora-1.2"
    micro_batches = (4, 2, 1)  # 4 is the published choice; frames are decoded on their own, so any gives the same video

    def checkpoints(self, spec_file: SpecFile) -> tuple[Checkpoint, ...]:
        """The three models, and the tokenizer if it has a folder of its own."""
        models = tuple(checkpoint_of(spec_file, section) for section in ("text_encoder", "denoiser", "vae"))
        given = spec_file.spec.text_encoder.tokenizer
        if given is None and models[0].folder is None:
            raise spec_file.error(
                "text_encoder.tokenizer", "random weights bring no tokenizer; name a folder with its files here"
            )
        return models + ((Checkpoint("tokenizer", spec_file.path.parent / given),) if given else ())

    def sampler(self, spec_file: SpecFile) -> Sampler:
        """Euler over the rectified flow, from the spec's sizes."""
        spec = spec_file.spec
        _check_frames(spec_file)
        return Sampler(
            solver="euler",
            prediction="rectified_flow",
            units=(spec.sampler.steps,),
            shift=timestep_shift(spec.video),
            rounded=spec.sampler.rounded,
            guidance=spec.sampler.guidance,
            latent=_latent(spec.video, _vae_config(spec_file)),
        )

    def trace(self, spec_file: SpecFile, machine: Machine, micro_batch_frames: int) -> Program:
        """Trace the four stages at the spec's sizes."""
        spec = spec_file.spec
        vae_config = _vae_config(spec_file)
        chunks = decode_chunks(spec.video.frames, vae_config.micro_frame_size)
        latent = _latent(spec.video, vae_config)
        text_config = _sized(spec_file, "text_encoder", lambda config: T5Config(**config))
        denoiser_config = _sized(spec_file, "denoiser", STDiT3Config.from_dict)
        _check_tensors(spec_file, text_config, denoiser_config, vae_config)
        tokenizer_json, pad_id = _tokenizer(spec_file)
        prompt = Prompt(
            tokenizer=TOKENIZER,
            max_tokens=spec.text_encoder.max_tokens,
            buckets=_buckets(spec_file),
            pad_id=pad_id,
            aesthetic=spec.prompt.aesthetic,
            cleaning="open-sora",
        )
        return Program(
            spec=spec,
            machine=machine,
            stages=(
                _text_stage(spec_file, prompt, text_config),
                _denoiser_stage(spec_file, prompt, denoiser_config, latent, text_config.d_model),
                *_vae_stages(spec_file, vae_config, chunks, latent, micro_batch_frames),
            ),
            sampler=self.sampler(spec_file),
            decode=Decode(
                chunks=tuple(Chunk(variant=_chunk_name(n), latent_frames=t, frames=n) for t, n in chunks),
                micro_batch_frames=micro_batch_frames,
            ),
            prompt=prompt,
            tokenizer_json=tokenizer_json,
        )


def _latent(video: VideoSpec, vae: OpenSoraVAEConfig) -> tuple[int, int, int, int, int]:
    height, width = video.height // PIXELS_PER_LATENT, video.width // PIXELS_PER_LATENT
    return (1, LATENT_CHANNELS, latent_frames(video.frames, vae.micro_frame_size), height, width)


def _check_frames(spec_file: SpecFile) -> None:
    frames = spec_file.spec.video.frames
    if 1 < frames < 17:  # their timestep shift would be 0
        raise spec_file.error("video.frames", f"{frames} is neither 1 nor at least 17; take 1 or 17")


def _buckets(spec_file: SpecFile) -> tuple[int, ...]:
    text = spec_file.spec.text_encoder
    lengths = [*text.buckets, text.max_tokens]
    if lengths != sorted(set(lengths)):
        raise spec_file.error(
            "text_encoder.buckets", f"{text.buckets}: write them from the shortest up, all below {text.max_tokens}"
        )
    return tuple(text.buckets)


def timestep_shift(video: VideoSpec) -> float:
    """r of the timestep transform t' = r t / (1 + (r - 1) t): larger videos spend more steps at high noise."""
    latent_length = 1 if video.frames == 1 else video.frames // 17 * 5
    return math.sqrt(video.height * video.width / BASE_PIXELS) * math.sqrt(latent_length)


def _f32(name: str, *shape: int) -> TensorSpec:
    return TensorSpec(name=name, dtype="f32", shape=shape)


def _text_stage(spec_file: SpecFile, prompt: Prompt, config: T5Config) -> Stage:
    config._attn_implementation = "eager"

    def traced(tokens: int) -> Graph:
        inputs = (TensorSpec(name="input_ids", dtype="i64", shape=(1, tokens)), _f32("text_mask", 1, tokens))
        return _trace(spec_file, "text_encoder", "t5.", partial(TextEncoder, config), inputs, "text")

    return Stage("text_encoder", "once", {prompt.variant("plain", tokens): traced(tokens) for tokens in prompt.lengths})


def _denoiser_stage(
    spec_file: SpecFile, prompt: Prompt, config: STDiT3Config, latent: tuple[int, ...], text_channels: int
) -> Stage:
    spec = spec_file.spec
    if config.caption_channels != text_channels:
        raise spec_file.error(
            "denoiser.weights",
            f"expects text of {config.caption_channels} channels, the text encoder gives {text_channels}; "
            "take both from one release",
        )
    if prompt.max_tokens > config.model_max_length:
        raise spec_file.error(
            "text_encoder.max_tokens",
            f"{prompt.max_tokens} is more than the denoiser's {config.model_max_length}; lower it",
        )

    def traced(tokens: int, frames: int) -> Graph:
        inputs = (
            _f32("latents", *latent[:2], frames, *latent[3:]),
            _f32("timestep", 1),
            _f32("text", 1, tokens, text_channels),
            _f32("text_mask", 1, tokens),
        )
        return _trace(spec_file, "denoiser", "stdit.", partial(Denoiser, config, spec.video), inputs, "velocity")

    def plain(tokens: int) -> Graph:
        retrace = partial(traced, tokens)
        layout = TokenLayout(
            frames=latent[2],
            attentions=("stdit.*_blocks.*.attn", "stdit.*_blocks.*.cross_attn"),
            mlps=("stdit.*_blocks.*.mlp",),
            retrace=retrace,
        )
        return replace(retrace(latent[2]), layout=layout)

    return Stage("denoiser", "per_step", {prompt.variant("plain", tokens): plain(tokens) for tokens in prompt.lengths})


def _vae_stages(
    spec_file: SpecFile,
    config: OpenSoraVAEConfig,
    chunks: tuple[tuple[int, int], ...],
    latent: tuple[int, ...],
    micro_batch_frames: int,
) -> tuple[Stage, Stage]:
    height, width = latent[-2:]
    temporal = {
        _chunk_name(frames): _trace(
            spec_file,
            "vae",
            "",
            partial(TemporalDecode, config, frames),
            (_f32("latents", 1, LATENT_CHANNELS, latents, height, width),),
            "frames",
        )
        for latents, frames in dict.fromkeys(chunks)
    }
    inputs = (_f32("frames", micro_batch_frames, LATENT_CHANNELS, height, width),)
    spatial = _trace(spec_file, "vae", "", partial(SpatialDecode, config), inputs, "pixels")
    return Stage("vae_temporal", "per_chunk", temporal), Stage("vae_spatial", "per_chunk", {"plain": spatial})


def _chunk_name(frames: int) -> str:
    return f"frames{frames}"


def _shapes(module: nn.Module, prefix: str) -> dict[str, tuple[int, ...]]:
    """The tensors of a module on the meta device, under their published names."""
    return {key.removeprefix(prefix): tuple(tensor.shape) for key, tensor in module.state_dict().items()}


def _check_tensors(spec_file: SpecFile, text: T5Config, denoiser: STDiT3Config, vae: OpenSoraVAEConfig) -> None:
    """All three checkpoints have the tensors of their models: told within seconds, before the first trace."""
    with torch.device("meta"):
        shapes = {
            "text_encoder": _shapes(TextEncoder(text), "t5."),
            "denoiser": _shapes(Denoiser(denoiser, spec_file.spec.video), "stdit."),
            "vae": _shapes(TemporalDecode(vae, 1), "") | _shapes(SpatialDecode(vae), ""),
        }
    for section, wanted in shapes.items():
        check_tensors(spec_file, section, wanted, _UNREAD[section], _TIED)


def _trace(
    spec_file: SpecFile,
    section: str,
    prefix: str,
    build: Callable[[], nn.Module],
    inputs: tuple[TensorSpec, ...],
    output: str,
) -> Graph:
    with torch.device("meta"):
        wanted = _shapes(build(), prefix)
    bound = bind(spec_file, section, wanted, source_of(spec_file, section, wanted).refs(), _TIED)
    return trace(build, inputs, (output,), {prefix + key: ref for key, ref in bound.items()})


def _sized(spec_file: SpecFile, section: str, parse: Callable[[dict[str, Any]], Config]) -> Config:
    """The sizes of a model; a config that its model does not understand is an error."""
    config = config_of(spec_file, section)
    try:
        return parse(config)
    except (ValueError, TypeError, KeyError, OSError) as error:
        key = f"{section}.weights" if getattr(spec_file.spec, section).config is None else f"{section}.config"
        raise spec_file.error(key, f"the config cannot be used: {error}; take it from the published release") from None


def _vae_config(spec_file: SpecFile) -> OpenSoraVAEConfig:
    def parse(config: dict[str, Any]) -> OpenSoraVAEConfig:
        if spec_file.spec.vae.config is not None:
            return OpenSoraVAEConfig.from_dict(config, config.get("spatial"))
        return OpenSoraVAEConfig.from_folder(folder_of(spec_file, "vae"))

    return _sized(spec_file, "vae", parse)


def _tokenizer(spec_file: SpecFile) -> tuple[bytes, int]:
    """The tokenizer as a `tokenizers` JSON file, and its padding id; nothing where neither can be had or is needed."""
    given = spec_file.spec.text_encoder.tokenizer
    if given is None and spec_file.spec.text_encoder.weights.startswith("random:"):
        return b"", 0
    folder = folder_of(spec_file, "text_encoder") if given is None else spec_file.path.parent / given
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        return tokenizer.backend_tokenizer.to_str(pretty=False).encode(), int(tokenizer.pad_token_id)
    except (OSError, ValueError, AttributeError) as error:
        reason = str(error).splitlines()[0]
        key = "text_encoder.weights" if given is None else "text_encoder.tokenizer"
        raise spec_file.error(key, f"{folder} holds no T5 tokenizer ({reason}); fetch its files again") from None
