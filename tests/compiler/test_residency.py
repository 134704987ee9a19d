"""Levels of residency: what the planner promises, the checker finds kept in every interleaving of the two lanes."""

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from movdc.compiler.checker import CertificateError, most_held
from movdc.compiler.device import Machine
from movdc.compiler.errors import BudgetError
from movdc.compiler.residency import Chain, cycle_s, intervals, pinning_order, residency, variant_of
from movdc.runtime.bundle import Partition, Residency, TensorSpec, Variant

MACHINE = Machine(10**9, 1000.0, 1000.0, 0.0, 2.0)
SLAB_BYTES = 7


def _tensor(name: str, items: int = 25) -> TensorSpec:
    return TensorSpec(name=name, dtype="f32", shape=(items,))


def _partition(
    index: int, held_bytes: int = 1000, workspace_bytes: int = 50, flops: int = 1000, items: int = 25
) -> Partition:
    return Partition(
        name=f"s.plain.{index}",
        program="programs/p.pte",
        weights=(),
        inputs=(_tensor("x") if index == 0 else _tensor(f"h{index - 1}", items),),
        outputs=(_tensor(f"h{index}", items),),
        weight_bytes=held_bytes,
        held_bytes=held_bytes,
        load_bytes=held_bytes + 100,
        program_bytes=10 + index,
        workspace_bytes=workspace_bytes,
        planned_bytes=3 * (index % 3),
        flops=flops,
    )


def _chain(partitions: list[Partition]) -> Chain:
    return Chain.of(partitions, (_tensor("x"),), SLAB_BYTES)


def _held(chain: Chain, level: Residency) -> dict[tuple[str, str], int]:
    variant = Variant(
        inputs=(_tensor("x"),),
        outputs=(),
        order=tuple(one.name for one in chain.partitions),
        residency=(level,),
        first_needs_bytes=0,
        certificate=(),
        peak_bytes=0,
    )
    return most_held(variant, level, {one.name: one for one in chain.partitions}, SLAB_BYTES)


CHAINS = st.lists(
    st.builds(lambda *sizes: sizes, st.integers(1, 3000), st.integers(0, 500), st.integers(0, 5000)),
    min_size=1,
    max_size=7,
).map(lambda sizes: _chain([_partition(index, *some) for index, some in enumerate(sizes)]))


@settings(max_examples=150, deadline=None)
@given(CHAINS, st.data())
def test_no_interleaving_holds_more_than_any_level_says(chain: Chain, data: st.DataObject) -> None:
    names = [one.name for one in chain.partitions]
    some = st.frozensets(st.sampled_from(names))
    pinned, waits, prefetch = data.draw(some), data.draw(some), data.draw(st.integers(0, 3))
    certified = intervals(chain, pinned, prefetch, waits)
    needs_bytes = max(one.total_bytes for one in certified)
    level = Residency(needs_bytes=needs_bytes, prefetch=prefetch, pinned=tuple(pinned), waits=tuple(waits))
    held = _held(chain, level)
    stated = {(one.partition, one.phase): one.total_bytes for one in certified}
    assert held.keys() == stated.keys()
    assert all(held[place] <= stated[place] for place in held)


@settings(max_examples=50, deadline=None)
@given(CHAINS)
def test_a_first_run_is_counted_exactly(chain: Chain) -> None:
    variant = variant_of(chain, MACHINE, "once", "s", (_tensor("x"),), ())
    partitions = {one.name: one for one in chain.partitions}
    held = most_held(variant, variant.residency[0], partitions, SLAB_BYTES, first=True)
    assert max(held.values()) == variant.first_needs_bytes


@settings(max_examples=100, deadline=None)
@given(CHAINS)
def test_without_pinned_partitions_the_planner_is_exact(chain: Chain) -> None:
    nothing: frozenset[str] = frozenset()
    for prefetch in (0, 1):
        stated = max(one.total_bytes for one in intervals(chain, nothing, prefetch, nothing))
        assert max(_held(chain, Residency(needs_bytes=stated, prefetch=prefetch)).values()) == stated


@settings(max_examples=50, deadline=None)
@given(CHAINS)
def test_levels_need_more_and_more_and_keep_more_and_more(chain: Chain) -> None:
    levels = residency(chain, MACHINE, "per_step")
    assert levels[0].pinned == ()
    assert levels[0].prefetch == 0
    needs = [level.needs_bytes for level in levels]
    assert needs == sorted(needs)
    kept = [set(level.pinned) for level in levels]
    assert all(one <= other for one, other in pairwise(kept))
    assert kept[-1] == {one.name for one in chain.partitions}
    assert all(not level.pinned for level in residency(chain, MACHINE, "once"))


def test_a_workspace_that_grows_is_counted_beside_the_one_before() -> None:
    def first_bytes(*sizes: int) -> int:
        chain = _chain([_partition(index, workspace_bytes=size) for index, size in enumerate(sizes)])
        return variant_of(chain, MACHINE, "once", "s", (_tensor("x"),), ()).first_needs_bytes

    assert first_bytes(900, 500, 900, 10) - first_bytes(900, 900, 900, 900) == 0
    assert first_bytes(500, 900, 10, 10) - first_bytes(900, 900, 900, 900) == 500


def test_a_first_load_must_fit_beside_the_smallest_level() -> None:
    chain = _chain([_partition(0), _partition(1)])
    needs = variant_of(chain, MACHINE, "once", "s", (_tensor("x"),), ()).first_needs_bytes
    with pytest.raises(BudgetError, match=f"holds {needs} bytes"):
        variant_of(chain, Machine(needs - 1, 1000.0, 1000.0, 0.0, 2.0), "once", "s", (_tensor("x"),), ())
    assert variant_of(chain, Machine(needs, 1000.0, 1000.0, 0.0, 2.0), "once", "s", (_tensor("x"),), ())


def test_a_budget_between_two_levels_lets_some_partitions_wait() -> None:
    chain = _chain([_partition(0), _partition(1), _partition(2, held_bytes=3000), _partition(3, held_bytes=500)])
    free = next(level.needs_bytes for level in residency(chain, MACHINE, "once") if level.prefetch == 1)
    machine = Machine(free - 1, 1000.0, 1000.0, 0.0, 2.0)
    variant = variant_of(chain, machine, "once", "s", (_tensor("x"),), ())
    assert [level.waits for level in variant.residency if level.waits] == [("s.plain.2",)]
    assert variant.peak_bytes <= free - 1
    with pytest.raises(BudgetError, match="run the pass partition"):
        variant_of(chain, Machine(100, 1000.0, 1000.0, 0.0, 2.0), "once", "s", (_tensor("x"),), ())


def test_equal_partitions_that_stay_are_spread() -> None:
    chain = _chain([_partition(index, flops=500) for index in range(8)])
    places = [int(name.split(".")[-1]) for name in pinning_order(chain, MACHINE)[:4]]
    gaps = sorted(
        (after - before) % 8 for before, after in zip(sorted(places), [*sorted(places)[1:], min(places)], strict=True)
    )
    assert gaps == [2, 2, 2, 2]
    spread_s = cycle_s(chain, MACHINE, frozenset(places))
    assert spread_s <= cycle_s(chain, MACHINE, frozenset(range(4)))


def test_a_tensor_that_nobody_makes_is_found() -> None:
    chain = Chain.of([_partition(1)], (), SLAB_BYTES)
    with pytest.raises(CertificateError, match="tensor h0 does not exist"):
        _held(chain, Residency(needs_bytes=0, prefetch=0))
