"""What each target makes of the partitions of a pipeline, as one Markdown table.

python benchmarks/by_target.py out/tiny out/tiny-onnx ...    (bundles of one spec, compiled for different targets)
"""

from __future__ import annotations

from collections import Counter
from itertools import groupby
from pathlib import Path
from typing import Annotated

import typer

from movdc.runtime.bundle import Bundle, Partition

HEAD = ("partition", "target", "delegated nodes", "other nodes", "program", "weights", "held")


def rows(bundle: Bundle) -> list[tuple[str, ...]]:
    """A row for each run of partitions that a program runs alike: their names, its nodes, the bytes of the first."""
    sizes = {file.path: file.size_bytes for file in bundle.manifest.files}
    found = []
    for (program, _), group in groupby(bundle.manifest.partitions, lambda one: (one.program, one.method)):
        some = list(group)
        first = some[0]
        found.append(
            (
                _named(some),
                bundle.manifest.target,
                str(first.delegated_nodes),
                str(sum(first.fallback.values())),
                f"{sizes[program]}",
                f"{sum(sizes[path] for path in first.weights) or first.weight_bytes}",
                f"{first.held_bytes}",
            )
        )
    return found


def others(bundle: Bundle) -> Counter[str]:
    """The operators that the target's own kernels leave out, in all partitions."""
    count = Counter[str]()
    for one in bundle.manifest.partitions:
        count.update(one.fallback)
    return count


def _named(some: list[Partition]) -> str:
    return some[0].name if len(some) == 1 else f"{some[0].name} to {some[-1].name.rpartition('.')[2]}"


def main(bundles: Annotated[list[Path], typer.Argument(help="Bundles of one spec.")]) -> None:
    """Print the table, and what is left out of it."""
    read = [Bundle.read(path) for path in bundles]
    print("| " + " | ".join(HEAD) + " |")
    print("| " + " | ".join("---" if name in HEAD[:2] else "---:" for name in HEAD) + " |")
    for row in sorted(row for bundle in read for row in rows(bundle)):
        print("| " + " | ".join(row) + " |")
    for bundle in read:
        names = ", ".join(f"{count} {name}" for name, count in others(bundle).most_common())
        print(f"\n{bundle.manifest.target}, other nodes: {names or 'none'}")


if __name__ == "__main__":
    typer.run(main)
