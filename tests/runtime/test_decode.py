"""The decode loads each partition once for all of its calls where memory allows, and makes the same frames if not."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from movdc.runtime.bundle import Bundle
from movdc.runtime.executor import Executor, Mode
from movdc.runtime.generate import Array, Generator

pytestmark = pytest.mark.slow
STEPS = 1


def _decode(bundle: Bundle, packed: Path, mode: Mode) -> tuple[Counter[str], Array]:
    """How often each partition of the decode was loaded, and the frames."""
    executor = Executor(bundle, mode=mode, packed_cache=packed, keeps_trace=True)
    frames = Generator(bundle, executor).generate("a red circle", steps=STEPS).frames
    names = [event["name"] for event in json.loads(executor.trace())["traceEvents"] if event.get("cat") == "load"]
    return Counter(name.removeprefix("load ") for name in names if name.startswith("load vae_")), frames


def test_a_partition_loads_once_for_all_chunks_where_all_may_stay(bundle: Path, tmp_path: Path) -> None:
    read = Bundle.read(bundle)
    decode = read.manifest.decode
    _decode(read, tmp_path, "dynamic")  # packs, one partition at a time
    loads, frames = _decode(read, tmp_path, "dynamic")
    order = {stage: next(iter(read.stages[stage].variants.values())).order for stage in ("vae_temporal", "vae_spatial")}
    assert loads == Counter([name for names in order.values() for name in names])
    again, same = _decode(read, tmp_path, "concurrent")
    calls = {"vae_temporal": len(decode.chunks), "vae_spatial": -(-len(frames) // decode.micro_batch_frames)}
    assert again == Counter({name: calls[stage] for stage, names in order.items() for name in names})
    assert np.array_equal(frames, same)
