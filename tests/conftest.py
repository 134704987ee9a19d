"""What tests share: the command, the example compiled once, toy programs and their evaluation."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any, Protocol

import pytest
import torch
import yaml
from module_source import ModuleSource
from pydantic_core import to_json
from torch import Tensor, fx, nn

from movdc.compiler.device import Machine
from movdc.compiler.program import DTYPES, Graph, Program, Stage
from movdc.compiler.spec import load_spec
from movdc.compiler.trace import trace
from movdc.models.opensora import OpenSora
from movdc.passes.pipeline import default_pipeline
from movdc.runtime.bundle import FORMAT_VERSION, MANIFEST, SEAL, Decode, Prompt, Sampler, TensorSpec, seal_of
from movdc.targets.executorch_xnnpack import ExecutorchXnnpack

REPOSITORY = Path(__file__).parents[1]
MACHINE = Machine(
    budget_bytes=10**9, load_bytes_per_s=1e9, compute_flops_per_s=1e9, load_overhead_s=0.0, load_copies=2.0
)
COMMAND_LIMIT_S = 900


class Movdc(Protocol):
    """Runs `movdc` as a user does."""

    def __call__(self, *arguments: object, cwd: Path | None = None, **environment: str) -> CompletedProcess[str]:
        """Run it to its end; gives the exit code and what it printed."""


class Refused(Protocol):
    """Checks that a command refused its input."""

    def __call__(self, done: CompletedProcess[str]) -> str:
        """Exit code 2 and one sentence on one line, which is given back."""


def pytest_addoption(parser: pytest.Parser) -> None:
    """The options that save minutes when a compile is not what is tested."""
    parser.addoption("--bundle", type=Path, help="the example compiled, instead of compiling it anew")
    parser.addoption("--onnx_bundle", type=Path, help="the same for the target onnx")
    parser.addoption("--traded_bundle", type=Path, help="the same with every pass that trades quality")


@pytest.fixture(scope="session")
def movdc(tmp_path_factory: pytest.TempPathFactory) -> Movdc:
    """The command of this environment, with a cache folder of its own."""
    command = Path(sys.executable).with_name("movdc")
    cache = {"XDG_CACHE_HOME": str(tmp_path_factory.mktemp("cache"))}

    def run(*arguments: object, cwd: Path | None = None, **environment: str) -> CompletedProcess[str]:
        return subprocess.run(
            [command, *map(str, arguments)],
            capture_output=True,
            text=True,
            check=False,
            cwd=cwd,
            env=os.environ | cache | environment,
            timeout=COMMAND_LIMIT_S,
        )

    return run


@pytest.fixture(scope="session")
def refused() -> Refused:
    """See Refused; lines of a progress bar may come before the sentence."""

    def check(done: CompletedProcess[str]) -> str:
        said = done.stdout + done.stderr
        assert done.returncode == 2, said
        assert "Traceback" not in said
        errors = [line for line in said.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1, said
        assert [line for line in said.splitlines() if line.strip()][-1] == errors[0], said
        return errors[0].removeprefix("error: ")

    return check


@pytest.fixture(scope="session")
def seal() -> Callable[..., None]:
    """Writes the smallest manifest that the engine reads, with the given parts in it, and its seal."""

    def write(root: Path, **parts: Any) -> None:
        sizes = {"budget_bytes": 0, "peak_bytes": 0, "slab_bytes": 4096}
        arrays: dict[str, Any] = {"stages": [], "partitions": [], "weights": [], "files": []}
        others = ("family", "target", "device", "video", "prompt", "sampler", "decode", "spec", "pipeline", "versions")
        manifest = {"format_version": FORMAT_VERSION, **sizes, **arrays, **dict.fromkeys(others), **parts}
        text = to_json(manifest)
        (root / MANIFEST).write_bytes(text)
        (root / SEAL).write_text(seal_of(text))

    return write


@pytest.fixture(scope="session")
def example() -> Path:
    """The pipeline that the README compiles."""
    return REPOSITORY / "examples" / "tiny.yaml"


@pytest.fixture
def shallow(tmp_path: Path, example: Path) -> Path:
    """The example's pipeline with one layer of everything and one small frame, so that a compile is short."""
    spec = yaml.safe_load(example.read_text())
    checkpoint = example.parent / "checkpoints" / "tiny"

    def config(model: str, **smaller: object) -> dict[str, object]:
        return json.loads((checkpoint / model / "config.json").read_text()) | smaller

    spec["text_encoder"] |= {
        "weights": str(checkpoint / "text_encoder"),
        "config": config("text_encoder", num_layers=1),
    }
    spec["denoiser"] = {"weights": str(checkpoint / "denoiser"), "config": config("denoiser", depth=1)}
    vae = config("vae", spatial={"block_out_channels": [8], "layers_per_block": 1, "norm_num_groups": 2})
    vae["vae_temporal"] |= {"channel_multipliers": [1, 1, 1], "temporal_downsample": [True, True], "filters": 8}
    spec["vae"] = {"weights": "random:0", "config": vae}
    spec["video"] |= {"frames": 1, "height": 16, "width": 16}
    spec["memory_budget"] = "1GB"
    path = tmp_path / "shallow.yaml"
    path.write_text(yaml.safe_dump(spec))
    return path


TRADED: dict[str, dict[str, Any]] = {"quantize-int8": {}, "merge-tokens": {"steps": 15}, "leap": {"mode": "fixed"}}
# The compiles that tests ask for by the name of their fixture: where, and the options beside the example's YAML.
COMPILES = {
    "bundle": ("one/tiny", []),
    "twin_bundle": ("another/place/twin", ["--no-cache"]),
    "small_bundle": ("small/tiny", ["--memory-budget", "12MB"]),
    "onnx_bundle": ("onnx/tiny", ["--target", "onnx"]),
    "traded_bundle": ("traded/tiny", ["--passes", ",".join(map(str, default_pipeline(TRADED, ExecutorchXnnpack())))]),
}


@pytest.fixture(scope="session")
def compiles(
    request: pytest.FixtureRequest, movdc: Movdc, example: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Future[Path]]]:
    """Every compile that a test of this run asks for, two at a time: a compile takes minutes and uses one core."""
    asked_for = {name for item in request.session.items for name in getattr(item, "fixturenames", ())}
    asked_for -= {
        name for name in ("bundle", "onnx_bundle", "traded_bundle") if request.config.getoption(f"--{name}") is not None
    }
    root = tmp_path_factory.mktemp("bundles")

    def compile_to(place: str, options: list[str]) -> Path:
        out = root / place
        out.parent.mkdir(parents=True)
        done = movdc("compile", example, "-o", out.name, *options, cwd=out.parent)
        assert done.returncode == 0, done.stdout + done.stderr
        return out

    with ThreadPoolExecutor(2) as pool:
        yield {name: pool.submit(compile_to, *COMPILES[name]) for name in COMPILES if name in asked_for}


@pytest.fixture(scope="session")
def bundle(compiles: dict[str, Future[Path]], request: pytest.FixtureRequest) -> Path:
    """The example compiled; copy it before you change it."""
    return _given_or_compiled("bundle", compiles, request)


@pytest.fixture(scope="session")
def onnx_bundle(compiles: dict[str, Future[Path]], request: pytest.FixtureRequest) -> Path:
    """The example compiled for ONNX Runtime; copy it before you change it."""
    return _given_or_compiled("onnx_bundle", compiles, request)


def _given_or_compiled(name: str, compiles: dict[str, Future[Path]], request: pytest.FixtureRequest) -> Path:
    given: Path | None = request.config.getoption(f"--{name}")
    return compiles[name].result() if given is None else given.resolve()


@pytest.fixture(scope="session")
def twin_bundle(compiles: dict[str, Future[Path]]) -> Path:
    """The example compiled once more, to another folder and from there."""
    return compiles["twin_bundle"].result()


@pytest.fixture(scope="session")
def small_bundle(compiles: dict[str, Future[Path]]) -> Path:
    """The example compiled for less memory, for which a part of the decoder is planned again when it is measured."""
    return compiles["small_bundle"].result()


@pytest.fixture(scope="session")
def traded_bundle(compiles: dict[str, Future[Path]], request: pytest.FixtureRequest) -> Path:
    """The example compiled with every pass that trades quality; copy it before you change it."""
    return _given_or_compiled("traded_bundle", compiles, request)


@pytest.fixture(scope="session")
def graph_of() -> Callable[..., Graph]:
    """Trace a module: `graph_of(module, x=tensor, ...)` gives its Graph, inputs named as the keywords."""

    def make(module: nn.Module, **inputs: Tensor) -> Graph:
        specs = tuple(TensorSpec(name=k, dtype=DTYPES[t.dtype], shape=tuple(t.shape)) for k, t in inputs.items())
        source = ModuleSource(module)
        return trace(lambda: module, specs, ("out",), source.refs())

    return make


@pytest.fixture(scope="session")
def program_of() -> Callable[..., Program]:
    """Wrap graphs, given as stage=graph, into a Program with one plain variant a stage."""
    spec = load_spec(REPOSITORY / "examples" / "tiny.yaml").spec
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
def example_program() -> Program:
    """The example pipeline as traced; its weights are read only when a graph is run."""
    return OpenSora().trace(load_spec(REPOSITORY / "examples" / "tiny.yaml"), MACHINE, 4)
