"""Golden tensors and the parity check shared by the model tests.

The tensors were recorded from the reference implementations on a CPU in fp32; tests/golden/README.md says from which.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

REPOSITORY = Path(__file__).parents[2]
MAX_RELATIVE_ERROR = 1e-5  # ||ours - golden|| / ||golden||; another order of summation gives about 3e-7


@pytest.fixture(scope="session")
def golden() -> Callable[[str], tuple[dict[str, Any], dict[str, Tensor]]]:
    """Read a golden case by name: what its json says, and its tensors in fp32 (ids and masks as they are).

    Weights are stored as fp16, which loses nothing: they were drawn as fp16 numbers.
    """
    folder = REPOSITORY / "tests" / "golden"

    def read(name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
        tensors = load_file(folder / f"{name}.safetensors")
        return json.loads((folder / f"{name}.json").read_text()), {
            key: tensor.float() if tensor.is_floating_point() else tensor for key, tensor in tensors.items()
        }

    return read


@pytest.fixture(scope="session")
def golden_folder() -> Path:
    """Where the golden files lie."""
    return REPOSITORY / "tests" / "golden"


@pytest.fixture(scope="session")
def tiny_checkpoint() -> Path:
    """The small trained checkpoint of the examples."""
    return REPOSITORY / "examples" / "checkpoints" / "tiny"


@pytest.fixture
def assert_parity(request: pytest.FixtureRequest) -> Callable[[Tensor, Tensor, str], None]:
    """Check a tensor against its golden one and keep the error for the summary."""

    def check(ours: Tensor, expected: Tensor, name: str) -> None:
        assert ours.shape == expected.shape, name
        error = float(torch.linalg.vector_norm(ours - expected) / torch.linalg.vector_norm(expected))
        request.node.user_properties.append(("relative_error", error))
        assert error <= MAX_RELATIVE_ERROR, f"{name}: relative error {error:.2e} > {MAX_RELATIVE_ERROR:.0e}"

    return check


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the worst error of each parity test, over its cases and recorded places."""
    worst: dict[str, float] = {}
    for report in terminalreporter.getreports("passed"):
        test = report.nodeid.partition("[")[0]
        for name, error in report.user_properties:
            if name == "relative_error":
                worst[test] = max(error, worst.get(test, 0.0))
    if worst:
        terminalreporter.section(f"worst relative error, limit {MAX_RELATIVE_ERROR:.0e}")
    for test, error in worst.items():
        terminalreporter.write_line(f"{error:.1e}  {test}")


@pytest.fixture(scope="session")
def record_calls() -> Callable[[nn.Module, list[str]], dict[str, list[tuple[tuple[Any, ...], Tensor]]]]:
    """Record each call of the named submodules, as (inputs, output)."""

    def attach(model: nn.Module, names: list[str]) -> dict[str, list[tuple[tuple[Any, ...], Tensor]]]:
        calls: dict[str, list[tuple[tuple[Any, ...], Tensor]]] = {name: [] for name in names}
        for name in names:

            def keep(_: nn.Module, inputs: tuple[Any, ...], output: Tensor, name: str = name) -> None:
                calls[name].append((inputs, output))

            model.get_submodule(name).register_forward_hook(keep)
        return calls

    return attach


@pytest.fixture(scope="session")
def check_export() -> Callable[..., None]:
    """Export a module built on fake tensors and run the graph with real weights: it must repeat eager bit for bit.

    So nothing that forward needs was lost with the fake values. Also: no rank above 5 (Core ML's limit), and no
    constant in the program other than parameters, buffers and Python numbers.
    """

    def check(build: Callable[[], nn.Module], weights: dict[str, Tensor], inputs: dict[str, Any]) -> None:
        with FakeTensorMode() as fake:
            fake_inputs = {
                name: fake.from_tensor(value) if isinstance(value, Tensor) else value for name, value in inputs.items()
            }
            program = torch.export.export(build().eval(), (), fake_inputs, strict=False)

        assert not program.constants
        for node in program.graph.nodes:
            values = node.meta.get("val")
            for value in values if isinstance(values, (tuple, list)) else (values,):
                assert not isinstance(value, Tensor) or value.dim() <= 5, node.format_node()

        model = build().eval()
        model.load_state_dict(weights)
        specs = program.graph_signature.input_specs
        arguments = [weights[spec.target] if spec.target else inputs[spec.arg.name] for spec in specs]
        with torch.no_grad():
            (traced,) = program.graph_module(*arguments)
            eager = model(**inputs)
        assert torch.equal(traced, eager)

    return check
