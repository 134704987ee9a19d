"""Regions of a graph that run with fewer frames: found from the dataflow, filled from a second trace.

Sizes are baked into a traced graph. So the stage is traced again with fewer frames, and since both traces come from
the same code, their nodes correspond one to one. A region is what a module computes plus the reshapes and transposes
around it, from values [B, T, S, C] to values [B, T, S, C]; there it takes the second trace's arguments for its own.
Nothing outside of regions changes, and every node keeps its name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from fnmatch import fnmatch

import torch
from torch import Tensor, fx, nn

from movdc.compiler.errors import InternalError, MovdcError
from movdc.compiler.printer import print_type
from movdc.compiler.program import Graph, spec_of, value_of
from movdc.compiler.trace import VIEWS, erase_unused, trace
from movdc.runtime.bundle import TensorSpec

aten = torch.ops.aten
# Views that keep every token: a slice or an expansion would change what a frame of the region stands for.
_REARRANGE = VIEWS - {aten.slice.Tensor, aten.expand.default}
_SOFTMAX = {aten.softmax.int, aten._softmax.default}


@dataclass(frozen=True)
class Region:
    """The nodes of one site: they read frames from `entries` and `tables`, and others read frames from `exits`."""

    site: str  # module path
    nodes: tuple[fx.Node, ...]
    entries: tuple[fx.Node, ...]  # [B, T, S, C]
    tables: tuple[fx.Node, ...]  # depend on no stage input
    exits: tuple[fx.Node, ...]  # [B, T, S, C]


class TwoTraces:
    """A copy of a graph, to be rewritten, beside a trace of the same stage with another number of frames."""

    def __init__(self, graph: Graph, other: Graph, frames: tuple[int, int]) -> None:
        self._given = graph
        self._graph = graph.copy()
        self._frames = frames
        ours, theirs = list(self._graph.nodes), list(other.graph.nodes)
        if [_identity(node, graph) for node in ours] != [_identity(node, other) for node in theirs]:
            raise InternalError(f"traces with {frames[0]} and with {frames[1]} frames differ in more than sizes")
        self._twin = dict(zip(ours, theirs, strict=True))
        self._ours = dict(zip(theirs, ours, strict=True))
        self._plain = {node: node.meta["val"] for node in ours[:-1]}
        self._constants = {node for node in ours if node.name in graph.weights}
        for node in ours:
            if node.op == "call_function" and self._constants.issuperset(node.all_input_nodes):
                self._constants.add(node)
        # Values of one graph must share one fake mode, or no operator could be evaluated on two of them.
        self._fake_mode = next(node.meta["val"].fake_mode for node in ours if node.op == "placeholder")
        self._traced: dict[tuple[Callable[..., Tensor], tuple[TensorSpec, ...]], Graph] = {}
        self._tables: dict[fx.Node, fx.Node] = {}
        self._latest: dict[fx.Node, fx.Node] = {}  # what an exit's readers read instead of it

    def result(self) -> Graph:
        """The graph as rewritten so far."""
        weights = erase_unused(self._graph, self._given.weights)
        self._graph.lint()
        return replace(self._given, graph=self._graph, weights=weights)

    def _has_frames(self, node: fx.Node) -> bool:
        """Whether the number of frames shows in a value's type."""
        return print_type(self._plain[node]) != print_type(self._twin[node].meta["val"])

    def _is_tokens(self, node: fx.Node) -> bool:
        ours, theirs = self._plain[node], self._twin[node].meta["val"]
        if not isinstance(ours, Tensor) or ours.dim() != 4:
            return False
        shapes = list(ours.shape), list(theirs.shape)
        return tuple(shape.pop(1) for shape in shapes) == self._frames and shapes[0] == shapes[1]

    def regions(self, patterns: Iterable[str]) -> list[Region]:
        """The region of each call of a module whose path matches; raises MovdcError for one that cannot be cut out."""
        calls: dict[tuple[str, str], list[fx.Node]] = {}
        for node in self._twin:
            for call, (path, _) in (node.meta.get("nn_module_stack") or {}).items():
                if any(fnmatch(path, pattern) for pattern in patterns):
                    calls.setdefault((call, path), []).append(node)
                    break
        return [self._region(path, nodes) for (_, path), nodes in calls.items()]

    def _region(self, site: str, nodes: list[fx.Node]) -> Region:
        inside, entries, tables, exits = set(nodes), [], [], []
        pending = [source for node in nodes for source in node.all_input_nodes]
        for value in pending:
            if value in inside or not self._has_frames(value):
                continue
            if value in self._constants:
                tables.append(value)
            elif self._is_tokens(value):
                entries.append(value)
            elif value.target in _REARRANGE:
                inside.add(value)
                pending += value.all_input_nodes
            else:
                raise self._refusal(site, "reads", value)
        pending = [node for node in self._twin if node in inside]
        for value in pending:
            readers = [user for user in value.users if user not in inside]
            if not readers or not self._has_frames(value):
                continue
            if self._is_tokens(value):
                exits.append(value)
            elif all(user.target in _REARRANGE for user in readers):
                inside.update(readers)
                pending += readers
            else:
                raise self._refusal(site, "returns", value)
        if not entries or not exits:
            raise MovdcError(
                f"merging frames: {site} reads or returns no video tokens; leave it out of the family's token layout"
            )
        order = tuple(node for node in self._twin if node in inside)
        return Region(site, order, *(tuple(dict.fromkeys(some)) for some in (entries, tables, exits)))

    def _refusal(self, site: str, verb: str, value: fx.Node) -> MovdcError:
        return MovdcError(
            f"merging frames: {site} {verb} %{value.name}: {print_type(self._plain[value])}, which is no reshape or "
            f"transpose of video tokens [B, {self._frames[0]}, S, C]; let the model pass tokens so, or take this "
            "module out of the token layout"
        )

    def resize(self, region: Region, before: Callable[[Tensor], Tensor], after: Callable[[Tensor], Tensor]) -> None:
        """Let a region run on before(entries), as in the other trace, and others read after(exits)."""
        values = {table: self._table(table) for table in region.tables}
        for entry in region.entries:
            first = next(node for node in region.nodes if entry in node.all_input_nodes)
            source = self._latest.get(entry, entry)
            values[entry] = self._inline(before, (source,), first, f"{entry.name}_merged")
        outside = {value: [user for user in value.users if user not in region.nodes] for value in region.exits}
        for node in region.nodes:
            twin = self._twin[node]
            node.args, node.kwargs = (
                fx.map_arg(given, lambda source: values.get(self._ours[source], self._ours[source]))
                for given in (twin.args, twin.kwargs)
            )
            self._evaluate(node)
            if print_type(node.meta["val"]) != print_type(twin.meta["val"]):
                raise InternalError(f"{region.site}: %{node.name} came out as {print_type(node.meta['val'])}")
        for value, readers in outside.items():
            self._latest[value] = self._inline(after, (value,), value.next, f"{value.name}_unmerged")
            for reader in readers:
                reader.replace_input_with(value, self._latest[value])

    def map_positions(self, region: Region, function: Callable[[Tensor], Tensor]) -> None:
        """Compute the region's tables from function(plain positions), which are the last [T] on the way to a table."""
        for table in region.tables:
            found = [table]
            for node in found:
                if value_of(node).shape == self._frames[:1] and value_of(node).is_floating_point():
                    if node not in self._tables:
                        self._tables[node] = self._inline(function, (node,), node.next, f"{node.name}_merged")
                    break
                found += [source for source in node.all_input_nodes if self._has_frames(source)]
            else:
                raise MovdcError(
                    f"merging frames: {region.site} reads %{table.name}, to which no positions [{self._frames[0]}] "
                    "lead; use rope=compressed"
                )

    def bias_keys(self, region: Region, bias: Callable[[Tensor], Tensor]) -> None:
        """Add a bias, given its attention's query, to the scores of an attention that saw T keys and now sees T'."""
        for node in region.nodes:
            if node.target in _SOFTMAX:
                raise MovdcError(
                    f"merging frames: {region.site} computes %{node.name} outside of scaled_dot_product_attention, so "
                    "its keys take no bias; use proportional=false"
                )
            if node.target is not aten.scaled_dot_product_attention.default:
                continue
            query, key, value, mask, *rest = (*node.args, None)[: max(4, len(node.args))]
            assert isinstance(query, fx.Node)
            assert isinstance(key, fx.Node)
            keys = int(self._plain[self._ours[self._twin[node].args[1]]].shape[-2]), int(value_of(key).shape[-2])
            if keys[0] == keys[1]:
                continue
            if keys != self._frames or (isinstance(mask, fx.Node) and value_of(mask).dtype == torch.bool):
                raise MovdcError(
                    f"merging frames: {region.site} has {keys[1]} keys after {keys[0]}; its scores take a bias only "
                    f"where each key is one of {self._frames[0]} frames and the mask is no bool; use proportional=false"
                )
            added = self._inline(bias, (query,), node, f"{node.name}_bias")
            if isinstance(mask, fx.Node):
                with self._graph.inserting_before(node):
                    added = self._graph.call_function(aten.add.Tensor, (mask, added))
                self._evaluate(added)
            node.args = (query, key, value, added, *rest)

    def _table(self, node: fx.Node) -> fx.Node:
        """A constant as the other trace computes it."""
        if not self._has_frames(node):
            return node
        if node not in self._tables:
            twin = self._twin[node]
            sources = {source: self._table(self._ours[source]) for source in twin.all_input_nodes}
            with self._graph.inserting_before(node.next):
                self._tables[node] = self._graph.node_copy(twin, lambda source: sources[source])
            self._tables[node]._rename(f"{node.name}_merged")
            self._evaluate(self._tables[node])
        return self._tables[node]

    def _inline(
        self, function: Callable[..., Tensor], arguments: tuple[fx.Node, ...], before: fx.Node, name: str
    ) -> fx.Node:
        """Insert the operators of a function of tensors, named after its result; returns that."""
        inputs = tuple(spec_of(f"argument_{index}", value_of(node)) for index, node in enumerate(arguments))
        if (function, inputs) not in self._traced:
            self._traced[function, inputs] = trace(lambda: _Function(function), inputs, ("result",), {})
        traced = self._traced[function, inputs]
        copies = dict(zip(traced.graph.find_nodes(op="placeholder"), arguments, strict=True))
        with self._graph.inserting_before(before):
            for node in traced.compute_nodes:
                copies[node] = self._graph.node_copy(node, lambda source: copies[source])
                # Who reports on a node names its module: it is the region's.
                copies[node].meta = {"nn_module_stack": before.meta.get("nn_module_stack")}
                copies[node]._rename(f"{name}_{node.name}")
                self._evaluate(copies[node])
        result = copies[traced.output_node.all_input_nodes[0]]
        result._rename(name)
        return result

    def _evaluate(self, node: fx.Node) -> None:
        """Set a node's fake value from those of its arguments."""
        assert callable(node.target)
        arguments, keywords = (
            fx.map_arg(given, lambda source: source.meta["val"]) for given in (node.args, node.kwargs)
        )
        with self._fake_mode:
            node.meta["val"] = node.target(*arguments, **keywords)


class _Function(nn.Module):
    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *arguments: Tensor) -> Tensor:
        return self.function(*arguments)


def _identity(node: fx.Node, graph: Graph) -> tuple[str, str]:
    """What the same node has in common in two traces of the same code."""
    if node.name in graph.weights:
        return "weight", str(graph.weights[node.name])
    return node.op, str(node.target)
