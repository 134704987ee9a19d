"""The published layout of a checkpoint: written whole, and read back."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import T5Config

from movdc.models.stdit3 import STDiT3Config
from tools.train_example.autoencoder import VideoAutoencoder
from tools.train_example.phases import TextToVideo

TIED = "encoder.embed_tokens.weight"  # T5 stores it once, as shared.weight
TOKENIZER_FILES = ("spiece.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
CONFIGS = ("denoiser/config.json", "text_encoder/config.json", "vae/config.json", "vae/spatial/config.json")


def models_like(folder: Path) -> tuple[TextToVideo, VideoAutoencoder]:
    """New models of the sizes that a checkpoint's configs have."""
    text = T5Config(**json.loads((folder / "text_encoder" / "config.json").read_text()))
    denoiser = STDiT3Config.from_dict(json.loads((folder / "denoiser" / "config.json").read_text()))
    return TextToVideo(text, denoiser), VideoAutoencoder(folder / "vae")


def read(folder: Path) -> tuple[TextToVideo, VideoAutoencoder]:
    """The models of a checkpoint with its weights."""
    model, vae = models_like(folder)
    text = load_file(folder / "text_encoder" / "model.safetensors")
    model.text_encoder.load_state_dict(text | {TIED: text["shared.weight"]})
    model.denoiser.load_state_dict(load_file(folder / "denoiser" / "model.safetensors"))
    read_autoencoder(vae, folder / "vae")
    return model, vae


def read_autoencoder(vae: VideoAutoencoder, folder: Path) -> None:
    """Put the weights of a checkpoint's autoencoder into one of the same sizes."""
    vae.load_state_dict(load_file(folder / "model.safetensors"))


def write(folder: Path, like: Path, model: TextToVideo, vae: VideoAutoencoder) -> None:
    """Write weights, configs and tokenizer below `folder`, each file whole; sizes and tokenizer are those of `like`."""
    for name in (*CONFIGS, *(f"text_encoder/{file}" for file in TOKENIZER_FILES)):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if folder.resolve() != like.resolve():
            shutil.copyfile(like / name, folder / name)
    config = json.loads((folder / "vae" / "config.json").read_text())
    config |= {name: [round(float(value), 6) for value in getattr(vae, name).flatten()] for name in ("scale", "shift")}
    (folder / "vae" / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    for name, module in (("text_encoder", model.text_encoder), ("denoiser", model.denoiser), ("vae", vae)):
        _save(folder / name / "model.safetensors", module)


def _save(path: Path, module: nn.Module) -> None:
    tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in module.state_dict().items() if key != TIED}
    partial = path.with_name(f".{path.name}.partial")
    save_file({key: tensor.to(torch.float32) for key, tensor in tensors.items()}, partial, metadata={"format": "pt"})
    os.replace(partial, path)
