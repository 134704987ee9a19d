"""The pages for apps: their C compiles, and their Swift and Kotlin name nothing that is not there."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from pydantic import BaseModel
from pydantic.alias_generators import to_snake

from movdc.runtime import bundle

REPOSITORY = Path(__file__).parents[1]
HEADER = REPOSITORY / "runtime" / "engine" / "movd.h"
PAGES = ["embedding", "android", "ios"]
RECORDS = {
    name: one for name, one in vars(bundle).items() if isinstance(one, type) and issubclass(one, BaseModel)
}  # of bundle.json


def _page(name: str) -> str:
    return (REPOSITORY / "docs" / f"{name}.md").read_text()


def _blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", _page(page), re.DOTALL)


@pytest.mark.parametrize("page", PAGES)
def test_whatever_begins_with_movd_is_in_the_header(page: str) -> None:
    declared = set(re.findall(r"\b(?:movd|MOVD)_\w+", HEADER.read_text())) | {"MOVD_EXECUTORCH"}  # an option of CMake
    used = set(re.findall(r"\b(?:movd|MOVD)_\w+", _page(page)))
    assert used
    assert used <= declared


def test_the_c_compiles_against_the_header(tmp_path: Path) -> None:
    compiler = shutil.which("cc")
    assert compiler is not None
    (block,) = _blocks("android", "c")
    source = tmp_path / "app.c"
    source.write_text(block)
    flags = ["-std=c99", "-Wall", "-Wextra", "-Werror", "-pedantic", "-fsyntax-only", "-I", HEADER.parent]
    done = subprocess.run([compiler, *flags, source], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_swift_structs_have_the_names_of_the_manifest() -> None:
    structs = {
        name: re.findall(r"let (\w+):", body)
        for block in _blocks("ios", "swift")
        for name, body in re.findall(r"struct (\w+): Decodable \{(.*?)\n\}", block, re.DOTALL)
    }
    assert {"Manifest", "Partition", "Variant"} <= structs.keys()
    for name, fields in structs.items():
        assert {to_snake(field) for field in fields} <= RECORDS[name].model_fields.keys(), name


def test_kotlin_reads_keys_of_the_manifest() -> None:
    read = {key for block in _blocks("android", "kotlin") for key in re.findall(r'get\w+\("(\w+)"\)', block)}
    assert {"program", "weights", "order"} <= read
    assert read <= {field for record in RECORDS.values() for field in record.model_fields}


def test_paths_of_keys_in_the_text_lead_somewhere() -> None:
    found = re.findall(r"`(prompt|sampler|decode)\.(\w+)`", _page("android"))
    assert len(found) > 5
    for section, key in found:
        assert key in RECORDS[section.capitalize()].model_fields, f"{section}.{key}"
