"""What every registered pass must have: documentation in a fixed form, and the tests that the contract asks for."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from movdc.compiler.pass_base import Pass
from movdc.passes.pipeline import PASSES, PHASE_OF, parse_pipeline

HERE = Path(__file__).parent
FOLDER = HERE.parents[1] / "passes"


@pytest.mark.parametrize("one", PASSES.values(), ids=PASSES)
def test_is_documented(one: type[Pass]) -> None:
    text = one.__doc__ or ""
    first, *rest = text.splitlines()
    assert first.endswith("."), "the first line is one sentence"
    assert not rest[0].strip()
    places = [text.index(word) for word in ("Before:", "After:", "1. ", "2. ", "Cost:")]
    assert places == sorted(places), "Before, After, refusals, cost, in this order"
    assert re.search(r"%\w+.* = ", text[places[0] : places[2]]) or "sampler" in text, "in the printer's text"
    assert one.exact or one.figure, "a pass that is not exact says what it is held to"
    assert one.exact or re.match(r"arXiv \d{4}\.\d{5}", one.paper)


@pytest.mark.parametrize("one", PASSES.values(), ids=PASSES)
def test_is_one_word_everywhere(one: type[Pass]) -> None:
    word = one.name.replace("-", "_")
    assert one.__module__ == f"movdc.passes.{word}"
    assert one.__name__ == "".join(part.capitalize() for part in one.name.split("-"))
    assert (FOLDER / f"{word}.py").read_text().count("\n") <= 150
    assert one.name in PHASE_OF


@pytest.fixture(scope="session")
def collected() -> list[str]:
    """The ids of all tests of passes."""
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", str(HERE)]
    return subprocess.run(command, capture_output=True, text=True, check=True, cwd=HERE.parents[1]).stdout.splitlines()


@pytest.mark.parametrize("one", PASSES.values(), ids=PASSES)
def test_has_its_tests(one: type[Pass], collected: list[str]) -> None:
    file = f"test_{one.name.replace('-', '_')}.py::"
    tests = [name.partition(file)[2] for name in collected if file in name]
    assert sum("refuse" in name for name in tests) >= 2
    for what in ("modified", "numbers", "golden_text"):
        assert any(what in name for name in tests), f"no test of {one.name} has {what} in its name"
    assert len(tests) >= 5


@pytest.mark.parametrize("one", PASSES.values(), ids=PASSES)
def test_prints_and_parses_back(one: type[Pass]) -> None:
    assert parse_pipeline(str(one())) == (one(),)
