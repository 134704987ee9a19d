"""The Pass protocol: a frozen dataclass whose contract the base class enforces."""

from __future__ import annotations

import hashlib
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import ClassVar

from movdc.compiler.abilities import Abilities
from movdc.compiler.configured import Configured
from movdc.compiler.errors import InternalError, MovdcError
from movdc.compiler.pieces import Piece
from movdc.compiler.printer import print_program
from movdc.compiler.program import Program
from movdc.compiler.verifier import verify
from movdc.runtime.bundle import Sampler


@dataclass(frozen=True)
class PassResult:
    """What a pass made, whether it changed anything, and one line for people."""

    program: Program
    modified: bool
    note: str


@dataclass(frozen=True)
class Pass(Configured, ABC):
    """One rewrite of the Program."""

    kind: ClassVar[str] = "pass"
    exact: ClassVar[bool]  # the results are the same numbers, up to the order of summation
    figure: ClassVar[str] = ""  # what the results of a pass that is not exact are held to, in words
    paper: ClassVar[str] = ""  # arXiv id and section
    after: ClassVar[tuple[str, ...]] = ()  # passes that must run before this one, where both run
    plan_options: ClassVar[tuple[str, ...]] = ()  # options that change nothing but the sampler's plan

    @abstractmethod
    def apply(self, program: Program) -> PassResult:
        """Return a new program; the one given is never changed."""

    def plan(self, sampler: Sampler) -> Sampler:
        """What the pass writes into the sampler's plan when it has done its part; raises MovdcError if it cannot.

        It goes by the plan and the options alone, so that graphs compiled before can have another plan.
        """
        return sampler

    def requires(self, program: Program) -> None:  # most passes take any program
        """Raise MovdcError if the program is not one that this pass can take."""

    def ensures(self, program: Program) -> None:  # most promises are the verifier's already
        """Raise InternalError if what this pass made is not what it promises."""

    def unable(self, abilities: Abilities) -> str | None:
        """Why a target of such abilities cannot run what this pass makes, or None."""
        return None

    def __call__(self, program: Program) -> PassResult:
        """Apply under the contract: valid output, the same stage interfaces, an honest `modified`, idempotence."""
        self.requires(program)
        before = print_program(program)
        result = self.apply(program)
        verify(result.program)
        if result.program.sampler not in (program.sampler, self.plan(program.sampler)):
            raise InternalError("writes into the sampler's plan what its method `plan` does not")
        self._keep_interfaces(program, result.program)
        if result.modified != (print_program(result.program) != before):
            raise InternalError(f"reports modified={result.modified}, the printed program says otherwise")
        if result.modified and self.apply(result.program).modified:
            raise InternalError("changes its own result when it is applied again")
        self.ensures(result.program)
        return result

    def _keep_interfaces(self, before: Program, after: Program) -> None:
        """Every variant has the inputs and outputs of one that its stage had before."""
        known = {stage.name: [(g.inputs, g.outputs) for g in stage.variants.values()] for stage in before.stages}
        for stage, variant, graph in after.graphs():
            if (graph.inputs, graph.outputs) not in known.get(stage, []):
                raise InternalError(f"changes the inputs or outputs of {stage} ({variant})")

    def min_sqnr_db(self, piece: Piece) -> float | None:
        """The ratio of signal to error that a piece keeps of its fp32 results; None where this pass keeps them all."""
        return None

    @property
    def identity(self) -> str:
        """Hash of source and options: two passes of one identity make the same graphs of the same graphs."""
        chosen = [field.name for field in fields(self) if field.name not in self.plan_options]
        values = [(name, getattr(self, name)) for name in chosen]
        ours = [one for one in type(self).__mro__ if issubclass(one, Pass)]  # a base that changes, changes its passes
        sources = [inspect.getsource(inspect.getmodule(one) or one) for one in ours]
        return hashlib.sha256(f"{sources}{values!r}".encode()).hexdigest()


def run_passes(
    program: Program, passes: Sequence[Pass], after: Callable[[Pass, PassResult], None] = lambda one, result: None
) -> Program:
    """Apply passes in order; an InternalError names the pass and those already run."""
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
