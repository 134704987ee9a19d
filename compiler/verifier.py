"""The verifier: what holds of every Program, checked after each pass."""

from __future__ import annotations

import torch

from movdc.compiler.errors import InternalError
from movdc.compiler.program import Graph, Program, spec_of


def verify(program: Program) -> None:
    """Raise InternalError naming the stage, the variant and the rule that is broken."""
    for stage, variant, graph in program.graphs():
        try:
            _verify_graph(graph)
        except (AssertionError, RuntimeError, KeyError) as error:
            raise InternalError(f"stage {stage} ({variant}): {error}") from error


def _verify_graph(graph: Graph) -> None:
    graph.graph.lint()
    placeholders = graph.graph.find_nodes(op="placeholder")
    names = [node.name for node in placeholders]
    inputs = {spec.name: spec for spec in graph.inputs}
    assert set(names) == set(graph.weights) | set(inputs), "placeholders are not the weights and the inputs"
    for node in placeholders:
        if node.name in inputs:
            assert spec_of(node.name, node.meta["val"]) == inputs[node.name], f"input {node.name} has another type"
        else:
            assert node.users, f"weight {node.name} is not used"
    for node in graph.compute_nodes:
        assert "val" in node.meta, f"node {node.name} has no fake value"
    results = graph.output_node.args[0]
    assert isinstance(results, (list, tuple))
    for spec, result in zip(graph.outputs, results, strict=True):
        assert isinstance(result, torch.fx.Node), f"output {spec.name} is a constant"
        assert spec_of(spec.name, result.meta["val"]) == spec, f"output {spec.name} has another type"
    order = [node.name for node in graph.compute_nodes]
    assert list(graph.cuts) == [name for name in order if name in set(graph.cuts)], "cuts are not in order"
