"""movd.h through ctypes: the bits of the Python executor, a status for each kind of error, and the example in C."""

import ctypes
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from movd import (
    BUDGET_ERROR,
    CANCELLED,
    CRITICAL,
    FILE_ERROR,
    INPUT_ERROR,
    NONE,
    OK,
    PARTITION_ERROR,
    Engine,
    Options,
    Report,
    buffers,
    load,
)

from movdc.runtime import _engine
from movdc.runtime.bundle import MANIFEST, NUMPY_DTYPES, SEAL, Bundle, Manifest, seal_of
from movdc.runtime.executor import Executor

pytestmark = pytest.mark.slow
Seal = Callable[..., None]
Array = np.ndarray[Any, Any]
FOLDER = Path(_engine.__file__ or "").parent
HEADER = Path(__file__).parents[2] / "runtime" / "engine" / "movd.h"
WATCHDOG_S = 120


@pytest.fixture(scope="module")
def movd() -> ctypes.CDLL:
    return load(FOLDER / "libmovd.so")


Opened = Callable[..., Engine]


@pytest.fixture
def opened(movd: ctypes.CDLL) -> Iterator[Opened]:
    """Opens engines, which are closed after the test."""
    engines: list[Engine] = []

    def open_one(root: Path, **options: Any) -> Engine:
        engines.append(Engine(movd, root, **options))
        return engines[-1]

    yield open_one
    for engine in engines:
        movd.movd_close(engine.handle)


class Case:
    """A stage of the bundle with inputs that do not matter, and what the Python executor makes of them."""

    def __init__(self, bundle: Bundle, stage: str, variant: str) -> None:
        generator = np.random.default_rng(0)
        plan = bundle.stages[stage].variants[variant]
        self.inputs = [generator.random(spec.shape).astype(NUMPY_DTYPES[spec.dtype]) for spec in plan.inputs]
        self.specs = plan.outputs
        named = {spec.name: array for spec, array in zip(plan.inputs, self.inputs, strict=True)}
        made = Executor(bundle).run(stage, variant, named)
        self.expected = [made[spec.name] for spec in plan.outputs]

    def outputs(self) -> list[Array]:
        return [np.full(spec.shape, 7, NUMPY_DTYPES[spec.dtype]) for spec in self.specs]

    def are_expected(self, outputs: Sequence[Array]) -> bool:
        return all(np.array_equal(mine, theirs) for mine, theirs in zip(outputs, self.expected, strict=True))


@pytest.fixture(scope="module")
def denoiser(bundle: Path) -> Case:
    return Case(Bundle.read(bundle), "denoiser", "plain")


DENOISER = 1  # its place among the stages


@contextmanager
def _meanwhile(work: Callable[[], Any]) -> Iterator[None]:
    """Does `work` on another thread as long as the block lasts, again and again."""
    ended = threading.Event()

    def repeat() -> None:
        while not ended.wait(0.002):
            work()

    thread = threading.Thread(target=repeat)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(WATCHDOG_S)
    assert not thread.is_alive()


def test_the_library_shows_only_the_functions_of_its_header(movd: ctypes.CDLL) -> None:
    assert movd.movd_version() == 1
    listed = subprocess.run(
        ["nm", "-D", "--defined-only", FOLDER / "libmovd.so"], capture_output=True, text=True, check=True
    ).stdout
    shown = {line.split()[-1] for line in listed.splitlines()}
    assert shown == set(re.findall(r"^MOVD_API .*?(movd_\w+)\(", HEADER.read_text(), re.MULTILINE))


def test_stages_are_described_as_in_the_manifest(bundle: Path, opened: Opened) -> None:
    read, engine = Bundle.read(bundle), opened(bundle)
    names = ["f32", "f16", "bf16", "i64", "i32", "i8", "u8", "bool"]
    described = []
    for index in range(engine.movd.movd_stage_count(engine.handle)):
        stage = engine.stage(index)
        sides = (stage.inputs[: stage.input_count], stage.outputs[: stage.output_count])
        described.append((stage.name.decode(), stage.variant.decode(), stage.least_bytes))
        variant = read.stages[described[-1][0]].variants[described[-1][1]]
        for tensors, specs in zip(sides, (variant.inputs, variant.outputs), strict=True):
            assert [
                (one.name.decode(), names[one.dtype], tuple(one.shape[: one.rank]), one.size_bytes) for one in tensors
            ] == [(spec.name, spec.dtype, spec.shape, spec.size_bytes) for spec in specs]
    assert described == [
        (stage.name, name, variant.first_needs_bytes)
        for stage in read.manifest.stages
        for name, variant in stage.variants.items()
    ]
    assert engine.movd.movd_compiled_budget_bytes(engine.handle) == read.manifest.budget_bytes


@pytest.mark.parametrize("ascii_only", [True, False])
def test_names_come_back_whole(opened: Opened, seal: Seal, tmp_path: Path, ascii_only: bool) -> None:
    name = '"\\/ \b\f\n\r\t \x7f\u00e9\u2028\uffff\U0001d11e\U0010ffff'
    level = {"needs_bytes": 1, "prefetch": 0, "pinned": [], "waits": []}
    arrays: dict[str, Any] = {key: [] for key in ("inputs", "outputs", "order", "certificate")}
    variant = arrays | {"residency": [level], "first_needs_bytes": 1, "peak_bytes": 1}
    seal(tmp_path, stages=[{"name": name, "cadence": "once", "variants": {name: variant}}])
    text = json.dumps(json.loads((tmp_path / MANIFEST).read_bytes()), ensure_ascii=ascii_only).encode()
    (tmp_path / MANIFEST).write_bytes(text)
    (tmp_path / SEAL).write_text(seal_of(text))
    stage = opened(tmp_path).stage(0)
    assert stage.name.decode() == stage.variant.decode() == name


@pytest.mark.parametrize("mode", [0, 1, 2])
def test_every_stage_gives_the_bits_of_the_python_executor(
    bundle: Path, opened: Opened, tmp_path: Path, mode: int
) -> None:
    engine = opened(bundle, mode=mode, packed_cache=str(tmp_path).encode())
    for index in range(engine.movd.movd_stage_count(engine.handle)):
        stage = engine.stage(index)
        case = Case(Bundle.read(bundle), stage.name.decode(), stage.variant.decode())
        for following in (index, NONE):
            outputs = case.outputs()
            assert engine.run(index, case.inputs, outputs, following) == OK, engine.said()
            assert case.are_expected(outputs)
    assert engine.movd.movd_release(engine.handle) == OK
    assert list(tmp_path.glob("*.packed"))


def test_a_measured_budget_keeps_all_and_the_report_says_so(bundle: Path, denoiser: Case, opened: Opened) -> None:
    engine = opened(bundle)
    for _ in range(3):  # the first packs, the second loads what stays
        assert engine.run(DENOISER, denoiser.inputs, denoiser.outputs(), DENOISER) == OK
    report = engine.report(DENOISER)
    assert report.pinned == len(Bundle.read(bundle).stages["denoiser"].variants["plain"].order)
    assert report.load_s == report.wait_s == report.read_bytes == 0
    assert report.wall_s >= report.run_s > 0
    assert report.peak_bytes > 0


def test_a_folder_that_is_no_bundle_is_a_file_error(movd: ctypes.CDLL, tmp_path: Path, seal: Seal) -> None:
    handle = ctypes.c_void_p(5)

    def refused(folder: Path) -> str:
        assert movd.movd_open(str(folder).encode(), None, ctypes.byref(handle)) == FILE_ERROR
        assert handle.value == 5  # nothing is written but on success
        return str(movd.movd_error().decode())

    missing = tmp_path / "missing"
    assert refused(missing) == f"{missing}: cannot be opened as a folder (No such file or directory)"
    assert refused(tmp_path).startswith(f"{tmp_path}: bundle.sha256: is missing")
    seal(tmp_path, format_version=3)
    assert f"{tmp_path}: bundle.json: format_version: is 3" in refused(tmp_path)


def test_arguments_that_do_not_fit_are_input_errors(
    movd: ctypes.CDLL, bundle: Path, denoiser: Case, opened: Opened, tmp_path: Path
) -> None:
    engine, outputs = opened(bundle), denoiser.outputs()
    first, *others = denoiser.inputs

    def refused(status: int) -> str:
        assert status == INPUT_ERROR
        return engine.said()

    short = refused(engine.run(DENOISER, [first[:, 1:].copy(), *others], outputs))
    assert short.startswith(f"denoiser (plain): input latents has {first.nbytes * 3 // 4} bytes")
    assert "has 4 inputs, not 3" in refused(engine.run(DENOISER, others, outputs))
    assert "output velocity has" in refused(engine.run(DENOISER, denoiser.inputs, [outputs[0][1:].copy()]))
    assert "stage 99 does not exist" in refused(engine.run(99, denoiser.inputs, outputs))
    assert "next is a variant of text_encoder" in refused(engine.run(DENOISER, denoiser.inputs, outputs, 0))
    null = movd.movd_run(engine.handle, DENOISER, None, 4, buffers(outputs), 1, NONE)
    assert "input latents is NULL" in refused(null)
    assert "pressure 9 is none" in refused(movd.movd_relieve(engine.handle, 9))
    assert "denoiser: has not run" in refused(movd.movd_last_report(engine.handle, DENOISER, ctypes.byref(Report())))
    assert "without keeps_trace" in refused(movd.movd_trace(engine.handle, str(tmp_path / "t.json").encode()))
    assert "engine is NULL" in refused(movd.movd_cancel(None))
    handle = ctypes.c_void_p()
    assert "folder is NULL" in refused(movd.movd_open(None, None, ctypes.byref(handle)))
    options = Options(mode=4)
    assert "mode 4 is none" in refused(
        movd.movd_open(str(bundle).encode(), ctypes.byref(options), ctypes.byref(handle))
    )
    movd.movd_close(None)
    assert engine.run(DENOISER, denoiser.inputs, outputs) == OK
    assert denoiser.are_expected(outputs)


def test_a_budget_that_holds_nothing_is_a_budget_error(bundle: Path, denoiser: Case, opened: Opened) -> None:
    engine, outputs = opened(bundle, budget_bytes=1000), denoiser.outputs()
    assert engine.run(DENOISER, denoiser.inputs, outputs) == BUDGET_ERROR
    least = engine.stage(DENOISER).least_bytes
    assert engine.said().startswith(f"denoiser needs {least} bytes at least; the budget is 1000")
    assert engine.movd.movd_set_budget(engine.handle, least) == OK
    assert engine.run(DENOISER, denoiser.inputs, outputs) == OK, engine.said()
    assert denoiser.are_expected(outputs)
    assert engine.report(DENOISER).peak_bytes <= least


def test_a_partition_that_cannot_be_initialised_is_named(
    bundle: Path, denoiser: Case, opened: Opened, seal: Seal, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(bundle, tmp_path / "copy"))
    manifest = Manifest.model_validate_json((copy / MANIFEST).read_bytes())
    parts = manifest.model_dump()
    next(one for one in parts["partitions"] if one["name"] == "denoiser.plain.1")["weights"] = []
    seal(copy, **parts)
    engine = opened(copy)
    assert engine.run(DENOISER, denoiser.inputs, denoiser.outputs()) == PARTITION_ERROR
    assert engine.said().startswith("denoiser.plain.1: initialising the program failed")


def test_a_file_that_changes_is_named(bundle: Path, denoiser: Case, opened: Opened, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(bundle, tmp_path / "copy"))
    engine = opened(copy)
    program = next(one for one in Bundle.read(copy).manifest.partitions if one.name == "denoiser.plain.0").program
    (copy / program).write_bytes((copy / program).read_bytes()[:100])
    assert engine.run(DENOISER, denoiser.inputs, denoiser.outputs()) == FILE_ERROR
    assert engine.said().startswith(f"{copy}: {program}: changed while the bundle was in use")


def test_a_link_to_a_file_is_no_change_and_a_hidden_write_is(
    bundle: Path, denoiser: Case, opened: Opened, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(bundle, tmp_path / "copy"))
    program = next(one for one in Bundle.read(copy).manifest.partitions if one.name == "denoiser.plain.0").program
    engine = opened(copy)
    os.link(copy / program, tmp_path / "in-a-cache")
    assert engine.run(DENOISER, denoiser.inputs, denoiser.outputs()) == OK

    engine = opened(copy)
    before = (copy / program).stat()
    with (copy / program).open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"x")
    os.utime(copy / program, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert engine.run(DENOISER, denoiser.inputs, denoiser.outputs()) == FILE_ERROR
    assert engine.said().startswith(f"{copy}: {program}: changed while the bundle was in use")


def test_cancel_from_another_thread_ends_a_run_and_the_next_one_is_whole(
    bundle: Path, denoiser: Case, opened: Opened
) -> None:
    engine, outputs = opened(bundle, mode=2), denoiser.outputs()
    with _meanwhile(lambda: engine.movd.movd_cancel(engine.handle)):
        ended = [engine.run(DENOISER, denoiser.inputs, outputs) for _ in range(5)]
    assert set(ended) <= {OK, CANCELLED}
    assert CANCELLED in ended
    assert engine.run(DENOISER, denoiser.inputs, outputs) == OK
    assert denoiser.are_expected(outputs)


def test_pressure_and_budgets_from_another_thread_change_no_bit(bundle: Path, denoiser: Case, opened: Opened) -> None:
    engine = opened(bundle)
    budgets = [0, engine.stage(DENOISER).least_bytes]

    def press() -> None:
        assert engine.movd.movd_relieve(engine.handle, CRITICAL) == OK
        budgets.append(budgets.pop(0))
        assert engine.movd.movd_set_budget(engine.handle, budgets[0]) == OK

    with _meanwhile(press):
        for _ in range(10):
            outputs = denoiser.outputs()
            assert engine.run(DENOISER, denoiser.inputs, outputs, DENOISER) == OK, engine.said()
            assert denoiser.are_expected(outputs)


def test_threads_that_share_an_engine_take_turns_and_have_their_own_errors(
    bundle: Path, denoiser: Case, opened: Opened
) -> None:
    engine = opened(bundle)

    def work(index: int) -> tuple[int, str, bool]:
        outputs = denoiser.outputs()
        failed = engine.run(1000 + index, denoiser.inputs, outputs)
        said = engine.said()
        engine.run(DENOISER, denoiser.inputs, outputs)
        return failed, said, denoiser.are_expected(outputs)

    with ThreadPoolExecutor(4) as pool:
        for index, (failed, said, whole) in enumerate(pool.map(work, range(4), timeout=WATCHDOG_S)):
            assert failed == INPUT_ERROR
            assert said.startswith(f"stage {1000 + index} does not exist")
            assert whole


def test_a_trace_is_written_or_the_path_is_named(bundle: Path, denoiser: Case, opened: Opened, tmp_path: Path) -> None:
    engine = opened(bundle, keeps_trace=True)
    assert engine.run(DENOISER, denoiser.inputs, denoiser.outputs()) == OK
    path = tmp_path / "trace.json"
    assert engine.movd.movd_trace(engine.handle, str(path).encode()) == OK
    names = {event["name"] for event in json.loads(path.read_text())["traceEvents"]}
    assert {"load denoiser.plain.0", "run denoiser.plain.0"} <= names
    assert engine.movd.movd_trace(engine.handle, str(tmp_path / "no" / "where").encode()) == FILE_ERROR
    assert f"{tmp_path}/no/where: cannot be written (No such file or directory)" in engine.said()


# The example's main in a Python process, whose symbols ExecuTorch's wheel needs.
CALL_MAIN = """
import ctypes, sys
library = ctypes.CDLL(sys.argv[1])
arguments = [argument.encode() for argument in sys.argv[1:]]
sys.exit(library.main(len(arguments), (ctypes.c_char_p * len(arguments))(*arguments)))
"""


def _example(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", CALL_MAIN, FOLDER / "librun_stage.so", *arguments]
    return subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, check=False, timeout=WATCHDOG_S
    )


def test_the_example_lists_the_stages_and_runs_one(bundle: Path, denoiser: Case, tmp_path: Path) -> None:
    listed = _example(bundle)
    assert listed.returncode == 0, listed.stderr
    stages = [line.split(",")[0] for line in listed.stdout.splitlines() if not line.startswith(" ")]
    assert stages[:2] == ["text_encoder plain", "denoiser plain"]
    plan = Bundle.read(bundle).stages["denoiser"].variants["plain"]
    files = []
    for spec, array in zip(plan.inputs, denoiser.inputs, strict=True):
        array.tofile(tmp_path / spec.name)
        files.append(f"{spec.name}={tmp_path / spec.name}")
    ran = _example(bundle, "denoiser", "plain", *files, f"velocity={tmp_path / 'velocity'}")
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.startswith("wall ")
    assert (tmp_path / "velocity").read_bytes() == denoiser.expected[0].tobytes()


def test_the_example_says_what_is_wrong(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "short").write_bytes(b"123")
    for arguments, said in [
        ([tmp_path], "bundle.sha256: is missing"),
        ([bundle, "denoiser", "merged"], "the bundle has no such stage"),
        ([bundle, "denoiser", "plain", f"latents={tmp_path / 'short'}"], "has not just 10240 bytes"),
        ([bundle, "denoiser"], "usage:"),
    ]:
        done = _example(*arguments)
        assert done.returncode == 2
        assert done.stderr.startswith("error: ")
        assert said in done.stderr
