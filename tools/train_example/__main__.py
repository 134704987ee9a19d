"""Train the example checkpoint from nothing, and measure it.

    python -m tools.train_example out/train                                                # everything
    python -m tools.train_example out/train --autoencoder examples/checkpoints/tiny/vae    # all but the autoencoder
    python -m tools.train_example out/train --measure-only                                 # measure what lies there

The checkpoint comes to out/train/checkpoint in the published layout. A stop, by Ctrl-C or a crash, costs a minute at
most: the same command goes on.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import torch
import typer

from tools.train_example import layout, phases
from tools.train_example.autoencoder import VideoAutoencoder
from tools.train_example.clips import Captions, named, training_captions
from tools.train_example.measure import measure, reconstruction, write_sheet
from tools.train_example.training import Schedule, StoppedError, train

EXAMPLE = Path(__file__).parents[2] / "examples" / "checkpoints" / "tiny"
SHARES = (0.2, 0.3, 0.5)  # of a time limit, for the three phases


@dataclass(frozen=True)
class Preset:
    """How much of everything."""

    spatial: Schedule
    spatial_clips: int
    spatial_frames: int  # of each clip
    temporal: Schedule
    temporal_clips: int
    temporal_frames: int  # of each clip are decoded to pixels
    flow: Schedule
    flow_batch: int
    clips_each: int  # of every caption
    captions: int | None = None  # learnt, of those that are not held out
    measured: int = 100  # captions

    def within(self, seconds: float) -> Preset:
        """The same within a time limit for the training."""
        spatial, temporal, flow = (
            replace(schedule, seconds=share * seconds)
            for schedule, share in zip((self.spatial, self.temporal, self.flow), SHARES, strict=True)
        )
        return replace(self, spatial=spatial, temporal=temporal, flow=flow)


PRESETS = {
    "gpu": Preset(
        spatial=Schedule(3200, 2e-3, 100),
        spatial_clips=64,
        spatial_frames=2,
        temporal=Schedule(8000, 2e-3, 50),
        temporal_clips=32,
        temporal_frames=3,
        flow=Schedule(6800, 1e-3, 500),
        flow_batch=512,
        clips_each=128,
    ),
    "cpu": Preset(
        spatial=Schedule(2200, 1.5e-3, 50),
        spatial_clips=8,
        spatial_frames=1,
        temporal=Schedule(1500, 2e-3, 50),
        temporal_clips=4,
        temporal_frames=2,
        flow=Schedule(12000, 1e-3, 200),
        flow_batch=16,
        clips_each=24,
    ),
    "smoke": Preset(  # every line of the code, and nothing learnt
        spatial=Schedule(3, 1e-3, 2),
        spatial_clips=2,
        spatial_frames=1,
        temporal=Schedule(2, 1e-3, 2),
        temporal_clips=1,
        temporal_frames=1,
        flow=Schedule(2, 1e-3, 2),
        flow_batch=2,
        clips_each=1,
        captions=4,
        measured=1,
    ),
}


def run(out: Path, preset: Preset, seed: int, device: torch.device, autoencoder: Path | None) -> None:
    """All phases, each from where it stands, and the checkpoint."""
    torch.manual_seed(seed)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    model, vae = layout.models_like(EXAMPLE)
    model, vae = model.to(device), vae.to(device)
    generator = torch.Generator(device)
    state = out / "state"
    state.mkdir(parents=True, exist_ok=True)
    if autoencoder is None:
        train_autoencoder(vae, preset, state, seed, generator)
    else:
        layout.read_autoencoder(vae, autoencoder)
    print(reconstruction(vae, generator.manual_seed(seed), preset.spatial_clips), flush=True)

    learnt = training_captions()[: preset.captions]
    vae.eval().requires_grad_(False)
    encoded = phases.encode_clips(vae, named(learnt, device), preset.clips_each, generator.manual_seed(seed))
    captions = Captions.of(learnt, EXAMPLE / "text_encoder" / "tokenizer.json", device)
    losses = phases.flow_losses(model, encoded, captions, preset.flow_batch, compiled=device.type == "cuda")
    train("flow", model, losses, preset.flow, state, seed)
    layout.write(out / "checkpoint", EXAMPLE, model, vae)


def train_autoencoder(
    vae: VideoAutoencoder, preset: Preset, state: Path, seed: int, generator: torch.Generator
) -> None:
    """The spatial side, then the temporal one between its halves."""
    phases.start_near_identity(vae)
    losses = phases.spatial_losses(vae, preset.spatial_clips, preset.spatial_frames)
    train("spatial", vae.spatial_vae, losses, preset.spatial, state, seed)
    vae.normalise_frame_latents(*phases.frame_statistics(vae, generator.manual_seed(seed), preset.spatial_clips))
    losses = phases.temporal_losses(vae, preset.temporal_clips, preset.temporal_frames)
    train("temporal", vae, losses, preset.temporal, state, seed)


def main(
    out: Annotated[Path, typer.Argument(help="Where the checkpoint, its figures and the state of the training go.")],
    preset: Annotated[str, typer.Option(help=f"How much to train: {', '.join(PRESETS)}.")] = "",
    seconds: Annotated[float, typer.Option(min=1, help="End the training within so many, with its schedule.")] = 1e9,
    seed: Annotated[int, typer.Option(min=0, max=2**20, help="Decides everything that is drawn.")] = 0,
    autoencoder: Annotated[
        Path | None, typer.Option(help="Take the autoencoder from this folder, instead of training one.")
    ] = None,
    measure_only: Annotated[
        bool, typer.Option("--measure-only", help="Measure the checkpoint that lies there.")
    ] = False,
) -> None:
    """Train and measure."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    preset = preset or ("gpu" if device.type == "cuda" else "cpu")
    if preset not in PRESETS:
        raise typer.BadParameter(f"preset {preset!r} is none of {', '.join(PRESETS)}")
    if autoencoder is not None and not (autoencoder / "model.safetensors").is_file():
        raise typer.BadParameter(f"{autoencoder} holds no model.safetensors; give the folder vae of a checkpoint")
    try:
        if not measure_only:
            run(out, PRESETS[preset].within(seconds), seed, device, autoencoder)
    except StoppedError as stopped:
        print(stopped)
        sys.exit(130)
    if not (out / "checkpoint").is_dir():
        raise typer.BadParameter(f"{out} holds no checkpoint; leave --measure-only out to train one")
    model, vae = layout.read(out / "checkpoint")
    tokenizer = out / "checkpoint" / "text_encoder" / "tokenizer.json"
    measured = measure(model.to(device).eval(), vae.to(device).eval(), tokenizer, PRESETS[preset].measured, seed)
    print(*measured.lines, sep="\n")
    (out / "measured.txt").write_text("\n".join(measured.lines) + "\n")
    write_sheet(out / "samples.png", measured.clips[:20])


if __name__ == "__main__":
    typer.run(main)
