"""The table of what targets make of partitions: every partition is in it once, with the figures of its bundle."""

from pathlib import Path

import by_target
import pytest

from movdc.runtime.bundle import Bundle

pytestmark = pytest.mark.slow  # needs the example compiled


def test_rows_cover_every_partition(bundle: Path) -> None:
    read = Bundle.read(bundle)
    rows = by_target.rows(read)
    covered = 0
    for name, *_ in rows:
        first, _, last = name.partition(" to ")
        covered += int(last) - int(first.rpartition(".")[2]) + 1 if last else 1
    assert covered == len(read.manifest.partitions)
    assert {row[1] for row in rows} == {"executorch-xnnpack"}
    assert all(int(delegated) > 0 for _, _, delegated, *_ in rows)
    assert by_target.others(read)["aten.native_layer_norm.default"] > 0, "XNNPACK has no norms"
