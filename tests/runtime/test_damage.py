"""A damaged or foreign file is refused by its name, before anything of the bundle runs."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from movdc.runtime.bundle import MANIFEST, SEAL, Bundle, seal_of
from movdc.runtime.errors import BundleError
from movdc.runtime.executor import Executor

pytestmark = pytest.mark.slow


def _truncate(path: Path, outside: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def _empty(path: Path, outside: Path) -> None:
    path.write_bytes(b"")


def _lengthen(path: Path, outside: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


def _flip(path: Path, outside: Path) -> None:
    data = path.read_bytes()
    middle = len(data) // 2
    path.write_bytes(data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :])


def _remove(path: Path, outside: Path) -> None:
    path.unlink()


def _link_outside(path: Path, outside: Path) -> None:
    """The same content, but not in the bundle."""
    shutil.copyfile(path, outside)
    path.unlink()
    path.symlink_to(outside)


def _folder(path: Path, outside: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.fixture
def copy(bundle: Path, tmp_path: Path) -> Path:
    """A copy of the example's bundle to damage."""
    return Path(shutil.copytree(bundle, tmp_path / "copy"))


def _names(root: Path) -> list[str]:
    return [MANIFEST, SEAL, *(file.path for file in Bundle.read(root).manifest.files)]


def _assert_refused(root: Path, name: str) -> None:
    with pytest.raises(BundleError) as caught:  # reading or opening may refuse
        Executor(Bundle.read(root))
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("damage", [_truncate, _empty, _lengthen, _flip, _remove, _link_outside, _folder])
def test_every_damaged_file_is_refused_by_name(
    copy: Path, tmp_path: Path, damage: Callable[[Path, Path], None]
) -> None:
    for name in _names(copy):
        kept = tmp_path / "kept"
        shutil.copyfile(copy / name, kept)
        damage(copy / name, tmp_path / "outside")
        _assert_refused(copy, name)
        if (copy / name).is_dir():
            (copy / name).rmdir()
        (copy / name).unlink(missing_ok=True)
        shutil.move(kept, copy / name)
    Executor(Bundle.read(copy))  # every file is as it was


@pytest.mark.parametrize("folder", ["programs", "weights"])
def test_a_file_swapped_with_another_of_the_bundle_is_refused(copy: Path, folder: str) -> None:
    one, another = [name for name in _names(copy) if name.startswith(folder)][:2]
    shutil.copyfile(copy / another, copy / one)
    _assert_refused(copy, one)


def test_a_folder_that_is_a_link_to_outside_is_refused(copy: Path, tmp_path: Path) -> None:
    shutil.move(copy / "weights", tmp_path / "elsewhere")
    (copy / "weights").symlink_to(tmp_path / "elsewhere")
    _assert_refused(copy, "weights/")


def test_the_manifest_and_seal_of_another_bundle_are_refused_with_its_files(copy: Path, small_bundle: Path) -> None:
    for name in (MANIFEST, SEAL):
        shutil.copyfile(small_bundle / name, copy / name)
    with pytest.raises(BundleError, match=r"(programs|weights)/\w+"):
        Executor(Bundle.read(copy))


def test_a_manifest_of_another_form_is_refused_by_the_key_that_differs(copy: Path) -> None:
    manifest = json.loads((copy / MANIFEST).read_text())
    del manifest["partitions"][0]["method"]
    text = json.dumps(manifest).encode()
    (copy / MANIFEST).write_bytes(text)
    (copy / SEAL).write_text(seal_of(text))
    with pytest.raises(BundleError, match=r"partitions\.0\.method: Field required; compile the bundle again"):
        Bundle.read(copy)


def test_a_file_that_the_manifest_does_not_list_is_harmless(bundle: Path, copy: Path) -> None:
    (copy / "notes.txt").write_text("mine")
    (copy / "weights" / "extra.ptd").write_bytes(b"nobody reads this")
    read = Bundle.read(copy)
    assert read.manifest == Bundle.read(bundle).manifest
    Executor(read)
