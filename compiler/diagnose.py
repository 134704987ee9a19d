"""Why a partition is wrong: a weight, its program, or what the target makes of one of its nodes."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

from torch import fx

from movdc.compiler.against_eager import Source, compared
from movdc.compiler.alone import NAME, Alone, lower_alone
from movdc.compiler.cost import is_fused_with_users
from movdc.compiler.pieces import Piece, piece_of
from movdc.compiler.printer import print_node
from movdc.compiler.program import value_of
from movdc.runtime.bundle import Bundle, Constant, WeightsFile
from movdc.runtime.executors import AnyExecutor, open_executor

_ROOM_BYTES = 1 << 40  # the budget of a program by itself: as much as the system has


def diagnose(source: Source, name: str, bundle: Bundle, executor: AnyExecutor) -> str:
    """One sentence about a partition that is wrong; lowers it again, and parts of it, until the node is found."""
    piece, record = source.pieces[name], bundle.partitions[name]
    hashes = {file.path: file.sha256 for file in bundle.manifest.files}
    with tempfile.TemporaryDirectory(prefix="movdc-") as folder:
        alone = lower_alone(piece, source.target, bundle.manifest, Path(folder))
        files = {file.path: file for file in bundle.manifest.weights}
        wrong = _other_constants(alone, executor, [files[path] for path in record.weights])
        if wrong:
            return _of_weights(piece, alone, wrong)
    if alone.program_sha256 != hashes[record.program]:
        return f"{record.program} is not the program that its graph is lowered to; compile again"
    node = _first_wrong(source, name, bundle)
    if node is None:
        return "lowered again by itself it is right: its place in the manifest is wrong; compile again"
    return f"{source.target.name} computes {_told(node)} otherwise than PyTorch"


def _other_constants(alone: Alone, executor: AnyExecutor, files: list[WeightsFile]) -> dict[str, str]:
    """Keys of the constants whose bytes are not those of the checkpoint, or that are not there, and their file."""
    kept: dict[str, tuple[str, bytes]] = {}
    for file in files:
        data = executor.read_file(file.path)
        kept |= {one.key: (file.path, _bytes_of(data, one)) for one in file.constants}
    wrong = {}
    for own in alone.weights:
        data = (alone.bundle.root / own.path).read_bytes()
        for one in own.constants:
            path, found = kept.get(one.key, ("none of its files", b""))
            if found != _bytes_of(data, one):
                wrong[one.key] = path
    return wrong


def _of_weights(piece: Piece, alone: Alone, wrong: Mapping[str, str]) -> str:
    """The first node, in the order of the graph, that reads a weight which is not the checkpoint's."""
    names = {slot.weight: slot.key for slot in alone.slots if slot.key in wrong}
    found = [weight for weight in piece.weights if weight.name in names]
    first = found[0]
    reader = next(node for node in piece.nodes if first.node in node.all_input_nodes)
    more = f"; so are {len(found) - 1} more" if len(found) > 1 else ""
    return f"{_told(reader)} reads {first.ref}, which is another one in {wrong[names[first.name]]}{more}"


def _first_wrong(source: Source, name: str, bundle: Bundle) -> fx.Node | None:
    """The first node whose value is wrong, if the partition is cut off behind it; by halves, for errors stay."""
    piece = source.pieces[name]
    nodes = [node for node in piece.nodes if not is_fused_with_users(node) and value_of(node).dtype.is_floating_point]
    low, high = 0, len(nodes)  # those before `low` are right, and the one at `high` is wrong
    while low < high:
        middle = (low + high) // 2
        if _is_right(source, name, _until(piece, nodes[middle]), bundle):
            low = middle + 1
        else:
            high = middle
    return nodes[low] if low < len(nodes) else None


def _is_right(source: Source, name: str, piece: Piece, bundle: Bundle) -> bool:
    with tempfile.TemporaryDirectory(prefix="movdc-") as folder:
        alone = lower_alone(piece, source.target, bundle.manifest, Path(folder))
        executor = open_executor(alone.bundle, memory_budget=_ROOM_BYTES)
        error, figure_db = compared(piece, source.target, name, partial(executor.run_partition, NAME))
        executor.release()
    return error.sqnr_db >= figure_db


def _until(piece: Piece, last: fx.Node) -> Piece:
    """What of a piece a node needs, with the node as its only output."""
    needed, stack, inside = {last}, [last], set(piece.nodes)
    while stack:
        more = [node for node in stack.pop().all_input_nodes if node in inside and node not in needed]
        needed.update(more)
        stack += more
    part = piece_of(piece.graph, [node for node in piece.nodes if node in needed])
    return replace(part, outputs=(last,), stage=piece.stage)


def _told(node: fx.Node) -> str:
    module = list((node.meta.get("nn_module_stack") or {"": ("", None)}).values())[-1][0]
    return f"{print_node(node).split(' = ')[0]}" + (f" of {module}" if module else "")


def _bytes_of(data: bytes, constant: Constant) -> bytes:
    return data[constant.offset_bytes : constant.offset_bytes + constant.size_bytes]
