"""The executor of onnx bundles: what eager computes, the same bits in every mode, and damage that is refused."""

import json
import shutil
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from denoiser import Denoiser, damage, in_time
from lowered_onnx import run
from torch import Tensor, fx, nn

from movdc.compiler.pass_base import run_passes
from movdc.compiler.program import Graph, Program
from movdc.passes.pipeline import default_pipeline
from movdc.runtime.bundle import NUMPY_DTYPES, Bundle
from movdc.runtime.checked_files import CheckedFiles
from movdc.runtime.errors import BudgetError, BundleError, CancelledError, InputError, RunError
from movdc.runtime.executors import open_executor
from movdc.runtime.generate import Generator
from movdc.runtime.onnx_executor import OnnxExecutor
from movdc.runtime.onnx_partition import OnnxPartition
from movdc.targets.onnx import Onnx

pytestmark = pytest.mark.slow
MAX_ERROR = 1e-4
MIN_PSNR_DB = 40
PLENTY_BYTES = 10**9


class Recording(fx.Interpreter):
    """Evaluates a graph and keeps the value of every node."""

    def __init__(self, graph: Graph) -> None:
        super().__init__(fx.GraphModule(nn.Module(), graph.graph))
        self.values: dict[str, Tensor] = {}

    def run_node(self, node: fx.Node) -> Any:
        value = super().run_node(node)
        self.values[node.name] = value
        return value


def _eager(graph: Graph) -> dict[str, Tensor]:
    """Every tensor of a stage by the name that partitions know it under, from random inputs."""
    generator = torch.Generator().manual_seed(0)
    inputs = {}
    for spec in graph.inputs:
        ids = torch.randint(2, 100, spec.shape, generator=generator)
        inputs[spec.name] = ids if spec.dtype == "i64" else torch.rand(spec.shape, generator=generator)
    recording = Recording(graph)
    arguments = [
        graph.weights[node.name].read() if node.name in graph.weights else inputs[node.name]
        for node in graph.graph.find_nodes(op="placeholder")
    ]
    with torch.no_grad():
        results = recording.run(*arguments)
    return recording.values | inputs | dict(zip((spec.name for spec in graph.outputs), results, strict=True))


def test_every_partition_computes_what_eager_does(onnx_bundle: Path, example_program: Program) -> None:
    bundle = Bundle.read(onnx_bundle)
    passes = [one for one in default_pipeline({}, Onnx()) if one.name not in ("partition", "share-templates")]
    program = run_passes(example_program, passes)
    files = CheckedFiles(bundle.root, bundle.manifest.files)
    constants = {file.path: file.constants for file in bundle.manifest.weights}
    errors = {}
    for stage, variant, graph in program.graphs():
        values = _eager(graph)
        for name in bundle.stages[stage].variants[variant].order:
            record = bundle.partitions[name]
            ours = run(OnnxPartition(record, constants, files), record, [values[spec.name] for spec in record.inputs])
            for spec, one in zip(record.outputs, ours, strict=True):
                expected = values[spec.name]
                errors[f"{name} {spec.name}"] = float((one - expected).norm() / expected.norm())
    print(errors)
    assert len(errors) >= len(bundle.manifest.partitions)
    assert max(errors.values()) <= MAX_ERROR


def test_its_video_is_that_of_executorch(onnx_bundle: Path, bundle: Path) -> None:
    made = []
    for root in (onnx_bundle, bundle):
        read = Bundle.read(root)
        executor = open_executor(read)
        made.append(Generator(read, executor).generate("a red circle moving down on a black background", seed=8))
        assert executor.peak_bytes <= read.manifest.peak_bytes
    ours, theirs = (one.frames.astype(np.float64) for one in made)
    psnr_db = 10 * np.log10(255**2 / max(np.mean((ours - theirs) ** 2), 1e-12))
    error = np.linalg.norm(made[0].latents - made[1].latents) / np.linalg.norm(made[1].latents)
    print(f"relative L2 of the latents {error:.1e}, PSNR {psnr_db:.1f} dB")
    assert error <= MAX_ERROR
    assert psnr_db >= MIN_PSNR_DB


@pytest.fixture(scope="module")
def denoiser(onnx_bundle: Path) -> Denoiser:
    return Denoiser.of(onnx_bundle)


@pytest.mark.parametrize("mode", ["sequential", "concurrent", "dynamic"])
def test_each_mode_gives_the_same_bits_within_its_certificate(denoiser: Denoiser, mode: Any) -> None:
    executor = OnnxExecutor(denoiser.bundle, mode=mode)
    assert all(denoiser.runs(executor, 3))
    variant = denoiser.bundle.stages["denoiser"].variants["plain"]
    assert 0 < executor.peak_bytes <= variant.peak_bytes
    reports = executor.reports["denoiser"]
    assert all(one.read_bytes > 0 for one in reports), "a budget below the weights reads some of them in every run"
    assert mode == "dynamic" or not any(one.pinned for one in reports)


def test_with_memory_for_all_of_it_nothing_is_loaded_again(denoiser: Denoiser) -> None:
    executor = OnnxExecutor(denoiser.bundle, memory_budget=PLENTY_BYTES)
    assert all(denoiser.runs(executor, 3))
    first, *later = executor.reports["denoiser"]
    assert first.load_s > 0
    assert all(one.load_s == one.wait_s == one.read_bytes == 0 for one in later)
    assert later[-1].pinned == denoiser.bundle.stages["denoiser"].variants["plain"].order


def test_pressure_frees_what_stays_and_later_runs_take_it_back_by_levels(denoiser: Denoiser) -> None:
    executor = OnnxExecutor(denoiser.bundle, memory_budget=PLENTY_BYTES)
    denoiser.runs(executor, 1)
    levels = denoiser.bundle.stages["denoiser"].variants["plain"].residency
    executor.relieve("critical")
    kept = []
    for _ in levels:
        assert denoiser.runs(executor, 1) == [True]
        kept.append(executor.reports["denoiser"][-1].pinned)
    assert not kept[0]
    assert kept[-1] == levels[-1].pinned
    assert [len(one) for one in kept] == sorted(len(one) for one in kept)


def test_a_budget_that_holds_nothing_is_refused_with_what_is_needed(denoiser: Denoiser) -> None:
    executor = OnnxExecutor(denoiser.bundle, memory_budget=1000)
    with pytest.raises(BudgetError, match=r"denoiser needs \d+ bytes at least; the budget is 1000"):
        denoiser.runs(executor, 1)
    executor.set_budget(PLENTY_BYTES)
    assert denoiser.runs(executor, 1) == [True]


def test_a_run_is_cancelled_at_any_moment_and_the_next_one_is_whole(denoiser: Denoiser) -> None:
    executor = OnnxExecutor(denoiser.bundle)
    cancelled = 0
    for delay_s in np.linspace(0, 0.08, 8):
        timer = threading.Timer(float(delay_s), executor.cancel)
        timer.start()
        ended = in_time(lambda: denoiser.runs(executor, 2))
        timer.join()
        cancelled += isinstance(ended, CancelledError)
        assert isinstance(ended, CancelledError) or all(ended)
        assert all(in_time(lambda: denoiser.runs(executor, 1)))
    assert cancelled > 0


def test_inputs_are_checked(denoiser: Denoiser) -> None:
    executor = OnnxExecutor(denoiser.bundle)
    with pytest.raises(InputError, match="input 'latents' is float64"):
        executor.run("denoiser", "plain", denoiser.inputs | {"latents": np.zeros(3)})
    with pytest.raises(InputError, match="has no input 'more'"):
        executor.run("denoiser", "plain", denoiser.inputs | {"more": np.zeros(3)})


@pytest.fixture
def copy(onnx_bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(onnx_bundle, tmp_path / "copy"))


@pytest.mark.parametrize("how", ["disappears", "shrinks", "changes"])
@pytest.mark.parametrize("what", ["weights", "program"])
def test_a_file_that_fails_between_two_runs_is_a_typed_error_or_harms_nothing(
    denoiser: Denoiser, copy: Path, how: str, what: str
) -> None:
    executor = OnnxExecutor(Bundle.read(copy), mode="concurrent")
    assert denoiser.runs(executor, 1) == [True]
    second = Bundle.read(copy).partitions["denoiser.plain.1"]
    damage(copy / (second.program if what == "program" else second.weights[0]), how)
    ended = in_time(lambda: denoiser.runs(executor, 2))
    if isinstance(ended, RunError):
        assert isinstance(ended, BundleError)
        assert Path(second.weights[0]).name in str(ended)
    else:
        assert all(ended)  # what is prepared needs the file no more


@pytest.mark.parametrize("how", ["disappears", "shrinks", "changes"])
@pytest.mark.parametrize("what", ["weights", "program"])
def test_a_wrong_file_is_refused_with_its_name(copy: Path, how: str, what: str) -> None:
    bundle = Bundle.read(copy)
    one = bundle.partitions["denoiser.plain.1"]
    path = one.program if what == "program" else one.weights[0]
    damage(copy / path, how)
    with pytest.raises(BundleError, match=Path(path).name):
        OnnxExecutor(bundle)


def test_a_link_is_no_file_of_a_bundle(copy: Path, tmp_path: Path) -> None:
    bundle = Bundle.read(copy)
    path = copy / bundle.partitions["denoiser.plain.1"].weights[0]
    (tmp_path / "elsewhere").write_bytes(path.read_bytes())
    path.unlink()
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(BundleError, match=path.name):
        OnnxExecutor(bundle)


def test_without_onnx_runtime_one_sentence_says_what_to_install(
    onnx_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(RunError, match=r"install that with `pip install movdc\[onnx\]`"):
        open_executor(Bundle.read(onnx_bundle))


def test_the_command_makes_a_video_and_a_trace_of_both_lanes(
    movdc: Callable[..., CompletedProcess[str]], onnx_bundle: Path, tmp_path: Path
) -> None:
    video, trace = tmp_path / "clip.mp4", tmp_path / "trace.json"
    done = movdc("run", onnx_bundle, "--prompt", "a red circle", "--steps", 2, "-o", video, "--trace", trace)
    assert done.returncode == 0, done.stdout + done.stderr
    assert video.read_bytes()[4:8] == b"ftyp"
    events = json.loads(trace.read_text())["traceEvents"]
    lanes = {event["args"]["name"]: event["tid"] for event in events if event["name"] == "thread_name"}
    spans = [event for event in events if event["ph"] == "X"]
    assert {event["cat"] for event in spans if event["tid"] == lanes["loader"]} >= {"load", "read", "init"}
    runs = [event["name"] for event in spans if event["cat"] == "run" and event["tid"] == lanes["execution"]]
    order = Bundle.read(onnx_bundle).stages["denoiser"].variants["plain"].order
    assert [name for name in runs if "denoiser" in name] == [f"run {name}" for name in order] * 2


def test_variants_share_their_weights(
    movdc: Callable[..., CompletedProcess[str]], shallow: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    spec = yaml.safe_load(shallow.read_text())
    spec["video"]["frames"] = 17  # of which pairs can be merged
    shallow.write_text(yaml.safe_dump(spec))
    passes = "merge-tokens{steps=1},canonicalize,partition,share-templates"
    done = movdc("compile", shallow, "--target", "onnx", "--passes", passes, "-o", out)
    assert done.returncode == 0, done.stdout + done.stderr
    bundle = Bundle.read(out)
    variants = bundle.stages["denoiser"].variants
    plain, merged = ([bundle.partitions[name] for name in variants[variant].order] for variant in ("plain", "merged"))
    assert [one.weights[0] for one in plain] == [one.weights[0] for one in merged]
    assert [one.program for one in plain] != [one.program for one in merged]
    stored_bytes = sum(file.size_bytes for file in bundle.manifest.files if file.path.startswith("weights/"))
    read_bytes = sum(one.weight_bytes for one in bundle.manifest.partitions)
    merged_bytes = sum(one.weight_bytes for one in merged)
    assert stored_bytes < read_bytes - 0.9 * merged_bytes
    executor = OnnxExecutor(bundle)
    outputs = []
    for variant in ("plain", "merged"):
        generator = np.random.default_rng(0)
        inputs = {
            spec.name: np.abs(generator.standard_normal(spec.shape)).astype(NUMPY_DTYPES[spec.dtype])
            for spec in variants[variant].inputs
        }
        outputs.append(executor.run("denoiser", variant, inputs)["velocity"])
    assert np.isfinite(outputs).all()
    assert not np.array_equal(*outputs)
