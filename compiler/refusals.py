"""What a target cannot run of a program: all of it at once, with the modules that it comes from."""

from __future__ import annotations

import re

from torch import fx

from movdc.compiler.errors import Refusal, RefusedError
from movdc.compiler.program import Program
from movdc.compiler.target import Target


def check_runs(program: Program, target: Target) -> None:
    """Raise RefusedError if the target refuses any node."""
    found: dict[tuple[str, ...], tuple[str, int]] = {}
    for stage, _, graph in program.graphs():
        for node in graph.compute_nodes:
            if reason := target.refuse(node):
                key = (stage, str(node.target), module_of(node), reason)
                first, count = found.get(key, (node.name, 0))
                found[key] = first, count + 1
    if found:
        refusals = [
            Refusal(stage, first, operator, module, reason, count)
            for (stage, operator, module, reason), (first, count) in found.items()
        ]
        raise RefusedError(target.name, refusals)


def module_of(node: fx.Node) -> str:
    """Where in the model a node comes from: `blocks.*.mlp`; what a pass made has the place of what it replaced."""
    stack = node.meta.get("nn_module_stack") or {}
    path = next((path for path, _ in reversed(stack.values())), "")
    return re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", path)
