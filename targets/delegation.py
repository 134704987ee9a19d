"""What of a program ExecuTorch gives to a delegate, what its own kernels run, and the program's bytes."""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch import fx


def delegation(module: fx.GraphModule) -> tuple[int, dict[str, int]]:
    """The number of operators within delegates of an edge program, and the others, counted by their names."""
    delegated, others = 0, Counter[str]()
    for node in _calls(module.graph):
        name = getattr(node.target, "__name__", str(node.target))
        if name == "executorch_call_delegate":
            delegated += len(_calls(getattr(module, node.args[0].target).original_module.graph))
        elif name != "getitem":
            others[name] += 1
    return delegated, dict(others)


def program_of(edge: Any) -> bytearray:
    """The file of an edge program; inputs and outputs are the caller's buffers, so that none is copied on the way."""
    from executorch.exir import ExecutorchBackendConfig
    from executorch.exir.passes import MemoryPlanningPass

    planning = MemoryPlanningPass(alloc_graph_input=False, alloc_graph_output=False)
    return bytearray(edge.to_executorch(ExecutorchBackendConfig(memory_planning_pass=planning)).buffer)


def _calls(graph: fx.Graph) -> list[fx.Node]:
    return [node for node in graph.nodes if node.op == "call_function"]
