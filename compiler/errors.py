"""Two families of error: the user's input (MovdcError and BudgetError) and our bugs (InternalError)."""

from __future__ import annotations


class MovdcError(Exception):
    """The input cannot be compiled; the message is one sentence: what, where, what is allowed, what to do next."""


class BudgetError(MovdcError):
    """A stage does not fit into the memory budget, however it is cut or as it was cut: then it has an excess."""

    def __init__(self, stage: str, message: str, excess_bytes: int = 0) -> None:
        super().__init__(f"{stage}: {message}")
        self.stage = stage
        self.excess_bytes = excess_bytes


class InternalError(Exception):
    """A bug in movdc; the message names the stage, pass or node, so that a report can be acted on."""
