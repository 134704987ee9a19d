"""The phases: the spatial autoencoder, the temporal one behind it, then the denoiser and the text encoder together.

Letters in shapes: B clips of a batch, N frames, T latent frames, K captions, L text tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import T5Config, T5EncoderModel

from movdc.evaluate.shape_clips import FRAMES, PIXELS
from movdc.models.stdit3 import STDiT3, STDiT3Config
from tools.train_example.autoencoder import CHUNK_FRAMES, VideoAutoencoder
from tools.train_example.clips import Captions, Named, random_names, render
from tools.train_example.training import Losses

FPS = 12.0
JITTER = 0.05  # of a latent's deviation: decoders must bear what a denoiser gets wrong
KL_WEIGHT = 1e-6
START_LOG_VARIANCE = -8.0
NULL_SHARE = 0.1  # of the captions are replaced by the null caption, which guidance needs
NO_BACKGROUND_SHARE = 0.1
ENCODED_CLIPS = 64  # at a time, when the cache of latents is made


def _pixel_loss(made: Tensor, frames: Tensor) -> Tensor:
    """L1, squares, and squares of means over 4x4 pixels, of frames [N, 3, H, W]."""
    error = made - frames
    return 0.3 * error.abs().mean() + 3 * error.square().mean() + 4 * F.avg_pool2d(error, 4).square().mean()


def _drawn(mean: Tensor, log_variance: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A sample of the posterior with jitter, and its KL divergence from the standard normal."""
    noise = torch.randn(mean.shape, generator=generator, device=mean.device)
    jitter = JITTER * torch.randn(mean.shape, generator=generator, device=mean.device) * mean.detach().std()
    kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
    return mean + noise * (0.5 * log_variance).exp() + jitter, kl


@torch.no_grad()
def start_near_identity(vae: VideoAutoencoder) -> None:
    """Let the spatial side start out as a resampler of the colours, and both posteriors narrow.

    From the usual start both would first learn for thousands of steps that noise of deviation 1 is worth removing.
    """
    for name, module in vae.spatial_vae.named_modules():
        if isinstance(module, nn.Conv2d):
            residual = name.endswith("conv2")
            module.weight *= 0.05 if residual else 0.5
            if not residual and not name.endswith("conv1"):
                module.weight += nn.init.dirac_(torch.empty_like(module.weight))
        elif name.endswith("to_out.0"):
            module.weight *= 0.05
    for moments in (vae.spatial_vae["module"].quant_conv, vae.temporal_vae.quant_conv.conv):
        moments.weight[4:] *= 0.1
        moments.bias[4:] = START_LOG_VARIANCE


def spatial_losses(vae: VideoAutoencoder, clips: int, frames: int) -> Callable[[torch.Generator], Losses]:
    """Reconstruction of `frames` frames from each of `clips` clips, a fifth of them in arbitrary colours."""

    def losses(generator: torch.Generator) -> Losses:
        drawn = render(random_names(clips, generator), generator, wide=True, any_colour=0.2)
        chosen = torch.randperm(FRAMES, generator=generator, device=generator.device)[:frames]
        images = drawn[:, chosen].flatten(0, 1)
        latents, kl = _drawn(*vae.frame_moments(images), generator)
        made = vae.decode_frames(latents)
        pixels = _pixel_loss(made, images)
        return {"loss": pixels + KL_WEIGHT * kl, "mse": F.mse_loss(made, images)}

    return losses


@torch.no_grad()
def frame_statistics(vae: VideoAutoencoder, generator: torch.Generator, clips: int) -> tuple[Tensor, Tensor]:
    """Mean and deviation [4] of the frame latents."""
    drawn = render(random_names(clips, generator), generator, wide=True)[:, ::8]
    mean, _ = vae.frame_moments(drawn.flatten(0, 1))
    return mean.mean(dim=(0, 2, 3)), mean.std(dim=(0, 2, 3))


def temporal_losses(vae: VideoAutoencoder, clips: int, frames: int) -> Callable[[torch.Generator], Losses]:
    """Reconstruction of chunks of 17 frames: their latents, and the pixels of `frames` of them.

    The spatial encoder stays as it is; its decoder learns on, for it only ever sees what the temporal side made.
    """
    vae.requires_grad_(True)
    vae.spatial_vae["module"].encoder.requires_grad_(False)
    vae.spatial_vae["module"].quant_conv.requires_grad_(False)

    def losses(generator: torch.Generator) -> Losses:
        drawn = render(random_names(clips, generator), generator, wide=True)
        start = int(torch.randint(FRAMES - CHUNK_FRAMES + 1, (), generator=generator, device=generator.device))
        drawn = drawn[:, start : start + CHUNK_FRAMES]
        with torch.no_grad():
            mean, _ = vae.frame_moments(drawn.flatten(0, 1))
        target = mean.unflatten(0, drawn.shape[:2]).transpose(1, 2)
        latents, kl = _drawn(*vae.temporal_vae.moments(target), generator)
        made = vae.temporal_vae(latents, CHUNK_FRAMES)
        chosen = torch.randperm(CHUNK_FRAMES, generator=generator, device=generator.device)[:frames]
        decoded = vae.decode_frames(made[:, :, chosen].transpose(1, 2).flatten(0, 1))
        images = drawn[:, chosen].flatten(0, 1)
        loss = F.mse_loss(made, target) + 0.2 * F.l1_loss(made, target) + _pixel_loss(decoded, images) + KL_WEIGHT * kl
        return {"loss": loss, "latent mse": F.mse_loss(made, target), "mse": F.mse_loss(decoded, images)}

    return losses


class TextToVideo(nn.Module):
    """The two models that are trained together."""

    def __init__(self, text_config: T5Config, denoiser_config: STDiT3Config) -> None:
        super().__init__()
        self.text_encoder = T5EncoderModel(text_config).eval()  # eval: no dropout
        self.denoiser = STDiT3(denoiser_config)
        for module in self.denoiser.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.zeros_(self.denoiser.final_layer.linear.weight)

    def text(self, captions: Captions) -> Tensor:
        """Text states [K, L, C] of all captions."""
        states: Tensor = self.text_encoder(input_ids=captions.ids, attention_mask=captions.mask).last_hidden_state
        return states

    def velocity(self, noisy: Tensor, t: Tensor, text: Tensor, mask: Tensor) -> Tensor:
        """Noisy latents [B, 4, T, h, w], t [B] in (0, 1], text [B, L, C] and mask [B, L] to velocities."""
        out: Tensor = self.denoiser(noisy, t * 1000, text[:, None], mask, fps=FPS, height=PIXELS, width=PIXELS)
        return out[:, :4]


@dataclass(frozen=True)
class LatentClips:
    """Encoded clips [n, 4, T, h, w] and the caption [n] of each, as its row."""

    latents: Tensor
    caption: Tensor


@torch.no_grad()
def encode_clips(vae: VideoAutoencoder, names: Named, each: int, generator: torch.Generator) -> LatentClips:
    """`each` clips of every caption; gives the autoencoder the shift and scale that make their latents standard."""
    caption = torch.arange(len(names), device=generator.device).repeat_interleave(each)
    order = torch.randperm(len(caption), generator=generator, device=generator.device)
    parts = []
    for rows in caption[order].split(ENCODED_CLIPS):
        chosen = Named(names.colour[rows], names.background[rows], names.shape[rows], names.direction[rows])
        parts.append(vae.encode(render(chosen, generator)) * vae.scale + vae.shift)
    latents = torch.cat(parts)
    vae.shift.copy_(latents.mean(dim=(0, 2, 3, 4), keepdim=True))
    vae.scale.copy_(latents.std(dim=(0, 2, 3, 4), keepdim=True))
    return LatentClips((latents - vae.shift) / vae.scale, caption[order])


def noise_levels(count: int, generator: torch.Generator) -> Tensor:
    """t [B]: half of them uniform, half near 1, where the caption alone says what will move where.

    The published transform would put most of them below a half for clips this small.
    """
    uniform = torch.rand(count, generator=generator, device=generator.device)
    return torch.where(torch.arange(count, device=generator.device) % 2 == 0, uniform, 1 - uniform.square() / 2)


def flow_losses(
    model: TextToVideo, clips: LatentClips, captions: Captions, batch: int, compiled: bool
) -> Callable[[torch.Generator], Losses]:
    """Rectified flow: the velocity from noise to data, at half precision where there is a GPU."""
    known = int(clips.caption.max()) + 1  # captions; as many follow without the background
    velocity = torch.compile(model.velocity) if compiled else model.velocity

    def losses(generator: torch.Generator) -> Losses:
        device = generator.device
        rows = torch.randint(len(clips.latents), (batch,), generator=generator, device=device)
        data = clips.latents[rows]
        noise = torch.randn(data.shape, generator=generator, device=device)
        t = noise_levels(batch, generator)
        shown = t[:, None, None, None, None]
        caption = clips.caption[rows]
        short = torch.rand(batch, generator=generator, device=device) < NO_BACKGROUND_SHARE
        caption = torch.where(short, caption + known, caption)
        null = torch.rand(batch, generator=generator, device=device) < NULL_SHARE
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            text = model.text(captions)[caption]
            text = torch.where(null[:, None, None], model.denoiser.y_embedder.y_embedding, text)
            made = velocity(torch.lerp(data, noise, shown), t, text, captions.mask[caption])
        error = (made - (data - noise)).square().mean(dim=(1, 2, 3, 4))
        early = (t > 0.9).float()
        return {"loss": error.mean(), "at t > 0.9": (error * early).sum() / early.sum().clamp(min=1)}

    return losses
