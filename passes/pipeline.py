"""The one page that orders the passes."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

from movdc.compiler.errors import MovdcError
from movdc.compiler.pass_base import Pass
from movdc.passes.attention_to_bmm import AttentionToBmm
from movdc.passes.canonicalize import Canonicalize
from movdc.passes.conv3d_to_conv2d import Conv3dToConv2d
from movdc.passes.gelu_to_tanh import GeluToTanh
from movdc.passes.leap import Leap
from movdc.passes.merge_tokens import MergeTokens
from movdc.passes.partition import Partition
from movdc.passes.quantize_int8 import QuantizeInt8
from movdc.passes.share_templates import ShareTemplates
from movdc.passes.split_to_slices import SplitToSlices

# Every pass, in the order in which they run, in phases.
PHASES: dict[str, tuple[type[Pass], ...]] = {
    "variants": (MergeTokens,),  # first: it aligns a stage with a second trace, so the stage must still be as traced
    "operators": (Canonicalize, SplitToSlices, AttentionToBmm, GeluToTanh, Conv3dToConv2d),
    "weights": (QuantizeInt8,),  # before the partitions, which weigh the weights as they are stored
    "sampler": (Leap,),
    "partitions": (Partition, ShareTemplates),
}
# The passes of every compile; the others run when the YAML or --passes names them.
DEFAULT: tuple[type[Pass], ...] = (
    Canonicalize,
    SplitToSlices,
    AttentionToBmm,
    GeluToTanh,
    Conv3dToConv2d,
    Partition,
    ShareTemplates,
)

PASSES: dict[str, type[Pass]] = {one.name: one for phase in PHASES.values() for one in phase}
PHASE_OF: dict[str, str] = {one.name: phase for phase, some in PHASES.items() for one in some}


def default_pipeline(options: Mapping[str, Mapping[str, Any]]) -> tuple[Pass, ...]:
    """The default passes and those that `options` names (pass name -> options), in the order of the phases."""
    for name in options:
        _known(name)
    return tuple(
        one.configured(options.get(name, {})) for name, one in PASSES.items() if one in DEFAULT or name in options
    )


def parse_pipeline(text: str) -> tuple[Pass, ...]:
    """The passes of `canonicalize,merge-tokens{steps=15}`; raises MovdcError for what is unknown or out of order."""
    passes = []
    for part in re.split(r",(?![^{]*\})", text):
        match = re.fullmatch(r"\s*([a-z0-9-]+)\s*(?:\{(.*)\})?\s*", part)
        if not match:
            raise MovdcError(f"--passes: {part.strip()!r} is not name or name{{option=value,...}}")
        pairs = [pair.partition("=") for pair in (match[2] or "").split(",") if pair.strip()]
        passes.append(_known(match[1]).configured({key.strip(): value.strip() for key, _, value in pairs}))
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
            raise MovdcError(f"--passes: {one.name} comes twice; keep one")
        for earlier in one.after:
            if earlier in names[index:]:
                raise MovdcError(f"--passes: {one.name} must run after {earlier}; move it behind")


def _known(name: str) -> type[Pass]:
    if name not in PASSES:
        raise MovdcError(f"unknown pass {name!r}; there are {', '.join(PASSES)}")
    return PASSES[name]
