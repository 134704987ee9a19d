"""What can be measured of frames without a model: against a reference, and of the frames alone.

Letters in shapes: N frames of H x W pixels.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from movdc.runtime.video import Frames

PEAK = 255
DYNAMICS_FPS = 8  # frames a second that motion is looked for in, as VBench's dynamic degree does
DYNAMICS_SHARE = 0.05  # of the pixels, those that change most


def psnr_db(frames: Frames, reference: Frames) -> float:
    """Peak signal-to-noise ratio of frames [N, H, W, 3], in dB; infinite where they are equal."""
    error = np.mean((frames.astype(np.float64) - reference) ** 2)
    return float(10 * np.log10(PEAK**2 / error)) if error else math.inf


def ssim(frames: Frames, reference: Frames) -> float:
    """Structural similarity of frames [N, H, W, 3] in [-1, 1], their mean, with the constants of Wang et al. 2004."""
    from skimage.metrics import structural_similarity

    return float(
        np.mean(
            [
                structural_similarity(
                    one,
                    other,
                    channel_axis=-1,
                    data_range=PEAK,
                    gaussian_weights=True,
                    sigma=1.5,
                    use_sample_covariance=False,
                )
                for one, other in zip(frames, reference, strict=True)
            ]
        )
    )


def temporal_flickering(frames: Frames) -> float | None:
    """VBench's score in [0, 1], 1 for frames that do not change; None of a single frame."""
    if len(frames) < 2:
        return None
    return float((PEAK - _changes(frames).mean(axis=(1, 2, 3)).mean()) / PEAK)


def dynamics(frames: Frames, fps: int) -> float | None:
    """How much moves, in [0, 1]: frames and pixels chosen as in VBench's dynamic degree, changes in place of flow.

    Of frames [N, H, W, 3] at about 8 a second: the mean over pairs of the mean of the 5 % largest changes.
    """
    chosen = frames[:: max(1, round(fps / DYNAMICS_FPS))]
    if len(chosen) < 2:
        return None
    changes = _changes(chosen).mean(axis=-1).reshape(len(chosen) - 1, -1)
    count = max(1, int(changes.shape[1] * DYNAMICS_SHARE))
    return float(np.partition(changes, -count, axis=1)[:, -count:].mean() / PEAK)


def _changes(frames: Frames) -> np.ndarray[Any, np.dtype[np.int16]]:
    """Absolute differences [N - 1, H, W, 3] of each frame with the one before."""
    changes: np.ndarray[Any, np.dtype[np.int16]] = np.abs(np.diff(frames.astype(np.int16), axis=0))
    return changes
