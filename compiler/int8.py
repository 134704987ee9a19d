"""int8 weights: symmetric values with one scale for each output channel, and what they lose."""

from __future__ import annotations

import math

import torch
from torch import Tensor

MAX_VALUE = 127  # and not -128 below: a symmetric range needs no zero point
_MAX_SQNR_DB = 150.0  # of weights that lose nothing; fp32 itself resolves 144 dB


def channel_scales(weight: Tensor) -> Tensor:
    """The scale of each output channel (dimension 0): its largest magnitude is MAX_VALUE steps.

    A channel of zeros gets the smallest normal number: targets divide by scales, and refuse zeros and subnormals.
    """
    rows = weight.float().flatten(1)
    largest = torch.maximum(rows.amax(1), -rows.amin(1))  # and not of abs(), which would copy the whole weight
    return (largest / MAX_VALUE).clamp(min=torch.finfo(torch.float32).tiny)


def to_int8(weight: Tensor) -> Tensor:
    """The nearest int8 values of a weight, in steps of its channel scales."""
    return _steps(weight.float(), _column(channel_scales(weight), weight)).to(torch.int8)


class Loss:
    """Signal and noise of a tensor's quantization, gathered part by part: sum w^2 and sum (w - int8 x scale)^2."""

    def __init__(self) -> None:
        self.signal = 0.0
        self.noise = 0.0

    def to_int8(self, weight: Tensor) -> Tensor:
        """As the function; what some output channels lose is counted."""
        weight = weight.float()
        scales = _column(channel_scales(weight), weight)
        steps = _steps(weight, scales)
        values = steps.to(torch.int8)
        error = steps.mul_(scales).sub_(weight).flatten()
        self.signal += float(torch.dot(weight.flatten(), weight.flatten()))
        self.noise += float(torch.dot(error, error))
        return values

    @property
    def sqnr_db(self) -> float:
        """Signal to quantization noise in decibels: 10 log10(signal / noise)."""
        if self.noise <= self.signal * 10 ** (-_MAX_SQNR_DB / 10):
            return _MAX_SQNR_DB
        return 10 * math.log10(self.signal / self.noise)


def _steps(weight: Tensor, scales: Tensor) -> Tensor:
    return (weight / scales).round_().clamp_(-MAX_VALUE, MAX_VALUE)


def _column(scales: Tensor, weight: Tensor) -> Tensor:
    """Scales in the shape that multiplies a weight of several dimensions."""
    return scales.reshape(-1, *[1] * (weight.dim() - 1))
