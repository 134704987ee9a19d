"""The whole sampler of the tiny checkpoint in eager fp32 against the recorded runs."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import T5Config

from movdc.compiler.spec import load_spec
from movdc.models.opensora import Denoiser, TextEncoder, timestep_shift
from movdc.models.stdit3 import STDiT3Config
from movdc.runtime.bundle import LeapRule, Sampler
from movdc.runtime.sampler import sample

MAX_RELATIVE_ERROR = 1e-4  # thirty steps add up what one step may differ by
MAX_COSINE_ERROR = 1e-4


def _read(model: torch.nn.Module, folder: Path) -> None:
    missing, unexpected = model.load_state_dict(load_file(folder / "model.safetensors"), strict=False)
    assert set(missing) <= {"encoder.embed_tokens.weight"}  # tied to shared.weight
    assert not unexpected


@pytest.mark.parametrize("item", [0, 1])
def test_sampling_repeats_the_recorded_latents(item: int, tiny_checkpoint: Path, golden_folder: Path) -> None:
    spec = load_spec(tiny_checkpoint.parents[1] / "tiny.yaml").spec
    recorded = load_file(golden_folder / "tiny" / f"golden_{item}.safetensors")
    settings = json.loads((golden_folder / "tiny" / "golden.json").read_text())["items"][item]
    encoder = TextEncoder(T5Config(**json.loads((tiny_checkpoint / "text_encoder/config.json").read_text()))).eval()
    _read(encoder.t5, tiny_checkpoint / "text_encoder")
    config = STDiT3Config.from_dict(json.loads((tiny_checkpoint / "denoiser/config.json").read_text()))
    denoiser = Denoiser(config, spec.video).eval()
    _read(denoiser.stdit, tiny_checkpoint / "denoiser")
    sampler = Sampler(
        solver="euler",
        prediction="rectified_flow",
        units=(settings["steps"],),
        shift=timestep_shift(spec.video),
        rounded=False,
        guidance=settings["cfg_scale"],
        latent=(1, *recorded["noise"].shape),
    )
    mask = recorded["attention_mask"][None].float()

    with torch.no_grad():
        text = encoder(recorded["input_ids"][None].long(), mask)

        evaluated: dict[bytes, np.ndarray] = {}  # the run with a leap begins as the other does

        def denoise(z: np.ndarray, timestep: np.ndarray, step: int) -> np.ndarray:
            key = z.tobytes() + timestep.tobytes()
            if key not in evaluated:
                evaluated[key] = denoiser(torch.from_numpy(z), torch.from_numpy(timestep), text, mask).numpy()
            return evaluated[key]

        noise = recorded["noise"][None].numpy()
        latents, trajectory = sample(denoise, noise, sampler)
        leap = sampler.model_copy(update={"leap": LeapRule(mode="fixed")})
        leapt, leap_trajectory = sample(denoise, noise, leap)

    for name, made in (("final_latents", latents), ("leap15_latents", leapt)):
        expected = recorded[name].numpy()
        error = np.linalg.norm(made[0] - expected) / np.linalg.norm(expected)
        print(f"{name}: relative L2 {error:.1e}")
        assert error <= MAX_RELATIVE_ERROR
    np.testing.assert_allclose(trajectory.cosines[1:], recorded["velocity_cosine"], atol=MAX_COSINE_ERROR)
    assert leap_trajectory.leap_step == 15
    assert len(evaluated) == 30
