"""The contract of passes: what the base class refuses, and the text of a configured pass."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import pytest
import torch
from torch import nn

from movdc.compiler.errors import InternalError, MovdcError
from movdc.compiler.pass_base import Pass, PassResult, run_passes
from movdc.compiler.program import Graph, Program
from movdc.passes.leap import Leap
from movdc.passes.pipeline import DEFAULT, PASSES, check_order, default_pipeline, in_phases, parse_pipeline
from movdc.runtime.bundle import Sampler
from movdc.targets.executorch_xnnpack import ExecutorchXnnpack
from movdc.targets.null import Null

X = torch.zeros(3, 4)


@dataclass(frozen=True)
class Toy(Pass):
    """Does what its option says."""

    name: ClassVar[str] = "toy"
    exact: ClassVar[bool] = True

    do: Literal["nothing", "lie", "shift", "rename", "crash", "refuse", "break", "plan"] = "nothing"
    steps: int | None = None
    ratio: float = 0.5
    stages: tuple[str, ...] = ()
    on: bool = False

    def requires(self, program: Program) -> None:
        if self.do == "refuse":
            raise MovdcError("pass toy: refuses; try another")

    def plan(self, sampler: Sampler) -> Sampler:
        return sampler.model_copy(update={"shift": sampler.shift + 1}) if self.do == "shift" else sampler

    def apply(self, program: Program) -> PassResult:
        if self.do == "crash":
            raise ZeroDivisionError("one by nothing")
        if self.do == "lie":
            return PassResult(program, True, "")
        if self.do == "shift":  # never comes to an end
            return PassResult(replace(program, sampler=self.plan(program.sampler)), True, "")
        if self.do == "plan":
            sampler = program.sampler.model_copy(update={"guidance": 1.0})
            return PassResult(replace(program, sampler=sampler), True, "")
        graph = program.stages[0].variants["plain"]
        if self.do == "rename":
            outputs = tuple(spec.model_copy(update={"name": "other"}) for spec in graph.outputs)
            return PassResult(program.map_graphs({("d", "plain"): replace(graph, outputs=outputs)}), True, "")
        if self.do == "break":
            return PassResult(program.map_graphs({("d", "plain"): replace(graph, cuts=("nowhere",))}), True, "")
        return PassResult(program, False, "")


@pytest.fixture
def program(graph_of: Callable[..., Graph], program_of: Callable[..., Program]) -> Program:
    return program_of(d=graph_of(nn.Linear(4, 2), x=X))


@pytest.mark.parametrize(
    ("do", "message"),
    [
        ("lie", "reports modified=True"),
        ("shift", "changes its own result when it is applied again"),
        ("rename", r"changes the inputs or outputs of d \(plain\)"),
        ("break", "cuts are not in order"),
        ("plan", "writes into the sampler's plan what its method `plan` does not"),
    ],
)
def test_the_base_class_refuses_a_broken_promise(program: Program, do: str, message: str) -> None:
    with pytest.raises(InternalError, match=message):
        Toy.configured({"do": do})(program)


def test_an_error_names_the_pass_and_those_before_it(program: Program) -> None:
    with pytest.raises(InternalError, match=r"pass toy\{do=crash\} failed after \[toy\{steps=2\}\]: one by nothing"):
        run_passes(program, [Toy(steps=2), Toy(do="crash")])


def test_a_refusal_of_the_input_stays_one_sentence(program: Program) -> None:
    with pytest.raises(MovdcError, match=r"^pass toy: refuses; try another$"):
        run_passes(program, [Toy(do="refuse")])


@pytest.mark.parametrize(
    ("one", "text"),
    [
        (Toy(), "toy"),
        (Toy(steps=15), "toy{steps=15}"),
        (Toy(do="shift", ratio=0.25, stages=("a", "b*"), on=True), "toy{do=shift,ratio=0.25,stages=a|b*,on=true}"),
    ],
)
def test_a_configured_pass_prints_and_parses_back(monkeypatch: pytest.MonkeyPatch, one: Pass, text: str) -> None:
    monkeypatch.setitem(PASSES, "toy", Toy)
    assert str(one) == text
    assert parse_pipeline(text) == (one,)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nonsense", r"unknown pass 'nonsense'; there are .*canonicalize"),
        ("partition{", "is not name or name"),
        ("partition,,canonicalize", "is not name or name"),
        ("partition{budget=3}", r"pass partition: unknown option 'budget'; its options are"),
        ("partition,partition", "partition comes twice"),
        ("share-templates,partition", "share-templates must run after partition"),
        ("toy{steps=many}", r"pass toy: option steps: .*got 'many'"),
        ("toy{do=everything}", r"pass toy: option do: .*'nothing'.*got 'everything'"),
        ("toy{on=perhaps}", r"pass toy: option on: .*got 'perhaps'"),
    ],
)
def test_wrong_pipelines_are_one_sentence(monkeypatch: pytest.MonkeyPatch, text: str, message: str) -> None:
    monkeypatch.setitem(PASSES, "toy", Toy)
    with pytest.raises(MovdcError, match=message) as caught:
        parse_pipeline(text)
    assert "\n" not in str(caught.value)


def test_options_from_yaml_and_rewrites_of_the_target_come_on_top_of_the_default() -> None:
    plain = default_pipeline({}, Null())
    assert [type(one) for one in plain] == [one for one in PASSES.values() if one in DEFAULT]
    target = ExecutorchXnnpack()
    rewritten = default_pipeline({}, target)
    assert {one.name for one in set(rewritten) - set(plain)} == set(target.rewrites)
    assert parse_pipeline(",".join(map(str, rewritten))) == rewritten
    more = default_pipeline({"merge-tokens": {"steps": 15}}, target)
    assert set(map(str, more)) - set(map(str, rewritten)) == {"merge-tokens{steps=15}"}
    assert next(phase for phase, _ in in_phases(more)) == "variants"
    with pytest.raises(MovdcError, match="unknown pass 'merge'"):
        default_pipeline({"merge": {}}, target)


def test_the_default_order_keeps_every_after() -> None:
    everything = tuple(one() for one in PASSES.values())
    check_order(everything)
    assert {name for one in everything for name in one.after} <= set(PASSES)


def test_identity_depends_on_options() -> None:
    assert Toy().identity == Toy().identity
    assert Leap(step=3).identity == Leap(mode="dynamic").identity, "the same graphs, another plan"
    assert Toy().identity != Toy(steps=3).identity
