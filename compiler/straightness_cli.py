"""The command that measures how straight a model's trajectories are: movdc straightness."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from platformdirs import user_cache_path
from rich.console import Console

from movdc.compiler.folders import check_output, write_output
from movdc.compiler.progress import Bars, progress_bars
from movdc.compiler.tables import print_straightness
from movdc.runtime.bundle import Bundle
from movdc.runtime.executors import open_executor
from movdc.runtime.generate import Generator
from movdc.runtime.prompt_cache import PromptCache
from movdc.runtime.straightness import measure_straightness

console = Console()


def straightness(
    bundle: Annotated[Path, typer.Argument(help="A bundle made by `movdc compile`.")],
    prompts: Annotated[Path, typer.Option(help="A text file, one prompt a line.")],
    out: Annotated[Path | None, typer.Option("-o", "--out", help="Write every prompt's curve here (.json).")] = None,
    packed_cache: Annotated[
        Path | None, typer.Option(help="Keep packed weights here; by default in the user's cache folder.")
    ] = None,
) -> None:
    """Measure how straight the ways of prompts are, and print the floor of a dynamic leap."""
    from movdc.evaluate.settings import load_prompts

    lines = load_prompts(prompts)
    if out is not None:
        check_output(out)
    read = Bundle.read(bundle)
    executor = open_executor(read, packed_cache=packed_cache or user_cache_path("movdc") / "packed")
    generator = Generator(read, executor, PromptCache(user_cache_path("movdc") / "prompts"))
    with progress_bars(console) as progress:
        found = measure_straightness(read, generator, lines, Bars(progress))
    print_straightness(console, found)
    if out is not None:
        write_output(out, found.json())
    floor = ", ".join(f'"{one:.4f}"' for one in found.floor)
    console.print(
        f"passes:\n  leap: {{mode: dynamic, floor: [{floor}]}}", markup=False, highlight=False, soft_wrap=True
    )
