"""The checker accepts what is sound and names the rule that is broken."""

import pytest

from movdc.compiler.errors import BudgetError, InternalError
from movdc.compiler.schedule import check, sequential
from movdc.runtime.bundle import Instruction, Partition, TensorSpec


def _tensor(name: str) -> TensorSpec:
    return TensorSpec(name=name, dtype="f32", shape=(25,))


def _partition(name: str, source: str, target: str) -> Partition:
    return Partition(
        name=name,
        program="programs/p.pte",
        weights=(),
        inputs=(_tensor(source),),
        outputs=(_tensor(target),),
        weight_bytes=1000,
        held_bytes=1000,
        load_bytes=2000,
        working_bytes=50,
        flops=0,
    )


PARTITIONS = {"a": _partition("a", "x", "h"), "b": _partition("b", "h", "y")}
INPUTS, OUTPUTS = (_tensor("x"),), (_tensor("y"),)


def _steps(text: str) -> list[Instruction]:
    return [
        Instruction.model_validate({"op": op, "partition": name}) for op, name in (s.split() for s in text.split(","))
    ]


def test_the_peak_is_the_load_of_the_second_partition() -> None:
    assert check(sequential(list(PARTITIONS.values())), PARTITIONS, INPUTS, OUTPUTS, 2200) == 2200


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        ("run a", "is not loaded"),
        ("load a,run a,free a,free a", "is not loaded"),
        ("load a,load a", "is loaded already"),
        ("load b,run b", "tensor h does not exist"),
        ("load a,run a,free a", "outputs y do not exist"),
        ("load a,run a,load b,run b,free b", "never freed"),
    ],
)
def test_a_broken_schedule_is_refused(schedule: str, message: str) -> None:
    with pytest.raises(InternalError, match=message):
        check(_steps(schedule), PARTITIONS, INPUTS, OUTPUTS, 10_000)


def test_a_budget_that_is_exceeded_is_named() -> None:
    with pytest.raises(BudgetError, match="the budget is 2199"):
        check(sequential(list(PARTITIONS.values())), PARTITIONS, INPUTS, OUTPUTS, 2199)
