"""Two families of error: the user's input (MovdcError and BudgetError) and our bugs (InternalError)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


class MovdcError(Exception):
    """The input cannot be compiled; the message is one sentence: what, where, what is allowed, what to do next."""


class BudgetError(MovdcError):
    """A stage does not fit into the memory budget, however it is cut or as it was cut: then it has an excess."""

    def __init__(self, stage: str, message: str, excess_bytes: int = 0) -> None:
        super().__init__(f"{stage}: {message}")
        self.stage = stage
        self.excess_bytes = excess_bytes


@dataclass(frozen=True)
class Refusal:
    """A node that a target refuses, in every place of the model that repeats it."""

    stage: str
    node: str  # the first one
    operator: str
    module: str  # its path in the model, with * for the numbers of repeated blocks
    reason: str
    count: int


class RefusedError(MovdcError):
    """A target cannot run a program; the command line prints `refusals` as a table."""

    def __init__(self, target: str, refusals: Sequence[Refusal]) -> None:
        first, count = refusals[0], sum(one.count for one in refusals)
        super().__init__(
            f"target {target} cannot run {count} of the nodes, which the table names; the first is %{first.node} "
            f"({first.operator}) of {first.stage}: {first.reason}"
        )
        self.refusals = tuple(refusals)


class InternalError(Exception):
    """A bug in movdc; the message names the stage, pass or node, so that a report can be acted on."""
