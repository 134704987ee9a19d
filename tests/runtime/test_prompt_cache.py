"""The prompt cache: one encoder and one prompt are encoded once, and nothing else is taken for them."""

import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from subprocess import CompletedProcess

import numpy as np
import pytest

from movdc.runtime.bundle import Bundle, File, Manifest, Partition, Stage, TensorSpec, Variant
from movdc.runtime.errors import RunError
from movdc.runtime.executor import Executor
from movdc.runtime.generate import Array, Generator
from movdc.runtime.prompt_cache import PromptCache

Movdc = Callable[..., CompletedProcess[str]]
INPUTS = {"input_ids": np.arange(6)[None], "text_mask": np.ones((1, 6), np.float32)}
OUTPUTS = {"text": np.linspace(0, 1, 48, dtype=np.float32).reshape(1, 6, 8)}


def _bundle(*weights: str, order: tuple[int, ...] = (0, 1)) -> Bundle:
    """A bundle whose text encoder has two partitions, with these digests of weights; the rest is as it may be."""
    spec = TensorSpec(name="text", dtype="f32", shape=(1, 6, 8))
    partitions = [
        Partition.model_construct(
            name=f"text_encoder.plain.{i}", program="p", weights=(f"w{i}",), inputs=(spec,), outputs=()
        )
        for i in range(2)
    ]
    digests = {"p": "aa", "w0": "00", "w1": "11"} | {f"w{i}": digest for i, digest in enumerate(weights)}
    return Bundle(
        Path("nowhere"),
        Manifest.model_construct(
            files=tuple(File.model_construct(path=path, size_bytes=1, sha256=one) for path, one in digests.items()),
            partitions=tuple(partitions),
            stages=(
                Stage.model_construct(
                    name="text_encoder",
                    variants={"plain": Variant.model_construct(order=tuple(partitions[i].name for i in order))},
                ),
            ),
        ),
    )


def _known(cache: PromptCache, bundle: Bundle, inputs: Mapping[str, Array]) -> bool:
    return cache.find(bundle, "plain", inputs) is not None


def test_what_was_kept_is_found_by_another_bundle_with_the_same_encoder(tmp_path: Path) -> None:
    PromptCache(tmp_path / "prompts").keep(_bundle(), "plain", INPUTS, OUTPUTS)
    found = PromptCache(tmp_path / "prompts").find(
        _bundle(), "plain", {name: INPUTS[name].copy() for name in reversed(INPUTS)}
    )
    assert found is not None
    assert found.keys() == OUTPUTS.keys()
    assert found["text"].dtype == np.float32
    assert np.array_equal(found["text"], OUTPUTS["text"])


def test_another_encoder_or_other_tokens_are_not_known(tmp_path: Path) -> None:
    cache = PromptCache(tmp_path)
    cache.keep(_bundle(), "plain", INPUTS, OUTPUTS)
    assert not _known(cache, _bundle("00", "22"), INPUTS)
    assert not _known(cache, _bundle("11", "00"), INPUTS)
    assert not _known(cache, _bundle(order=(1, 0)), INPUTS)
    for name, array in INPUTS.items():
        changed = array.copy()
        changed[0, -1] = 0
        assert not _known(cache, _bundle(), INPUTS | {name: changed})


@pytest.mark.parametrize(
    "damage", [lambda data: data[:-1], lambda data: b"", lambda data: data[:90] + b"?" + data[91:]]
)
def test_a_damaged_file_is_as_good_as_none_and_made_anew(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    cache = PromptCache(tmp_path)
    cache.keep(_bundle(), "plain", INPUTS, OUTPUTS)
    (path,) = tmp_path.iterdir()
    path.write_bytes(damage(path.read_bytes()))
    assert not _known(cache, _bundle(), INPUTS)
    cache.keep(_bundle(), "plain", INPUTS, OUTPUTS)
    assert _known(cache, _bundle(), INPUTS)


def test_what_was_used_least_goes_and_what_a_stopped_writer_left(tmp_path: Path) -> None:
    cache = PromptCache(tmp_path)
    prompts = [{**INPUTS, "input_ids": INPUTS["input_ids"] + place} for place in range(5)]
    for place, inputs in enumerate(prompts[:4]):
        before = set(tmp_path.iterdir())
        cache.keep(_bundle(), "plain", inputs, OUTPUTS)
        (path,) = set(tmp_path.iterdir()) - before
        os.utime(path, (place + 1, place + 1))
    (tmp_path / ".left.sealed.1.partial").write_bytes(path.read_bytes())
    os.utime(tmp_path / ".left.sealed.1.partial", (0, 0))
    assert _known(cache, _bundle(), prompts[0])  # which makes it the one that was used last
    small = PromptCache(tmp_path, limit_bytes=3 * path.stat().st_size)
    small.keep(_bundle(), "plain", prompts[4], OUTPUTS)
    assert [_known(small, _bundle(), inputs) for inputs in prompts] == [True, False, False, True, True]
    assert len(list(tmp_path.iterdir())) == 3


def test_a_folder_that_cannot_be_made_or_written_is_named_with_the_way_out(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(RunError, match=r"file/prompts: cannot be made \(Not a directory\); .*--no-cache"):
        PromptCache(tmp_path / "file" / "prompts")
    cache = PromptCache(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    with pytest.raises(RunError, match=r"gone: cannot be written \(No such file or directory\); .*--no-cache"):
        cache.keep(_bundle(), "plain", INPUTS, OUTPUTS)


@pytest.mark.slow
def test_a_prompt_is_encoded_once(bundle: Path, tmp_path: Path) -> None:
    read, prompts = Bundle.read(bundle), PromptCache(tmp_path / "prompts")
    latents = []
    for cache, encoded in ((None, True), (prompts, True), (prompts, False)):
        executor = Executor(read, packed_cache=tmp_path / "packed")
        for seed in (1, 2):
            made = Generator(read, executor, cache).generate("a red circle", seed=seed, steps=2)
            latents.append(made.latents)
        assert len(executor.reports.get("text_encoder", [])) == (2 if cache is None else int(encoded))
    assert all(np.array_equal(latents[index], latents[index % 2]) for index in range(6))


@pytest.mark.slow
def test_the_command_keeps_prompts_unless_it_is_told_not_to(movdc: Movdc, bundle: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    kept = cache / "movdc" / "prompts"

    def encodes(*options: str) -> bool:
        common = ["--prompt", "a blue cross", "--steps", 1, "-o", tmp_path / "clip.mp4", *options]
        done = movdc("run", bundle, *common, XDG_CACHE_HOME=str(cache))
        assert done.returncode == 0, done.stdout + done.stderr
        return re.search(r"^ text_encoder +1 ", done.stdout, re.MULTILINE) is not None

    assert encodes("--no-cache")
    assert not kept.exists()
    assert encodes()
    (path,) = kept.iterdir()
    assert not encodes()
    assert encodes("--no-cache")
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    assert encodes()
    assert path.read_bytes() == whole
    assert not encodes()
