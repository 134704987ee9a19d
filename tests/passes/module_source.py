"""A module's own tensors in the place of a checkpoint, for toy graphs."""

from collections.abc import Mapping

from torch import Tensor, nn

from movdc.compiler.weights import WeightRef


class ModuleSource:
    """A module's own tensors as a source of weights."""

    label = "toy"

    def __init__(self, module: nn.Module) -> None:
        self._tensors = dict(module.state_dict())

    def refs(self) -> Mapping[str, WeightRef]:
        return {key: WeightRef(self, key, tuple(t.shape), t.dtype) for key, t in self._tensors.items()}

    def read(self, key: str) -> Tensor:
        return self._tensors[key]

    def identity(self, key: str) -> str:
        return f"{id(self)} {key}"
