"""movdc verify: a good bundle is right, and of ten faults, each with correct checksums, the partition is named."""

import hashlib
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import fx, nn

from movdc.compiler.against_eager import Source, compare_with_eager, piece_between, source_of
from movdc.compiler.alone import NAME, lower_alone
from movdc.compiler.device import Machine
from movdc.compiler.diagnose import diagnose
from movdc.compiler.int8 import channel_scales
from movdc.compiler.pass_base import Pass, run_passes
from movdc.compiler.pieces import Piece, split
from movdc.compiler.program import Graph, Program
from movdc.compiler.spec import load_spec
from movdc.compiler.target import Artifact
from movdc.models.opensora import OpenSora
from movdc.passes.pipeline import parse_pipeline
from movdc.passes.quantize_int8 import QuantizeInt8
from movdc.runtime.bundle import MANIFEST, SEAL, Bundle, seal_of
from movdc.runtime.executors import open_executor
from movdc.runtime.replay import Finding, replay
from movdc.targets.executorch_xnnpack import ExecutorchXnnpack

pytestmark = pytest.mark.slow
aten = torch.ops.aten
WIDTH = 128  # of the example's denoiser and text encoder
Array = np.ndarray[Any, Any]
Movdc = Callable[..., CompletedProcess[str]]
Refused = Callable[[CompletedProcess[str]], str]


class Copy:
    """A copy of a bundle to damage, whose files and seal are right again when it is signed."""

    def __init__(self, bundle: Path, root: Path, source: Source) -> None:
        self.root = Path(shutil.copytree(bundle, root))
        self.manifest = json.loads((root / MANIFEST).read_text())
        self.source = source

    def partition(self, name: str) -> dict[str, Any]:
        return next(one for one in self.manifest["partitions"] if one["name"] == name)

    def change(self, name: str, wanted: Callable[[dict[str, Any], Array], bool], edit: Callable[[Array], Any]) -> None:
        """Edit the first constant of a partition that is wanted, in a file that becomes the partition's own."""
        partition = self.partition(name)
        for index, path in enumerate(partition["weights"]):
            record = next(one for one in self.manifest["weights"] if one["path"] == path)
            data = np.fromfile(self.root / path, np.uint8)
            for one in record["constants"]:
                part = data[one["offset_bytes"] : one["offset_bytes"] + one["size_bytes"]]
                if wanted(one, part):
                    edit(part)
                    own = f"weights/{hashlib.sha256(data).hexdigest()[:16]}.ptd"
                    data.tofile(self.root / own)
                    self.manifest["weights"].append(record | {"path": own})
                    self.manifest["files"].append({"path": own})
                    partition["weights"][index] = own
                    return
        raise AssertionError(f"{name} has no such constant")

    def break_graph(self, name: str, edit: Callable[[fx.Graph, list[str]], None]) -> None:
        """Lower a partition of a graph that was edited, and put it in the place of the right one."""
        stage, _, _ = name.split(".")
        right = self.source.pieces[name]
        graph: Graph = replace(right.graph, graph=right.graph.copy())
        edit(graph.graph, [node.name for node in right.nodes])
        graph.graph.eliminate_dead_code()
        record = Bundle.read(self.root).partitions[name]
        folder = self.root / f"broken-{name}"
        folder.mkdir()
        alone = lower_alone(piece_between(graph, record, stage), ExecutorchXnnpack(), self.source.manifest, folder)
        made = json.loads((folder / MANIFEST).read_text())
        assert alone.program_sha256 not in (self.root / MANIFEST).read_text(), "the program is another one"
        partition = self.partition(name)
        partition["program"] = f"{folder.name}/{made['partitions'][0]['program']}"
        partition["weights"] = [f"{folder.name}/{path}" for path in made["partitions"][0]["weights"]]
        self.manifest["weights"] += [one | {"path": f"{folder.name}/{one['path']}"} for one in made["weights"]]
        self.manifest["files"] += [{"path": path} for path in (partition["program"], *partition["weights"])]

    def sign(self) -> None:
        for file in self.manifest["files"]:
            data = (self.root / file["path"]).read_bytes()
            file |= {"size_bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        text = json.dumps(self.manifest).encode()
        (self.root / MANIFEST).write_bytes(text)
        (self.root / SEAL).write_text(seal_of(text))


def _is_matrix(one: dict[str, Any], part: Array) -> bool:
    return bool(one["size_bytes"] == 4 * WIDTH * WIDTH)


def _flipped_weight(copy: Copy) -> None:
    def flip(part: Array) -> None:
        numbers = part.view(np.float32)
        numbers[np.argsort(np.abs(numbers))[len(numbers) // 2]] *= -1  # of a middling size

    copy.change("denoiser.plain.2", _is_matrix, flip)


def _scale_off(copy: Copy, factor: float) -> None:
    """All scales of one int8 matrix of the text encoder."""
    checkpoint = Path(__file__).parents[1] / "examples/checkpoints/tiny/text_encoder/model.safetensors"
    weight = load_file(checkpoint)["encoder.block.0.layer.0.SelfAttention.v.weight"]
    scales = channel_scales(weight).numpy().tobytes()

    def multiply(part: Array) -> None:
        part.view(np.float32)[:] *= factor

    copy.change("text_encoder.plain.0", lambda one, part: part.tobytes() == scales, multiply)


def _wrong_scale(copy: Copy) -> None:
    _scale_off(copy, 2)


def _swapped_inputs(copy: Copy) -> None:
    def swap(graph: fx.Graph, names: list[str]) -> None:
        """The caption and the null caption."""
        for node in graph.find_nodes(op="call_function", target=aten.cat.default):
            first, second = node.args[0][:2]
            if node.name in names and "text" in (first.name, second.name):
                node.args = ([second, first], *node.args[1:])
                return
        raise AssertionError("nothing joins the captions")

    copy.break_graph("denoiser.plain.0", swap)


def _nan(copy: Copy) -> None:
    def break_one(part: Array) -> None:
        part.view(np.float32)[7] = np.nan

    copy.change("vae_temporal.frames17.1", lambda one, part: one["size_bytes"] > 10_000, break_one)


def _transposed_matrix(copy: Copy) -> None:
    def transpose(part: Array) -> None:
        matrix = part.view(np.float32).reshape(WIDTH, WIDTH)
        matrix[:] = matrix.T.copy()

    copy.change("denoiser.merged.3", _is_matrix, transpose)


def _rope_off_by_one(copy: Copy) -> None:
    def shift(part: Array) -> None:
        table = part.view(np.float32).reshape(-1, 16)
        table[:] = np.roll(table, 1, axis=0)

    copy.change("denoiser.plain.3", lambda one, part: one["key"] == "tables_0", shift)


def _dropped_residual(copy: Copy) -> None:
    def drop(graph: fx.Graph, names: list[str]) -> None:
        for node in graph.find_nodes(op="call_function", target=aten.add.Tensor):
            shapes = {source.meta["val"].shape for source in (*node.all_input_nodes, node)}
            if node.name in names and len(node.all_input_nodes) == 2 and len(shapes) == 1:
                node.replace_all_uses_with(node.args[1])  # what an attention adds to what it read
                graph.erase_node(node)
                return
        raise AssertionError("nothing is added to what it was made of")

    copy.break_graph("denoiser.plain.1", drop)


def _ignored_mask(copy: Copy) -> None:
    def ignore(graph: fx.Graph, names: list[str]) -> None:
        for node in graph.nodes:
            for index, value in enumerate(node.args):
                if node.name in names and isinstance(value, float) and value < -1e8:
                    node.update_arg(index, 0.0)
                    return
        raise AssertionError("nothing is masked")

    copy.break_graph("denoiser.plain.0", ignore)


def _stale_variant(copy: Copy) -> None:
    plain = copy.partition("denoiser.plain.2")
    copy.partition("denoiser.merged.2").update(program=plain["program"], weights=plain["weights"])


def _wrong_leap_step(copy: Copy) -> None:
    assert copy.manifest["sampler"]["leap"]["mode"] == "fixed"
    copy.manifest["sampler"]["leap"]["step"] = 16  # and not 15, half of the steps


FAULTS: dict[str, tuple[Callable[[Copy], None], str]] = {
    "flipped weight": (_flipped_weight, "denoiser.plain.2"),
    "wrong scale": (_wrong_scale, "text_encoder.plain.0"),
    "swapped inputs": (_swapped_inputs, "denoiser.plain.0"),
    "NaN": (_nan, "vae_temporal.frames17.1"),
    "transposed matrix": (_transposed_matrix, "denoiser.merged.3"),
    "off-by-one rope": (_rope_off_by_one, "denoiser.plain.3"),
    "dropped residual": (_dropped_residual, "denoiser.plain.1"),
    "wrong mask": (_ignored_mask, "denoiser.plain.0"),
    "stale variant": (_stale_variant, "denoiser.merged.2"),
    "wrong leap step": (_wrong_leap_step, "sampler"),
}


@pytest.fixture(scope="session")
def source(traded_bundle: Path, example: Path) -> Source:
    """The graphs that the bundle was made of."""
    manifest = Bundle.read(traded_bundle).manifest
    machine = Machine(
        budget_bytes=10**9, load_bytes_per_s=1e9, compute_flops_per_s=1e9, load_overhead_s=0.0, load_copies=2.0
    )
    passes = parse_pipeline(manifest.pipeline)
    return source_of(load_spec(example), OpenSora(), ExecutorchXnnpack(), machine, passes, manifest)


@pytest.fixture(scope="session")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Packed weights, which copies of a bundle share."""
    return tmp_path_factory.mktemp("packed")


def _findings(root: Path, packed: Path) -> list[Finding]:
    bundle = Bundle.read(root)
    return replay(bundle, open_executor(bundle, packed_cache=packed), lambda what, done, total: None)


def test_a_good_bundle_is_right(traded_bundle: Path, packed: Path) -> None:
    manifest = Bundle.read(traded_bundle).manifest
    found = _findings(traded_bundle, packed)
    stages = {f"{stage.name}.{variant}" for stage in manifest.stages for variant in stage.variants}
    assert {one.name for one in found} == {one.name for one in manifest.partitions} | stages | {"sampler"}
    assert all(one.passed for one in found), found
    exact = [one for one in found if one.error and not one.name.startswith("text_encoder")]
    assert min(one.error.sqnr_db for one in exact if one.error) > 90  # well above the 80 dB that they are held to


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_is_found_where_it_is(
    traded_bundle: Path, source: Source, packed: Path, tmp_path: Path, fault: str
) -> None:
    damage, wanted = FAULTS[fault]
    copy = Copy(traded_bundle, tmp_path / "copy", source)
    damage(copy)
    copy.sign()
    wrong = {one.name for one in _findings(copy.root, packed) if one.passed is False}
    stage = wanted.rpartition(".")[0]
    assert wrong == ({wanted, stage} if stage else {wanted})


def test_an_int8_fault_that_is_less_than_int8_loses_is_found(
    traded_bundle: Path, source: Source, packed: Path, tmp_path: Path
) -> None:
    copy = Copy(traded_bundle, tmp_path / "copy", source)
    _scale_off(copy, 1.03)
    copy.sign()
    found = {one.name: one for one in _findings(copy.root, packed)}
    assert {name for name, one in found.items() if one.passed is False} == {"text_encoder.plain.0"}
    stage = found["text_encoder.plain"]  # the same tensors against fp32, which is what was compared before
    assert stage.error is not None
    assert stage.error.sqnr_db > 27


def test_a_bundle_for_onnx_runtime_is_right(onnx_bundle: Path, packed: Path) -> None:
    found = _findings(onnx_bundle, packed)
    assert {one.kind for one in found} == {"partition", "stage", "sampler"}
    assert all(one.passed for one in found), found


def test_the_command_names_the_partition_the_weight_and_the_program(
    movdc: Movdc, traded_bundle: Path, source: Source, example: Path, tmp_path: Path
) -> None:
    copy = Copy(traded_bundle, tmp_path / "copy", source)
    _flipped_weight(copy)
    _dropped_residual(copy)
    copy.sign()
    done = movdc("verify", copy.root)
    assert done.returncode == 1, done.stdout + done.stderr
    said = done.stdout.splitlines()
    assert "wrong: denoiser.plain.1" in said
    assert "wrong: denoiser.plain, through denoiser.plain.1, denoiser.plain.2" in said
    assert said[-1].endswith(" right, 3 wrong")
    done = movdc("verify", copy.root, "--spec", example)
    assert done.returncode == 1, done.stdout + done.stderr
    assert re.search(
        r"wrong: denoiser.plain.2: .* reads denoiser:\S+weight, which is another one in weights/", done.stdout
    )
    assert re.search(
        r"wrong: denoiser.plain.1: broken-\S+ is not the program that its graph is lowered to", done.stdout
    )


@dataclass(frozen=True)
class Wrong(ExecutorchXnnpack):
    """A target that takes the hyperbolic tangent for the sigmoid."""

    def emit(self, piece: Piece, directory: Path) -> Artifact:
        graph = replace(piece.graph, graph=piece.graph.copy())
        same = {node.name: node for node in graph.graph.nodes}
        for node in piece.nodes:
            if node.target is aten.sigmoid.default:
                same[node.name].target = aten.tanh.default
        inputs, nodes, outputs = (
            tuple(same[node.name] for node in some) for some in (piece.inputs, piece.nodes, piece.outputs)
        )
        weights = tuple(replace(weight, node=same[weight.node.name]) for weight in piece.weights)
        copied = replace(piece, graph=graph, inputs=inputs, nodes=nodes, outputs=outputs, weights=weights)
        return super().emit(copied, directory)


@pytest.mark.parametrize("passes", [(), (QuantizeInt8(stages=("toy",)),)], ids=["fp32", "int8"])
def test_a_node_that_the_target_computes_otherwise_is_found(
    traded_bundle: Path,
    graph_of: Callable[..., Graph],
    program_of: Callable[..., Program],
    tmp_path: Path,
    passes: tuple[Pass, ...],
) -> None:
    layers = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.Sigmoid(), nn.Linear(8, 8), nn.ReLU())
    program = run_passes(program_of(toy=graph_of(layers.eval(), x=torch.ones(2, 8))), passes)
    (piece,) = split(program.stages[0].variants["plain"])
    manifest = Bundle.read(traded_bundle).manifest
    alone = lower_alone(piece, Wrong(), manifest, tmp_path)
    executor = open_executor(alone.bundle, memory_budget=10**9)
    source = Source({NAME: piece}, {}, manifest.sampler, passes, Wrong(), alone.bundle.manifest)
    found = compare_with_eager(source, executor, lambda what, done, total: None)
    assert [(one.kind, one.passed) for one in found] == [("partition", False), ("sampler", True)]
    said = diagnose(source, NAME, alone.bundle, executor)
    assert said == "executorch-xnnpack computes %sigmoid: f32[2,8] of 3 otherwise than PyTorch"


def test_what_cannot_be_verified_is_refused(
    movdc: Movdc, refused: Refused, traded_bundle: Path, tmp_path: Path, source: Source
) -> None:
    assert "no such bundle" in refused(movdc("verify", tmp_path / "none"))
    assert "none.yaml" in refused(movdc("verify", traded_bundle, "--spec", tmp_path / "none.yaml"))
    copy = Copy(traded_bundle, tmp_path / "copy", source)
    del copy.manifest["expected"]
    copy.sign()
    assert "has no expected outputs; compile it again" in refused(movdc("verify", copy.root))
    copy.manifest["target"] = "coreml"
    copy.sign()
    assert "is for the target coreml, which this machine cannot run" in refused(movdc("verify", copy.root))
