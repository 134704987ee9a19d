"""The arms of streaming.py: each runs one evaluation of the denoiser, in a process of its own.

    python benchmarks/streaming_arms.py '{"arm": ..., ...}'     # a Job; then one Request a line on its input

A process imports what its arm needs, says how large it is, and from then on answers each request with an Answer.
All arms compute the same numbers: the same random weights, the same inputs, two rows (caption and null caption).
"""

from __future__ import annotations

import contextlib
import importlib
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor, nn

    from movdc.models.stdit3 import STDiT3

Array = np.ndarray[Any, Any]
Mode = Literal["sequential", "concurrent", "dynamic"]
SEED = 1
DROP_CACHES = Path("/proc/sys/vm/drop_caches")
TORCH = ("torch", "movdc.compiler.weights", "movdc.models.stdit3")


@dataclass(frozen=True)
class Job:
    """What one process measures."""

    arm: str
    config: dict[str, Any]  # of the denoiser, under the names of its config.json
    fps: float
    side_pixels: int
    bundle: str
    kept: str  # the folder of what the arm's preparation made; empty if nothing is kept
    inputs: str  # an npz of the denoiser's inputs
    output: str = ""  # where to put what the first pass gave
    budget_bytes: int = 0  # of the movdc arms; 0 is more than everything
    members: str = ""  # the cgroup.procs to enter


@dataclass(frozen=True)
class Request:
    """So many timed passes; `cold` drops the page cache before each."""

    passes: int
    cold: bool


@dataclass(frozen=True)
class Answer:
    """What the timed passes of one request took; every figure is of one pass."""

    seconds: list[float]
    load_s: list[float]
    run_s: list[float]
    peak_rss_bytes: int
    pinned: list[str]


@dataclass
class Pass:
    """One evaluation: its output, and the sums of its loads and of its runs."""

    output: Array
    load_s: float
    run_s: float
    pinned: tuple[str, ...] = ()


# Runs one pass; the flag says that another one follows at once.
Run = Callable[[bool], Pass]


@dataclass(frozen=True)
class Arm:
    """A way to run the denoiser: how it is prepared on disk (once, without a limit) and opened."""

    imports: tuple[str, ...]
    open: Callable[[Job], Run]
    prepare: Callable[[Job], None] = lambda job: None
    streamed: bool = True


def movdc(mode: Mode) -> Callable[[Job], Run]:
    """Our engine, in one of its modes."""

    def open_arm(job: Job) -> Run:
        from movdc.runtime.bundle import Bundle
        from movdc.runtime.executor import Executor

        bundle = Bundle.read(Path(job.bundle))
        budget_bytes = job.budget_bytes or 4 * sum(one.held_bytes for one in bundle.manifest.partitions)
        executor = Executor(bundle, mode=mode, memory_budget=budget_bytes, packed_cache=Path(job.kept))
        inputs = dict(np.load(job.inputs))

        def run(more: bool) -> Pass:
            outputs = executor.run("denoiser", "plain", inputs, then="plain" if more else None)
            report = executor.reports["denoiser"][-1]
            return Pass(outputs["velocity"], report.load_s, report.run_s, report.pinned)

        return run

    return open_arm


def fill_packed_cache(job: Job) -> None:
    """Run once, so that no measured pass writes the cache of packed weights."""
    movdc("sequential")(job)(False)


def torch_resident(job: Job) -> Run:
    """PyTorch with all weights in memory."""
    return _torch_run(job, _filled(job))


def accelerate_disk(job: Job) -> Run:
    """accelerate.disk_offload: each leaf module's weights are read before its forward and dropped after it."""
    import torch
    from accelerate import disk_offload
    from accelerate.hooks import AlignDevicesHook

    loads = _clocked(AlignDevicesHook, "pre_forward", "post_forward")
    model = disk_offload(_empty(job), job.kept, torch.device("cpu"), offload_buffers=True)
    return _torch_run(job, model, loads)


def prepare_accelerate(job: Job) -> None:
    """Write the weights as accelerate keeps them."""
    from accelerate.utils import offload_state_dict

    offload_state_dict(job.kept, _filled(job).state_dict())


def diffusers_groups(job: Job) -> Run:
    """Group offload to disk of diffusers, a block at a time; it has no streams on a CPU, so it cannot prefetch."""
    from diffusers.hooks.group_offloading import ModuleGroup

    loads = _clocked(ModuleGroup, "onload_", "offload_")
    # Its files are there already, so that the values of this model are never read.
    model = _empty(job).to_empty(device="cpu")
    _apply_groups(job, model)
    return _torch_run(job, model, loads)


def prepare_diffusers(job: Job) -> None:
    """Write the weights as the group offload keeps them."""
    _apply_groups(job, _filled(job))


def _apply_groups(job: Job, model: nn.Module) -> None:
    from diffusers.hooks import apply_group_offloading

    apply_group_offloading(
        model,
        onload_device="cpu",
        offload_type="block_level",
        num_blocks_per_group=1,
        offload_to_disk_path=job.kept,
    )


def onnxruntime_blocks(job: Job) -> Run:
    """ONNX Runtime, default settings: a session a block is made, run and dropped, one after the other."""
    import onnxruntime

    files = sorted(Path(job.kept).glob("*.onnx"))
    inputs = _rows(job)

    def run(more: bool) -> Pass:
        values, load_s, run_s = dict(inputs), 0.0, 0.0
        for file in files:
            start = time.perf_counter()
            session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
            loaded = time.perf_counter()
            outputs = [one.name.removesuffix("_out") for one in session.get_outputs()]
            feeds = {one.name: values[one.name] for one in session.get_inputs()}
            values |= dict(zip(outputs, session.run(None, feeds), strict=True))
            ran = time.perf_counter()
            del session
            load_s += loaded - start + time.perf_counter() - ran
            run_s += ran - loaded
        return Pass(values["velocity"], load_s, run_s)

    return run


def prepare_onnx(job: Job) -> None:
    """Export the embeddings, each block and the final layer to a file with external weights."""
    import torch
    from streaming_onnx import exportable_parts

    values = {name: torch.from_numpy(array) for name, array in _rows(job).items()}
    for index, part in enumerate(exportable_parts(_filled(job), job.fps, job.side_pixels)):
        part.eval()
        arguments = tuple(values[name] for name in part.inputs)
        torch.onnx.export(
            part,
            arguments,
            Path(job.kept) / f"{index:03}.onnx",
            input_names=part.inputs,
            output_names=[f"{name}_out" for name in part.outputs],  # an ONNX graph takes and gives no name twice
            dynamo=True,
            external_data=True,
            verbose=False,
        )
        made = part(*arguments)
        values |= dict(zip(part.outputs, made if isinstance(made, tuple) else (made,), strict=True))


ARMS: dict[str, Arm] = {
    "torch resident": Arm(TORCH, torch_resident, streamed=False),
    "movdc resident": Arm(("movdc.runtime.executor",), movdc("dynamic"), fill_packed_cache, streamed=False),
    "movdc sequential": Arm(("movdc.runtime.executor",), movdc("sequential"), fill_packed_cache),
    "movdc concurrent": Arm(("movdc.runtime.executor",), movdc("concurrent"), fill_packed_cache),
    "movdc dynamic": Arm(("movdc.runtime.executor",), movdc("dynamic"), fill_packed_cache),
    "accelerate disk": Arm((*TORCH, "accelerate"), accelerate_disk, prepare_accelerate),
    "diffusers groups": Arm((*TORCH, "diffusers.hooks"), diffusers_groups, prepare_diffusers),
    "onnxruntime blocks": Arm((*TORCH, "onnxruntime"), onnxruntime_blocks, prepare_onnx),
}


def _source(job: Job) -> Any:
    """The weights that `random:1` gives to a compile."""
    from movdc.compiler.weights import RandomSource

    shapes = {key: tuple(tensor.shape) for key, tensor in _empty(job).state_dict().items()}
    return RandomSource(SEED, shapes)


def _empty(job: Job) -> STDiT3:
    """The denoiser without memory for its weights."""
    import torch

    from movdc.models.stdit3 import STDiT3, STDiT3Config

    with torch.device("meta"):
        return STDiT3(STDiT3Config.from_dict(job.config)).eval()


def _filled(job: Job) -> STDiT3:
    model = _empty(job)
    model.load_state_dict({key: ref.read() for key, ref in _source(job).refs().items()}, assign=True)
    return model


def _rows(job: Job) -> dict[str, Array]:
    """The inputs as the two rows that one guided evaluation runs: the caption, and the null caption."""
    inputs = np.load(job.inputs)
    null = _source(job).read("y_embedder.y_embedding")[None, : inputs["text"].shape[1]].numpy()
    return {
        "latents": np.concatenate([inputs["latents"]] * 2),
        "timestep": np.concatenate([inputs["timestep"]] * 2),
        "text": np.concatenate((inputs["text"], null))[:, None],
        "text_mask": inputs["text_mask"],
    }


def _torch_run(job: Job, model: nn.Module, loads: list[float] | None = None) -> Run:
    import torch

    rows: dict[str, Tensor] = {name: torch.from_numpy(array) for name, array in _rows(job).items()}
    sizes = {"fps": job.fps, "height": job.side_pixels, "width": job.side_pixels}

    def run(more: bool) -> Pass:
        start, before = time.perf_counter(), sum(loads or ())
        velocity = model(rows["latents"], rows["timestep"], rows["text"], rows["text_mask"], **sizes)
        load_s = sum(loads or ()) - before
        channels = rows["latents"].shape[1]
        return Pass(velocity[:, :channels].numpy(), load_s, time.perf_counter() - start - load_s)

    return run


def _clocked(owner: type, *names: str) -> list[float]:
    """Have the seconds of each call of some methods of a class added to a list."""
    seconds: list[float] = []

    def clocked(method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            start = time.perf_counter()
            try:
                return method(*arguments, **named)
            finally:
                seconds.append(time.perf_counter() - start)

        return call

    for name in names:
        setattr(owner, name, clocked(getattr(owner, name)))
    return seconds


def _status_bytes(field: str) -> int:
    """A size of this process: VmRSS now, VmHWM at its largest."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) * 1024


def _answer(run: Run, request: Request, first: bool, output: str) -> Answer:
    """Run the passes of one request, after one that is not timed where the page cache is warm."""
    if first or not request.cold:
        settled = run(not request.cold)
        if first and output:
            np.save(output, settled.output)
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM counts from here on
    seconds, passes = [], []
    for _ in range(request.passes):
        if request.cold:
            DROP_CACHES.write_text("3")
        start = time.perf_counter()
        # A prefetch across a drop of the page cache would be a load that no pass pays for.
        passes.append(run(not request.cold))
        seconds.append(time.perf_counter() - start)
    return Answer(
        seconds,
        [one.load_s for one in passes],
        [one.run_s for one in passes],
        _status_bytes("VmHWM"),
        list(passes[-1].pinned),
    )


@contextlib.contextmanager
def _without_gradients(arm: Arm) -> Iterator[None]:
    if "torch" not in arm.imports:
        yield
        return
    import torch

    with torch.no_grad():
        yield


def main() -> None:
    """Serve one job: `prepare` as the second argument writes its files and ends."""
    job = Job(**json.loads(sys.argv[1]))
    arm = ARMS[job.arm]
    if job.members:
        Path(job.members).write_text("0")
    for name in arm.imports:
        importlib.import_module(name)
    with _without_gradients(arm):
        if sys.argv[2:] == ["prepare"]:
            arm.prepare(job)
            return
        replies, sys.stdout = sys.stdout, sys.stderr  # libraries print; only answers go to the pipe
        print(json.dumps({"idle_bytes": _status_bytes("VmRSS")}), file=replies, flush=True)
        run: Run | None = None
        for line in sys.stdin:
            first = run is None
            run = run or arm.open(job)
            answer = _answer(run, Request(**json.loads(line)), first, job.output)
            print(json.dumps(asdict(answer)), file=replies, flush=True)


if __name__ == "__main__":
    main()
