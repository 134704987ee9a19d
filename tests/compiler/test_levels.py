"""plan-residency: rows that nest, where more memory is never slower, and none better within the budget."""

from dataclasses import replace
from itertools import combinations, pairwise

import pytest
from chains import CHAINS, chained, partition, tensor, uniform
from hypothesis import given, settings
from hypothesis import strategies as st

from movdc.compiler.bounds import call_bound_s, calls_bound_s
from movdc.compiler.device import Machine
from movdc.compiler.errors import BudgetError
from movdc.compiler.levels import MOST_AHEAD, TRIED, levels, seconds_of, variant_of
from movdc.compiler.residency import Chain, needs_bytes
from movdc.runtime.bundle import Residency
from movdc.runtime.rates import Rates

MACHINE = Machine(10**9, 1000.0, 1000.0, 0.0, 2.0)
RATES = st.builds(
    lambda load, contention: replace(MACHINE, load_bytes_per_s=load, contention=contention),
    st.floats(200.0, 5000.0),
    st.sampled_from([0.0, 0.3, 1.0]),
)


def _row(chain: Chain, pinned: frozenset[str], ahead: int) -> Residency:
    most_bytes = needs_bytes(chain, pinned, ahead, frozenset())
    return Residency(needs_bytes=most_bytes, prefetch=ahead, pinned=tuple(sorted(pinned)))


def _all_rows(chain: Chain) -> list[Residency]:
    names = [one.name for one in chain.partitions]
    sets = [frozenset(some) for count in range(len(names) + 1) for some in combinations(names, count)]
    return [_row(chain, pinned, ahead) for pinned in sets for ahead in range(MOST_AHEAD + 1)]


def _seconds(chain: Chain, rates: Rates, row: Residency, calls: int) -> tuple[float, float]:
    return tuple(round(seconds, 5) for seconds in seconds_of(chain, rates, row, calls))


@settings(max_examples=40, deadline=None)
@given(CHAINS, RATES, st.integers(1, 12), st.floats(0, 1))
def test_no_set_and_no_depth_within_the_budget_is_faster(
    chain: Chain, machine: Machine, calls: int, share: float
) -> None:
    rows = _all_rows(chain)
    low, high = (pick(row.needs_bytes for row in rows) for pick in (min, max))
    machine = replace(machine, budget_bytes=round(low + share * (high - low)))
    chosen = [one for one in levels(chain, machine, "per_step", calls) if one.row.needs_bytes <= machine.budget_bytes]
    fitting = [row for row in rows if row.needs_bytes <= machine.budget_bytes]
    best = min(_seconds(chain, machine.rates, row, calls) for row in fitting)
    assert _seconds(chain, machine.rates, chosen[-1].row, calls) <= best  # levels may also let partitions wait


@settings(max_examples=40, deadline=None)
@given(CHAINS, RATES, st.integers(1, 12), st.integers(300, 12_000))
def test_levels_nest_and_more_memory_is_never_slower(
    chain: Chain, machine: Machine, calls: int, budget_bytes: int
) -> None:
    found = levels(chain, replace(machine, budget_bytes=budget_bytes), "per_step", calls)
    assert (found[0].row.pinned, found[0].row.prefetch) == ((), 0)
    for less, more in pairwise(found):
        assert less.row.needs_bytes <= more.row.needs_bytes
        assert set(less.row.pinned) <= set(more.row.pinned)
        assert more.beats(less)
        assert more.calls_s <= less.calls_s * (1 + 1e-9)
    assert set(found[-1].row.pinned) == {one.name for one in chain.partitions}
    once = levels(chain, replace(machine, budget_bytes=budget_bytes), "once", 1)
    assert not any(one.row.pinned for one in once)


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 7), st.floats(0.2, 5.0), st.integers(2, 30), st.data())
def test_equal_partitions_are_planned_as_well_without_trying_every_set(
    count: int, ratio: float, calls: int, data: st.DataObject
) -> None:
    chain = uniform(count)
    machine = replace(MACHINE, load_bytes_per_s=1000 / ratio)
    some = data.draw(st.sampled_from(_all_rows(chain)))
    machine = replace(machine, budget_bytes=some.needs_bytes)
    found = levels(chain, machine, "per_step", calls, tried=0)
    best = [one for one in found if one.row.needs_bytes <= machine.budget_bytes][-1]
    fitting = [row for row in _all_rows(chain) if row.needs_bytes <= machine.budget_bytes]
    least = min(_seconds(chain, machine.rates, row, calls) for row in fitting)
    assert _seconds(chain, machine.rates, best.row, calls) <= least


@settings(max_examples=40, deadline=None)
@given(CHAINS, RATES, st.integers(300, 12_000))
def test_nothing_beats_the_bound(chain: Chain, machine: Machine, budget_bytes: int) -> None:
    rates = machine.rates
    call_s, calls_s = call_bound_s(chain, rates, budget_bytes), calls_bound_s(chain, rates, budget_bytes, 10)
    for row in _all_rows(chain):
        if row.needs_bytes <= budget_bytes:
            ten_s, one_s = seconds_of(chain, machine.rates, row, 10)
            assert one_s >= call_s * (1 - 1e-9)
            assert ten_s >= calls_s * (1 - 1e-9)


@settings(max_examples=40, deadline=None)
@given(CHAINS, RATES, st.integers(1, 12), st.lists(st.integers(300, 12_000), min_size=2, max_size=4), st.booleans())
def test_a_plan_for_more_memory_is_never_slower(
    chain: Chain, machine: Machine, calls: int, budgets: list[int], tries_every_set: bool
) -> None:
    """Each budget has a plan of its own: what the smaller one can do, the larger one can do as well."""
    before_s = float("inf")
    for budget_bytes in sorted(budgets):
        planned = replace(machine, budget_bytes=budget_bytes)
        found = levels(chain, planned, "per_step", calls, tried=TRIED if tries_every_set else 0)
        fitting = [one.calls_s for one in found if one.row.needs_bytes <= budget_bytes]
        assert not fitting or fitting[-1] <= before_s * (1 + 1e-9)
        before_s = fitting[-1] if fitting else before_s


def test_memory_goes_to_what_stays_before_it_goes_to_loading_further_ahead() -> None:
    chain = uniform(8)  # a load takes as long as a run
    machine = replace(MACHINE, load_bytes_per_s=500.0)
    rows = [one.row for one in levels(chain, machine, "per_step", 30)]
    assert [row.prefetch for row in rows if row.pinned].count(2) <= 1


def test_equal_partitions_that_stay_are_spread() -> None:
    chain = uniform(8, flops=500)
    budget_bytes = _row(chain, frozenset(f"s.plain.{index}" for index in range(4)), 1).needs_bytes
    machine = replace(MACHINE, budget_bytes=budget_bytes)
    best = [one for one in levels(chain, machine, "per_step", 30, tried=0) if one.row.needs_bytes <= budget_bytes][-1]
    places = sorted(int(name.split(".")[-1]) for name in best.row.pinned)
    gaps = sorted((after - before) % 8 for before, after in zip(places, [*places[1:], places[0]], strict=True))
    assert max(gaps) <= 2 + (len(places) < 4)
    assert best.call_s == pytest.approx(call_bound_s(chain, machine.rates, budget_bytes))


def test_a_budget_between_two_levels_lets_some_partitions_wait() -> None:
    chain = chained([partition(0), partition(1), partition(2, held_bytes=3000), partition(3, held_bytes=500)])
    free = _row(chain, frozenset(), 1).needs_bytes
    machine = Machine(free - 1, 1000.0, 1000.0, 0.0, 2.0)
    variant = variant_of(chain, machine, "once", 1, "s", (tensor("x"),), ())
    assert [level.waits for level in variant.residency if level.waits] == [("s.plain.2",)]
    assert variant.peak_bytes <= free - 1
    with pytest.raises(BudgetError, match="run the pass partition"):
        variant_of(chain, Machine(100, 1000.0, 1000.0, 0.0, 2.0), "once", 1, "s", (tensor("x"),), ())


def test_a_stage_that_is_called_again_and_again_in_plenty_of_memory_loads_once() -> None:
    chain = uniform(5)
    last = levels(chain, MACHINE, "per_step", 30)[-1]
    runs_s = sum(MACHINE.rates.run_s(one) for one in chain.partitions)
    assert last.call_s == pytest.approx(runs_s)
