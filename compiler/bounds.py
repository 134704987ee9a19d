"""Bounds: seconds that no plan can beat on a device within a budget, printed beside what a plan takes.

A second of a load that lies beside runs takes `lost` = contention / (1 + contention) of a second from them, and one
that lies beside none passes without a run. So calls whose loads take L seconds and whose runs R, the first of which
waits for a first load of l, cannot take less than

    max(L, (1 - lost) l + R + lost L) .
"""

from __future__ import annotations

from collections.abc import Iterable

from movdc.compiler.residency import Chain, needs_bytes
from movdc.runtime.bundle import Manifest
from movdc.runtime.rates import Rates
from movdc.runtime.simulate import Call, calls_of


def call_bound_s(chain: Chain, rates: Rates, budget_bytes: int) -> float:
    """Of a settled call: what is loaded for it may be loaded beside the runs of the call before."""
    return _bound_s(_reloads_s(chain, rates, budget_bytes), _runs_s(chain, rates), 0.0, rates)


def calls_bound_s(chain: Chain, rates: Rates, budget_bytes: int, calls: int) -> float:
    """Of so many calls, the first of which loads everything."""
    loads_s = sum(rates.load_s(one) for one in chain.partitions) + (calls - 1) * _reloads_s(chain, rates, budget_bytes)
    return _bound_s(loads_s, calls * _runs_s(chain, rates), rates.load_s(chain.partitions[0]), rates)


def stage_bounds_s(manifest: Manifest, rates: Rates, budget_bytes: int, calls: Iterable[Call] = ()) -> dict[str, float]:
    """Of each stage of a video, or of other calls; the variants of a stage share nothing that stays loaded."""
    named = {one.name: one for one in manifest.partitions}
    asked = list(calls) or calls_of(manifest)
    found: dict[str, float] = {}
    for stage in manifest.stages:
        for variant in stage.variants.values():
            count = sum(call.variant is variant for call in asked)
            if count:
                chain = Chain.of([named[name] for name in variant.order], variant.inputs, manifest.slab_bytes)
                bound_s = calls_bound_s(chain, rates, budget_bytes, count)
                found[stage.name] = found.get(stage.name, 0.0) + bound_s
    return found


def _bound_s(loads_s: float, runs_s: float, first_s: float, rates: Rates) -> float:
    lost = rates.contention / (1 + rates.contention)
    return max(loads_s, (1 - lost) * first_s + runs_s + lost * loads_s)


def _runs_s(chain: Chain, rates: Rates) -> float:
    return sum(rates.run_s(one) for one in chain.partitions)


def _reloads_s(chain: Chain, rates: Rates, budget_bytes: int) -> float:
    """Loads of what cannot stay from call to call, at best a part of a partition."""
    base_bytes = needs_bytes(chain, frozenset(), 0, frozenset())
    room_bytes = max(budget_bytes - base_bytes + max(one.held_bytes for one in chain.partitions), 0)
    seconds = 0.0
    for one in sorted(chain.partitions, key=lambda one: -rates.load_s(one) / max(one.held_bytes, 1)):
        stays = min(room_bytes, one.held_bytes) / max(one.held_bytes, 1)
        room_bytes -= round(stays * one.held_bytes)
        seconds += (1 - stays) * rates.load_s(one)
    return seconds
