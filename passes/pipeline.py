"""The default pipeline: the one page that orders the passes."""

from __future__ import annotations

from movdc.compiler.pass_base import Pass
from movdc.passes.conv3d_to_conv2d import Conv3dToConv2d
from movdc.passes.partition import Partition

PASSES: dict[str, type[Pass]] = {one.name: one for one in (Conv3dToConv2d, Partition)}


def default_pipeline(budget_bytes: int, load_copies: float) -> tuple[Pass, ...]:
    """The passes of every compile, in order."""
    return (
        # Phase 1: operators that the target has.
        Conv3dToConv2d(),
        # Phase 2: cuts. After every rewrite, because it weighs the nodes as they are lowered.
        Partition(budget_bytes, load_copies),
    )
