"""VBench's quality scores from its seven dimensions that need no prompt (arXiv 2311.17982).

Each raw score is brought to [0, 1] by the least and the most that VBench expects of it, and they are averaged by
weight. `quality_official` does so. `quality_paper` is what Table 6 of the paper on MOVD (extended arXiv 2502.04363)
holds, all 16 rows of it: dynamic degree counts whole in the sum and half in the divisor.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple


class Dimension(NamedTuple):
    """One of the seven: the raw scores that count as 0 and as 1, and its weight."""

    least: float
    most: float
    weight: float


DIMENSIONS = {
    "subject_consistency": Dimension(0.1462, 1.0, 1.0),
    "background_consistency": Dimension(0.2615, 1.0, 1.0),
    "temporal_flickering": Dimension(0.6293, 1.0, 1.0),
    "motion_smoothness": Dimension(0.706, 0.9975, 1.0),
    "dynamic_degree": Dimension(0.0, 1.0, 0.5),
    "aesthetic_quality": Dimension(0.0, 1.0, 1.0),
    "imaging_quality": Dimension(0.0, 1.0, 1.0),
}
TOTAL_WEIGHT = sum(one.weight for one in DIMENSIONS.values())


def normalised(scores: Mapping[str, float]) -> dict[str, float]:
    """Raw scores of the seven dimensions as VBench averages them."""
    return {name: (scores[name] - one.least) / (one.most - one.least) for name, one in DIMENSIONS.items()}


def quality_official(scores: Mapping[str, float]) -> float:
    """VBench's quality score of raw scores of the seven dimensions."""
    return sum(DIMENSIONS[name].weight * value for name, value in normalised(scores).items()) / TOTAL_WEIGHT


def quality_paper(scores: Mapping[str, float]) -> float:
    """The quality score as the paper's Table 6 has it."""
    return sum(normalised(scores).values()) / TOTAL_WEIGHT
