"""Products as ONNX has them: matrices of weights are [in, out], and int8 ones are multiplied as integers.

A linear layer is a MatMul whose second factor no runtime has to transpose. A product of int8 weights is MatMulInteger
or ConvInteger, whatever the graph says between the choice of the scale and the product:

    step = max |x| of each token / 127,  q = round(x / step) + 128,  y = step * scale * sum (q - 128) (w - 128)

(of each image, where it is a convolution). Weights are stored as uint8, OFFSET above their values: x86 processors
without VNNI multiply unsigned by signed bytes in sums of 16 bits, which overflow; of unsigned ones they do not.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

OFFSET = 128  # of an int8 value that is stored as uint8
_STEPS = 127  # on each side of zero
_MIN_STEP = torch.finfo(torch.float32).eps  # of an input of zeros


def linear(x: Tensor, matrix: Tensor, bias: Tensor | None = None) -> Tensor:
    """A linear layer on a matrix [in, out]."""
    product = torch.matmul(x, matrix)
    return product if bias is None else product + bias


def linear_int8(x: Tensor, matrix: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """A linear layer on a uint8 matrix [in, out] with a scale [out] for each column."""
    stored, step = quantized(x, (-1,))
    sums = _sums("MatMulInteger", stored, matrix, (*x.shape[:-1], matrix.shape[1]))
    product = sums.to(torch.float32) * step * scale
    return product if bias is None else product + bias


def conv2d_int8(
    x: Tensor,
    kernel: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    shape: tuple[int, ...],
) -> Tensor:
    """A convolution [B, C, H, W] of a given shape on a uint8 kernel with a scale [C, 1, 1] for each output channel."""
    stored, step = quantized(x, (1, 2, 3))
    settings = {"strides": list(stride), "pads": [*padding, *padding], "dilations": list(dilation)}
    product = _sums("ConvInteger", stored, kernel, shape, **settings).to(torch.float32) * step * scale
    return product if bias is None else product + bias.reshape(-1, 1, 1)


def quantized(x: Tensor, over: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Values as uint8 around OFFSET, and the step between two of them, one for what `over` leaves."""
    step = (x.abs().amax(over, keepdim=True) / _STEPS).clamp(min=_MIN_STEP)
    return (torch.round(x / step) + OFFSET).to(torch.uint8), step


def _sums(operator: str, x: Tensor, weight: Tensor, shape: tuple[int, ...], **settings: Any) -> Tensor:
    zero = torch.full((), OFFSET, dtype=torch.uint8)
    return torch.onnx.ops.symbolic(operator, (x, weight, zero, zero), settings, dtype=torch.int32, shape=shape)
