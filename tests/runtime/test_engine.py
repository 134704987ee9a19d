"""The engine: the same bits whatever it keeps and however far it loads ahead, and errors that free everything."""

import shutil
import subprocess
import sys
import threading
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from denoiser import WATCHDOG_S, Denoiser, damage, in_time
from hypothesis import given, settings
from hypothesis import strategies as st

from movdc.compiler.residency import Chain, intervals
from movdc.runtime.bundle import MANIFEST, NUMPY_DTYPES, SEAL, Bundle, Manifest, Residency, seal_of
from movdc.runtime.errors import BudgetError, BundleError, CancelledError, InputError, RunError
from movdc.runtime.executor import Executor

pytestmark = pytest.mark.slow
PLENTY_BYTES = 10**9


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("packed")


@pytest.fixture(scope="module")
def denoiser(bundle: Path) -> Denoiser:
    return Denoiser.of(bundle)


def test_partitions_by_themselves_make_what_the_stage_makes(denoiser: Denoiser, packed: Path) -> None:
    executor = Executor(denoiser.bundle, packed_cache=packed)
    tensors = dict(denoiser.inputs)
    for name in denoiser.bundle.stages["denoiser"].variants["plain"].order:
        given = {spec.name: tensors[spec.name] for spec in denoiser.bundle.partitions[name].inputs}
        tensors |= executor.run_partition(name, given)
    assert np.array_equal(tensors["velocity"], denoiser.expected)
    assert executor.peak_bytes <= denoiser.bundle.manifest.peak_bytes
    with pytest.raises(InputError, match="'timestep' is missing"):
        executor.run_partition("denoiser.plain.0", {"latents": denoiser.inputs["latents"]})
    assert all(denoiser.runs(executor, 2))  # and leaves nothing behind that a stage would mind


def _rewrite(root: Path, manifest: Manifest) -> Bundle:
    """The bundle in a folder with another manifest."""
    text = manifest.model_dump_json().encode()
    (root / MANIFEST).write_bytes(text)
    (root / SEAL).write_text(seal_of(text))
    return Bundle.read(root)


def _with_level(denoiser: Denoiser, root: Path, pinned: frozenset[str], prefetch: int, waits: frozenset[str]) -> Bundle:
    """The bundle with one more level, of which the first is what it was; `root` holds its files."""
    manifest = denoiser.bundle.manifest
    variant = denoiser.bundle.stages["denoiser"].variants["plain"]
    chain = Chain.of([denoiser.bundle.partitions[name] for name in variant.order], variant.inputs, manifest.slab_bytes)
    needs_bytes = max(one.total_bytes for one in intervals(chain, pinned, prefetch, waits))
    level = Residency(needs_bytes=needs_bytes, prefetch=prefetch, pinned=tuple(pinned), waits=tuple(waits))
    levels = (variant.residency[0], level)
    stage = denoiser.bundle.stages["denoiser"]
    changed = stage.model_copy(update={"variants": {"plain": variant.model_copy(update={"residency": levels})}})
    stages = tuple(changed if one.name == "denoiser" else one for one in manifest.stages)
    return _rewrite(root, manifest.model_copy(update={"stages": stages}))


@pytest.fixture(scope="module")
def workshop(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the bundle whose manifest is written anew for each example."""
    return Path(shutil.copytree(bundle, tmp_path_factory.mktemp("workshop") / "bundle"))


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_the_bits_are_the_same_whatever_stays_and_loads_ahead(
    denoiser: Denoiser, workshop: Path, packed: Path, data: st.DataObject
) -> None:
    names = denoiser.bundle.stages["denoiser"].variants["plain"].order
    some = st.frozensets(st.sampled_from(names))
    level = data.draw(some), data.draw(st.integers(0, 3)), data.draw(some)
    bundle = _with_level(denoiser, workshop, *level)
    variant = bundle.stages["denoiser"].variants["plain"]
    budget_bytes = max(variant.residency[1].needs_bytes, variant.first_needs_bytes)
    cache = data.draw(st.sampled_from([None, packed]))
    executor = Executor(bundle, memory_budget=budget_bytes, packed_cache=cache)
    pressures = data.draw(st.lists(st.tuples(st.floats(0, 0.1), st.sampled_from(["warning", "critical"])), max_size=3))

    def press() -> None:
        for after_s, pressure in pressures:
            time.sleep(after_s)
            executor.relieve(pressure)

    presser = threading.Thread(target=press)
    presser.start()
    assert all(in_time(lambda: denoiser.runs(executor, 3)))
    presser.join()
    assert executor.peak_bytes <= budget_bytes


@pytest.mark.parametrize("mode", ["sequential", "concurrent", "dynamic"])
def test_each_mode_gives_the_same_bits_within_its_certificate(denoiser: Denoiser, packed: Path, mode: Any) -> None:
    assert all(denoiser.runs(Executor(denoiser.bundle, packed_cache=packed), 1))  # packs
    executor = Executor(denoiser.bundle, mode=mode, packed_cache=packed)
    assert all(denoiser.runs(executor, 3))
    assert executor.peak_bytes <= denoiser.bundle.manifest.peak_bytes


@pytest.mark.parametrize("mode", ["sequential", "concurrent", "dynamic"])
def test_no_stage_holds_more_than_its_certificate(bundle: Path, packed: Path, mode: Any) -> None:
    read = Bundle.read(bundle)
    executor = Executor(read, mode=mode, packed_cache=packed)
    for stage in read.manifest.stages:
        for name, variant in stage.variants.items():
            inputs = {spec.name: np.ones(spec.shape, NUMPY_DTYPES[spec.dtype]) for spec in variant.inputs}
            executor.run(stage.name, name, inputs, name)
            assert executor.peak_bytes <= read.manifest.peak_bytes  # weights may still have been packed
            for _ in range(2):
                executor.run(stage.name, name, inputs, name)
                assert executor.reports[stage.name][-1].peak_bytes <= variant.peak_bytes


def test_with_memory_for_all_of_it_nothing_is_loaded_again(denoiser: Denoiser, packed: Path) -> None:
    executor = Executor(denoiser.bundle, memory_budget=PLENTY_BYTES, packed_cache=packed)
    assert all(denoiser.runs(executor, 3))
    first, *later = executor.reports["denoiser"]
    assert first.load_s > 0
    assert all(one.load_s == one.wait_s == one.read_bytes == 0 for one in later)
    assert set(later[-1].pinned) == set(denoiser.bundle.stages["denoiser"].variants["plain"].order)


def test_pressure_frees_what_stays_and_later_runs_take_it_back_by_levels(denoiser: Denoiser, packed: Path) -> None:
    executor = Executor(denoiser.bundle, memory_budget=PLENTY_BYTES, packed_cache=packed)
    denoiser.runs(executor, 2)
    residency = denoiser.bundle.stages["denoiser"].variants["plain"].residency
    levels = list(dict.fromkeys(frozenset(level.pinned) for level in residency))
    executor.relieve("critical")
    kept = []
    for _ in residency:
        assert denoiser.runs(executor, 1) == [True]
        kept.append(frozenset(executor.reports["denoiser"][-1].pinned))
    assert kept[0] == frozenset()
    assert all(levels.index(after) - levels.index(before) <= 1 for before, after in pairwise(kept))
    assert kept[-1] == levels[-1]


def test_a_budget_that_holds_nothing_is_refused_with_what_is_needed(denoiser: Denoiser) -> None:
    executor = Executor(denoiser.bundle, memory_budget=1000)
    with pytest.raises(BudgetError, match=r"denoiser needs \d+ bytes at least; the budget is 1000"):
        denoiser.runs(executor, 1)
    executor.set_budget(PLENTY_BYTES)
    assert denoiser.runs(executor, 1) == [True]


def test_a_run_is_cancelled_at_any_moment_and_the_next_one_is_whole(denoiser: Denoiser, packed: Path) -> None:
    executor = Executor(denoiser.bundle, packed_cache=packed)
    cancelled = 0
    for delay_s in np.linspace(0, 0.08, 20):
        timer = threading.Timer(float(delay_s), executor.cancel)
        timer.start()
        ended = in_time(lambda: denoiser.runs(executor, 2))
        timer.join()
        cancelled += isinstance(ended, CancelledError)
        assert isinstance(ended, CancelledError) or all(ended)
        assert all(in_time(lambda: denoiser.runs(executor, 1)))
    assert cancelled > 0


@pytest.fixture
def copy(bundle: Path, tmp_path: Path) -> Path:
    shutil.copytree(bundle, tmp_path / "copy")
    return tmp_path / "copy"


@pytest.mark.parametrize("how", ["disappears", "shrinks", "changes"])
@pytest.mark.parametrize("what", ["weights", "program"])
@pytest.mark.parametrize("mode", ["sequential", "dynamic"])
def test_a_file_that_fails_between_two_runs_is_a_typed_error_or_harms_nothing(
    denoiser: Denoiser, copy: Path, how: str, what: str, mode: Any
) -> None:
    executor = Executor(Bundle.read(copy), mode=mode, memory_budget=PLENTY_BYTES)
    assert denoiser.runs(executor, 1) == [True]
    second = Bundle.read(copy).partitions["denoiser.plain.1"]
    damage(copy / (second.program if what == "program" else second.weights[0]), how)
    ended = in_time(lambda: denoiser.runs(executor, 2))
    if isinstance(ended, RunError):
        assert isinstance(ended, BundleError)
        assert Path(second.program).name in str(ended) or Path(second.weights[0]).name in str(ended)
    else:
        assert all(ended)  # what is loaded needs the file no more


def test_a_program_that_cannot_be_initialised_is_named_and_nothing_stays(denoiser: Denoiser, copy: Path) -> None:
    manifest = Bundle.read(copy).manifest
    second = manifest.partitions[2]
    assert second.name == "denoiser.plain.1"
    broken = second.model_copy(update={"weights": ()})  # its program asks for constants that nobody has
    partitions = tuple(broken if one is second else one for one in manifest.partitions)
    executor = Executor(_rewrite(copy, manifest.model_copy(update={"partitions": partitions})))
    for _ in range(3):
        ended = in_time(lambda: denoiser.runs(executor, 1))
        assert isinstance(ended, RunError)
        assert "denoiser.plain.1: initialising the program failed" in str(ended)


def test_two_engines_run_at_once(denoiser: Denoiser, packed: Path) -> None:
    ended: list[list[bool]] = []

    def work() -> None:
        ended.append(denoiser.runs(Executor(denoiser.bundle, packed_cache=packed), 3))

    threads = [threading.Thread(target=work, daemon=True) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WATCHDOG_S)
    assert ended == [[True] * 3] * 2


def test_packed_weights_that_are_damaged_or_deleted_are_made_again(denoiser: Denoiser, tmp_path: Path) -> None:
    assert denoiser.runs(Executor(denoiser.bundle, packed_cache=tmp_path), 1) == [True]
    first, second, *_ = files = sorted(tmp_path.glob("*.packed"))
    damage(first, "changes")
    second.unlink()
    assert denoiser.runs(Executor(denoiser.bundle, packed_cache=tmp_path), 2) == [True, True]
    assert sorted(tmp_path.glob("*")) == files


# In a process of its own, where nothing else comes and goes: KiB in memory, open files, kept files; before and after.
THOUSAND_LOADS = """
import sys
from pathlib import Path
import numpy as np
from movdc.runtime.bundle import NUMPY_DTYPES, Bundle
from movdc.runtime.executor import Executor

bundle, packed = Bundle.read(Path(sys.argv[1])), Path(sys.argv[2])
variant = bundle.stages["denoiser"].variants["plain"]
inputs = {spec.name: np.zeros(spec.shape, NUMPY_DTYPES[spec.dtype]) for spec in variant.inputs}
executor = Executor(bundle, mode="concurrent", packed_cache=packed)
for loads in (400, 1000):
    for _ in range(loads // len(variant.order)):
        executor.run("denoiser", "plain", inputs, "plain")
    executor.release()
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    print(status["VmRSS"].split()[0], len(list(Path("/proc/self/fd").iterdir())), len(list(packed.iterdir())))
"""


def test_a_thousand_loads_leave_nothing_behind(denoiser: Denoiser, packed: Path) -> None:
    command = [sys.executable, "-c", THOUSAND_LOADS, str(denoiser.bundle.root), str(packed)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10 * WATCHDOG_S)
    before, after = ([int(number) for number in line.split()] for line in done.stdout.splitlines())
    assert after[1:] == before[1:]
    assert after[0] - before[0] < 1024  # KiB: less than half of one of the thousand
