"""What a program of a target should make of a piece, and how near it can come to that.

A program sums in another order than PyTorch, so a few values that lie at a tie are rounded to another int8 step. Each
is as far off as a step, which rounds more values behind it otherwise: in a chain of products the difference grows to
the size of what int8 loses. Where it ends depends on the piece, its length and its weights; so it is measured.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from movdc.compiler.eager import ThroughInt8, evaluate
from movdc.compiler.pieces import Piece
from movdc.compiler.target import Target
from movdc.runtime.expected import compare, worst_of

_DISTURBANCE = 1e-5  # of what is rounded, relative: as much as programs in fp32 differ from PyTorch at the most
_MARGIN_DB = 3.0  # a digest of 16 projections says the distance to 1.5 dB two times out of three


def expectation(piece: Piece, inputs: Mapping[str, Tensor], target: Target) -> tuple[dict[str, Tensor], float]:
    """The outputs by name, int8 as the target has it, and the least SQNR that its program keeps of them."""
    right = evaluate(piece, inputs, target.through_int8)
    figure_db = target.min_sqnr_db() or 0.0
    if is_rounded(piece, target):
        other = evaluate(piece, inputs, _disturbed(target.through_int8))
        error = worst_of({name: compare(other[name].numpy(), right[name].numpy(), name) for name in right})
        figure_db = min(figure_db, round(error.sqnr_db - _MARGIN_DB, 1))
    return right, figure_db


def is_rounded(piece: Piece, target: Target) -> bool:
    """Whether products of a piece round their inputs to int8, so that it is evaluated twice."""
    return target.abilities.int8_products == "int8" and piece.int8_flops > 0


def _disturbed(through_int8: ThroughInt8) -> ThroughInt8:
    """The same, of rows that come out of other sums."""
    generator = torch.Generator().manual_seed(0)

    def through(rows: Tensor) -> Tensor:
        return through_int8(rows * (1 + _DISTURBANCE * torch.randn(rows.shape, generator=generator)))

    return through
