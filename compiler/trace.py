"""Tracing: a module on fake tensors to a Graph whose weights are references, so that no weight is read or allocated."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping

import torch
from torch import fx, nn
from torch._subclasses import FakeTensorMode
from torch.export.graph_signature import InputKind

from movdc.compiler.errors import InternalError
from movdc.compiler.program import TORCH_DTYPES, Graph, spec_of
from movdc.compiler.weights import WeightRef
from movdc.runtime.bundle import TensorSpec

aten = torch.ops.aten
# Nodes that say something about the trace and compute nothing at inference.
_NO_OPS = {aten._assert_tensor_metadata.default}
_IDENTITY = {aten.dropout.default, aten.alias.default, aten.contiguous.default, aten.clone.default, aten.detach.default}
_VIEWS = {aten.view.default, aten._unsafe_view.default}
VIEWS = _VIEWS | {
    aten.reshape.default, aten.permute.default, aten.transpose.int, aten.t.default, aten.unsqueeze.default,
    aten.squeeze.dim, aten.expand.default, aten.slice.Tensor,
}  # fmt: skip
_CONVERSIONS = {aten.to.dtype, aten.to.device, aten.to.dtype_layout, aten._to_copy.default}


def trace(
    build: Callable[[], nn.Module],
    inputs: tuple[TensorSpec, ...],
    outputs: tuple[str, ...],
    weights: Mapping[str, WeightRef],
) -> Graph:
    """Trace `build()`, a module whose forward takes `inputs` in order; `weights` maps its state_dict keys."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        module = build().eval().requires_grad_(False)
        arguments = tuple(torch.empty(spec.shape, dtype=TORCH_DTYPES[spec.dtype]) for spec in inputs)
    program = torch.export.export(module, arguments, strict=False).run_decompositions({})
    return _to_graph(program, inputs, outputs, weights)


def _to_graph(
    program: torch.export.ExportedProgram,
    inputs: tuple[TensorSpec, ...],
    outputs: tuple[str, ...],
    weights: Mapping[str, WeightRef],
) -> Graph:
    graph = program.graph_module.graph
    input_names = iter(inputs)
    references: dict[str, WeightRef] = {}
    renames: dict[str, str] = {}
    for spec in program.graph_signature.input_specs:
        name = spec.arg.name
        if spec.kind is InputKind.USER_INPUT:
            renames[name] = next(input_names).name
        elif spec.target in weights:
            references[name] = weights[spec.target]
        else:
            raise InternalError(f"traced tensor {spec.target} ({spec.kind.name.lower()}) has no weight reference")
    _drop_no_ops(graph)
    for node in graph.find_nodes(op="placeholder"):
        if node.name in renames:
            node.target = renames[node.name]
            node._rename(renames[node.name])
    references = erase_unused(graph, references)
    graph.lint()
    results = next(iter(reversed(graph.nodes))).args[0]
    specs = tuple(spec_of(name, result.meta["val"]) for name, result in zip(outputs, results, strict=True))
    return Graph(graph, inputs, specs, references)


def _drop_no_ops(graph: fx.Graph) -> None:
    for node in list(graph.nodes):
        if node.target in _NO_OPS:
            graph.erase_node(node)
        elif node.target in _IDENTITY or (node.target in _CONVERSIONS and _keeps_dtype(node)):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
        elif node.target in _VIEWS:
            # Strides are nobody's business here: a value is contiguous whenever it crosses a cut.
            node.target = aten.reshape.default


def insert_after(node: fx.Node) -> Callable[..., fx.Node]:
    """A function that adds calls behind a node, one after the other, with its history and their own values.

    They are named after the node, so that variants of a stage that share it have equal names.
    """
    last = node

    def call(target: torch._ops.OpOverload, *arguments: object) -> fx.Node:
        nonlocal last
        with node.graph.inserting_after(last):
            name = f"{node.name}_{target._opname}"
            last = node.graph.create_node("call_function", target, arguments, name=name)
        last.meta = {key: value for key, value in node.meta.items() if key != "val"}
        last.meta["val"] = target(*fx.map_arg(arguments, lambda argument: argument.meta["val"]))
        return last

    return call


def erase_unused(graph: fx.Graph, weights: Mapping[str, WeightRef]) -> dict[str, WeightRef]:
    """Erase nodes and weights that nothing reads; returns the weights that are left."""
    graph.eliminate_dead_code()
    for node in graph.find_nodes(op="placeholder"):
        if node.name in weights and not node.users:
            graph.erase_node(node)
    names = {node.name for node in graph.find_nodes(op="placeholder")}
    return {name: ref for name, ref in weights.items() if name in names}


def _keeps_dtype(node: fx.Node) -> bool:
    return bool(node.args[0].meta["val"].dtype == node.meta["val"].dtype)


def is_pick(node: fx.Node) -> bool:
    """Whether a node only picks one result of a node that has several."""
    return node.target is operator.getitem
