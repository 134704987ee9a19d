"""The journal: a run that goes on gives the same bits, and one that cannot go on says why."""

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest

from movdc.runtime.bundle import Bundle, Chunk, Decode, LeapRule, Manifest, Prompt, Sampler, Stage
from movdc.runtime.generate import Array, Generator, Result
from movdc.runtime.journal import POINT, JournalError, journal
from movdc.runtime.sampler import Point, initial_noise, is_over, sample

TOKENIZER = Path(__file__).parents[2] / "examples/checkpoints/tiny/text_encoder/tokenizer.json"
LATENT = (1, 4, 4, 2, 2)
ASKED: dict[str, str | int | None] = {"bundle": "00ff", "--prompt": "a red circle", "--seed": 3}


class StoppedError(Exception):
    """What stops a run in these tests."""


def _sampler(**others: object) -> Sampler:
    plan = {"solver": "euler", "prediction": "rectified_flow", "units": (8,), "shift": 1.0, "rounded": False}
    return Sampler.model_validate(plan | {"guidance": 4.0, "latent": LATENT} | others)


class Curved:
    """Stages without weights whose outputs depend on all that goes in; stops before one call where it is told to."""

    def __init__(self, stops_at: int | None = None) -> None:
        self.ran: list[str] = []
        self._stops_at = stops_at

    def read_file(self, path: str) -> bytes:
        return TOKENIZER.read_bytes()

    def run(self, stage: str, variant: str, inputs: Mapping[str, Array], then: str | None = None) -> dict[str, Array]:
        if len(self.ran) == self._stops_at:
            raise StoppedError
        self.ran.append(stage)
        if stage == "text_encoder":
            return {"text": np.cos(inputs["input_ids"].astype(np.float32))}
        if stage == "denoiser":
            z = inputs["latents"] + inputs["timestep"] / 1000 + inputs["text"].mean()
            return {"velocity": np.concatenate([np.sin(3 * z), np.cos(2 * z)])}
        if stage == "vae_temporal":
            return {"frames": np.sin(inputs["latents"])}
        return {"pixels": np.tanh(inputs["frames"][:, :3])}


def _generator(executor: Curved, **sampler: object) -> Generator:
    chunk = Chunk(variant="frames2", latent_frames=2, frames=2)
    manifest = Manifest.model_construct(
        stages=(Stage.model_construct(name="denoiser", variants=dict.fromkeys(("plain", "merged"))),),
        sampler=_sampler(**sampler),
        prompt=Prompt(tokenizer="tokenizer.json", max_tokens=24, pad_id=0, aesthetic=None, cleaning="open-sora"),
        decode=Decode(chunks=(chunk, chunk), micro_batch_frames=3),
    )
    return Generator(Bundle(Path("nowhere"), manifest), executor)


def _run(out: Path, executor: Curved, *, resume: bool, **sampler: object) -> Result:
    with journal(out, ASKED, resume=resume) as kept:
        return _generator(executor, **sampler).generate("a red circle", seed=3, journal=kept)


@pytest.mark.parametrize("leap", [None, LeapRule(mode="fixed"), LeapRule(mode="dynamic", patience=2, tol=0.5)])
@pytest.mark.parametrize("merged_steps", [0, 3])
def test_the_sampler_goes_on_from_each_of_its_points(leap: LeapRule | None, merged_steps: int) -> None:
    def denoise(z: Array, timestep: Array, step: int) -> Array:
        return np.concatenate([np.sin(z + step), np.cos(z * timestep)])

    sampler = _sampler(leap=leap, merged_steps=merged_steps)
    points: list[Point] = []
    latents, trajectory = sample(denoise, initial_noise(3, LATENT), sampler, None, points.append)
    assert (trajectory.leap_step is None) == (leap is None)
    assert [is_over(point, sampler) for point in points] == [False] * (len(points) - 1) + [True]
    for point in points:
        again, same = sample(denoise, point, sampler)
        assert np.array_equal(again, latents)
        assert np.array_equal(same.cosines, trajectory.cosines, equal_nan=True)
        assert (same.evaluations, same.leap_step, same.sigma) == (len(points), trajectory.leap_step, trajectory.sigma)


@pytest.mark.parametrize("sampler", [{}, {"leap": LeapRule(mode="fixed"), "merged_steps": 2}])
def test_a_run_that_is_stopped_before_any_call_goes_on_there(tmp_path: Path, sampler: dict[str, object]) -> None:
    whole = Curved()
    expected = _run(tmp_path / "whole.mp4", whole, resume=False, **sampler)
    for stops_at in range(len(whole.ran)):
        out = tmp_path / f"{stops_at}.mp4"
        first, second = Curved(stops_at), Curved()
        with pytest.raises(StoppedError):
            _run(out, first, resume=False, **sampler)
        made = _run(out, second, resume=True, **sampler)
        assert np.array_equal(made.latents, expected.latents)
        assert np.array_equal(made.frames, expected.frames)
        again = [stage for stage in second.ran if stage != "text_encoder"]
        assert [stage for stage in first.ran if stage != "text_encoder"] + again == whole.ran[1:]
        assert ("text_encoder" in second.ran) == ("denoiser" in second.ran)
    assert not list(tmp_path.iterdir())


def _stop(out: Path, calls: int) -> Path:
    """A run that was stopped before one of its calls; gives its journal."""
    with pytest.raises(StoppedError):
        _run(out, Curved(calls), resume=False)
    return out.with_name(f"{out.name}.journal")


def test_a_run_that_is_stopped_before_its_first_step_leaves_nothing(tmp_path: Path) -> None:
    _stop(tmp_path / "a.mp4", 1)
    assert not list(tmp_path.iterdir())
    assert _run(tmp_path / "a.mp4", Curved(), resume=True).trajectory.evaluations == 8  # nothing to go on from


@pytest.mark.parametrize("name", ["bundle", "--prompt", "--seed", "version"])
def test_the_journal_of_another_run_is_refused_and_kept(tmp_path: Path, name: str) -> None:
    folder = _stop(tmp_path / "a.mp4", 4)
    before = {path: path.read_bytes() for path in folder.iterdir()}
    with (
        pytest.raises(JournalError, match=rf"had {name} .*, this one has 'other'; give what it had, or leave --resume"),
        journal(tmp_path / "a.mp4", ASKED | {name: "other"}, resume=True),
    ):
        pass
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize(
    "damage", [lambda data: data[:-1], lambda data: b"", lambda data: data[:99] + b"?" + data[100:]]
)
@pytest.mark.parametrize("name", [POINT, "vae_temporal-0.sealed", "vae_spatial-0.sealed"])
def test_a_damaged_journal_is_refused_by_the_name_of_its_file(
    tmp_path: Path, name: str, damage: Callable[[bytes], bytes]
) -> None:
    path = _stop(tmp_path / "a.mp4", 12) / name
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(JournalError, match=f"{name}: is damaged; leave --resume out to start over"):
        _run(tmp_path / "a.mp4", Curved(), resume=True)


def test_a_run_that_starts_over_takes_nothing_from_the_one_before(tmp_path: Path) -> None:
    folder = _stop(tmp_path / "a.mp4", 12)
    (folder / ".point.sealed.1.partial").write_bytes(b"what a kill leaves")
    with pytest.raises(StoppedError):
        _run(tmp_path / "a.mp4", Curved(4), resume=False)
    assert [path.name for path in folder.iterdir()] == [POINT]


def test_two_runs_that_make_one_video_are_kept_apart(tmp_path: Path) -> None:
    with journal(tmp_path / "a.mp4", ASKED, resume=False) as first:
        first.keep_point(Point(np.zeros(LATENT, np.float32), np.zeros(LATENT[1:], np.float32), (0.5,)))
        for resume in (False, True):
            with (
                pytest.raises(JournalError, match="another run is making this video"),
                journal(tmp_path / "a.mp4", ASKED, resume=resume),
            ):
                pass
    assert not list(tmp_path.iterdir())


def test_files_of_others_in_its_folder_are_left_alone(tmp_path: Path) -> None:
    folder = _stop(tmp_path / "a.mp4", 4)
    (folder / "notes.txt").write_text("mine")
    _run(tmp_path / "a.mp4", Curved(), resume=True)
    assert [path.name for path in folder.iterdir()] == ["notes.txt"]


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(JournalError, match=r"file/a\.mp4\.journal: cannot be made"):
        _run(tmp_path / "file" / "a.mp4", Curved(), resume=False)
