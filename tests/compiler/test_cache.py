"""The compile cache: entries are whole or not there, found again, and few enough."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from movdc.compiler.cache import CompileCache, entries, key_of, open_cache, passing_cache, prune
from movdc.compiler.errors import MovdcError
from movdc.compiler.folders import place
from movdc.compiler.target import Slot
from movdc.compiler.weights import RandomSource
from movdc.compiler.weights_files import WantedFile, make_files
from movdc.targets.null import Null


def _put(cache: CompileCache, name: str, size_bytes: int = 10) -> str:
    key = key_of("weights", name)
    cache.put_bytes(key, name[:1].encode() * size_bytes, {"name": name})
    return key


def test_what_was_put_is_found_by_another_compile(tmp_path: Path) -> None:
    with open_cache(tmp_path) as cache:
        key = _put(cache, "a")
    with open_cache(tmp_path) as cache:
        entry = cache.get(key)
        assert entry is not None
        assert (entry.kind, entry.note, entry.path.read_bytes()) == ("weights", {"name": "a"}, b"a" * 10)
        assert entry.sha256 == hashlib.sha256(b"a" * 10).hexdigest()
        assert cache.get(key_of("weights", "b")) is None
        assert cache.get(key_of("program", "a")) is None


def test_keys_tell_apart_how_parts_are_divided() -> None:
    assert key_of("weights", "a", "bc") != key_of("weights", "ab", "c")


def test_a_file_that_was_changed_through_a_bundle_is_made_again(tmp_path: Path) -> None:
    with open_cache(tmp_path / "cache") as cache:
        key = _put(cache, "a")
        entry = cache.get(key)
        assert entry is not None
        os.link(entry.path, tmp_path / "in-a-bundle")
        with (tmp_path / "in-a-bundle").open("r+b") as file:
            file.write(b"x")
        assert cache.get(key) is None
        assert not entry.path.exists()
        _put(cache, "a")
        assert cache.get(key) is not None


def test_an_entry_without_its_record_is_none(tmp_path: Path) -> None:
    with open_cache(tmp_path) as cache:
        key = _put(cache, "a")
        (tmp_path / key / "entry.json").write_text("{")
        assert cache.get(key) is None
        _put(cache, "a")
        assert cache.get(key) is not None


def test_of_two_compiles_the_first_keeps_its_file(tmp_path: Path) -> None:
    with open_cache(tmp_path) as one, open_cache(tmp_path) as other:
        assert one.work != other.work
        key = _put(one, "a")
        entry = one.get(key)
        assert entry is not None
        inode = entry.path.stat().st_ino
        _put(other, "a")
        assert entry.path.stat().st_ino == inode


def test_what_a_killed_compile_left_goes_and_that_of_a_running_one_stays(tmp_path: Path) -> None:
    code = f"from movdc.compiler.cache import open_cache; from pathlib import Path; import os, signal\n\
with open_cache(Path({str(tmp_path)!r})) as cache:\n    (cache.work / 'half').write_text('a')\n\
    os.kill(os.getpid(), signal.SIGKILL)"
    subprocess.run([sys.executable, "-c", code], check=False)
    (left,) = tmp_path.glob(".work-*")
    assert (left / "half").exists()
    with open_cache(tmp_path) as first:
        assert not left.exists()
        with open_cache(tmp_path):
            assert first.work.exists()
    assert list(tmp_path.iterdir()) == []


def test_a_passing_cache_leaves_nothing(tmp_path: Path) -> None:
    with passing_cache(tmp_path) as cache:
        key = _put(cache, "a")
        entry = cache.get(key)
        assert entry is not None
        place(entry.path, tmp_path / "placed")
    assert [path.name for path in tmp_path.iterdir()] == ["placed"]
    assert (tmp_path / "placed").stat().st_nlink == 1


def test_pruning_keeps_what_was_used_last(tmp_path: Path) -> None:
    with open_cache(tmp_path) as cache:
        keys = [_put(cache, name, 100) for name in "abc"]
        for age_s, key in zip((30, 20, 10), keys, strict=True):
            os.utime(tmp_path / key / "entry.json", (1e9 - age_s, 1e9 - age_s))
        assert cache.get(keys[0]) is not None  # used now
    assert [entry.key for entry in entries(tmp_path)] == [keys[0], keys[2], keys[1]]
    assert prune(tmp_path, 250) == 100
    assert [entry.key for entry in entries(tmp_path)] == [keys[0], keys[2]]
    with open_cache(tmp_path, limit_bytes=150) as cache:
        pass  # a compile ends with it
    assert [entry.key for entry in entries(tmp_path)] == [keys[0]]


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    wanted = r"file/cache: cannot be the cache .*--cache DIR, or --no-cache"
    with pytest.raises(MovdcError, match=wanted), open_cache(tmp_path / "file" / "cache"):
        pass


def test_files_are_placed_without_writing_them_again_where_that_is_possible(tmp_path: Path) -> None:
    (tmp_path / "made").write_bytes(b"data")
    place(tmp_path / "made", tmp_path / "placed")
    assert (tmp_path / "placed").read_bytes() == b"data"
    elsewhere = Path("/dev/shm")
    if not elsewhere.is_dir() or elsewhere.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("there is no other file system to copy to")
    copy = elsewhere / f"movdc-{os.getpid()}"
    try:
        place(tmp_path / "made", copy)
        assert copy.read_bytes() == b"data"
    finally:
        copy.unlink(missing_ok=True)


def test_weights_that_the_disk_has_no_room_for_are_refused_before_any_is_written(tmp_path: Path) -> None:
    slot = Slot("key", "weight", "plain", "f32", (1 << 60,))
    ref = RandomSource(0, {"weight": (1 << 60,)}).refs()["weight"]
    with open_cache(tmp_path) as cache:
        file = WantedFile("weights-a", [slot], {"weight": ref})
        with pytest.raises(MovdcError, match=r"take 4294967296\.00 GiB more, .* are free; free some"):
            make_files([file], Null(), cache, 1, lambda done, total: None)
        assert list(cache.work.iterdir()) == []
