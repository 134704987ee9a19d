"""The planner against brute force over every set of cuts, with the memory replayed node by node."""

from __future__ import annotations

from dataclasses import replace
from itertools import chain as concatenate
from itertools import combinations, pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from movdc.compiler.chain import Chain, Value, costs
from movdc.compiler.cut import cheapest, largest, least_s, predict, smallest_budget
from movdc.compiler.device import Machine

LOAD_BYTES_PER_S, FLOPS_PER_S, INT8_FLOPS_PER_S, LOAD_COPIES = 100.0, 10.0, 40.0, 1.5


def _machine(budget_bytes: int, load_overhead_s: float = 0.25, contention: float = 0.0) -> Machine:
    return Machine(
        budget_bytes,
        LOAD_BYTES_PER_S,
        FLOPS_PER_S,
        load_overhead_s,
        LOAD_COPIES,
        int8_flops_per_s=INT8_FLOPS_PER_S,
        contention=contention,
    )


@st.composite
def chains(draw: st.DrawFn, max_nodes: int = 7) -> Chain:
    """A small DAG in linear order: each node makes a value, some of which outlive it by far; weights may be shared."""
    count = draw(st.integers(1, max_nodes))
    small = st.integers(0, 50)
    weights = draw(st.lists(st.integers(1, 200), min_size=1, max_size=5))
    flops = draw(st.lists(small, min_size=count, max_size=count))
    return Chain(
        flops=tuple(flops),
        int8_flops=tuple(draw(st.sampled_from([0, figure])) for figure in flops),
        scratch_bytes=tuple(draw(st.lists(small, min_size=count, max_size=count))),
        values=tuple(Value(k, draw(st.integers(k, count)), draw(small)) for k in range(count)),
        reads=tuple(
            tuple(draw(st.lists(st.integers(0, len(weights) - 1), max_size=2, unique=True))) for _ in range(count)
        ),
        weight_bytes=tuple(weights),
        input_bytes=draw(small),
        output_bytes=0,
    )


def _held_bytes(chain: Chain, start: int, stop: int) -> int:
    return sum(chain.weight_bytes[weight] for weight in set(concatenate(*chain.reads[start:stop])))


def _live_bytes(chain: Chain, start: int, stop: int, node: int) -> int:
    """What lives while `node` of the partition start .. stop runs, by asking every value."""
    live = chain.input_bytes + chain.scratch_bytes[node]
    for value in chain.values:
        came_in = value.first < start <= value.last
        goes_out = start <= value.first < stop <= value.last
        inside = start <= value.first <= node <= value.last
        live += value.size_bytes * (came_in or goes_out or inside)
    return live


def _around_bytes(chain: Chain, start: int, stop: int) -> int:
    """The values that enter the partition start .. stop, leave it, or pass it."""
    return sum(
        value.size_bytes
        for value in chain.values
        if value.first < start <= value.last or start <= value.first < stop <= value.last
    )


def _together_s(machine: Machine, run_s: float, load_s: float) -> float:
    """Seconds until both have ended, where the run does less for as long as the load lasts."""
    done_meanwhile_s = load_s / (1 + machine.contention)
    return load_s if run_s <= done_meanwhile_s else load_s + run_s - done_meanwhile_s


def _replay(chain: Chain, machine: Machine, cuts: tuple[int, ...]) -> tuple[float, int]:
    """Seconds and peak bytes of a run; a load waits for the run before it where both do not fit."""
    seconds, peak_bytes = 0.0, 0
    running_s, running_bytes = 0.0, None
    for start, stop in pairwise(cuts):
        held = _held_bytes(chain, start, stop)
        first_load_bytes, load_s = int(machine.load_copies * held), machine.load_s(held)
        waiting = sum(value.size_bytes for value in chain.values if value.first < start <= value.last)
        alone_bytes = chain.input_bytes + waiting
        if running_bytes is not None and running_bytes + held <= machine.budget_bytes:
            seconds += _together_s(machine, running_s, load_s)
            peak_bytes = max(peak_bytes, running_bytes + held)
        else:
            seconds += running_s + load_s
        live_bytes = max(_live_bytes(chain, start, stop, node) for node in range(start, stop))
        working_bytes = live_bytes - chain.input_bytes - _around_bytes(chain, start, stop)
        running_bytes = held + live_bytes
        int8 = sum(chain.int8_flops[start:stop])
        running_s = (sum(chain.flops[start:stop]) - int8) / FLOPS_PER_S + int8 / INT8_FLOPS_PER_S
        peak_bytes = max(peak_bytes, alone_bytes + first_load_bytes + working_bytes, running_bytes)
    return seconds + running_s, peak_bytes


def _every_cutting(length: int) -> list[tuple[int, ...]]:
    inner = range(1, length)
    return [(0, *some, length) for count in range(length) for some in combinations(inner, count)]


def _fitting(chain: Chain, machine: Machine) -> dict[tuple[int, ...], float]:
    runs = {cuts: _replay(chain, machine, cuts) for cuts in _every_cutting(chain.length)}
    return {cuts: seconds for cuts, (seconds, peak_bytes) in runs.items() if peak_bytes <= machine.budget_bytes}


def _all_positions(chain: Chain) -> range:
    return range(chain.length + 1)


@settings(deadline=None, max_examples=120)
@given(chains(), st.integers(1, 1500), st.sampled_from([0.0, 0.25]), st.sampled_from([0.0, 0.1, 0.75]))
def test_the_time_is_that_of_the_best_of_all_cuttings(
    chain: Chain, budget_bytes: int, overhead_s: float, contention: float
) -> None:
    machine = _machine(budget_bytes, overhead_s, contention)
    found = cheapest(costs(chain, _all_positions(chain), machine))
    fitting = _fitting(chain, machine)
    if found is None:
        assert not fitting
        return
    seconds, peak_bytes = _replay(chain, machine, tuple(found))
    assert seconds == pytest.approx(min(fitting.values()), rel=1e-9)
    assert peak_bytes <= budget_bytes
    assert found[0] == 0
    assert found[-1] == chain.length
    assert found == sorted(set(found))


@settings(deadline=None, max_examples=80)
@given(chains(), st.integers(100, 1500))
def test_the_prediction_is_what_a_replay_gives(chain: Chain, budget_bytes: int) -> None:
    machine = _machine(budget_bytes)
    measured = costs(chain, _all_positions(chain), machine)
    for cuts in _every_cutting(chain.length):
        seconds, peak_bytes = _replay(chain, machine, cuts)
        one = predict(measured, cuts)
        assert (one is None) == (peak_bytes > budget_bytes)
        if one is not None:
            assert one.seconds == pytest.approx(seconds)
            assert one.peak_bytes == peak_bytes
            assert one.seconds >= least_s(measured) - 1e-9


@settings(deadline=None, max_examples=80)
@given(chains())
def test_the_smallest_budget_is_met_and_a_byte_less_is_not(chain: Chain) -> None:
    measured = costs(chain, _all_positions(chain), _machine(1))
    smallest, step = smallest_budget(measured)
    assert 0 <= step < chain.length
    assert cheapest(replace(measured, machine=_machine(smallest))) is not None
    assert cheapest(replace(measured, machine=_machine(smallest - 1))) is None
    assert not _fitting(chain, _machine(smallest - 1))


@settings(deadline=None, max_examples=80)
@given(chains(), st.integers(200, 1500), st.data())
def test_a_fee_is_weighed_and_forced_cuts_are_made(chain: Chain, budget_bytes: int, data: st.DataObject) -> None:
    machine = _machine(budget_bytes)
    measured = costs(chain, _all_positions(chain), machine)
    fee_s = data.draw(st.sampled_from([0.1, 1.0, 100.0]))
    forced = data.draw(st.sets(st.integers(1, chain.length - 1))) if chain.length > 1 else set()
    found = cheapest(measured, fee_s, sorted(forced))

    def price(cuts: tuple[int, ...]) -> float:
        share = 1 + measured.before_bytes / (1 + measured.before_bytes.sum())
        return _replay(chain, machine, cuts)[0] + fee_s * float(share[list(cuts[:-1])].sum())

    fitting = [cuts for cuts in _fitting(chain, machine) if forced <= set(cuts)]
    if found is None:
        assert not fitting
        return
    assert forced <= set(found)
    assert price(tuple(found)) == pytest.approx(min(map(price, fitting)), rel=1e-9)


@settings(deadline=None, max_examples=40)
@given(chains(max_nodes=12), st.integers(500, 3000), st.data())
def test_cuts_are_only_made_where_they_may_be(chain: Chain, budget_bytes: int, data: st.DataObject) -> None:
    inner = data.draw(st.sets(st.integers(1, chain.length)))
    positions = sorted({0, chain.length} | inner)
    machine = _machine(budget_bytes)
    found = cheapest(costs(chain, positions, machine))
    allowed = {
        cuts: run
        for cuts in _every_cutting(chain.length)
        if set(cuts) <= set(positions) and (run := _replay(chain, machine, cuts))[1] <= budget_bytes
    }
    assert (found is None) == (not allowed)
    if found is not None:
        cuts = tuple(positions[index] for index in found)
        assert _replay(chain, machine, cuts)[0] == pytest.approx(min(seconds for seconds, _ in allowed.values()))


def test_fewer_positions_cost_what_they_cost_among_all() -> None:
    chain = Chain((5, 7, 9, 2), (1, 2, 3, 4), (Value(0, 3, 8), Value(1, 2, 4)), ((0,), (1,), (0,), ()), (10, 20), 3, 0)
    few = costs(chain, [0, 2, 4], _machine(1000))
    among = costs(chain, range(5), _machine(1000)).at([0, 2, 4])
    upper = np.triu_indices(3, 1)
    for name in ("held_bytes", "working_bytes", "running_bytes", "run_s"):
        np.testing.assert_array_equal(getattr(few, name)[upper], getattr(among, name)[upper])
    np.testing.assert_array_equal(few.before_bytes, among.before_bytes)


def test_variants_that_are_cut_alike_fit_together() -> None:
    light = Chain((5, 5), (0, 0), (Value(0, 1, 10),), ((0,), (1,)), (100, 100), 0, 0)
    heavy = replace(light, flops=(50, 1), values=(Value(0, 1, 90),))
    both = largest([costs(one, range(3), _machine(400)) for one in (light, heavy)])
    assert both.run_s[0, 1] == 5.0
    assert both.run_s[1, 2] == 0.5
    assert both.running_bytes[0, 1] == 190
    assert both.held_bytes[0, 2] == 200
