"""The canonical printer: any Program as stable text, for dumps, golden tests and honest `modified`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from movdc.compiler.program import DTYPES, Graph, Program
from movdc.compiler.units import format_bytes


def print_program(program: Program) -> str:
    """Every stage and variant, then the sampler and the decode plan."""
    parts = [f"stage {stage} ({variant}) {{\n{print_graph(graph)}}}\n" for stage, variant, graph in program.graphs()]
    parts += [f"sampler {program.sampler!r}\n", f"decode {program.decode!r}\n", f"prompt {program.prompt!r}\n"]
    return "\n".join(parts)


def print_graph(graph: Graph) -> str:
    """One line a node: `%name: f32[2,160,128] = op(args)  # 160.0 KiB`, and a line where a partition ends."""
    lines = []
    piece = 0
    if graph.templates:
        lines.append(f"  ---- template {graph.templates[0][:16]} ----")
    for node in graph.graph.nodes:
        if node.op == "placeholder":
            source = f"weight({graph.weights[node.name]})" if node.name in graph.weights else "input"
            lines.append(f"  %{node.name}: {print_type(node.meta['val'])} = {source}")
        elif node.op == "output":
            results = ", ".join(f"%{result.name}" for result in node.args[0])
            lines.append(f"  return [{results}]")
        else:
            value = node.meta["val"]
            size = f"  # {format_bytes(value.nbytes)}" if isinstance(value, torch.Tensor) else ""
            lines.append(f"  {print_node(node)}{size}")
        if node.name in graph.cuts:
            piece += 1
            template = f" template {graph.templates[piece][:16]} ----" if graph.templates else ""
            lines.append(f"  ---- cut ----{template}")
    return "\n".join(lines) + "\n"


def print_node(node: fx.Node, names: Mapping[fx.Node, str] | None = None) -> str:
    """A node that computes, `%name: type = op(args)`, under the given names or its own."""
    known = names or {}

    def argument(value: Any) -> str:
        if isinstance(value, fx.Node):
            return known.get(value, f"%{value.name}")
        if isinstance(value, (list, tuple)):
            return f"[{', '.join(argument(item) for item in value)}]"
        return repr(value)

    arguments = [argument(value) for value in node.args]
    arguments += [f"{key}={argument(value)}" for key, value in node.kwargs.items()]
    return f"{argument(node)}: {print_type(node.meta['val'])} = {_operator(node)}({', '.join(arguments)})"


def print_type(value: Any) -> str:
    """The type of a node's value: f32[2,160,128], or a tuple of those."""
    if isinstance(value, torch.Tensor):
        return f"{DTYPES.get(value.dtype, str(value.dtype))}[{','.join(str(int(size)) for size in value.shape)}]"
    return f"({', '.join(print_type(item) for item in value)})"


def _operator(node: fx.Node) -> str:
    if isinstance(node.target, torch._ops.OpOverload):
        return f"{node.target.namespace}.{node.target._opname}"
    return getattr(node.target, "__name__", str(node.target))
