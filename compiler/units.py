"""Sizes with units, as people write them and as they read them."""

from __future__ import annotations

import re

_BYTES = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def parse_bytes(text: object) -> int:
    """Bytes of 12000000, "12MB" or "3.3 GiB"; raises ValueError with what is allowed."""
    if isinstance(text, int) and not isinstance(text, bool) and text > 0:
        return text
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]+)\s*", str(text))
    if match and match[2].upper() in _BYTES and float(match[1]) > 0:
        return round(float(match[1]) * _BYTES[match[2].upper()])
    raise ValueError(f"{text!r} is not a size; write a number with a unit, such as 12MB, 3.3GB or 512MiB")


def format_bytes(size_bytes: float) -> str:
    """A size for people, in the binary unit that keeps it short: 1.5 MiB."""
    for unit in ("B", "KiB", "MiB"):
        if size_bytes < 1024:
            return f"{size_bytes:.0f} {unit}" if unit == "B" else f"{size_bytes:.1f} {unit}"
        size_bytes /= 1024
    return f"{size_bytes:.2f} GiB"
