"""The quality scores: Table 6 of the paper (extended arXiv 2502.04363), which its own weighting reproduces whole."""

import pytest

from movdc.evaluate.vbench import DIMENSIONS, quality_official, quality_paper

# Subject, background, flickering, smoothness, dynamic degree, aesthetic, imaging; and the quality score as printed.
TABLE_6 = """
Animal        .97 .98 .99 .99 .15 .51 .56 .79   .95 .97 .99 .99 .28 .48 .55 .79
Architecture  .99 .98 .99 .99 .05 .53 .60 .78   .98 .98 .99 .99 .12 .49 .56 .78
Food          .97 .97 .99 .99 .26 .52 .60 .81   .95 .97 .99 .99 .38 .48 .53 .81
Human         .96 .97 .99 .99 .38 .48 .57 .81   .96 .96 .99 .99 .43 .48 .55 .82
Lifestyle     .97 .97 .99 .99 .23 .45 .56 .79   .96 .97 .99 .99 .25 .45 .53 .78
Plant         .98 .98 .99 .99 .15 .50 .58 .79   .97 .98 .99 .99 .16 .46 .55 .78
Scenery       .98 .98 .99 .99 .10 .50 .50 .77   .97 .98 .99 .99 .17 .48 .47 .77
Vehicles      .97 .97 .99 .99 .37 .48 .54 .81   .94 .96 .98 .99 .44 .47 .49 .80
"""


def _rows() -> list[list[float]]:
    lines = [[float(number) for number in line.split()[1:]] for line in TABLE_6.split("\n") if line]
    return [line[first : first + 8] for line in lines for first in (0, 8)]


@pytest.mark.parametrize("row", _rows())
def test_the_papers_weighting_gives_its_table_6(row: list[float]) -> None:
    scores = dict(zip(DIMENSIONS, row[:7], strict=True))
    paper, official = quality_paper(scores), quality_official(scores)
    print(f"printed {row[7]:.2f}, the paper's weighting {paper:.4f}, the official one {official:.4f}")
    assert paper == pytest.approx(row[7], abs=0.005)
    assert paper - official == pytest.approx(0.5 * scores["dynamic_degree"] / 6.5)


def test_the_best_scores_are_one_by_the_official_weighting_and_more_by_the_papers() -> None:
    best = {name: one.most for name, one in DIMENSIONS.items()}
    assert quality_official(best) == pytest.approx(1)
    assert quality_paper(best) == pytest.approx(7 / 6.5)
    assert quality_official({name: one.least for name, one in DIMENSIONS.items()}) == pytest.approx(0)
