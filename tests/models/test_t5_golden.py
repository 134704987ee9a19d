"""The T5 encoder of transformers against recorded tensors: movdc compiles it as it is."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import T5Config, T5EncoderModel

Parity = Callable[[Tensor, Tensor, str], None]


@pytest.mark.parametrize("batch", ["a", "b"])
def test_matches_the_reference(batch: str, golden: Callable[[str], Any], assert_parity: Parity) -> None:
    meta, tensors = golden("t5_encoder")
    model = T5EncoderModel(T5Config(**meta["config"])).eval()
    weights = {key.removeprefix("w."): value for key, value in tensors.items() if key.startswith("w.")}
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert set(missing) <= {"encoder.embed_tokens.weight"}
    assert not unexpected

    ids, mask = tensors[f"{batch}.in.ids"], tensors[f"{batch}.in.mask"]
    with torch.no_grad():
        out = model(input_ids=ids, attention_mask=mask, output_hidden_states=True)
        bias = model.encoder.block[0].layer[0].SelfAttention.compute_bias(ids.shape[1], ids.shape[1])
    assert_parity(out.last_hidden_state, tensors[f"{batch}.out"], "out")
    for index in range(3):
        if f"{batch}.mid.hidden{index}" in tensors:
            assert_parity(out.hidden_states[index], tensors[f"{batch}.mid.hidden{index}"], f"hidden{index}")
    if batch == "a":
        assert_parity(bias, tensors["a.position_bias"], "position_bias")
    else:
        assert_parity(bias[:, :, :1], tensors["b.position_bias"], "position_bias")
        assert_parity(bias[:, :, -1:], tensors["b.position_bias_last_row"], "position_bias_last_row")


@pytest.mark.parametrize("item", [0, 1])
def test_tiny_checkpoint_repeats_its_recorded_text_embedding(
    item: int, tiny_checkpoint: Path, golden_folder: Path, assert_parity: Parity
) -> None:
    recorded = load_file(golden_folder / "tiny" / f"golden_{item}.safetensors")
    model = T5EncoderModel.from_pretrained(tiny_checkpoint / "text_encoder", local_files_only=True).eval()
    with torch.no_grad():
        out = model(input_ids=recorded["input_ids"][None].long(), attention_mask=recorded["attention_mask"][None])
    assert_parity(out.last_hidden_state[0], recorded["text_embedding"], "text_embedding")
