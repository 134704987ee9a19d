"""What every registered target must have, whatever it emits."""

import subprocess
import sys
from pathlib import Path

import pytest

from movdc.passes.pipeline import PASSES
from movdc.targets.registry import TARGETS, parse_target, target_class

HERE = Path(__file__).parent
LIST = "from movdc.targets.registry import *; [target_class(name) for name in TARGETS]; import sys; print(*sys.modules)"


@pytest.mark.parametrize("name", TARGETS)
def test_is_one_word_everywhere(name: str) -> None:
    one, word = target_class(name), name.replace("-", "_")
    assert one.name == name
    assert one.__module__ == f"movdc.targets.{word}"
    assert one.__name__ == "".join(part.capitalize() for part in name.split("-"))
    assert (one.__doc__ or "").splitlines()[0].endswith(".")
    assert (HERE / f"test_{word}.py").exists()


@pytest.mark.parametrize("name", TARGETS)
def test_its_rewrites_are_passes(name: str) -> None:
    rewrites = target_class(name).rewrites
    assert set(rewrites) <= set(PASSES)
    assert all(PASSES[one].exact for one in rewrites), "what is not exact is asked for"


@pytest.mark.parametrize("name", TARGETS)
def test_prints_and_parses_back(name: str) -> None:
    target = target_class(name)()
    assert parse_target(str(target)) == target


def test_listing_targets_imports_no_sdk() -> None:
    done = subprocess.run([sys.executable, "-c", LIST], capture_output=True, text=True, check=True)
    assert not {"executorch", "coremltools", "onnx", "onnxruntime"}.intersection(done.stdout.split())
