"""The families of pipelines."""

from __future__ import annotations

from movdc.compiler.family import Family
from movdc.models.opensora import OpenSora

FAMILIES: dict[str, type[Family]] = {OpenSora.name: OpenSora}
