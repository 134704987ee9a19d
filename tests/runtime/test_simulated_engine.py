"""The simulator and the engine on the example: the same loads and runs in the same order, and the same bytes held."""

from pathlib import Path

import pytest
from simulator import Arms

from movdc.runtime.bundle import Bundle
from movdc.runtime.simulate import Mode
from movdc.runtime.timeline import Event

pytestmark = pytest.mark.slow
STEPS = 4


@pytest.fixture(scope="module")
def arms(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Arms:
    return Arms(Bundle.read(bundle), tmp_path_factory.mktemp("packed"), STEPS)


def _order(events: list[Event], what: str) -> list[str]:
    return [event.partition for event in sorted(events, key=lambda one: one.start_s) if event.what == what]


@pytest.mark.parametrize("mode", ["sequential", "concurrent", "dynamic"])
def test_loads_and_runs_are_those_of_the_engine(arms: Arms, mode: Mode) -> None:
    rows = arms.variant.residency
    for share in (0.0, 0.3, 0.7, 1.0):
        low, high = arms.variant.first_needs_bytes, rows[-1].needs_bytes
        budget_bytes = low + round(share * (high - low))
        real, _, real_bytes = arms.measure(mode, budget_bytes)
        played, _, played_bytes = arms.simulate(mode, budget_bytes)
        assert _order(played, "run") == _order(real, "run")
        # How far the loader gets before a run that changes the level is a matter of time: its order is not.
        assert _order(played, "load") == _order(real, "load")
        assert played_bytes == pytest.approx(real_bytes, rel=0.05)
        assert played_bytes <= budget_bytes


def test_rates_fitted_to_the_engine_are_those_of_a_machine(arms: Arms) -> None:
    assert 1e8 < arms.rates.compute_flops_per_s < 1e13
    assert arms.rates.load_s(next(iter(arms.named.values()))) > 0
