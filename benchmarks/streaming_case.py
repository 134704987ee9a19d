"""The denoiser that streaming.py measures: its sizes, its bundle, its inputs and what its arms keep on disk."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from streaming_arms import SEED, Job

from movdc.models.opensora_vae import latent_frames
from movdc.runtime.bundle import Bundle
from movdc.runtime.errors import BundleError

REPOSITORY = Path(__file__).parents[1]
TINY = REPOSITORY / "examples" / "checkpoints" / "tiny"
HEADS, CAPTION_CHANNELS, TEXT_TOKENS, FPS = 16, 128, 24, 12


@dataclass(frozen=True)
class Case:
    """A denoiser with random weights and the video that it denoises."""

    hidden_size: int
    depth: int
    frames: int
    side_pixels: int
    compile_share: float  # the budget that the bundle is compiled for, of the weights

    @property
    def weights_bytes(self) -> int:
        """Bytes of the blocks, nearly all there is: 16 C^2 weights a block, two blocks a layer, fp32."""
        return 4 * 2 * self.depth * 16 * self.hidden_size**2

    @property
    def folder(self) -> Path:
        """Where everything made for it goes."""
        sizes = f"h{self.hidden_size}-d{self.depth}-{self.frames}x{self.side_pixels}"
        return REPOSITORY / "build" / "streaming" / sizes

    @property
    def config(self) -> dict[str, Any]:
        """The denoiser's config.json."""
        return {
            "hidden_size": self.hidden_size,
            "depth": self.depth,
            "num_heads": HEADS,
            "caption_channels": CAPTION_CHANNELS,
            "model_max_length": TEXT_TOKENS,
        }

    def job(self, arm: str) -> Job:
        """What an arm measures."""
        folder, inputs = self.folder, self.folder / "inputs.npz"
        return Job(arm, self.config, FPS, self.side_pixels, str(folder / "bundle"), str(self.kept(arm)), str(inputs))

    def files(self, arm: str) -> list[Path]:
        """What the arm reads during a pass."""
        folders = [self.kept(arm), *([self.folder / "bundle"] if arm.startswith("movdc") else [])]
        return [file for folder in folders for file in folder.rglob("*") if file.is_file()]

    def kept(self, arm: str) -> Path:
        """The folder that the arm's preparation fills; no two share one, for what one maps is cold for none."""
        return self.folder / arm.replace(" ", "-")

    def log(self, arm: str) -> Path:
        """What the libraries of an arm print."""
        return self.folder / f"{arm.replace(' ', '-')}.log"

    def output(self, arm: str) -> Path:
        """What the arm's first pass gave."""
        return self.folder / f"{arm.replace(' ', '-')}.npy"

    def write_inputs(self) -> None:
        """Seeded inputs of the denoiser; the prompt is 16 tokens long."""
        side = self.side_pixels // 8
        random = np.random.default_rng(SEED)
        text_mask = np.zeros((1, TEXT_TOKENS), np.float32)
        text_mask[:, :16] = 1
        np.savez(
            self.folder / "inputs.npz",
            latents=random.standard_normal((1, 4, latent_frames(self.frames), side, side), np.float32),
            timestep=np.array([500], np.float32),
            text=random.standard_normal((1, TEXT_TOKENS, CAPTION_CHANNELS), np.float32),
            text_mask=text_mask,
        )

    def compile(self) -> None:
        """Make the bundle through the command line, unless there is one for this budget that this movdc reads."""
        budget_bytes = round(self.compile_share * self.weights_bytes)
        try:
            made = Bundle.read(self.folder / "bundle").manifest.budget_bytes == budget_bytes
        except BundleError:
            made = False
        if not made:
            spec = {
                "movdc": 1,
                "family": "opensora-1.2",
                "text_encoder": {"weights": str(TINY / "text_encoder"), "max_tokens": TEXT_TOKENS},
                "denoiser": {"weights": f"random:{SEED}", "config": self.config},
                "vae": {"weights": str(TINY / "vae")},
                "video": {"frames": self.frames, "height": self.side_pixels, "width": self.side_pixels, "fps": FPS},
                "sampler": {"steps": 4, "guidance": 4.0},
                "prompt": {"aesthetic": None},
                "target": "executorch-xnnpack",
                "device": "host",
                "memory_budget": budget_bytes,
            }
            path = self.folder / "spec.yaml"
            path.write_text(yaml.safe_dump(spec, sort_keys=False))
            movdc = Path(sys.executable).with_name("movdc")
            subprocess.run([movdc, "compile", path, "-o", self.folder / "bundle"], check=True)

    def prepare(self, arm: str) -> None:
        """Make what the arm keeps on disk, once."""
        kept, made_from_s = self.kept(arm), 0.0
        done = kept.with_suffix(".done")
        if arm.startswith("movdc"):
            self.compile()
            made_from_s = (self.folder / "bundle" / "bundle.json").stat().st_mtime
        if not done.exists() or done.stat().st_mtime < made_from_s:
            shutil.rmtree(kept, ignore_errors=True)
            kept.mkdir()
            with self.log(arm).open("w") as log:
                subprocess.run([*command(self.job(arm)), "prepare"], check=True, stdout=log, stderr=log)
            done.touch()


def command(job: Job) -> list[str | Path]:
    """The process that serves a job."""
    return [sys.executable, Path(__file__).with_name("streaming_arms.py"), json.dumps(asdict(job))]
