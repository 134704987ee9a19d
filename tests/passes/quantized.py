"""What the tests of quantize-int8 share: the toy, its input and measures of error."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from movdc.compiler.int8 import Loss
from movdc.compiler.layer_errors import LayerErrors
from movdc.compiler.program import Program
from movdc.compiler.weights import INT8
from movdc.passes.quantize_int8 import QuantizeInt8
from movdc.runtime.bundle import LayerError

GENERATOR = torch.Generator().manual_seed(0)
MIN_COSINE = 0.999
MAX_RELATIVE_ERROR = 0.03
LINEARS = QuantizeInt8(stages=("toy",))


class GatedFeedForward(nn.Module):
    """As in T5: three weights without bias, two of which read one input."""

    def __init__(self, width: int = 16, inner: int = 32) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.wi_0, self.wi_1 = (nn.Linear(width, inner, bias=False) for _ in range(2))
        self.wo = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return x + self.wo(F.gelu(self.wi_0(y), approximate="tanh") * self.wi_1(y))


def tokens(count: int, width: int) -> Tensor:
    """Activations whose size differs from token to token."""
    return torch.randn(1, count, width, generator=GENERATOR) * torch.linspace(0.1, 5, count)[:, None]


def relative_error(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


def cosine(a: Tensor, b: Tensor) -> float:
    return float(F.cosine_similarity(a.flatten().double(), b.flatten().double(), dim=0))


def errors_of(program: Program) -> tuple[LayerError, ...]:
    """The report of a program, from reading each of its int8 weights as a target does."""
    errors = LayerErrors()
    for stage, _, graph in program.graphs():
        for name, ref in graph.weights.items():
            if INT8 in ref.transforms:
                loss = Loss()
                assert sum(part.shape[0] for part in ref.parts(loss)) == ref.shape[0]
                errors.add(stage, graph.weights, {name: loss.sqnr_db})
    return errors.worst_first()
