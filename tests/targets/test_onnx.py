"""The target onnx: programs that stock ONNX Runtime runs, weights beside them, and int8 products as integers."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from lowered_onnx import LoweredOnnx, eager
from quantized import LINEARS, MAX_RELATIVE_ERROR, MIN_COSINE, GatedFeedForward, cosine, relative_error, tokens
from torch import Tensor, nn

from movdc.compiler.pieces import Piece, split
from movdc.compiler.program import Graph, Program
from movdc.passes.canonicalize import Canonicalize
from movdc.passes.quantize_int8 import QuantizeInt8
from movdc.runtime.onnx_location import location_of
from movdc.targets.onnx import OPSET, Onnx

MAX_FP32_ERROR = 1e-5
IDS = torch.tensor([[0, 1, 2, 3, 4], [9, 8, 7, 6, 5]])


class Net(nn.Module):
    """Each way to read a weight: as a matrix, as a kernel, row by row, element by element, and as two of them."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = nn.Embedding(10, 8)
        self.project = nn.Linear(8, 12)
        self.norm = nn.LayerNorm(12)
        self.both = nn.Parameter(torch.randn(12, 12, generator=torch.Generator().manual_seed(0)))
        self.convolve = nn.Conv2d(1, 3, 3, padding=1, stride=2)

    def forward(self, ids: Tensor) -> Tensor:
        x = F.gelu(self.norm(self.project(self.rows(ids))), approximate="tanh")
        return self.convolve((F.linear(x, self.both) + self.both[:5])[:, None])


@pytest.fixture(scope="module")
def piece(graph_of: Callable[..., Graph]) -> Piece:
    """All of the net, in one."""
    return split(graph_of(Net(), ids=IDS))[0]


@pytest.fixture(scope="module")
def lowered(piece: Piece, tmp_path_factory: pytest.TempPathFactory) -> LoweredOnnx:
    """The net lowered; its files are not to be changed."""
    return LoweredOnnx(piece, tmp_path_factory.mktemp("lowered"))


def test_a_program_is_what_eager_computes(piece: Piece, lowered: LoweredOnnx, tmp_path: Path) -> None:
    (ours,), (expected,) = lowered(IDS), eager(piece, [IDS], tmp_path)
    assert relative_error(ours, expected) < MAX_FP32_ERROR
    layouts = {slot.shape: slot.layout for slot in lowered.artifact.slots}
    assert layouts[8, 12] == "transposed"
    assert layouts[12, 12] == layouts[3, 1, 3, 3] == layouts[10, 8] == "plain", "what else reads it wants it as it is"


def test_stock_onnx_runtime_runs_it_with_the_weights_under_their_location(lowered: LoweredOnnx, tmp_path: Path) -> None:
    (path,) = lowered.constants
    program = Path(shutil.copy(lowered.artifact.program, tmp_path))
    shutil.copy(lowered.folder / path, tmp_path / location_of("weights"))
    onnx.checker.check_model(str(program), full_check=True)
    stock = onnxruntime.InferenceSession(str(program)).run(None, {"input_0": IDS.numpy()})
    assert relative_error(torch.from_numpy(stock[0]), lowered(IDS)[0]) < MAX_FP32_ERROR


def test_a_program_holds_no_weights_and_says_where_they_lie(lowered: LoweredOnnx) -> None:
    model = onnx.load(lowered.artifact.program, load_external_data=False)
    assert [one.version for one in model.opset_import] == [OPSET]
    assert [one.name for one in model.graph.input] == ["input_0"]
    (constants,) = lowered.constants.values()
    assert sorted(_place(one) for one in model.graph.initializer if one.external_data) == [
        (one.key, location_of("weights"), one.offset_bytes, one.size_bytes, one.shape) for one in constants
    ]
    assert all(one.external_data or len(one.raw_data) <= 64 for one in model.graph.initializer)
    text = lowered.artifact.program.read_bytes()
    assert not any(word in text for word in (b"/site-packages/", b".py", b"stack_trace"))


def _place(tensor: Any) -> tuple[str, str, int, int, tuple[int, ...]]:
    place = {entry.key: entry.value for entry in tensor.external_data}
    return tensor.name, place["location"], int(place["offset"]), int(place["length"]), tuple(tensor.dims)


def test_the_same_piece_gives_the_same_bytes(piece: Piece, lowered: LoweredOnnx, tmp_path: Path) -> None:
    again = Onnx().emit(piece, tmp_path)
    assert again.sha256 == lowered.artifact.sha256
    assert again.memory == lowered.artifact.memory


class Int8Net(nn.Module):
    """Linears as in T5, and a convolution with a bias behind a norm, as in a decoder."""

    def __init__(self) -> None:
        super().__init__()
        self.feed = GatedFeedForward(64, 128)
        self.convolve = nn.Sequential(nn.GroupNorm(2, 4), nn.SiLU(), nn.Conv2d(4, 8, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        return self.convolve(self.feed(x).reshape(2, 4, 8, -1))


def test_int8_products_run_as_integers_within_the_figure(
    graph_of: Callable[..., Graph],
    program_of: Callable[..., Program],
    run_graph: Callable[..., list[Tensor]],
    tmp_path: Path,
) -> None:
    x = tokens(16, 64)
    plain = graph_of(Int8Net(), x=x)
    (piece,) = split(LINEARS(program_of(toy=plain)).program.stages[0].variants["plain"])
    lowered = LoweredOnnx(piece, tmp_path)
    (expected,) = run_graph(plain, x=x)
    (ours,) = lowered(x)
    assert relative_error(ours, expected) < MAX_RELATIVE_ERROR
    matrices = [slot for slot in lowered.artifact.slots if len(slot.shape) in (2, 4)]
    assert {slot.dtype for slot in matrices} == {"u8"}
    assert len(matrices) == 4
    kernels = _kernels(lowered, {"input_0": x.numpy()})
    assert kernels.count("MatMulInteger") + kernels.count("MatMulIntegerToFloat") == 3
    assert kernels.count("ConvInteger") == 1
    assert not {"MatMul", "Gemm", "FusedMatMul", "Conv", "DequantizeLinear"}.intersection(kernels)


def _kernels(lowered: LoweredOnnx, inputs: dict[str, Any]) -> list[str]:
    """The kernels that ONNX Runtime says it ran."""
    folder = lowered.folder
    for path in lowered.constants:
        (folder / path).rename(folder / location_of("weights"))
    options = onnxruntime.SessionOptions()
    options.enable_profiling = True
    options.profile_file_prefix = str(folder / "profile")
    session = onnxruntime.InferenceSession(str(lowered.artifact.program), options)
    session.run(None, inputs)
    events = json.loads(Path(session.end_profiling()).read_text())
    return [one["args"]["op_name"] for one in events if one["name"].endswith("_kernel_time")]


def test_large_int8_values_do_not_overflow(
    graph_of: Callable[..., Graph], program_of: Callable[..., Program], tmp_path: Path
) -> None:
    layer = nn.Linear(256, 32, bias=False)
    nn.init.constant_(layer.weight, 0.5)  # products of the largest values all along, which sums of 16 bits cannot hold
    program = program_of(toy=graph_of(layer, x=torch.ones(1, 4, 256)))
    (piece,) = split(LINEARS(program).program.stages[0].variants["plain"])
    (ours,) = LoweredOnnx(piece, tmp_path)(torch.ones(1, 4, 256))
    assert relative_error(ours, torch.full((1, 4, 32), 128.0)) < 1e-5


def test_the_text_encoder_of_the_example_in_int8(
    example_program: Program, run_graph: Callable[..., list[Tensor]], tmp_path: Path
) -> None:
    program = Canonicalize()(example_program).program
    plain = program.stages[0].variants["plain"]
    (piece,) = split(QuantizeInt8(embeddings=True)(program).program.stages[0].variants["plain"])
    lowered = LoweredOnnx(piece, tmp_path)
    ids = torch.randint(2, 100, (1, 24), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(24) < 11).float()[None]
    inputs = {"input_ids": ids, "text_mask": mask}
    (expected,) = run_graph(plain, **inputs)
    (ours,) = lowered(*(inputs[spec.name] for spec in lowered.record.inputs))
    assert cosine(ours, expected) >= MIN_COSINE
    stored = sum(Path(tmp_path / path).stat().st_size for path in lowered.constants)
    assert stored < 0.3 * sum(ref.read().nbytes for ref in plain.weights.values())


def test_complex_numbers_are_refused(graph_of: Callable[..., Graph]) -> None:
    class Rotation(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.view_as_real(torch.view_as_complex(x) * 1j)

    reasons = [Onnx().refuse(node) for node in graph_of(Rotation(), x=torch.ones(3, 2)).compute_nodes]
    assert any(reason and "pairs of real ones" in reason for reason in reasons)
