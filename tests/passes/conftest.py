"""What only the tests of the passes share: graphs with a token layout, other machines, quantized graphs."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest
from module_source import ModuleSource
from quantized import LINEARS
from torch import nn

from movdc.compiler.program import Graph, Program, TokenLayout
from movdc.compiler.trace import trace
from movdc.compiler.weights import Source
from movdc.passes.quantize_int8 import QuantizeInt8
from movdc.runtime.bundle import TensorSpec


@pytest.fixture(scope="session")
def graph_with_layout() -> Callable[..., Graph]:
    """Trace what `build` makes into a Graph with a TokenLayout, whose retrace gives the inputs other frames.

    `frame_axes` says which axis of which input has the frames; weights are the module's own unless `source` has them.
    """

    def make(
        build: Callable[[], nn.Module],
        shapes: Mapping[str, tuple[int, ...]],
        frame_axes: Mapping[str, int],
        source: Source | None = None,
        **layout: Any,
    ) -> Graph:
        refs = (source or ModuleSource(build())).refs()

        def retrace(frames: int) -> Graph:
            sized = {name: list(shape) for name, shape in shapes.items()}
            for name, axis in frame_axes.items():
                sized[name][axis] = frames
            dtypes = {name: "bool" if name == "x_mask" else "f32" for name in shapes}
            specs = tuple(TensorSpec(name=k, dtype=dtypes[k], shape=tuple(shape)) for k, shape in sized.items())
            return trace(build, specs, ("out",), refs)

        frames = next(shapes[name][axis] for name, axis in frame_axes.items())
        return replace(retrace(frames), layout=TokenLayout(frames=frames, retrace=retrace, **layout))

    return make


@pytest.fixture(scope="session")
def with_machine() -> Callable[..., Program]:
    """The same program for another machine: `with_machine(program, budget_bytes=...)`."""
    return lambda program, **changes: replace(program, machine=replace(program.machine, **changes))


@pytest.fixture
def quantize(program_of: Callable[..., Program]) -> Callable[..., Graph]:
    """Quantize a graph, under the contract of the base class (honest `modified`, idempotence, interfaces)."""

    def run(graph: Graph, one: QuantizeInt8 = LINEARS) -> Graph:
        return one(program_of(toy=graph)).program.stages[0].variants["plain"]

    return run
