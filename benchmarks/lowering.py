"""How the time to lower grows with the blocks of a text encoder, with and without share-templates.

python benchmarks/lowering.py
"""

from __future__ import annotations

import os
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table
from transformers import T5Config

from movdc.compiler.bundle_writer import BundleWriter
from movdc.compiler.cache import open_cache
from movdc.compiler.device import Machine
from movdc.compiler.lower import lower
from movdc.compiler.pass_base import run_passes
from movdc.compiler.program import Program, Stage
from movdc.compiler.spec import load_spec
from movdc.compiler.trace import trace
from movdc.compiler.weights import RandomSource
from movdc.models.opensora import OpenSora, TextEncoder
from movdc.passes.pipeline import parse_pipeline
from movdc.passes.share_templates import ShareTemplates
from movdc.runtime.bundle import TensorSpec
from movdc.targets.executorch_xnnpack import ExecutorchXnnpack

EXAMPLE = Path(__file__).parents[1] / "examples" / "tiny.yaml"
WIDTH, TOKENS = 64, 24


def program_of(blocks: int, example: Program) -> Program:
    """A T5 of tiny width, cut behind each block, in the place of the example's stages."""
    config = T5Config(
        d_model=WIDTH, d_kv=16, d_ff=128, num_heads=4, vocab_size=256, num_layers=blocks, feed_forward_proj="gated-gelu"
    )
    config._attn_implementation = "eager"
    with torch.device("meta"):
        shapes = {key: tuple(tensor.shape) for key, tensor in TextEncoder(config).state_dict().items()}
    inputs = (
        TensorSpec(name="input_ids", dtype="i64", shape=(1, TOKENS)),
        TensorSpec(name="text_mask", dtype="f32", shape=(1, TOKENS)),
    )
    graph = trace(lambda: TextEncoder(config), inputs, ("text",), RandomSource(0, shapes).refs())
    program = replace(example, stages=(Stage("text_encoder", "once", {"plain": graph}),))
    program = run_passes(program, parse_pipeline("canonicalize,split-to-slices,attention-to-bmm"))
    graph = program.stages[0].variants["plain"]
    last = {}  # the last sum of each block
    for node in graph.compute_nodes:
        scopes = [scope for scope, _ in (node.meta.get("nn_module_stack") or {}).values()]
        inside = [scope for scope in scopes if scope.startswith("t5.encoder.block.") and scope.count(".") == 3]
        if inside and node.target is torch.ops.aten.add.Tensor and node.meta["val"].shape == (1, TOKENS, WIDTH):
            last[inside[0]] = node.name
    return program.map_graphs({("text_encoder", "plain"): replace(graph, cuts=tuple(last.values()))})


def lowering_s(program: Program) -> float:
    """Seconds of processor time to lower a program and to write its weights."""
    with tempfile.TemporaryDirectory() as folder, open_cache(Path(folder) / "cache") as cache:
        start = time.process_time()
        lower(program, ExecutorchXnnpack(), BundleWriter(Path(folder)), cache, lambda what, done, total: None)
        return time.process_time() - start


def main(
    blocks: Annotated[list[int] | None, typer.Option(help="Numbers of blocks.")] = None,
    unshared: Annotated[int, typer.Option(help="Measure without sharing up to this many blocks.")] = 6,
) -> None:
    """Lower each number of blocks and print one table."""
    machine = Machine(10**9, 1e9, 1e9, 0.0, 2.0)
    example = OpenSora().trace(load_spec(EXAMPLE), machine, 4)
    lowering_s(ShareTemplates()(program_of(1, example)).program)  # imports and caches of ExecuTorch
    table = Table(title=f"processor seconds to lower, load {os.getloadavg()[0]:.1f}")
    for column in ("blocks", "shared", "per added block", "not shared"):
        table.add_column(column, justify="right")
    before: tuple[int, float] | None = None
    for count in blocks or [6, 12, 24, 48]:
        program = program_of(count, example)
        shared_s = lowering_s(ShareTemplates()(program).program)
        growth = f"{(shared_s / before[1] - 1) / (count - before[0]):.2%}" if before else "-"
        alone = f"{lowering_s(program):.1f}" if count <= unshared else "-"
        table.add_row(str(count), f"{shared_s:.1f}", growth, alone)
        before = (count, shared_s)
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
