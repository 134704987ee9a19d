"""Which operators of a Core ML program compute in half precision."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

import numpy as np

from movdc.compiler.pieces import Piece

# Sums over many values, and what amplifies their errors: attention's weights, statistics of norms, angles.
_FP32_OPERATORS = (
    "softmax", "layer_norm", "reduce_mean", "reduce_sum", "rsqrt", "sqrt", "square", "pow", "exp", "sin", "cos",
)  # fmt: skip


class Halves:
    """Says of each MIL operator whether it computes in fp16.

    In fp32 stay norms, softmax, what reads tables (rope, positions, biases of attention), products with weights whose
    keys match a pattern, and sums of two values, which carry a model's residuals.
    """

    def __init__(self, piece: Piece, fp32: Sequence[str]) -> None:
        kept = [
            weight
            for weight in piece.weights
            if weight.group == "tables" or any(fnmatchcase(weight.ref.key, pattern) for pattern in fp32)
        ]
        self._kept = {hashlib.sha256(weight.stand_in().numpy().data).digest() for weight in kept}

    def __call__(self, operator: Any) -> bool:
        """True for fp16."""
        if operator.op_type in _FP32_OPERATORS:
            return False
        inputs = [
            one for some in operator.inputs.values() for one in (some if isinstance(some, list | tuple) else [some])
        ]
        constants = [one.val for one in inputs if one is not None and isinstance(one.val, np.ndarray)]
        if operator.op_type in ("add", "sub") and not constants:
            return False
        return not any(
            constant.dtype == np.float32 and hashlib.sha256(np.ascontiguousarray(constant).data).digest() in self._kept
            for constant in constants
        )
