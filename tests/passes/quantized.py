"""What the tests of quantize-int8 share: the toy, its input and measures of error."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from movdc.passes.quantize_int8 import QuantizeInt8

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
