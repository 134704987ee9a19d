"""Record tests/golden/tiny: two prompts through the example checkpoint in eager fp32, with every tensor on the way.

    python -m tools.train_example.golden

Also the text encoder in the sharded pickle layout of the published T5 v1.1 XXL encoder.
"""

from __future__ import annotations

import json
import shutil
from itertools import pairwise
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from movdc.evaluate.shape_clips import FRAMES, PIXELS, Seen, caption, judge
from movdc.runtime.sampler import initial_noise
from tools.train_example import layout
from tools.train_example.clips import Captions
from tools.train_example.measure import GUIDANCE, LATENT, LEAP_STEP, STEPS, frames_of, psnr_db, timesteps
from tools.train_example.phases import FPS

REPOSITORY = Path(__file__).parents[2]
CHECKPOINT = REPOSITORY / "examples" / "checkpoints" / "tiny"
GOLDEN = REPOSITORY / "tests" / "golden" / "tiny"
PROMPTS = ((Seen("purple", "gray", "triangle", "right"), 7), (Seen("red", "black", "circle", "down"), 8))
RECORDED_STEPS = (0, 10, 20)
SHARDS = 2


@torch.no_grad()
def record(named: Seen, seed: int) -> tuple[dict[str, Tensor], dict[str, object]]:
    """The tensors of one prompt, and what golden.json says of it."""
    model, vae = (module.eval() for module in layout.read(CHECKPOINT))
    captions = Captions.of([named], CHECKPOINT / "text_encoder" / "tokenizer.json", torch.device("cpu"))
    captions = captions.part(slice(1))
    text, null = model.text(captions), model.denoiser.y_embedder.y_embedding
    schedule = timesteps()
    z = noise = torch.from_numpy(initial_noise(seed, (1, *LATENT)))  # as `movdc run --seed` draws it
    tensors: dict[str, Tensor] = {
        "input_ids": captions.ids[0].int(),
        "attention_mask": captions.mask[0].int(),
        "text_embedding": text[0],
        "null_embedding": null.clone(),
        "timesteps": torch.tensor(schedule[:-1], dtype=torch.float64).mul(1000).float(),
        "noise": noise[0],
    }
    before, cosines = None, []
    for step, (t, after) in enumerate(pairwise(schedule)):
        both = torch.cat((text, null[None]))[:, None]
        times = tensors["timesteps"][step].expand(2)
        out = model.denoiser(torch.cat((z, z)), times, both, captions.mask, fps=FPS, height=PIXELS, width=PIXELS)
        conditional, unconditional = out[:, :4]
        velocity = unconditional + GUIDANCE * (conditional - unconditional)
        if step in RECORDED_STEPS:
            tensors |= {f"model_output_{step:02}": out, f"velocity_{step:02}": velocity}
        if before is not None:
            cosines.append(torch.cosine_similarity(velocity.double().flatten(), before.double().flatten(), dim=0))
        if step == LEAP_STEP:
            tensors["leap15_latents"] = (z + velocity * t)[0]
        z, before = z + velocity * (t - after), velocity
    tensors |= {"final_latents": z[0], "velocity_cosine": torch.stack(cosines).float()}
    for name in ("final", "leap15"):
        frames = torch.from_numpy(frames_of(vae, tensors[f"{name}_latents"][None])[0])
        tensors["frames" if name == "final" else "leap15_frames"] = frames
    frames, leapt = tensors["frames"].numpy(), tensors["leap15_frames"].numpy()
    said = {
        "prompt": caption(named),
        "seed": seed,
        "steps": STEPS,
        "cfg_scale": GUIDANCE,
        "leap15_psnr_db": round(psnr_db(leapt, frames), 2),
        "seen": judge(frames)._asdict(),
    }
    return {key: tensor.contiguous() for key, tensor in tensors.items()}, said


def write_shards(folder: Path) -> None:
    """The text encoder as pickled shards of about one size with an index, configs and slow tokenizer files."""
    folder.mkdir(parents=True, exist_ok=True)
    encoder = layout.read(CHECKPOINT)[0].text_encoder
    tensors = {key: tensor.clone() for key, tensor in encoder.state_dict().items() if key != layout.TIED}
    total = sum(tensor.nbytes for tensor in tensors.values())
    names = [f"pytorch_model-{part:05}-of-{SHARDS:05}.bin" for part in range(1, SHARDS + 1)]
    weight_map, before = {}, 0
    for key, tensor in sorted(tensors.items()):
        weight_map[key] = names[SHARDS * before // total]
        before += tensor.nbytes
    tensors[layout.TIED], weight_map[layout.TIED] = tensors["shared.weight"], weight_map["shared.weight"]
    for name in names:
        torch.save({key: tensors[key] for key in weight_map if weight_map[key] == name}, folder / name)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index, indent=2) + "\n")
    for name in ("config.json", "spiece.model", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copyfile(CHECKPOINT / "text_encoder" / name, folder / name)


def main() -> None:
    """Write all of tests/golden/tiny."""
    items = []
    for index, (named, seed) in enumerate(PROMPTS):
        tensors, said = record(named, seed)
        save_file(tensors, GOLDEN / f"golden_{index}.safetensors")
        items.append({"file": f"golden_{index}.safetensors"} | said)
        print(f"{said['prompt']}: seen {said['seen']}, leap {said['leap15_psnr_db']} dB")
    settings = {
        "height": PIXELS,
        "width": PIXELS,
        "num_frames": FRAMES,
        "fps": int(FPS),
        "num_timesteps": 1000,
        "use_timestep_transform": True,
        "items": items,
    }
    (GOLDEN / "golden.json").write_text(json.dumps(settings, indent=1) + "\n")
    write_shards(GOLDEN / "text_encoder_sharded")


if __name__ == "__main__":
    main()
