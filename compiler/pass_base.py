"""The Pass protocol: a frozen dataclass whose contract the base class enforces."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import ClassVar

from movdc.compiler.errors import InternalError, MovdcError
from movdc.compiler.printer import print_program
from movdc.compiler.program import Program
from movdc.compiler.verifier import verify


@dataclass(frozen=True)
class PassResult:
    """What a pass made, whether it changed anything, and one line for people."""

    program: Program
    modified: bool
    note: str


@dataclass(frozen=True)
class Pass(ABC):
    """One rewrite of the Program; its fields are its options, and it prints as name{option=value,...}."""

    name: ClassVar[str]
    exact: ClassVar[bool]  # the results are the same numbers, up to the order of summation

    @abstractmethod
    def apply(self, program: Program) -> PassResult:
        """Return a new program; the one given is never changed."""

    def __call__(self, program: Program) -> PassResult:
        """Apply, verify the result and hold `modified` against the printed program."""
        before = print_program(program)
        result = self.apply(program)
        verify(result.program)
        if result.modified != (print_program(result.program) != before):
            raise InternalError(f"pass {self.name} reports modified={result.modified}, its program says otherwise")
        return result

    def __str__(self) -> str:
        options = ",".join(f"{field.name}={getattr(self, field.name)}" for field in fields(self))
        return f"{self.name}{{{options}}}" if options else self.name


def run_passes(program: Program, passes: Sequence[Pass], after: Callable[[Pass, PassResult], None]) -> Program:
    """Apply passes in order; an error names the pass and those already run."""
    done: list[str] = []
    for one in passes:
        try:
            result = one(program)
        except MovdcError:
            raise
        except Exception as error:
            raise InternalError(f"pass {one} failed after [{', '.join(done)}]: {error}") from error
        program = result.program
        done.append(str(one))
        after(one, result)
    return program
