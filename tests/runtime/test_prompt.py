"""Prompts are cleaned and tokenized as in training."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from movdc.runtime.bundle import Prompt
from movdc.runtime.errors import RunError
from movdc.runtime.prompt import clean, prepare, tokenize

REPOSITORY = Path(__file__).parents[2]
GOLDEN = REPOSITORY / "tests" / "golden"
TOKENIZER = (REPOSITORY / "examples/checkpoints/tiny/text_encoder/tokenizer.json").read_bytes()
PROMPT = Prompt(tokenizer="tokenizer.json", max_tokens=24, pad_id=0, aesthetic=None, cleaning="open-sora")
CASES = json.loads((GOLDEN / "text_preprocessing.json").read_text())["cases"]


@pytest.mark.parametrize("case", CASES, ids=range(len(CASES)))
def test_cleaning_matches_the_recorded_cases(case: dict[str, str]) -> None:
    assert clean(clean(case["in"])) == case["out"]


def test_the_score_is_appended_once() -> None:
    scored = PROMPT.model_copy(update={"aesthetic": 6.5})
    assert prepare("a red circle", scored) == "a red circle aesthetic score: 6.5."
    assert prepare("a red circle aesthetic score: 5.0.", scored) == "a red circle aesthetic score: 5.0."


def test_a_prompt_of_which_nothing_is_left_is_refused() -> None:
    with pytest.raises(RunError, match="describe the video"):
        prepare("....", PROMPT)


@pytest.mark.parametrize("index", [0, 1])
def test_tokens_match_the_recorded_ones(index: int) -> None:
    item = json.loads((GOLDEN / "tiny/golden.json").read_text())["items"][index]
    recorded = load_file(GOLDEN / "tiny" / item["file"])
    tokens = tokenize(prepare(item["prompt"], PROMPT), PROMPT, TOKENIZER)
    np.testing.assert_array_equal(tokens.ids.ravel(), recorded["input_ids"].ravel())
    np.testing.assert_array_equal(tokens.mask.ravel(), recorded["attention_mask"].ravel())


def test_a_long_prompt_keeps_its_end_of_sequence_token() -> None:
    tokens = tokenize("red " * 40, PROMPT, TOKENIZER)
    assert tokens.dropped == 17
    assert tokens.ids[0, -1] == 1
    assert tokens.mask.all()


@pytest.mark.parametrize(("words", "length"), [(3, 4), (4, 16), (15, 16), (16, 24), (40, 24)])
def test_a_prompt_is_padded_to_the_shortest_length_that_holds_it(words: int, length: int) -> None:
    bucketed = PROMPT.model_copy(update={"buckets": (4, 16)})
    tokens, padded = (tokenize("red " * words, one, TOKENIZER) for one in (bucketed, PROMPT))  # one more ends it
    assert tokens.ids.shape == tokens.mask.shape == (1, length)
    assert np.array_equal(tokens.ids, padded.ids[:, :length])
    assert tokens.mask.sum() == padded.mask.sum() == min(words + 1, 24)
    assert tokens.dropped == padded.dropped
