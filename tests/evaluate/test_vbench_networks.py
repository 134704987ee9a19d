"""VBench's dimensions with networks whose answers are known, in the files and formats that trained ones come in."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from movdc.compiler.errors import MovdcError
from movdc.evaluate import vbench_networks as networks

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # VBench's networks are such files


class _Mean(nn.Module):
    """Features: the means of the channels, from pixels or as CLIP names it."""

    def forward(self, pixels: Tensor) -> Tensor:
        return pixels.mean(dim=(-2, -1))

    @torch.jit.export
    def encode_image(self, pixels: Tensor) -> Tensor:
        return pixels.mean(dim=(-2, -1))


class _Between(nn.Module):
    def forward(self, one: Tensor, other: Tensor) -> Tensor:
        return (one + other) / 2


class _Flow(nn.Module):
    """All pixels move right by the change of the first one."""

    def forward(self, one: Tensor, other: Tensor) -> Tensor:
        change = (other - one)[:, :1]
        return torch.cat((change, torch.zeros_like(change)), dim=1)


class _Score(nn.Module):
    def forward(self, pixels: Tensor) -> Tensor:
        return 100 * pixels.mean()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    modules = {
        "dino_vitb16.pt": _Mean(),
        "ViT-B-32.pt": _Mean(),
        "ViT-L-14.pt": _Mean(),
        "amt-s.pt": _Between(),
        "raft-things.pt": _Flow(),
        "musiq_spaq.pt": _Score(),
    }
    for name, module in modules.items():
        torch.jit.script(module).save(str(tmp_path / name))
    head = {"weight": torch.zeros(1, 3), "bias": torch.tensor([5.0])}
    torch.save(head, tmp_path / "sa_0_4_vit_l_14_linear.pth")
    return tmp_path


def _ramp(step: int, frames: int = 9) -> np.ndarray:
    return np.stack([np.full((32, 48, 3), 20 + step * index, np.uint8) for index in range(frames)])


def test_scores_are_those_of_the_formulas(folder: Path) -> None:
    even = networks.scores(_ramp(2), 8, folder)
    assert even["motion_smoothness"] == pytest.approx(1, abs=1e-6)  # the mean of its neighbours is each frame
    assert even["dynamic_degree"] == 1  # 2 pixels a pair, and 0.75 count as moving at a height of 32
    assert even["aesthetic_quality"] == pytest.approx(0.5)
    assert even["imaging_quality"] == pytest.approx((20 + 2 * 4) / 255, abs=1e-6)
    still = networks.scores(_ramp(0), 8, folder)
    assert still["dynamic_degree"] == 0
    assert [still["subject_consistency"], still["background_consistency"]] == pytest.approx([1, 1])
    jumps = _ramp(0)
    jumps[1::2] += 30
    assert networks.scores(jumps, 8, folder)["motion_smoothness"] == pytest.approx((255 - 30) / 255)


def test_consistency_counts_the_frame_before_and_the_first() -> None:
    features = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 2.0], [-1.0, 0.0]])
    assert networks.consistency(features) == pytest.approx((0 + 0.5 + 0) / 3)


def test_what_is_missing_is_said_in_one_sentence(folder: Path) -> None:
    digest = networks.check_weights(folder)
    (folder / "amt-s.pt").unlink()
    with pytest.raises(MovdcError) as error:
        networks.check_weights(folder)
    said = f"{folder} lacks amt-s.pt (for motion_smoothness); docs/evaluate.md says where each comes from"
    assert str(error.value) == f"--metric-weights: {said}"
    torch.jit.script(_Flow()).save(str(folder / "amt-s.pt"))
    assert networks.check_weights(folder) != digest
