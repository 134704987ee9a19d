"""The one page that orders the passes."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

from movdc.compiler.configured import split_text
from movdc.compiler.errors import MovdcError
from movdc.compiler.pass_base import Pass
from movdc.compiler.target import Target
from movdc.passes.attention_to_bmm import AttentionToBmm
from movdc.passes.canonicalize import Canonicalize
from movdc.passes.conv3d_to_conv2d import Conv3dToConv2d
from movdc.passes.gelu_to_tanh import GeluToTanh
from movdc.passes.group_norm_to_rows import GroupNormToRows
from movdc.passes.leap import Leap
from movdc.passes.merge_tokens import MergeTokens
from movdc.passes.partition import Partition
from movdc.passes.quantize_int8 import QuantizeInt8
from movdc.passes.share_templates import ShareTemplates
from movdc.passes.split_to_slices import SplitToSlices

# Every pass, in the order in which they run, in phases.
PHASES: dict[str, tuple[type[Pass], ...]] = {
    "variants": (MergeTokens,),  # first: it aligns a stage with a second trace, so the stage must still be as traced
    "operators": (Canonicalize, SplitToSlices, AttentionToBmm, GeluToTanh, Conv3dToConv2d, GroupNormToRows),
    "weights": (QuantizeInt8,),  # before the partitions, which weigh the weights as they are stored
    "sampler": (Leap,),
    "partitions": (Partition, ShareTemplates),
}
# The passes of every compile. Others run where the target rewrites what it cannot run otherwise, and when the YAML or
# --passes names them.
DEFAULT: tuple[type[Pass], ...] = (Canonicalize, Partition, ShareTemplates)

PASSES: dict[str, type[Pass]] = {one.name: one for phase in PHASES.values() for one in phase}
PHASE_OF: dict[str, str] = {one.name: phase for phase, some in PHASES.items() for one in some}


def default_pipeline(options: Mapping[str, Mapping[str, Any]], target: Target) -> tuple[Pass, ...]:
    """The default passes, those that the target needs, and what `options` names (name -> options), in their order."""
    for name in options:
        _known(name)
    wanted = {*(one.name for one in DEFAULT), *target.rewrites, *options}
    return tuple(one.configured(options.get(name, {})) for name, one in PASSES.items() if name in wanted)


def parse_pipeline(text: str) -> tuple[Pass, ...]:
    """The passes of `canonicalize,merge-tokens{steps=15}`; raises MovdcError for what is unknown or out of order."""
    passes = []
    for part in re.split(r",(?![^{]*\})", text):
        name, options = split_text(part)
        passes.append(_known(name).configured(options))
    check_order(passes)
    return tuple(passes)


def in_phases(passes: Sequence[Pass]) -> list[tuple[str, list[Pass]]]:
    """The passes grouped by phase, in the order in which they run."""
    return [(phase, list(some)) for phase, some in groupby(passes, lambda one: PHASE_OF[one.name])]


def check_order(passes: Sequence[Pass]) -> None:
    """Raise MovdcError if a pass comes twice or before one that it must follow."""
    names = [one.name for one in passes]
    for index, one in enumerate(passes):
        if one.name in names[:index]:
            raise MovdcError(f"{one.name} comes twice; keep one")
        for earlier in one.after:
            if earlier in names[index:]:
                raise MovdcError(f"{one.name} must run after {earlier}; move it behind")


def _known(name: str) -> type[Pass]:
    if name not in PASSES:
        raise MovdcError(f"unknown pass {name!r}; there are {', '.join(PASSES)}")
    return PASSES[name]
