"""A checkpoint of Open-Sora 1.2 at its full size with seeded values, to compile and to measure without a download.

python benchmarks/make_checkpoint.py DIR

Names, shapes and file layouts are the published ones (tests/golden/fullsize_keys.json): the text encoder as two pickled
shards with an index, the denoiser and the video decoder as safetensors. Nothing that it draws means anything.
"""

from __future__ import annotations

import json
import math
import shutil
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, BinaryIO

import numpy as np
import torch
import typer
import yaml
from numpy.typing import NDArray
from torch._subclasses import FakeTensorMode

REPOSITORY = Path(__file__).parents[1]
TOKENIZER = REPOSITORY / "examples" / "checkpoints" / "tiny" / "text_encoder"
TOKENIZER_FILES = ("spiece.model", "tokenizer_config.json", "special_tokens_map.json")
BLOCK_VALUES = 1 << 22  # drawn once; each tensor repeats them from a place of its own
STANDARD_DEVIATION = 0.02
# T5 does not divide scores by the root of the head's width, 8 in T5-XXL: its weights are as much smaller, also at its
# initialisation. Without that each row of a softmax would be one token.
UNSCALED, HEAD_SCALE = ".SelfAttention.q.weight", np.float32(1 / 8)
SPARE_BYTES = 10**9
TIED = {"encoder.embed_tokens.weight": "shared.weight"}
FOLDERS = {"text_encoder": ("t5_xxl_encoder",), "denoiser": ("stdit3_xl_2",), "vae": ("vae_temporal", "vae_spatial")}
Shapes = Mapping[str, list[int]]


def published() -> dict[str, Any]:
    """Names, shapes and settings of the full-size models."""
    found: dict[str, Any] = json.loads((REPOSITORY / "tests" / "golden" / "fullsize_keys.json").read_text())
    return found


def shapes_of(folder: str) -> dict[str, list[int]]:
    """Every tensor of one of the three checkpoints."""
    shapes = {key: shape for model in FOLDERS[folder] for key, shape in published()[model]["keys"].items()}
    return shapes | ({"scale": [1, 4, 1, 1, 1], "shift": [1, 4, 1, 1, 1]} if folder == "vae" else {})


def config_of(folder: str) -> dict[str, Any]:
    """The config.json of one of the three checkpoints, as published."""
    if folder == "text_encoder":
        return published()["t5_xxl_encoder"]["config"] | {"model_type": "t5", "pad_token_id": 0, "eos_token_id": 1}
    if folder == "denoiser":
        return published()["stdit3_xl_2"]["config"] | {"model_type": "STDiT3"}
    return {
        "model_type": "VideoAutoencoderPipeline",
        "micro_frame_size": 17,
        "vae_2d": {
            "type": "VideoAutoencoderKL",
            "from_pretrained": "PixArt-alpha/pixart_sigma_sdxlvae_T5_diffusers",
            "subfolder": "vae",
            "micro_batch_size": 4,
        },
        "vae_temporal": {"type": "VAE_Temporal_SD"},
    }


def size_bytes(shape: list[int]) -> int:
    """Bytes of an fp32 tensor."""
    return 4 * math.prod(shape)


def stored_bytes(folder: str) -> int:
    """Bytes of the tensors of one of the three checkpoints."""
    return sum(size_bytes(shape) for key, shape in shapes_of(folder).items() if key not in TIED)


class Values:
    """Seeded values of any tensor, a block at a time."""

    def __init__(self, seed: int) -> None:
        drawn = np.random.default_rng(seed).standard_normal(BLOCK_VALUES, np.float32)
        self._block = np.tile(drawn * np.float32(STANDARD_DEVIATION), 2)

    def of(self, key: str, shape: list[int]) -> Iterator[NDArray[np.float32]]:
        """The values of a tensor in its order; gains of norms are near one."""
        start, left = zlib.crc32(key.encode()) % BLOCK_VALUES, math.prod(shape)
        while left:
            part = self._block[start : start + min(left, BLOCK_VALUES)]
            left -= part.size
            if key.endswith(UNSCALED):
                part = part * HEAD_SCALE
            yield part + 1 if len(shape) == 1 and key.endswith("weight") else part

    def write(self, file: BinaryIO, key: str, shape: list[int]) -> None:
        """Write a tensor where the file stands."""
        for part in self.of(key, shape):
            file.write(part.data)


def write_safetensors(path: Path, shapes: Shapes, values: Values) -> None:
    """A header of names, shapes and offsets, and then the tensors in its order."""
    header, end = {}, 0
    for key, shape in shapes.items():
        header[key] = {"dtype": "F32", "shape": shape, "data_offsets": [end, end + size_bytes(shape)]}
        end += size_bytes(shape)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for key, shape in shapes.items():
            values.write(file, key, shape)


def write_shards(folder: Path, shapes: Shapes, values: Values) -> None:
    """Two shards of about one size as torch.save writes them, and the index that says which tensor is where."""
    stored = {key: shape for key, shape in shapes.items() if key not in TIED}
    total, names = sum(map(size_bytes, stored.values())), [f"pytorch_model-0000{n}-of-00002.bin" for n in (1, 2)]
    weight_map, before = {}, 0
    for key, shape in stored.items():
        weight_map[key] = names[2 * before >= total]
        before += size_bytes(shape)
    weight_map |= {tied: weight_map[key] for tied, key in TIED.items() if tied in shapes}
    for name in names:
        with FakeTensorMode():
            tensors = {key: torch.empty(shape) for key, shape in stored.items() if weight_map[key] == name}
            tensors |= {tied: tensors[key] for tied, key in TIED.items() if weight_map.get(tied) == name}
            with torch.serialization.skip_data(materialize_fake_tensors=True):
                torch.save(tensors, folder / name)  # all but the data, for which it leaves room
            placed = torch.load(folder / name, weights_only=True)
        with (folder / name).open("r+b") as file:
            for key in tensors.keys() & stored.keys():
                file.seek(placed[key].untyped_storage()._checkpoint_offset)
                values.write(file, key, stored[key])
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index, indent=1))


def write_checkpoint(root: Path, seed: int) -> None:
    """All three checkpoints below `root`."""
    values = Values(seed)
    for name in FOLDERS:
        folder = root / name
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps(config_of(name), indent=1))
        if name == "text_encoder":
            write_shards(folder, shapes_of(name), values)
            for file in TOKENIZER_FILES:
                shutil.copy(TOKENIZER / file, folder)
        else:
            write_safetensors(folder / "model.safetensors", shapes_of(name), values)


def write_pipelines(root: Path) -> list[Path]:
    """The example pipelines with these checkpoints in the place of the published ones."""
    written = []
    for example in sorted((REPOSITORY / "examples").glob("opensora*.yaml")):
        spec = yaml.safe_load(example.read_text())
        for name in FOLDERS:
            spec[name]["weights"] = name
            spec[name].pop("revision", None)
        written.append(root / example.name)
        written[-1].write_text(yaml.safe_dump(spec, sort_keys=False))
    return written


def main(
    root: Annotated[Path, typer.Argument(metavar="DIR", help="A folder that is not there yet.")],
    seed: Annotated[int, typer.Option(help="Another seed gives other values.")] = 0,
) -> None:
    """Write the checkpoints, and pipelines that use them."""
    if root.exists():
        raise typer.BadParameter(f"{root} exists; give a folder that is not there yet")
    root.parent.mkdir(parents=True, exist_ok=True)
    needed = SPARE_BYTES + sum(stored_bytes(name) for name in FOLDERS)
    free = shutil.disk_usage(root.parent).free
    if free < needed:
        raise typer.BadParameter(f"{root.parent} has {free / 1e9:.1f} GB free, and {needed / 1e9:.1f} GB are needed")
    write_checkpoint(root, seed)
    pipelines = ", ".join(map(str, write_pipelines(root)))
    size = sum(file.stat().st_size for file in root.rglob("*") if file.is_file())
    print(f"{size / 1e9:.1f} GB in {root}; compile {pipelines}. To delete it all: rm -r {root}")


if __name__ == "__main__":
    typer.run(main)
