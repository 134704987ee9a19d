"""The engine's reader of bundle.json: what does not fit is refused with the place where it stands."""

import copy
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from movdc.runtime import _engine
from movdc.runtime.bundle import MANIFEST, SEAL, seal_of

Seal = Callable[..., None]


def _open(root: Path) -> _engine.Engine:
    options = _engine.Options(
        mode=_engine.Mode.dynamic,
        budget_bytes=10**6,
        packed_cache=str(root / "packed"),
        packed_cache_limit_bytes=0,
        keeps_trace=False,
    )
    return _engine.Engine(str(root), options)


def _tensor(name: str, *shape: int) -> dict[str, Any]:
    return {"name": name, "dtype": "f32", "shape": list(shape)}


def _partition(name: str, source: str, result: str) -> dict[str, Any]:
    return {
        "name": name,
        "program": "programs/a.pte",
        "method": "forward",
        "weights": ["weights/a.ptd"],
        "inputs": [_tensor(source, 2, 3)],
        "outputs": [_tensor(result, 2, 3)],
        **dict.fromkeys(("weight_bytes", "held_bytes", "load_bytes", "program_bytes"), 64),
        **dict.fromkeys(("workspace_bytes", "planned_bytes", "flops"), 64),
    }


PROGRAM, WEIGHTS = b"no program", bytes(64)
VARIANT = {
    "inputs": [_tensor("x", 2, 3)],
    "outputs": [_tensor("z", 2, 3)],
    "order": ["s.plain.0", "s.plain.1"],
    "residency": [
        {"needs_bytes": 100, "prefetch": 0, "pinned": [], "waits": []},
        {"needs_bytes": 200, "prefetch": 1, "pinned": ["s.plain.0"], "waits": ["s.plain.1"]},
    ],
    "first_needs_bytes": 100,
    "certificate": [],
    "peak_bytes": 200,
}
CONSTANT = {"key": "w", "offset_bytes": 16, "size_bytes": 48, "dtype": "f32", "shape": [12]}
PARTS = {
    "stages": [{"name": "s", "cadence": "once", "variants": {"plain": VARIANT}}],
    "partitions": [_partition("s.plain.0", "x", "y"), _partition("s.plain.1", "y", "z")],
    "weights": [{"path": "weights/a.ptd", "constants": [CONSTANT]}],
    "files": [
        {"path": path, "size_bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        for path, data in {"programs/a.pte": PROGRAM, "weights/a.ptd": WEIGHTS}.items()
    ],
}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for path, data in {"programs/a.pte": PROGRAM, "weights/a.ptd": WEIGHTS}.items():
        (tmp_path / path).parent.mkdir()
        (tmp_path / path).write_bytes(data)
    return tmp_path


def test_what_fits_is_opened(root: Path, seal: Seal) -> None:
    seal(root, **PARTS)
    _open(root)


V, P = "stages[0].variants.plain", "partitions[1]"
# The place that is changed, what to, and what the error says.
FAULTS: list[tuple[str, Any, str]] = [
    ("format_version", 2, "bundle.json: format_version: is 2, and this movdc reads 1"),
    ("slab_bytes", 100, "slab_bytes: is 100, not a whole number from 4096 to"),
    ("budget_bytes", -1, "budget_bytes: is -1, not a whole number from 0"),
    ("budget_bytes", 1.5, "budget_bytes: is 1.5, not a whole number"),
    ("budget_bytes", 10**30, f"budget_bytes: is {10**30}, not a whole number"),
    ("budget_bytes", "1", "budget_bytes: is not a number"),
    ("surplus", 1, 'bundle.json: has a key that this format does not know: "surplus"'),
    ("stages", {}, "stages: is not an array"),
    ("stages[0]", 7, "stages[0]: is not an object"),
    ("stages[0].name", None, "stages[0].name: is not a string"),
    ("stages[0].variants.plain.order[1]", "s.plain.2", f'{V}.order[1]: "s.plain.2" is none of the partitions'),
    (f"{V}.order", ["s.plain.0"], f'{V}: tensor "z" is not there when the caller reads it'),
    (f"{V}.order", ["s.plain.1", "s.plain.0"], f'{V}: tensor "y" is not there when s.plain.1 reads it'),
    (f"{V}.order", ["s.plain.0"] * 2, f'{V}: tensor "y" is made twice'),
    (f"{V}.inputs[0].shape", [3, 2], f'{V}: tensor "x" is another one to s.plain.0'),
    (f"{V}.outputs[0].dtype", "i32", f'{V}: tensor "z" is another one to the caller'),
    (f"{V}.outputs", [_tensor("x", 2, 3)], f'{V}: tensor "x" is not there when the caller reads it'),
    (f"{V}.residency", [], f"{V}.residency: has no first level that pins nothing"),
    (f"{V}.residency[0].pinned", ["s.plain.0"], f"{V}.residency: has no first level that pins nothing"),
    (f"{V}.residency[0].needs_bytes", 300, f"{V}.residency: does not go from the least memory to the most"),
    (f"{V}.residency[1].waits[0]", "s", f'{V}.residency[1].waits[0]: "s" is no partition of this variant'),
    (f"{P}.name", "s.plain.0", 'partitions: "s.plain.0" is there twice'),
    (f"{P}.name", 'a"b', f"{P}.name: is not made of letters"),
    (f"{P}.program", "programs/b.pte", f'{P}.program: "programs/b.pte" is none of the files'),
    (f"{P}.weights[0]", "programs/a.pte", f'{P}.weights[0]: "programs/a.pte" is none of the weights'),
    (f"{P}.inputs[0].dtype", "f64", f'{P}.inputs[0].dtype: "f64" is no dtype of this format'),
    (f"{P}.inputs[0].shape", [2**31 - 1] * 3, f"{P}.inputs[0].shape: has too many items"),
    (f"{P}.inputs[0].shape", [-1], f"{P}.inputs[0].shape[0]: is -1"),
    ("weights[0].constants[0].offset_bytes", 17, "weights[0].constants[0]: does not lie within its file"),
    ("weights[0].constants[0].shape", [11], "weights[0].constants[0]: has another size than its dtype and shape"),
    ("files[0].sha256", "A" * 64, "files[0].sha256: is not 64 lower-case hexadecimal digits"),
    ("files[1].path", "programs/a.pte", 'files: "programs/a.pte" is there twice'),
    *(
        ("files[0].path", path, f'files[0].path: "{path}" is not a plain path inside the bundle')
        for path in ("", "/etc/passwd", "../a", "a/../b", "a/./b", "a//b", "a/", ".", "a\\b")
    ),
    ("files[0].path", "a\0\nb", 'files[0].path: "a??b" is not a plain path inside the bundle'),
]


def _steps(place: str) -> list[str | int]:
    names = place.replace("[", ".[").split(".")
    return [int(name[1:-1]) if name.startswith("[") else name for name in names]


@pytest.mark.parametrize(
    ("place", "value", "said"), FAULTS, ids=[f"{place}={value!r:.20}" for place, value, _ in FAULTS]
)
def test_a_fault_is_named_with_its_place(root: Path, seal: Seal, place: str, value: Any, said: str) -> None:
    parts: Any = copy.deepcopy(PARTS)
    *way, last = _steps(place)
    holder = parts
    for step in way:
        holder = holder[step]
    holder[last] = value
    seal(root, **parts)
    with pytest.raises(_engine.FileError) as caught:
        _open(root)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("key", ["family", "versions", "files"])
def test_a_missing_key_is_named(root: Path, seal: Seal, key: str) -> None:
    seal(root, **PARTS)
    manifest = json.loads((root / MANIFEST).read_bytes())
    del manifest[key]
    _write(root, json.dumps(manifest).encode())
    with pytest.raises(_engine.FileError, match=f'bundle.json: has no "{key}"'):
        _open(root)


def _write(root: Path, text: bytes) -> None:
    (root / MANIFEST).write_bytes(text)
    (root / SEAL).write_text(seal_of(text))


def _with_spec(root: Path, seal: Seal, spec: bytes) -> None:
    """A manifest whose `spec`, at the end of the first line, is just this text."""
    seal(root, spec=123456789)
    _write(root, (root / MANIFEST).read_bytes().replace(b"123456789", spec))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b"", "line 1, column 1: expected a value"),
        (b"{", "line 1, column 2: expected a key"),
        (b'{"a" 1}', "line 1, column 6: expected ':' after a key"),
        (b'{"a": 1,\n "a": 2}', "line 2, column 2: the key is there twice"),
        (b'{"a": 1,}', "line 1, column 9: expected a key"),
        (b'{"a": [1, 2\n', "line 2, column 1: expected ']' or ','"),
        (b'{"\xc3\xa9": tru}', "line 1, column 7: expected a value"),
        (b'"\xff"', "line 1, column 2: not UTF-8"),
        (b'"\xed\xa0\x80"', "line 1, column 2: not UTF-8"),
        (b'"ab', "line 1, column 4: the text ends within a string"),
        (b'"a\nb"', "line 1, column 3: a control character within a string"),
        (rb'"\x"', "line 1, column 2: no escape of JSON"),
        (rb'"\ud800x"', "line 1, column 2: half of a pair of escapes"),
        (b"-", "line 1, column 2: expected a digit"),
        (b"01", "line 1, column 2: nothing may follow the value"),
        (b"1.e5", "line 1, column 3: expected a digit"),
        (b"{} {}", "line 1, column 4: nothing may follow the value"),
        (b"[" * 1000, "line 1, column 33: more than 32 arrays and objects within each other"),
        (b"[]", "bundle.json: is not an object"),
    ],
)
def test_what_is_no_json_is_refused_with_line_and_column(root: Path, text: bytes, said: str) -> None:
    _write(root, text)
    with pytest.raises(_engine.FileError) as caught:
        _open(root)
    assert said in str(caught.value)


def test_a_manifest_without_its_seal_is_refused(root: Path, seal: Seal) -> None:
    seal(root, **PARTS)
    (root / MANIFEST).write_bytes((root / MANIFEST).read_bytes() + b" ")
    with pytest.raises(_engine.FileError, match=r"bundle.json: does not match bundle.sha256"):
        _open(root)
    (root / SEAL).unlink()
    with pytest.raises(_engine.FileError, match=r"bundle.sha256: is missing"):
        _open(root)


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) < len(pairs):
        raise ValueError("a key is there twice")
    return dict(pairs)


def _constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def _is_json(text: bytes) -> bool:
    """Whether Python reads it, as strictly as it can be told to, and it is Unicode."""
    try:
        json.dumps(
            json.loads(text.decode(), object_pairs_hook=_pairs, parse_constant=_constant), ensure_ascii=False
        ).encode()
    except ValueError:
        return False
    return True


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda values: st.lists(values, max_size=3) | st.dictionaries(st.text(max_size=3), values, max_size=3),
    max_leaves=8,
)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(JSON, st.booleans(), st.integers(0, 200), st.binary(max_size=2), st.integers(0, 3))
@example("\U0001d11e", True, 200, b"", 0)
def test_just_what_python_reads_is_read(
    root: Path, seal: Seal, value: Any, ascii_only: bool, at: int, inserted: bytes, removed: int
) -> None:
    text = json.dumps(value, ensure_ascii=ascii_only).encode(errors="surrogatepass")
    text = text[:at] + inserted + text[at + removed :]
    _with_spec(root, seal, text)
    refused = ""
    try:
        _open(root)
    except _engine.FileError as error:
        refused = str(error)
    # What is inserted may close the object early or add keys to it, which is JSON and no manifest.
    assert ("column" not in refused) == _is_json((root / MANIFEST).read_bytes())
