"""The metrics on frames whose values are known, and one against its textbook."""

import math

import numpy as np
import pytest

from movdc.evaluate.metrics import dynamics, psnr_db, ssim, temporal_flickering


def _grey(*values: int) -> np.ndarray:
    return np.stack([np.full((16, 16, 3), value, np.uint8) for value in values])


def test_psnr_is_of_the_mean_squared_error() -> None:
    assert psnr_db(_grey(10, 10), _grey(10, 12)) == pytest.approx(10 * math.log10(255**2 / 2))
    assert psnr_db(_grey(0), _grey(255)) == 0
    assert psnr_db(_grey(7), _grey(7)) == math.inf


def test_ssim_of_flat_frames_is_that_of_their_luminance() -> None:
    black, white = 0.0, 255.0
    c1 = (0.01 * 255) ** 2
    expected = (2 * black * white + c1) / (black**2 + white**2 + c1)
    assert ssim(_grey(0), _grey(255)) == pytest.approx(expected)
    noise = np.random.Generator(np.random.PCG64(0)).integers(0, 256, (2, 32, 32, 3), np.uint8)
    assert ssim(noise, noise) == 1
    assert abs(ssim(noise, noise[::-1])) < 0.1


def test_flickering_is_vbenchs_formula() -> None:
    assert temporal_flickering(_grey(5, 5, 5)) == 1
    assert temporal_flickering(_grey(0, 255)) == 0  # unsigned differences would wrap around
    assert temporal_flickering(_grey(10, 20, 14)) == pytest.approx((255 - (10 + 6) / 2) / 255)
    assert temporal_flickering(_grey(10)) is None


def test_dynamics_look_at_the_pixels_that_change_most() -> None:
    frames = _grey(0, 0, 0, 0)
    frames[2:, :1, :12] = 255  # 12 of 256 pixels, which is 4.7 %, jump once
    assert dynamics(frames, fps=8) == pytest.approx(1 / 3)  # in one of three pairs
    assert dynamics(frames, fps=16) == 1  # every other frame
    assert dynamics(frames, fps=32) is None
    frames[1:, :, :] = 51
    assert dynamics(frames[:2], fps=8) == pytest.approx(0.2)
