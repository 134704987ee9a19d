"""Toy programs for the tests of the passes, and the evaluation of a graph with its weights."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from quantized import LINEARS
from torch import Tensor, fx, nn

from movdc.compiler.device import Machine
from movdc.compiler.program import DTYPES, Graph, Program, Stage, TokenLayout
from movdc.compiler.spec import load_spec
from movdc.compiler.trace import trace
from movdc.compiler.weights import Source, WeightRef
from movdc.models.opensora import OpenSora
from movdc.passes.quantize_int8 import QuantizeInt8
from movdc.runtime.bundle import Decode, Prompt, Sampler, TensorSpec

EXAMPLE = Path(__file__).parents[2] / "examples" / "tiny.yaml"
MACHINE = Machine(
    budget_bytes=10**9, load_bytes_per_s=1e9, compute_flops_per_s=1e9, load_overhead_s=0.0, load_copies=2.0
)


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


@pytest.fixture(scope="session")
def graph_of() -> Callable[..., Graph]:
    """Trace a module: `graph_of(module, x=tensor, ...)` gives its Graph, inputs named as the keywords."""

    def make(module: nn.Module, **inputs: Tensor) -> Graph:
        specs = tuple(TensorSpec(name=k, dtype=DTYPES[t.dtype], shape=tuple(t.shape)) for k, t in inputs.items())
        source = ModuleSource(module)
        return trace(lambda: module, specs, ("out",), source.refs())

    return make


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
def program_of() -> Callable[..., Program]:
    """Wrap graphs, given as stage=graph, into a Program with one plain variant a stage."""
    spec = load_spec(EXAMPLE).spec
    sampler = Sampler.model_validate(
        {"solver": "euler", "prediction": "rectified_flow", "units": (30,), "shift": 1.0, "rounded": False}
        | {"guidance": 4.0, "latent": (1, 4, 10, 8, 8)}
    )
    prompt = Prompt(tokenizer="t.json", max_tokens=24, pad_id=0, aesthetic=None, cleaning="open-sora")

    def make(machine: Machine = MACHINE, **graphs: Graph) -> Program:
        stages = tuple(Stage(name, "per_step", {"plain": graph}) for name, graph in graphs.items())
        return Program(spec, machine, stages, sampler, Decode(chunks=(), micro_batch_frames=4), prompt, b"")

    return make


@pytest.fixture(scope="session")
def run_graph() -> Callable[..., list[Tensor]]:
    """Evaluate a Graph: `run_graph(graph, x=tensor, ...)` reads its weights and gives its outputs."""

    def run(graph: Graph, **inputs: Any) -> list[Tensor]:
        arguments = [
            graph.weights[node.name].read() if node.name in graph.weights else inputs[node.name]
            for node in graph.graph.find_nodes(op="placeholder")
        ]
        with torch.no_grad():
            return list(fx.Interpreter(fx.GraphModule(nn.Module(), graph.graph)).run(*arguments))

    return run


@pytest.fixture(scope="session")
def with_machine() -> Callable[..., Program]:
    """The same program for another machine: `with_machine(program, budget_bytes=...)`."""
    return lambda program, **changes: replace(program, machine=replace(program.machine, **changes))


@pytest.fixture(scope="session")
def example_program() -> Program:
    """The example pipeline as traced; its weights are read only when a graph is run."""
    return OpenSora().trace(load_spec(EXAMPLE), MACHINE, 4)


@pytest.fixture
def quantize(program_of: Callable[..., Program]) -> Callable[..., Graph]:
    """Quantize a graph, under the contract of the base class (honest `modified`, idempotence, interfaces)."""

    def run(graph: Graph, one: QuantizeInt8 = LINEARS) -> Graph:
        return one(program_of(toy=graph)).program.stages[0].variants["plain"]

    return run
