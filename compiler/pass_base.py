"""The Pass protocol: a frozen dataclass whose contract the base class enforces."""

from __future__ import annotations

import hashlib
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, fields
from typing import Any, ClassVar, Self, get_type_hints

from pydantic import TypeAdapter, ValidationError

from movdc.compiler.errors import InternalError, MovdcError
from movdc.compiler.printer import print_program
from movdc.compiler.program import Program
from movdc.compiler.verifier import verify
from movdc.runtime.bundle import Sampler

Option = bool | int | float | str | tuple[str, ...] | None


@dataclass(frozen=True)
class PassResult:
    """What a pass made, whether it changed anything, and one line for people."""

    program: Program
    modified: bool
    note: str


@dataclass(frozen=True)
class Pass(ABC):
    """One rewrite of the Program; its fields are its options, and it prints as name{option=value,...}.

    Options are bool, int, float, str, a tuple of str, or None for "decided by the program".
    """

    name: ClassVar[str]
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

    def requires(self, program: Program) -> None:  # noqa: B027  # most passes take any program
        """Raise MovdcError if the program is not one that this pass can take."""

    def ensures(self, program: Program) -> None:  # noqa: B027  # most promises are the verifier's already
        """Raise InternalError if what this pass made is not what it promises."""

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

    def __str__(self) -> str:
        options = [
            f"{field.name}={print_option(getattr(self, field.name))}"
            for field in fields(self)
            if field.default is MISSING or getattr(self, field.name) != field.default
        ]
        return f"{self.name}{{{','.join(options)}}}" if options else self.name

    @classmethod
    def options(cls) -> dict[str, object]:
        """Option names with their defaults."""
        return {field.name: field.default for field in fields(cls)}

    @classmethod
    def configured(cls, options: Mapping[str, Any]) -> Self:
        """The pass with options as YAML or text gives them; raises MovdcError naming what is allowed."""
        known: dict[str, Field[Any]] = {field.name: field for field in fields(cls)}
        hints = get_type_hints(cls)
        values = {}
        for key, value in options.items():
            if key not in known:
                allowed = ", ".join(known) or "none"
                raise MovdcError(f"pass {cls.name}: unknown option {key!r}; its options are {allowed}")
            values[key] = _parse_option(f"pass {cls.name}: option {key}", hints[key], value)
        return cls(**values)

    @property
    def identity(self) -> str:
        """Hash of source and options: two passes of one identity make the same graphs of the same graphs."""
        chosen = [field.name for field in fields(self) if field.name not in self.plan_options]
        values = [(name, getattr(self, name)) for name in chosen]
        ours = [one for one in type(self).__mro__ if issubclass(one, Pass)]  # a base that changes, changes its passes
        sources = [inspect.getsource(inspect.getmodule(one) or one) for one in ours]
        return hashlib.sha256(f"{sources}{values!r}".encode()).hexdigest()


def print_option(value: object) -> str:
    """An option's value as the text of a pipeline has it."""
    if isinstance(value, bool):
        return str(value).lower()
    return "|".join(value) if isinstance(value, tuple) else str(value)


def _parse_option(where: str, hint: Any, value: Any) -> Option:
    """A value of the option's type, from YAML or from the text of a pipeline."""
    if value == "None":
        value = None
    elif isinstance(value, str) and "tuple" in str(hint):
        value = tuple(value.split("|")) if value else ()
    try:
        parsed: Option = TypeAdapter(hint).validate_python(value)
    except ValidationError as error:
        raise MovdcError(f"{where}: {error.errors()[0]['msg']}, got {value!r}") from None
    return parsed


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
