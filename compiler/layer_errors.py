"""The error report of int8 weights: one figure for each quantized tensor, the worst first."""

from __future__ import annotations

from movdc.compiler.int8 import sqnr_db
from movdc.compiler.program import Program
from movdc.compiler.weights import INT8, WeightRef
from movdc.runtime.bundle import LayerError


def layer_errors(program: Program) -> tuple[LayerError, ...]:
    """What each int8 tensor of the program loses, the worst first; reads them one at a time, and each once."""
    quantized: dict[tuple[str, str], WeightRef] = {}  # variants of a stage share tensors
    for stage, _, graph in program.graphs():
        for ref in graph.weights.values():
            if ref.transforms and ref.transforms[-1] == INT8:
                quantized[stage, str(ref)] = ref
    errors = [
        LayerError(stage=stage, key=ref.key, sqnr_db=round(sqnr_db(ref.without_last().read()), 2))
        for (stage, _), ref in quantized.items()
    ]
    return tuple(sorted(errors, key=lambda error: (error.sqnr_db, error.stage, error.key)))
