"""Levels of residency: what the planner promises, the checker finds kept in every interleaving of the two lanes."""

import pytest
from chains import CHAINS, SLAB_BYTES, chained, partition, tensor
from hypothesis import given, settings
from hypothesis import strategies as st

from movdc.compiler.checker import CertificateError, most_held
from movdc.compiler.device import Machine
from movdc.compiler.errors import BudgetError
from movdc.compiler.levels import variant_of
from movdc.compiler.residency import Chain, intervals
from movdc.runtime.bundle import Residency, Variant

MACHINE = Machine(10**9, 1000.0, 1000.0, 0.0, 2.0)


def _held(chain: Chain, level: Residency) -> dict[tuple[str, str], int]:
    variant = Variant(
        inputs=(tensor("x"),),
        outputs=(),
        order=tuple(one.name for one in chain.partitions),
        residency=(level,),
        first_needs_bytes=0,
        certificate=(),
        peak_bytes=0,
    )
    return most_held(variant, level, {one.name: one for one in chain.partitions}, SLAB_BYTES)


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
    variant = variant_of(chain, MACHINE, "once", 1, "s", (tensor("x"),), ())
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


def test_a_workspace_that_grows_is_counted_beside_the_one_before() -> None:
    def first_bytes(*sizes: int) -> int:
        chain = chained([partition(index, workspace_bytes=size) for index, size in enumerate(sizes)])
        return variant_of(chain, MACHINE, "once", 1, "s", (tensor("x"),), ()).first_needs_bytes

    assert first_bytes(900, 500, 900, 10) - first_bytes(900, 900, 900, 900) == 0
    assert first_bytes(500, 900, 10, 10) - first_bytes(900, 900, 900, 900) == 500


def test_a_first_load_must_fit_beside_the_smallest_level() -> None:
    chain = chained([partition(0), partition(1)])
    needs = variant_of(chain, MACHINE, "once", 1, "s", (tensor("x"),), ()).first_needs_bytes
    with pytest.raises(BudgetError, match=f"holds {needs} bytes"):
        variant_of(chain, Machine(needs - 1, 1000.0, 1000.0, 0.0, 2.0), "once", 1, "s", (tensor("x"),), ())
    assert variant_of(chain, Machine(needs, 1000.0, 1000.0, 0.0, 2.0), "once", 1, "s", (tensor("x"),), ())


def test_a_tensor_that_nobody_makes_is_found() -> None:
    chain = Chain.of([partition(1)], (), SLAB_BYTES)
    with pytest.raises(CertificateError, match="tensor h0 does not exist"):
        _held(chain, Residency(needs_bytes=0, prefetch=0))
