"""Videos and pictures: pixels to an mp4 and to a contact sheet, written whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import av
import numpy as np
from PIL import Image, ImageDraw, ImageFont

Frames = np.ndarray[Any, np.dtype[np.uint8]]
SHEET_COLUMNS, SHEET_ROWS = 4, 2
SHEET_TILE_PIXELS = 192
SHEET_MARGIN_PIXELS = 12


def to_frames(pixels: np.ndarray[Any, np.dtype[np.float32]]) -> Frames:
    """Pixels [N, 3, H, W] fp32 in about [-1, 1] to frames [N, H, W, 3] uint8."""
    scaled = np.round(np.clip(pixels, -1, 1) * 127.5 + 127.5)
    return np.ascontiguousarray(scaled.transpose(0, 2, 3, 1).astype(np.uint8))


@contextmanager
def _whole(path: Path) -> Iterator[Path]:
    """A temporary sibling that is renamed to `path` when the block ends well."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.stem}.partial{path.suffix}")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_mp4(path: Path, frames: Frames, fps: int) -> None:
    """Write frames [N, H, W, 3] as H.264; the last row or column of an odd size is repeated, as the codec needs."""
    frames = np.pad(frames, ((0, 0), (0, frames.shape[1] % 2), (0, frames.shape[2] % 2), (0, 0)), mode="edge")
    with _whole(path) as partial, av.open(str(partial), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=fps, options={"crf": "12", "threads": "1"})
        stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def write_contact_sheet(path: Path, frames: Frames, fps: int, title: str) -> None:
    """Write a PNG of evenly spaced frames with their times, the title beneath."""
    count = SHEET_COLUMNS * SHEET_ROWS
    chosen = np.linspace(0, len(frames) - 1, count).round().astype(int)
    tile, margin = SHEET_TILE_PIXELS, SHEET_MARGIN_PIXELS
    label = 18
    width = SHEET_COLUMNS * (tile + margin) + margin
    height = SHEET_ROWS * (tile + label + margin) + margin + 28
    sheet = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(sheet)
    small, large = ImageFont.load_default(12), ImageFont.load_default(16)
    for place, index in enumerate(chosen):
        row, column = divmod(place, SHEET_COLUMNS)
        left, top = margin + column * (tile + margin), margin + row * (tile + label + margin)
        picture = Image.fromarray(frames[index])
        scale = tile / max(picture.size)
        size = (round(picture.width * scale), round(picture.height * scale))
        kind = Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS
        sheet.paste(picture.resize(size, kind), (left, top))
        draw.text((left, top + tile + 2), f"{index / fps:.2f} s", fill="#555555", font=small)
    draw.text((margin, height - 28), title, fill="black", font=large)
    with _whole(path) as partial:
        sheet.save(partial, format="PNG")
