"""Prompts: the score suffix, the cleaning that Open-Sora was trained with, and tokens."""

from __future__ import annotations

import html
import re
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote_plus

import ftfy
import numpy as np
from tokenizers import Tokenizer

from movdc.runtime.bundle import Prompt
from movdc.runtime.errors import RunError


@dataclass(frozen=True)
class Tokens:
    """Token ids and mask, [1, L] int64 of one of the prompt's lengths, and how many tokens did not fit."""

    ids: np.ndarray[Any, np.dtype[np.int64]]
    mask: np.ndarray[Any, np.dtype[np.int64]]
    dropped: int


def prepare(text: str, prompt: Prompt) -> str:
    """Append the aesthetic score where none is named, and clean twice; raises RunError if nothing is left."""
    if prompt.aesthetic is not None and "aesthetic score:" not in text:
        text = f"{text} aesthetic score: {prompt.aesthetic:.1f}."
    cleaned = clean(clean(text))
    if not cleaned:
        raise RunError("the prompt is empty once links, numbers and markup are removed; describe the video in words")
    return cleaned


def tokenize(text: str, prompt: Prompt, tokenizer_json: bytes) -> Tokens:
    """Tokens of a prepared prompt, cut to max_tokens with the end-of-sequence token kept, padded to a bucket."""
    tokenizer = Tokenizer.from_buffer(tokenizer_json)
    tokenizer.no_padding()
    tokenizer.no_truncation()
    ids = tokenizer.encode(text).ids
    dropped = max(0, len(ids) - prompt.max_tokens)
    if dropped:
        ids = [*ids[: prompt.max_tokens - 1], ids[-1]]
    length = prompt.length_for(len(ids))
    padded = np.full((1, length), prompt.pad_id, np.int64)
    padded[0, : len(ids)] = ids
    mask = (np.arange(length) < len(ids)).astype(np.int64)[None]
    return Tokens(padded, mask, dropped)


_CJK = "\u31c0-\u31ef\u31f0-\u31ff\u3200-\u32ff\u3300-\u33ff\u3400-\u4dbf\u4dc0-\u4dff\u4e00-\u9fff"
_DASHES = (
    "\u002d\u058a\u05be\u1400\u1806\u2010-\u2015\u2e17\u2e1a\u2e3a\u2e3b\u2e40\u301c\u3030\u30a0\ufe31\ufe32"
    "\ufe58\ufe63\uff0d"
)
_MEDIA = "png|jpg|jpeg|bmp|webp|eps|pdf|apk|mp4"
# (pattern, replacement), in the order in which the training captions were cleaned.
_BEFORE_MARKUP: tuple[tuple[str, str], ...] = (
    (r"<person>", "person"),
    (r"\b(?:https?://|www\.)[^\s?]*", ""),
)
_BEFORE_REPAIR: tuple[tuple[str, str], ...] = (
    (r"@[\w\d]+\b", ""),
    (f"[{_CJK}]+", ""),
    (f"[{_DASHES}]+", "-"),
    (r"[`\u00b4\u00ab\u00bb\u201c\u201d\u00a8]", '"'),
    (r"[\u2018\u2019]", "'"),
    (r"&quot;?", ""),
    (r"&amp", ""),
    (r"\d{1,3}\.\d{1,3}\.\d{1,3}\.\d{1,3}", " "),
    (r"\d:\d\d\s+$", ""),
    (r"\\n", " "),
    (r"#\d{1,3}\b", ""),
    (r"#\d{5,}\b", ""),
    (r"\b\d{6,}\b", ""),
    (rf"\S+\.(?:{_MEDIA})\b", ""),
    (r"[\"']{2,}", '"'),
    (r"\.{2,}", " "),
    (r"[#\u00ae\u2022\u00a9\u2122&@\u00ba\u00bd\u00be\u00bf\u00a1\u00a7~()\[\]{}|\\/*]+", " "),
    (r"\s+\.\s+", " "),
)
_AFTER_REPAIR: tuple[tuple[str, str], ...] = (
    (r"\b[a-zA-Z]{1,3}\d{3,15}\b", ""),
    (r"\b[a-zA-Z]+\d+[a-zA-Z]+\b", ""),
    (r"\b\d+[a-zA-Z]+\d+\b", ""),
    (r"(?:worldwide\s+)?(?:free\s+)?shipping", ""),
    (r"(?:free\s)?download(?:\sfree)?", ""),
    (r"\bclick\b\s(?:for|on)\s\w+", ""),
    (rf"\b(?:{_MEDIA}|gif|tiff?)(?:\simages?|\spictures?)?\b", ""),
    (r"\bpage\s+\d+\b", ""),
    (r"\b\d+\.?\d*[x\u0445\u00d7]\d+\.?\d*\b", ""),
    (r"\b\s+:\s+", ": "),
    (r"(\D[,./])\b", r"\1 "),
    (r"\s+", " "),
)
_AROUND: tuple[tuple[str, str], ...] = (
    (r"^[\"']([\w\W]+)[\"']$", r"\1"),
    (r"^['_,\-:;]", ""),
    (r"['_,\-:;+]$", ""),
    (r"^\.\S+$", ""),
)


def clean(text: str) -> str:
    """One pass of the caption cleaning of Open-Sora 1.2 (after DeepFloyd's)."""
    text = unquote_plus(str(text)).strip().lower()
    text = _substitute(text, _BEFORE_MARKUP)
    text = html.unescape(re.sub(r"<[^<>]+>", "", text))
    text = _substitute(text, _BEFORE_REPAIR)
    if len(re.findall(r"[-_]", text)) > 3:  # words joined by hyphens or underscores, as in file names
        text = re.sub(r"[-_]", " ", text)
    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    text = _substitute(text.strip(), _AFTER_REPAIR).strip()
    return _substitute(text, _AROUND).strip()


def _substitute(text: str, rules: tuple[tuple[str, str], ...]) -> str:
    for pattern, replacement in rules:
        text = re.sub(pattern, replacement, text)
    return text
