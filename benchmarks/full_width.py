"""Open-Sora 1.2 at its full width and its real sizes, a block of each kind: compiled against eager PyTorch in fp32.

    python benchmarks/full_width.py [--target onnx]

One T5-XXL block (fp32 and int8), one pair of STDiT3-XL blocks on 68 frames of 256x256 pixels (plain and merged), both
parts of the video decoder; seeded weights, the command that a user types. Programs for Core ML are computed by the
tests' interpreter. T5's are of its own initialisation, which gives attention's
scores the size that training starts from: it does not divide them by the root of the head's width, and weights that
keep every signal's size (`random:SEED`) would make a softmax of nearly one token out of each row, in which the error of
an int8 score is as large as the score. It takes 10 GB of memory and of build/full_width.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
import yaml
from make_checkpoint import TOKENIZER, TOKENIZER_FILES, config_of
from rich.console import Console
from rich.table import Table
from torch import fx, nn
from transformers import T5Config, T5EncoderModel

from movdc.compiler.device import read_profiles
from movdc.compiler.pass_base import run_passes
from movdc.compiler.spec import VideoSpec, load_spec
from movdc.compiler.weights import RandomSource
from movdc.models.opensora import Denoiser, OpenSora, TextEncoder
from movdc.models.opensora_vae import OpenSoraVAEConfig, SpatialDecode, SpatialVAEConfig, TemporalDecode
from movdc.models.stdit3 import STDiT3Config
from movdc.passes.merge_tokens import MergeTokens
from movdc.runtime.bundle import Bundle
from movdc.runtime.executors import Array, open_executor
from movdc.targets.null import Null

REPOSITORY = Path(__file__).parents[1]
FOLDER = REPOSITORY / "build" / "full_width"
SEED, TOKENS, PROMPT_TOKENS = 0, 300, 40
VIDEO = VideoSpec(frames=68, height=256, width=256, fps=24)
TEXT = config_of("text_encoder") | {"num_layers": 1}
DENOISER = config_of("denoiser") | {"depth": 1}
MERGING = MergeTokens(steps=15)
VAE = config_of("vae") | {"spatial": asdict(SpatialVAEConfig())}


def t5_folder() -> Path:
    """A checkpoint of the text encoder, as transformers initialises it."""
    folder = FOLDER / "t5"
    torch.manual_seed(SEED)
    T5EncoderModel(T5Config(**TEXT)).save_pretrained(folder)
    for file in TOKENIZER_FILES:
        shutil.copy(TOKENIZER / file, folder)
    return folder


def compiled(name: str, target: str, text_encoder: Path, passes: Mapping[str, Any]) -> Path:
    """A bundle of one block of each kind."""
    random = f"random:{SEED}"
    spec = {
        "movdc": 1,
        "family": "opensora-1.2",
        "text_encoder": {"weights": str(text_encoder), "max_tokens": TOKENS},
        "denoiser": {"weights": random, "config": DENOISER},
        "vae": {"weights": random, "config": VAE},
        "video": VIDEO.model_dump(),
        "passes": dict(passes),
        "target": target,
        "device": "iphone-15-pro",
    }
    FOLDER.mkdir(parents=True, exist_ok=True)
    path = FOLDER / f"{target}-{name}.yaml"
    path.write_text(yaml.safe_dump(spec))
    movdc = str(Path(sys.executable).with_name("movdc"))
    subprocess.run([movdc, "compile", path, "-o", path.with_suffix(""), "--cache", FOLDER / "cache"], check=True)
    return path.with_suffix("")


def seeded(module: nn.Module, prefix: str) -> nn.Module:
    """The module with the weights of `random:SEED`, which have the names that they have in a checkpoint."""
    shapes = {key: tuple(tensor.shape) for key, tensor in module.state_dict().items()}
    source = RandomSource(SEED, {key.removeprefix(prefix): shape for key, shape in shapes.items()})
    module.load_state_dict({key: source.read(key.removeprefix(prefix)) for key in shapes})
    return module


def eager(module: nn.Module, inputs: Mapping[str, Array]) -> Array:
    """What PyTorch makes of the same inputs."""
    with torch.inference_mode():
        result: Array = module.eval()(*(torch.from_numpy(array) for array in inputs.values())).numpy()
    return result


def merged(root: Path, inputs: Mapping[str, Array]) -> Array:
    """What PyTorch makes of the denoiser's merged variant, which is a graph that merge-tokens made, and no module."""
    spec_file = load_spec(root.with_suffix(".yaml"))
    profile = read_profiles(REPOSITORY / "targets" / "devices.toml")[spec_file.spec.device]
    traced = OpenSora().trace(spec_file, Null().machine(profile, None), OpenSora().micro_batches[0])
    program = run_passes(traced, [MERGING])
    (graph,) = (one for stage, variant, one in program.graphs() if (stage, variant) == ("denoiser", "merged"))
    values = [
        graph.weights[node.name].read() if node.name in graph.weights else torch.from_numpy(inputs[node.name])
        for node in graph.graph.find_nodes(op="placeholder")
    ]
    with torch.inference_mode():
        (velocity,) = fx.Interpreter(fx.GraphModule(nn.Module(), graph.graph)).run(*values)
    result: Array = velocity.numpy()
    return result


def run(root: Path, stage: str, variant: str, inputs: Mapping[str, Array]) -> Array:
    """What a bundle makes of a stage's inputs, by its target's executor or, for Core ML, by an interpreter."""
    bundle = Bundle.read(root)
    if "coreml" in bundle.manifest.target:
        from mil_stages import MilStages

        (result,) = MilStages(bundle).run(stage, variant, inputs).values()
    else:
        (result,) = open_executor(bundle).run(stage, variant, inputs).values()
    return result


def text_inputs(random: np.random.Generator) -> dict[str, Array]:
    """A prompt of 40 tokens."""
    mask = (np.arange(TOKENS) < PROMPT_TOKENS)[None].astype(np.float32)
    return {"input_ids": random.integers(3, 32000, (1, TOKENS)), "text_mask": mask}


def main(
    target: Annotated[str, typer.Option(help="One that runs here, or one for Core ML.")] = "executorch-xnnpack",
) -> None:
    """Compile twice, run each stage and print how far it is from eager."""
    console = Console(width=120)
    checkpoint = t5_folder()
    fp32 = compiled("fp32", target, checkpoint, {"merge-tokens": {"steps": MERGING.steps}})
    int8 = compiled("int8", target, checkpoint, {"quantize-int8": {"stages": ["text_encoder"]}})
    random = np.random.default_rng(SEED)

    def normal(*shape: int) -> Array:
        return random.standard_normal(shape, np.float32)

    text = text_inputs(random)
    config = T5Config(**TEXT)
    config._attn_implementation = "eager"
    vae = OpenSoraVAEConfig.from_dict(VAE, VAE["spatial"])
    evaluation = {
        "latents": normal(1, 4, 20, 32, 32),
        "timestep": np.array([500], np.float32),
        "text": normal(1, TOKENS, TEXT["d_model"]),
        "text_mask": text["text_mask"],
    }
    table = Table(title=f"{target}: relative L2 error against eager fp32 (cosine of int8's)")
    for column in ("stage", "relative L2", "cosine"):
        table.add_column(column, justify="left" if column == "stage" else "right")
    encoder = TextEncoder(config)
    encoder.t5 = T5EncoderModel.from_pretrained(checkpoint, attn_implementation="eager")
    denoiser = seeded(Denoiser(STDiT3Config.from_dict(DENOISER), VIDEO), "stdit.")
    temporal, spatial = seeded(TemporalDecode(vae, 17), ""), seeded(SpatialDecode(vae), "")
    in_time, in_space = {"latents": normal(1, 4, 5, 32, 32)}, {"frames": normal(4, 4, 32, 32)}
    cases = (
        ("T5-XXL block, fp32", fp32, "text_encoder", "plain", eager(encoder, text), text),
        ("T5-XXL block, int8", int8, "text_encoder", "plain", eager(encoder, text), text),
        (
            "STDiT3-XL, a block in space, one in time",
            fp32,
            "denoiser",
            "plain",
            eager(denoiser, evaluation),
            evaluation,
        ),
        ("the same, merged", fp32, "denoiser", "merged", merged(fp32, evaluation), evaluation),
        ("VAE in time, 17 frames", fp32, "vae_temporal", "frames17", eager(temporal, in_time), in_time),
        ("VAE in space, 4 frames", fp32, "vae_spatial", "plain", eager(spatial, in_space), in_space),
    )
    for name, root, stage, variant, expected, inputs in cases:
        made = run(root, stage, variant, inputs).ravel()
        wanted = expected.ravel()
        if stage == "text_encoder":  # padded positions are nobody's
            wanted, made = (array[: PROMPT_TOKENS * TEXT["d_model"]] for array in (wanted, made))
        error = np.linalg.norm(made - wanted) / np.linalg.norm(wanted)
        cosine = made @ wanted / np.linalg.norm(made) / np.linalg.norm(wanted)
        table.add_row(name, f"{error:.1e}", f"{cosine:.6f}")
    console.print(table)


if __name__ == "__main__":
    typer.run(main)
