"""The simulator: within what levels say, never faster than can be, and the same order of things as the engine."""

import math
from dataclasses import replace
from itertools import pairwise

import pytest
from chains import CHAINS, SLAB_BYTES, tensor, uniform
from hypothesis import given, settings
from hypothesis import strategies as st

from movdc.compiler.residency import Chain, first_needs_bytes, most_bytes, needs_bytes
from movdc.runtime.bundle import Residency, Variant
from movdc.runtime.errors import BudgetError
from movdc.runtime.rates import Rates
from movdc.runtime.simulate import MODES, Call, Mode, Pressure, Simulator, growing_bytes, least_packed_bytes
from movdc.runtime.timeline import LANES, LOADER, Event, read_trace, stage_times, to_chrome

RATES = st.builds(
    Rates,
    load_bytes_per_s=st.floats(100, 10_000),
    compute_flops_per_s=st.floats(100, 10_000),
    load_overhead_s=st.sampled_from([0.0, 0.3]),
    run_overhead_s=st.sampled_from([0.0, 0.2]),
    contention=st.sampled_from([0.0, 0.5]),
    load_contention=st.sampled_from([0.0, 0.4]),
    pack_bytes_per_s=st.floats(100, 10_000),
    init_s=st.sampled_from([0.0, 0.1]),
    touch_bytes_per_s=st.sampled_from([math.inf, 5000.0]),
    free_bytes_per_s=st.sampled_from([math.inf, 7000.0]),
)
PRESSURES = st.lists(
    st.builds(Pressure, st.floats(0, 30), st.sampled_from(["warning", "critical"])),
    max_size=3,
)


def _variant(chain: Chain) -> Variant:
    """Levels that keep more and more of the first partitions, as far as each needs more memory."""
    names = [one.name for one in chain.partitions]
    rows: list[Residency] = []
    for count, ahead in [(0, 0), (0, 1), *((count, 2) for count in range(len(names) + 1))]:
        most = needs_bytes(chain, frozenset(names[:count]), ahead, frozenset())
        while rows[1:] and rows[-1].needs_bytes >= most:
            rows.pop()
        if not rows or most > rows[0].needs_bytes:
            rows.append(Residency(needs_bytes=most, prefetch=ahead, pinned=tuple(names[:count])))
    return Variant(
        inputs=(tensor("x"),),
        outputs=chain.partitions[-1].outputs,
        order=tuple(names),
        residency=tuple(rows),
        first_needs_bytes=first_needs_bytes(chain),
        certificate=(),
        peak_bytes=0,
    )


def _simulator(chain: Chain, rates: Rates, budget_bytes: int, mode: Mode = "dynamic", **options: object) -> Simulator:
    named = {one.name: one for one in chain.partitions}
    return Simulator(named, SLAB_BYTES, rates, budget_bytes, mode=mode, **options)


def _calls(variant: Variant, count: int) -> list[Call]:
    return [Call("s", variant, again=index + 1 < count) for index in range(count)]


def _of(events: list[Event], what: str) -> list[Event]:
    return [event for event in events if event.what == what]


@settings(max_examples=60, deadline=None)
@given(CHAINS, RATES, PRESSURES, st.sampled_from(MODES), st.booleans(), st.data())
def test_what_is_held_is_within_the_levels_and_the_lanes_keep_their_order(
    chain: Chain, rates: Rates, pressures: list[Pressure], mode: Mode, packed: bool, data: st.DataObject
) -> None:
    variant = _variant(chain)
    most = max(variant.residency[-1].needs_bytes, variant.first_needs_bytes)
    least_packed = least_packed_bytes(variant, max(growing_bytes(chain.partitions)))
    least = least_packed if packed else variant.first_needs_bytes
    budget_bytes = data.draw(st.integers(least, max(most, least) + 100))
    simulator = _simulator(chain, rates, budget_bytes, mode, packed=packed, pressures=pressures)
    events = simulator.run(_calls(variant, 4))
    fitting = [row.needs_bytes for row in variant.residency if row.needs_bytes <= budget_bytes]
    peak = variant.model_copy(update={"peak_bytes": max(fitting, default=0)})
    assert simulator.books.peak_bytes <= most_bytes(peak, chain.partitions, budget_bytes) or not packed
    assert simulator.books.peak_bytes <= budget_bytes
    for lane in set(LANES.values()):
        own = [one for one in events if LANES[one.what] == lane and one.what in ("load", "run", "wait", "free")]
        assert all(after.start_s >= before.end_s - 1e-9 for before, after in pairwise(own))
    names = list(variant.order) * 4
    assert [one.partition for one in _of(events, "run")] == names
    loaded: set[str] = set()
    for event in events:  # each run finds what it runs
        if event.what == "load":
            assert event.partition not in loaded
            loaded.add(event.partition)
        elif event.what == "free":
            loaded.remove(event.partition)
        elif event.what == "run":
            assert event.partition in loaded


@settings(max_examples=60, deadline=None)
@given(CHAINS, RATES, st.sampled_from(MODES), st.integers(1, 4))
def test_nothing_is_faster_than_its_loads_or_its_runs(chain: Chain, rates: Rates, mode: Mode, count: int) -> None:
    variant = _variant(chain)
    simulator = _simulator(chain, rates, 10**9, mode)
    events = simulator.run(_calls(variant, count))
    least_s = count * sum(rates.run_s(one) for one in chain.partitions)
    assert simulator.now_s >= least_s * (1 - 1e-9)
    assert simulator.now_s >= sum(one.duration_s for one in _of(events, "load")) * (1 - 1e-9)
    lane_s = sum(one.duration_s for one in events if one.what in ("run", "wait", "free"))
    assert simulator.now_s == pytest.approx(lane_s)
    for load in _of(events, "load"):
        inside = [one for one in events if LANES[one.what] == LOADER and one.partition == load.partition]
        parts = [one for one in inside if one.what != "load" and load.start_s <= one.start_s < load.end_s]
        assert sum(one.duration_s for one in parts) == pytest.approx(load.duration_s)


@settings(max_examples=30, deadline=None)
@given(CHAINS, RATES, st.integers(1, 3))
def test_one_after_the_other_takes_the_sum(chain: Chain, rates: Rates, count: int) -> None:
    simulator = _simulator(chain, rates, 10**9, "sequential")
    simulator.run(_calls(_variant(chain), count))
    once_s = len(chain.partitions) * rates.init_s
    parts = (rates.load_s, rates.touch_s, rates.run_s, rates.free_s)
    each_s = sum(part(one) for one in chain.partitions for part in parts)
    assert simulator.now_s == pytest.approx(once_s + count * each_s)


def test_weights_that_stay_are_touched_once_and_never_freed() -> None:
    chain, rates = uniform(3), Rates(1000.0, 1000.0, touch_bytes_per_s=100.0, free_bytes_per_s=50.0)
    variant = _variant(chain)
    simulator = _simulator(chain, rates, 10**9)
    simulator.run(_calls(variant, 3))
    runs_s = [one.duration_s for one in _of(simulator.events, "run")]
    [touched_s, *_], [settled_s, *_] = runs_s[:3], runs_s[3:]
    assert touched_s - settled_s == pytest.approx(chain.partitions[0].held_bytes / 100)
    assert not _of(simulator.events, "free")


@settings(max_examples=30, deadline=None)
@given(CHAINS, RATES)
def test_a_first_call_that_packs_does_nothing_beside(chain: Chain, rates: Rates) -> None:
    variant = _variant(chain)
    simulator = _simulator(chain, rates, 10**9, packed=False)
    events = list(simulator.run(_calls(variant, 1)))
    assert [one.partition for one in _of(events, "pack")] == list(variant.order)
    assert simulator.books.peak_bytes <= variant.first_needs_bytes
    both = sorted(_of(events, "load") + _of(events, "run"), key=lambda one: (one.start_s, one.end_s))
    assert all(after.start_s >= before.end_s - 1e-9 for before, after in pairwise(both))
    simulator.run(_calls(variant, 1))
    assert len(_of(simulator.events, "pack")) == len(variant.order)


@settings(max_examples=40, deadline=None)
@given(CHAINS, RATES, st.integers(2, 6))
def test_more_contention_is_never_faster(chain: Chain, rates: Rates, count: int) -> None:
    seconds = []
    for contention in (0.0, 0.5, 2.0):
        simulator = _simulator(chain, replace(rates, contention=contention), 10**9, "concurrent")
        simulator.run(_calls(_variant(chain), count))
        seconds.append(simulator.now_s)
    assert all(less <= more * (1 + 1e-9) for less, more in pairwise(seconds))


def test_pressure_frees_what_stays_and_calls_take_it_back_by_levels() -> None:
    chain = uniform(6)
    rates = Rates(1000.0, 1000.0)
    variant = _variant(chain)
    simulator = _simulator(chain, rates, 10**9, pressures=[Pressure(15.5, "critical")])
    loads = []
    for call in _calls(variant, 12):
        before = len(simulator.events)
        simulator.run([call])
        loads.append(len(_of(simulator.events[before:], "load")))
    assert loads[1] == 0
    assert max(loads[2:4]) >= 5
    assert loads[-1] == 0
    least = variant.residency[0]
    at = next(i for i, one in enumerate(simulator.events) if one.what == "run" and one.start_s > 15.5)
    after = [one.held_bytes for one in simulator.events[at : at + 3]]
    assert max(after) <= least.needs_bytes + 2000


def test_another_variant_or_stage_starts_with_nothing() -> None:
    chain, rates = uniform(3), Rates(1000.0, 1000.0, init_s=0.5)
    first = _variant(chain)
    second = first.model_copy(update={"first_needs_bytes": first.first_needs_bytes + 1})
    simulator = _simulator(chain, rates, 10**9)
    events = simulator.run([Call("s", first, False), Call("s", second, False), Call("t", second, False)])
    assert len(_of(events, "init")) == 9


def test_a_budget_that_holds_nothing_is_refused() -> None:
    chain = uniform(3)
    simulator = _simulator(chain, Rates(1000.0, 1000.0), 100)
    with pytest.raises(BudgetError, match=r"s needs \d+ bytes at least; the budget is 100"):
        simulator.run(_calls(_variant(chain), 1))


@pytest.mark.parametrize(("load_s", "run_s"), [(0.5, 1.0), (1.0, 1.0), (2.0, 1.0)])
def test_equal_blocks_take_what_equation_8_says(load_s: float, run_s: float) -> None:
    """r = b min(l, e) of arXiv 2502.04363, section 3.4: a settled pass takes b max(l, e)."""
    chain = uniform(7)
    rates = Rates(1000 / load_s, 1000 / run_s)
    level = Residency(needs_bytes=10**6, prefetch=1)
    variant = _variant(chain).model_copy(update={"residency": (level,)})
    simulator = _simulator(chain, rates, 10**9)
    ends_s = []
    for call in _calls(variant, 5):
        simulator.run([call])
        ends_s.append(simulator.now_s)
    assert ends_s[-2] - ends_s[-3] == pytest.approx(7 * max(load_s, run_s))


def test_a_trace_reads_back_as_it_was_written(tmp_path) -> None:
    simulator = _simulator(uniform(3), Rates(1000.0, 1000.0), 10**9)
    events = simulator.run(_calls(_variant(uniform(3)), 2))
    (tmp_path / "t.json").write_text(to_chrome(events))
    again = read_trace(tmp_path / "t.json")
    assert [(one.what, one.partition, one.bytes, one.held_bytes) for one in again] == [
        (one.what, one.partition, one.bytes, one.held_bytes) for one in events
    ]
    before, after = stage_times(events)["s"], stage_times(again)["s"]
    assert after.calls == before.calls == 2
    assert after.wall_s == pytest.approx(before.wall_s, abs=1e-5)
