"""Recording what a bundle is expected to make: each partition and stage, evaluated with PyTorch.

A partition is evaluated as the target should compute it, int8 included: what a model loses by int8 is no fault of a
program. A stage is evaluated in fp32 and held to what the passes declare, so that this loss is seen there.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version

import torch
from torch import Tensor, fx

from movdc.compiler.cache import CompileCache, key_of
from movdc.compiler.eager import evaluate
from movdc.compiler.expectation import expectation, is_rounded
from movdc.compiler.identity import code_identity
from movdc.compiler.pass_base import Pass
from movdc.compiler.pieces import Piece, split
from movdc.compiler.program import Graph, Program, value_of
from movdc.compiler.target import Target
from movdc.runtime.bundle import NUMPY_DTYPES, TensorSpec
from movdc.runtime.expected import Check, Expected, Recipe, digest_of, make_input

# What is evaluated at most, so that a compile of many billion parameters takes half a minute longer and no more.
LIMIT_FLOPS = 2 * 10**12
_UNIT = math.sqrt(3.0)  # uniform within this of 0 has a variance of 1
_KEPT_TOKENS = 0.75  # of a mask of tokens: the others are padding
_TIMES = 1000.0


@dataclass(frozen=True)
class _Wanted:
    """A partition, or a variant of a stage, that can be recorded."""

    name: str
    pieces: tuple[Piece, ...]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[str, ...]
    is_partition: bool
    flops: int  # of evaluating it


def record(
    program: Program,
    passes: Sequence[Pass],
    target: Target,
    cache: CompileCache,
    on_done: Callable[[int, int], None],
) -> Expected:
    """Record a partition of each program, then whole stages, then the other partitions, the cheapest first, until
    LIMIT_FLOPS are spent."""
    of_target_db = target.min_sqnr_db()
    if of_target_db is None:
        return Expected()
    partitions, stages, firsts = _everything(program, target)
    order = [
        *sorted((one for one in partitions if one.name in firsts), key=lambda one: one.flops),
        *sorted(stages, key=lambda one: one.flops),
        *sorted((one for one in partitions if one.name not in firsts), key=lambda one: one.flops),
    ]
    chosen, left_flops = [], LIMIT_FLOPS
    for one in order:
        if one.flops <= left_flops:
            chosen.append(one)
            left_flops -= one.flops
    checks: dict[str, Check] = {}
    on_done(0, len(chosen))
    for one in chosen:
        if check := _recorded(one, target, min_sqnr_db(one.pieces, passes, of_target_db), cache):
            checks[one.name] = check
        on_done(len(checks), len(chosen))
    return Expected(
        partitions=tuple(checks[one.name] for one in partitions if one.name in checks),
        stages=tuple(checks[one.name] for one in stages if one.name in checks),
    )


def min_sqnr_db(pieces: Sequence[Piece], passes: Sequence[Pass], of_target_db: float) -> float:
    """What a stage is held to: the least that the target and the passes which changed a piece of it declare."""
    figures = (one.min_sqnr_db(piece) for one in passes for piece in pieces)
    return min([of_target_db, *(figure for figure in figures if figure is not None)])


def recipes_of(graph: Graph, specs: Sequence[TensorSpec]) -> tuple[Recipe, ...]:
    """How to make inputs that are like those of a run: indices into tables, masks of a prompt, times, numbers."""
    nodes = {node.name: node for node in graph.graph.nodes}
    return tuple(_recipe(spec, nodes.get(spec.name)) for spec in specs)


def made_inputs(check_name: str, recipes: Sequence[Recipe], specs: Sequence[TensorSpec]) -> dict[str, Tensor]:
    """The inputs of a check as PyTorch takes them."""
    return {
        spec.name: torch.from_numpy(make_input(recipe, check_name, spec.shape, NUMPY_DTYPES[spec.dtype]))
        for recipe, spec in zip(recipes, specs, strict=True)
    }


def run_pieces(pieces: Sequence[Piece], inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Pieces that follow each other, each on what those before have made; gives everything that was made."""
    tensors = dict(inputs)
    for piece in pieces:
        tensors |= evaluate(piece, tensors)
    return tensors


def _everything(program: Program, target: Target) -> tuple[list[_Wanted], list[_Wanted], set[str]]:
    """All partitions, all variants of stages, and the names of the partitions that are the first of their template."""
    partitions, stages, seen, firsts = [], [], set(), set()
    for stage, variant, graph in program.graphs():
        pieces = split(graph, stage)
        names = [f"{stage}.{variant}.{index}" for index in range(len(pieces))]
        for name, piece, template in zip(names, pieces, graph.templates or names, strict=True):
            if (stage, template) not in seen:
                firsts.add(name)
                seen.add((stage, template))
            inputs = tuple(piece.tensor(node) for node in piece.inputs)
            outputs = tuple(piece.tensor(one).name for one in piece.outputs)
            flops = piece.flops * (2 if is_rounded(piece, target) else 1)
            partitions.append(_Wanted(name, (piece,), inputs, outputs, True, flops))
        outputs = tuple(spec.name for spec in graph.outputs)
        flops = sum(piece.flops for piece in pieces)
        stages.append(_Wanted(f"{stage}.{variant}", tuple(pieces), graph.inputs, outputs, False, flops))
    return partitions, stages, firsts


def _recorded(one: _Wanted, target: Target, stage_db: float, cache: CompileCache) -> Check | None:
    """The check, or None where what comes out is not finite: it would say nothing."""
    names = ("compiler.eager", "compiler.expectation", "compiler.record", "runtime.expected")
    identity = code_identity(*(f"movdc.{name}" for name in names))
    arithmetic = target.identity if one.is_partition else f"fp32, {stage_db} dB"
    weights = [weight.ref.identity for piece in one.pieces for weight in piece.weights]
    texts = [piece.text() for piece in one.pieces]
    inputs = json.dumps([spec.model_dump() for spec in one.inputs])
    key = key_of("expected", one.name, inputs, *one.outputs, *texts, *weights, arithmetic, identity, version("torch"))
    if entry := cache.get(key):
        return Check.model_validate_json(entry.path.read_bytes())
    recipes = recipes_of(one.pieces[0].graph, one.inputs)
    made = made_inputs(one.name, recipes, one.inputs)
    if one.is_partition:
        tensors, figure_db = expectation(one.pieces[0], made, target)
    else:
        tensors, figure_db = run_pieces(one.pieces, made), stage_db
    digests = tuple(digest_of(tensors[name].numpy(), name, one.name) for name in one.outputs)
    if not all(map(math.isfinite, (figure_db, *(digest.l2 for digest in digests)))):
        return None
    check = Check(name=one.name, inputs=recipes, outputs=digests, min_sqnr_db=figure_db)
    cache.put_bytes(key, check.model_dump_json().encode())
    return check


def _recipe(spec: TensorSpec, node: fx.Node | None) -> Recipe:
    if spec.name.endswith("_mask"):
        return Recipe(name=spec.name, rule="prefix", high=math.ceil(spec.shape[-1] * _KEPT_TOKENS))
    if not spec.dtype.startswith(("f", "bf")):
        return Recipe(name=spec.name, rule="integers", high=_rows_read(node))
    if spec.name == "timestep":
        return Recipe(name=spec.name, rule="uniform", high=_TIMES)
    return Recipe(name=spec.name, rule="uniform", low=-_UNIT, high=_UNIT)


def _rows_read(node: fx.Node | None) -> int:
    """Of the smallest table that integers are looked up in; 2 where they are none, as for truth values."""
    users = node.users if node is not None else ()
    lookups = [user for user in users if user.target is torch.ops.aten.embedding.default and user.args[1] is node]
    return min((int(value_of(user.args[0]).shape[0]) for user in lookups), default=2)
