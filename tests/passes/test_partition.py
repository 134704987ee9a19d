"""partition: the toy graphs whose cuts can be told by hand, and what a schedule's checker says of any of them."""

from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from movdc.compiler.chain import chain_of, common_positions, costs, legal_positions
from movdc.compiler.cut import cheapest, predict
from movdc.compiler.device import Machine
from movdc.compiler.errors import BudgetError, MovdcError
from movdc.compiler.levels import variant_of
from movdc.compiler.pieces import Piece, split
from movdc.compiler.printer import print_graph
from movdc.compiler.program import Graph, Program, Stage
from movdc.compiler.residency import Chain
from movdc.passes.partition import Partition
from movdc.passes.share_templates import ShareTemplates
from movdc.runtime import bundle

GraphOf = Callable[..., Graph]
ProgramOf = Callable[..., Program]
RunGraph = Callable[..., list[Tensor]]
X = torch.randn(2, 8, generator=torch.Generator().manual_seed(0))
MACHINE = Machine(1000, load_bytes_per_s=1000, compute_flops_per_s=1000, load_overhead_s=0.01, load_copies=2.0)


class Block(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(size, 2 * size), nn.Linear(2 * size, size)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(x)))


class Stack(nn.Module):
    """A head, equal blocks, a tail."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.head, self.tail = nn.Linear(8, 16), nn.Linear(16, 4)
        self.blocks = nn.Sequential(*[Block(16) for _ in range(blocks)])

    def forward(self, x: Tensor) -> Tensor:
        return self.tail(self.blocks(torch.tanh(self.head(x))))


class Halves(nn.Module):
    """A node with two results, which cannot be cut from those that pick them."""

    def forward(self, x: Tensor) -> Tensor:
        low, high = torch.split(x * 2, 4, dim=-1)
        return torch.sin(low) + torch.cos(high)


def _cut(program: Program, **options: float) -> Graph:
    return Partition(**options)(program).program.stages[0].variants["plain"]


def _manifest(name: str, piece: Piece, working: bool) -> bundle.Partition:
    return bundle.Partition(
        name=name,
        program="programs/p.pte",
        method="forward",
        weights=(),
        inputs=tuple(map(piece.tensor, piece.inputs)),
        outputs=tuple(map(piece.tensor, piece.outputs)),
        weight_bytes=piece.weight_bytes,
        held_bytes=piece.weight_bytes,
        load_bytes=int(MACHINE.load_copies * piece.weight_bytes),
        program_bytes=0,
        workspace_bytes=piece.working_bytes if working else 0,
        planned_bytes=0,
        flops=piece.flops,
    )


def _sequential_peak_bytes(graph: Graph, budget_bytes: int, working: bool = False) -> int:
    """What the certificate says that a first run holds, with what the largest partition computes in or without."""
    made = [_manifest(str(index), piece, working) for index, piece in enumerate(split(graph))]
    machine = replace(MACHINE, budget_bytes=budget_bytes)
    variant = variant_of(Chain.of(made, graph.inputs, 0), machine, "once", 1, "net", graph.inputs, graph.outputs)
    return variant.first_needs_bytes


def test_fires(graph_of: GraphOf, program_of: ProgramOf) -> None:
    graph = _cut(program_of(replace(MACHINE, budget_bytes=14000), net=graph_of(Stack(6), x=X)))
    pieces = split(graph)
    assert len(pieces) > 3
    assert [node for piece in pieces for node in piece.nodes] == graph.compute_nodes
    made = {node for node in graph.graph.find_nodes(op="placeholder")}
    for piece in pieces:
        assert made.issuperset(piece.inputs)
        made |= set(piece.nodes)


def test_equal_blocks_become_equal_partitions(graph_of: GraphOf, program_of: ProgramOf) -> None:
    program = program_of(replace(MACHINE, budget_bytes=14000), net=graph_of(Stack(6), x=X))
    result = Partition(slack=0.1)(program)
    shared = ShareTemplates()(result.program).program.stages[0].variants["plain"]
    assert len(shared.templates) >= 4
    assert len(set(shared.templates)) <= 3
    assert f"{len(shared.templates)} partitions, {len(set(shared.templates))} programs" in result.note


def test_refuses_a_budget_that_nothing_fits_and_names_the_smallest(graph_of: GraphOf, program_of: ProgramOf) -> None:
    graph = graph_of(Stack(3), x=X)
    with pytest.raises(BudgetError, match=r"smallest memory budget is (\d+) bytes .* set by %\w+ \(aten") as caught:
        Partition()(program_of(MACHINE, net=graph))
    smallest = int(str(caught.value).split("budget is ")[1].split(" bytes")[0])
    fits = _cut(program_of(replace(MACHINE, budget_bytes=smallest), net=graph))
    assert _sequential_peak_bytes(fits, smallest) <= smallest
    with pytest.raises(BudgetError, match=f"smallest memory budget is {smallest} bytes"):
        Partition()(program_of(replace(MACHINE, budget_bytes=smallest - 1), net=graph))


def test_what_an_estimate_missed_is_kept_in_reserve(graph_of: GraphOf, program_of: ProgramOf) -> None:
    machine, excess, graph = replace(MACHINE, budget_bytes=14000), 10, graph_of(Stack(6), x=X)
    first = _cut(program_of(machine, net=graph))
    assert 0 < first.estimated_bytes < machine.budget_bytes - excess  # so that the excess alone would change nothing
    missed_bytes = machine.budget_bytes + excess - first.estimated_bytes
    reserving = machine.reserving("net", missed_bytes, excess)
    second = _cut(program_of(reserving, net=graph))
    assert second.cuts != first.cuts
    assert second.estimated_bytes <= first.estimated_bytes - excess
    assert dict(reserving.reserving("net", 1, excess).reserves) == {"net": missed_bytes + excess}


def test_refuses_to_cut_a_node_from_those_that_pick_its_results(graph_of: GraphOf, program_of: ProgramOf) -> None:
    graph = graph_of(Halves(), x=X)
    several = [index for index, node in enumerate(graph.compute_nodes) if not isinstance(node.meta["val"], Tensor)]
    assert len(several) == 1
    assert not {several[0] + 1, several[0] + 2}.intersection(legal_positions(graph))
    whole = int(_sequential_peak_bytes(graph, 10**6))
    for budget_bytes in range(64, whole + 1, 16):
        try:
            cut = _cut(program_of(replace(MACHINE, budget_bytes=budget_bytes), net=graph))
        except BudgetError:
            continue
        picks = [node.name for node in graph.compute_nodes[several[0] : several[0] + 2]]
        assert not set(picks).intersection(cut.cuts)


@pytest.mark.parametrize("slack", [-0.1, 1.5])
def test_refuses_a_slack_that_is_no_part(graph_of: GraphOf, program_of: ProgramOf, slack: float) -> None:
    with pytest.raises(MovdcError, match=r"option slack is .*; write a number from 0 to 1"):
        Partition(slack=slack)(program_of(net=graph_of(Stack(1), x=X)))


def test_no_partition_has_more_weights_than_asked_for(graph_of: GraphOf, program_of: ProgramOf) -> None:
    module = nn.Sequential(*[nn.Linear(512, 512, bias=False) for _ in range(4)])  # a MiB each
    program = program_of(Machine(10**9, 1e12, 1e15, 0.5, 2.0), net=graph_of(module, x=torch.randn(2, 512)))
    weights = {mb: [piece.weight_bytes >> 20 for piece in split(_cut(program, weights_mb=mb))] for mb in (1, 3, 5)}
    assert weights == {1: [1, 1, 1, 1], 3: [2, 2], 5: [4]}  # one layer is more than a megabyte, and is not cut


def test_refuses_partitions_without_weights(graph_of: GraphOf, program_of: ProgramOf) -> None:
    with pytest.raises(MovdcError, match="option weights_mb is 0; write 1 or more"):
        Partition(weights_mb=0)(program_of(net=graph_of(Stack(1), x=X)))


def test_modified_is_honest_and_the_pass_is_idempotent(graph_of: GraphOf, program_of: ProgramOf) -> None:
    program = program_of(replace(MACHINE, budget_bytes=14000), net=graph_of(Stack(3), x=X))
    once = Partition()(program)
    assert once.modified
    assert not Partition()(once.program).modified
    roomy = Partition()(program_of(Machine(10**9, 1e12, 1.0, 0.5, 2.0), net=graph_of(Stack(3), x=X)))
    assert not roomy.modified
    assert "1 partitions, 1 programs" in roomy.note


def test_numbers_are_the_same_run_piece_by_piece(
    graph_of: GraphOf, program_of: ProgramOf, run_graph: RunGraph, tmp_path: Path
) -> None:
    module = Stack(3)
    graph = _cut(program_of(replace(MACHINE, budget_bytes=14000), net=graph_of(module, x=X)))
    values = {node: X for node in graph.graph.find_nodes(op="placeholder") if node.name == "x"}
    for piece in split(graph):
        lowered = piece.module(tmp_path)
        weights = {weight.name: weight.ref.read() for weight in piece.weights}
        with torch.no_grad():
            for name, data in weights.items():
                lowered.get_parameter(name).copy_(data)
            results = lowered(*[values[node] for node in piece.inputs])
        values.update(zip(piece.outputs, results, strict=True))
    result = values[graph.output_node.args[0][0]]
    torch.testing.assert_close(result, run_graph(graph, x=X)[0], rtol=0, atol=0)
    torch.testing.assert_close(result, module(X), rtol=1e-6, atol=1e-6)


class Random(nn.Module):
    """A random DAG: each step reads two earlier values; some are linears, one weight serves twice."""

    def __init__(self, steps: list[tuple[int, int, int]]) -> None:
        super().__init__()
        self.steps = steps
        self.linears = nn.ModuleList(nn.Linear(8, 8, bias=index == 1) for index in range(3))

    def forward(self, x: Tensor) -> Tensor:
        values = [x]
        for kind, first, second in self.steps:
            one, other = values[first % len(values)], values[second % len(values)]
            values.append(self.linears[kind](one) if kind < 3 else one + torch.cat((other, other))[:2] * kind)
        return torch.stack(values).sum(0)


@settings(deadline=None, max_examples=10)
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=4), st.data())
def test_no_budget_is_exceeded_by_a_random_graph_and_no_cutting_is_faster(
    graph_of: GraphOf, steps: list[tuple[int, int, int]], data: st.DataObject
) -> None:
    graph = graph_of(Random(steps), x=X)
    nodes = graph.compute_nodes
    names = [node.name for node in nodes]
    positions = legal_positions(graph)
    machine = replace(MACHINE, budget_bytes=data.draw(st.integers(400, 3000)))
    measured = costs(chain_of(graph), positions, machine)
    found = cheapest(measured)
    inner = range(1, len(positions) - 1)
    fastest = float("inf")
    for chosen in product((False, True), repeat=min(len(inner), 9)):
        cuts = [0, *(index for index, cut in zip(inner, chosen, strict=False) if cut), len(positions) - 1]
        one = predict(measured, cuts)
        after = tuple(names[positions[index] - 1] for index in cuts[1:-1])
        # The certificate, which knows nothing of the planner, has what each partition computes in while others load,
        # too: the planner, which has it with its own alone, lies between it with the largest and with none.
        cut = replace(graph, cuts=after)
        if one is None:
            assert _sequential_peak_bytes(cut, 10**9, working=True) > machine.budget_bytes
        else:
            assert _sequential_peak_bytes(cut, 10**9) <= one.peak_bytes <= machine.budget_bytes
            fastest = min(fastest, one.seconds)
    if found is None:
        assert fastest == float("inf")
    elif len(inner) <= 9:
        assert predict(measured, found) is not None
        assert predict(measured, found).seconds == pytest.approx(fastest)  # type: ignore[union-attr]


class Residual(nn.Module):
    """Blocks with branches that are wider than what goes around them."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(16) for _ in range(blocks))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(torch.sin(x))
        return x


def test_cuts_are_at_waists_where_these_fit_and_within_blocks_where_not(
    graph_of: GraphOf, program_of: ProgramOf
) -> None:
    graph = graph_of(Residual(6), x=torch.randn(2, 16))
    adds = [node.name for node in graph.compute_nodes if "add" in node.name]
    between = {adds[0], *adds[1::2]}  # the branch of the first block is beside an input, which nobody frees
    roomy, tight = (
        _cut(program_of(replace(MACHINE, budget_bytes=budget_bytes), net=graph)) for budget_bytes in (20000, 9000)
    )
    assert len(roomy.cuts) > 1
    assert set(roomy.cuts) <= between
    assert len(tight.cuts) > 6
    assert not set(tight.cuts) <= between


def test_variants_are_cut_behind_the_same_nodes(graph_of: GraphOf, program_of: ProgramOf) -> None:
    module = Stack(4)
    plain, longer = graph_of(module, x=X), graph_of(module, x=torch.cat((X, X)))
    program = program_of(replace(MACHINE, budget_bytes=14000), net=plain)
    program = replace(program, stages=(Stage("net", "per_step", {"plain": plain, "longer": longer}),))
    variants = Partition()(program).program.stages[0].variants
    assert variants["plain"].cuts == variants["longer"].cuts != ()
    for one, other in zip(split(variants["plain"]), split(variants["longer"]), strict=True):
        assert [str(weight.ref) for weight in one.weights] == [str(weight.ref) for weight in other.weights]
    for graph in variants.values():
        assert _sequential_peak_bytes(graph, 14000) <= 14000


def test_variants_with_other_weights_are_cut_alone(graph_of: GraphOf, program_of: ProgramOf) -> None:
    plain, other = graph_of(Stack(4), x=X), graph_of(nn.Sequential(*[nn.Linear(8, 8) for _ in range(3)]), x=X)
    assert len(common_positions([plain, other])) == 2
    program = program_of(replace(MACHINE, budget_bytes=14000), net=plain)
    program = replace(program, stages=(Stage("net", "per_step", {"plain": plain, "other": other}),))
    variants = Partition()(program).program.stages[0].variants
    assert len(variants["plain"].cuts) >= 2


def test_golden_text(graph_of: GraphOf, program_of: ProgramOf) -> None:
    module = nn.Sequential(nn.Linear(8, 16, bias=False), nn.ReLU(), nn.Linear(16, 8, bias=False))
    graph = graph_of(module, x=X)
    assert print_graph(graph) == BEFORE
    assert print_graph(_cut(program_of(replace(MACHINE, budget_bytes=1700), net=graph))) == AFTER


BEFORE = """\
  %p_0_weight: f32[16,8] = weight(toy:0.weight)
  %p_2_weight: f32[8,16] = weight(toy:2.weight)
  %x: f32[2,8] = input
  %linear: f32[2,16] = aten.linear(%x, %p_0_weight)  # 128 B
  %relu: f32[2,16] = aten.relu(%linear)  # 128 B
  %linear_1: f32[2,8] = aten.linear(%relu, %p_2_weight)  # 64 B
  return [%linear_1]
"""
AFTER = """\
  %p_0_weight: f32[16,8] = weight(toy:0.weight)
  %p_2_weight: f32[8,16] = weight(toy:2.weight)
  %x: f32[2,8] = input
  %linear: f32[2,16] = aten.linear(%x, %p_0_weight)  # 128 B
  ---- cut ----
  %relu: f32[2,16] = aten.relu(%linear)  # 128 B
  %linear_1: f32[2,8] = aten.linear(%relu, %p_2_weight)  # 64 B
  return [%linear_1]
"""
