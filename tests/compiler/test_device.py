"""Device profiles: every number has its source, and a machine can be measured into an entry that reads back."""

import tomllib
from importlib.resources import as_file, files
from pathlib import Path

import pytest
from pydantic import ValidationError

from movdc.compiler.device import DeviceProfile, Machine, print_profile, read_profiles
from movdc.targets.measure_host import measure_host
from movdc.targets.null import Null


@pytest.fixture
def profiles() -> dict[str, DeviceProfile]:
    """Those that are there."""
    with as_file(files("movdc.targets") / "devices.toml") as path:
        return read_profiles(path)


def test_every_number_has_a_source_that_names_what_it_is(profiles: dict[str, DeviceProfile]) -> None:
    assert {"host", "iphone-15-pro", "iphone-16-pro", "android-8gb", "android-12gb", "mac-m1"} <= set(profiles)
    for name, profile in profiles.items():
        assert profile.source.keys() == profile.numbers.keys()
        assert all(len(text) > 15 for text in profile.source.values()), name


def test_a_number_without_a_source_is_refused(profiles: dict[str, DeviceProfile]) -> None:
    fields = profiles["host"].model_dump()
    del fields["source"]["contention"]
    with pytest.raises(ValidationError, match="one entry for each number: contention"):
        DeviceProfile.model_validate(fields)


def test_what_a_target_makes_of_a_profile(profiles: dict[str, DeviceProfile]) -> None:
    machine = Null().machine(profiles["android-12gb"], None)
    assert machine.budget_bytes == 6_000_000_000
    assert machine.run_s(1.5e11) == pytest.approx(1)
    assert machine.run_s(1.5e11, 1.5e11) == pytest.approx(1.5 / 6.4)
    assert machine.run_s(3e11, 1.5e11) == pytest.approx(1 + 1.5 / 6.4)
    assert Machine(1, 1.0, 2.0, 0.0, 1.0).run_s(4, 4) == 2, "int8 is as fast as the rest where nobody says otherwise"


@pytest.mark.slow
def test_a_measured_machine_is_an_entry_that_reads_back(tmp_path: Path) -> None:
    measured = measure_host(tmp_path, width=512)
    (tmp_path / "devices.toml").write_text(print_profile("here", measured))
    read = read_profiles(tmp_path / "devices.toml")["here"]
    assert read.source == measured.source
    for name, value in measured.numbers.items():
        assert read.numbers[name] == pytest.approx(value, rel=0.02), name
    assert 1e8 < read.fp32_flops_per_s < 1e14
    assert 1e6 < read.load_rate < 1e12
    assert set(tomllib.loads(print_profile("here", measured))) == {"here"}
