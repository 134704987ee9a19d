"""Where an .onnx program says that its weights lie: a name for each group, which any partition's file can stand in for.

Names have the length of a weights file's, so that one is put in the other's place without parsing the program.
"""

from __future__ import annotations

from collections.abc import Mapping

_NAME_LENGTH = 16  # of a file's name in a bundle, without its suffix


def location_of(group: str) -> str:
    """The name for a group: "weights", of the checkpoint, or "tables"."""
    return f"{group:_<{_NAME_LENGTH}}.bin"


def group_of(key: str) -> str:
    """The group of a constant: that of weights_12 is weights."""
    return key.rpartition("_")[0]


def with_files(program: bytes, files: Mapping[str, str]) -> bytes:
    """The program with the names of files (by group) in the place of the locations; ValueError for another length."""
    for group, name in files.items():
        location = location_of(group)
        if len(name) != len(location):
            raise ValueError(f"{name} cannot stand for {location}: the names differ in length")
        program = program.replace(location.encode(), name.encode())
    return program
