"""The error report of int8 weights: one figure for each quantized tensor, the worst first."""

from __future__ import annotations

from collections.abc import Mapping

from movdc.compiler.weights import WeightRef
from movdc.runtime.bundle import LayerError


class LayerErrors:
    """Gathers what each int8 tensor of a program loses, as its weights are written."""

    def __init__(self) -> None:
        self._errors: dict[tuple[str, str], LayerError] = {}  # variants of a stage share tensors

    def add(self, stage: str, refs: Mapping[str, WeightRef], sqnr_db: Mapping[str, float]) -> None:
        """Add the tensors of one partition, by the names of its weights."""
        for name, figure in sqnr_db.items():
            ref = refs[name]
            self._errors[stage, str(ref)] = LayerError(stage=stage, key=ref.key, sqnr_db=round(figure, 2))

    def worst_first(self) -> tuple[LayerError, ...]:
        """All of them, in an order that does not depend on that of writing."""
        return tuple(sorted(self._errors.values(), key=lambda error: (error.sqnr_db, error.stage, error.key)))
