"""What passes and targets have in common: a name, options that are its fields, and a text that parses back."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import MISSING, Field, dataclass, fields
from typing import Any, ClassVar, Self, get_type_hints

from pydantic import TypeAdapter, ValidationError

from movdc.compiler.errors import MovdcError

Option = bool | int | float | str | tuple[str, ...] | None


@dataclass(frozen=True)
class Configured:
    """Something whose fields are its options, and which prints as name{option=value,...}.

    Options are bool, int, float, str, a tuple of str, or None for "decided by the program".
    """

    kind: ClassVar[str]  # what messages call it: pass, target
    name: ClassVar[str]

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
        """It with options as YAML or text gives them; raises MovdcError naming what is allowed."""
        known: dict[str, Field[Any]] = {field.name: field for field in fields(cls)}
        hints = get_type_hints(cls)
        values = {}
        for key, value in options.items():
            if key not in known:
                allowed = ", ".join(known) or "none"
                raise MovdcError(f"{cls.kind} {cls.name}: unknown option {key!r}; its options are {allowed}")
            values[key] = _parse_option(f"{cls.kind} {cls.name}: option {key}", hints[key], value)
        return cls(**values)


def split_text(text: str) -> tuple[str, dict[str, str]]:
    """The name and the options of `merge-tokens{steps=15}`; raises MovdcError for what is neither."""
    match = re.fullmatch(r"\s*([a-z0-9-]+)\s*(?:\{(.*)\})?\s*", text)
    if not match:
        raise MovdcError(f"{text.strip()!r} is not name or name{{option=value,...}}")
    pairs = [pair.partition("=") for pair in (match[2] or "").split(",") if pair.strip()]
    return match[1], {key.strip(): value.strip() for key, _, value in pairs}


def print_option(value: object) -> str:
    """An option's value as text has it."""
    if isinstance(value, bool):
        return str(value).lower()
    return "|".join(value) if isinstance(value, tuple) else str(value)


def print_options(one: type[Configured]) -> str:
    """Every option with its default, for lists of what there is."""
    return ", ".join(f"{key}={print_option(value)}" for key, value in one.options().items())


def _parse_option(where: str, hint: Any, value: Any) -> Option:
    """A value of the option's type, from YAML or from text."""
    if value == "None":
        value = None
    elif isinstance(value, str) and "tuple" in str(hint):
        value = tuple(value.split("|")) if value else ()
    try:
        parsed: Option = TypeAdapter(hint).validate_python(value)
    except ValidationError as error:
        raise MovdcError(f"{where}: {error.errors()[0]['msg']}, got {value!r}") from None
    return parsed
