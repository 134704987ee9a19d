"""What of a program ExecuTorch gives to a delegate, and what its own kernels run."""

from __future__ import annotations

from collections import Counter

from torch import fx


def delegation(module: fx.GraphModule) -> tuple[int, dict[str, int]]:
    """The number of operators within delegates of an edge program, and the others, counted by their names."""
    delegated, others = 0, Counter[str]()
    for node in module.graph.find_nodes(op="call_function"):
        name = getattr(node.target, "__name__", str(node.target))
        if name == "executorch_call_delegate":
            lowered = getattr(module, node.args[0].target)
            delegated += len(lowered.original_module.graph.find_nodes(op="call_function", sort=False))
        elif name != "getitem":
            others[name] += 1
    return delegated, dict(others)
