"""Does the video show what the prompt names? The tiny checkpoint, prompts of its grammar, judged by a formula.

python benchmarks/adherence.py out/tiny --prompts 48 --seed 0
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from shape_clips import ATTRIBUTES, judge, prompts

from movdc.runtime.bundle import Bundle
from movdc.runtime.executor import Executor
from movdc.runtime.generate import Generator


def score(bundle: Path, count: int, seed: int) -> dict[str, int]:
    """How many of `count` prompts give a video with the named colour, background, shape and direction."""
    read = Bundle.read(bundle)
    generator = Generator(read, Executor(read))
    right = dict.fromkeys(ATTRIBUTES, 0)
    for index, (prompt, named) in enumerate(prompts(count, seed)):
        seen = judge(generator.generate(prompt, seed=seed + index).frames)
        for attribute in ATTRIBUTES:
            right[attribute] += getattr(seen, attribute) == getattr(named, attribute)
    return right


def main(
    bundle: Annotated[Path, typer.Argument(help="A bundle of the tiny checkpoint.")],
    count: Annotated[int, typer.Option("--prompts", min=1, help="How many prompts to draw.")] = 48,
    seed: Annotated[int, typer.Option(min=0, help="Decides the prompts and the noises.")] = 0,
) -> None:
    """Generate one video a prompt and print how often each attribute is right."""
    start = time.perf_counter()
    right = score(bundle, count, seed)
    table = Table(title=f"{bundle}, seed {seed}, {time.perf_counter() - start:.0f} s")
    for column in ("attribute", "right", "of"):
        table.add_column(column)
    for attribute in ATTRIBUTES:
        table.add_row(attribute, str(right[attribute]), str(count))
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
