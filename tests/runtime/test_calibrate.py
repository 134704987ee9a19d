"""Calibration: a trace that was simulated gives back the rates that it was simulated with."""

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
from chains import chained, partition, tensor
from test_simulate import _calls, _variant

from movdc.runtime.calibrate import calibrate
from movdc.runtime.errors import RunError
from movdc.runtime.rates import Rates
from movdc.runtime.simulate import Simulator
from movdc.runtime.timeline import Event, joined


def _trace(rates: Rates, sizes: list[tuple[int, ...]], *modes: str) -> tuple[list, dict]:
    parts = [
        partition(i, held, flops=flops).model_copy(update={"int8_flops": sum(int8)})
        for i, (held, flops, *int8) in enumerate(sizes)
    ]
    chain = chained(parts)
    named = {one.name: one for one in chain.partitions}
    events = []
    for mode in modes:
        simulator = Simulator(named, 0, rates, 10**9, mode=mode, packed=False)
        simulator.now_s = max((one.end_s for one in events), default=0.0) + 1
        events += simulator.run(_calls(_variant(chain), 5))
    return events, named


def test_the_rates_of_a_simulated_trace_come_back() -> None:
    rates = Rates(1000.0, 2000.0, 0.05, 0.1, 0.4, 0.2, pack_bytes_per_s=300.0, init_s=0.02)
    sizes = [(1000, 500), (300, 4000), (2500, 3000), (700, 1500), (1600, 2500)]
    found = calibrate(*_trace(rates, sizes, "sequential", "concurrent"))
    for name in ("load_bytes_per_s", "compute_flops_per_s", "pack_bytes_per_s", "init_s"):
        assert getattr(found, name) == pytest.approx(getattr(rates, name), rel=1e-3), name
    for name in ("load_overhead_s", "run_overhead_s", "contention", "load_contention"):
        assert getattr(found, name) == pytest.approx(getattr(rates, name), rel=1e-2, abs=1e-4), name


def test_what_mapping_and_freeing_weights_takes_comes_back() -> None:
    rates = Rates(1000.0, 2000.0, 0.05, 0.1, 0.4, 0.2, touch_bytes_per_s=700.0, free_bytes_per_s=3000.0)
    sizes = [(1000, 500), (300, 4000), (2500, 3000), (700, 1500), (1600, 2500)]
    found = calibrate(*_trace(rates, sizes, "sequential", "dynamic"))
    assert found.touch_bytes_per_s == pytest.approx(rates.touch_bytes_per_s, rel=1e-2)
    assert found.free_bytes_per_s == pytest.approx(rates.free_bytes_per_s, rel=1e-2)
    alone = calibrate(*_trace(rates, sizes, "sequential"))  # where all were just loaded, a run has it in its seconds
    assert alone.touch_bytes_per_s == math.inf
    assert alone.free_bytes_per_s == pytest.approx(rates.free_bytes_per_s, rel=1e-2)


def test_traces_of_two_runs_tell_what_one_does_not() -> None:
    rates = Rates(1000.0, 2000.0, 0.05, 0.1, 0.4, 0.2)
    sizes = [(1000, 500), (300, 4000), (2500, 3000), (700, 1500), (1600, 2500)]
    traces = [_trace(rates, sizes, mode) for mode in ("sequential", "concurrent")]
    named = traces[0][1]
    assert calibrate(traces[0][0], named).contention == 0
    found = calibrate(joined([events for events, _ in traces]), named)
    assert found.contention == pytest.approx(rates.contention, rel=1e-2)
    assert found.load_contention == pytest.approx(rates.load_contention, rel=1e-2)


def _late(events: list[Event], late: Callable[[int], float]) -> list[Event]:
    """The events with reads that take so many times as long, by their place, and still lie beside no run."""
    found, count = [], 0
    for event in events:
        count += event.what == "read"
        apart = replace(event, start_s=9 * event.start_s)
        found.append(replace(apart, duration_s=event.duration_s * late(count)) if event.what == "read" else apart)
    return found


def test_quick_and_slow_loads_weigh_the_same() -> None:
    rates = Rates(1000.0, 2000.0)
    events, named = _trace(rates, [(1000, 500), (2000, 700), (1500, 900)], "sequential")
    found = calibrate(_late(events, lambda place: 0.85 if place % 2 else 1.15), named)
    assert sum(found.load_s(one) for one in named.values()) == pytest.approx(4.5, rel=0.05)


def test_a_few_events_that_took_many_times_as_long_do_not_count_as_much() -> None:
    rates = Rates(1000.0, 2000.0)
    events, named = _trace(rates, [(1000, 500), (2000, 700), (1500, 900)], "sequential")
    found = calibrate(_late(events, lambda place: 6.0 if place in (6, 13) else 1.0), named)
    assert sum(found.load_s(one) for one in named.values()) == pytest.approx(4.5, rel=0.1)  # the mean is 7.6


def test_products_with_int8_weights_have_a_rate_of_their_own() -> None:
    rates = Rates(1000.0, 2000.0, 0.05, 0.1, 0.4, 0.2, int8_flops_per_s=9000.0)
    sizes = [(1000, 500, 500), (300, 4000, 1000), (2500, 3000), (700, 1500, 1400), (1600, 2500, 300)]
    found = calibrate(*_trace(rates, sizes, "sequential", "concurrent"))
    assert found.compute_flops_per_s == pytest.approx(2000, rel=1e-3)
    assert found.int8_flops_per_s == pytest.approx(9000, rel=1e-3)
    assert calibrate(*_trace(rates, [(1000, 500)], "sequential")).int8_flops_per_s is None


def test_equal_partitions_give_the_seconds_though_not_what_they_consist_of() -> None:
    rates = Rates(1000.0, 2000.0, 0.05, 0.1)
    events, named = _trace(rates, [(1000, 500)] * 4, "sequential")
    found = calibrate(events, named)
    one = next(iter(named.values()))
    assert found.load_s(one) == pytest.approx(rates.load_s(one), rel=1e-6)
    assert found.run_s(one) == pytest.approx(rates.run_s(one), rel=1e-6)


def test_a_trace_of_another_bundle_is_refused() -> None:
    events, named = _trace(Rates(1000.0, 1000.0), [(1000, 500)] * 3, "sequential")
    named.pop("s.plain.2")
    with pytest.raises(RunError, match=r"the trace has s\.plain\.2, which this bundle has not"):
        calibrate(events, named)
    with pytest.raises(RunError, match="no load or no run"):
        calibrate([], named)
    assert tensor("x").size_bytes == 100
