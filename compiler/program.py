"""The Program: a whole pipeline as immutable data; passes take one and return another."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import fx

from movdc.compiler.device import Machine
from movdc.compiler.errors import InternalError
from movdc.compiler.spec import PipelineSpec
from movdc.compiler.weights import WeightRef
from movdc.runtime.bundle import Decode, DType, Prompt, Sampler, TensorSpec

DTYPES: dict[torch.dtype, DType] = {
    torch.float32: "f32",
    torch.float16: "f16",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.bool: "bool",
}
TORCH_DTYPES = {name: dtype for dtype, name in DTYPES.items()}


@dataclass(frozen=True)
class TokenLayout:
    """How a graph arranges video tokens: what merging frames needs to know, as the family declares it.

    Tokens are [B, T, S, C] where they enter and leave an attention, T latent frames of S patches. `attentions` and
    `mlps` are patterns (fnmatch) of module paths as nn_module_stack names them. `retrace` traces the same stage with
    another number of frames. `frame_mask` is False on frames held as condition, None if every frame is denoised;
    `frame_mask_input` names the stage input that says so where only the run knows.
    """

    frames: int
    attentions: tuple[str, ...]
    mlps: tuple[str, ...]
    retrace: Callable[[int], Graph]
    frame_mask: tuple[bool, ...] | None = None
    frame_mask_input: str | None = None
    merged_by: str = ""  # on a merged variant: the pass that made it, with its options


@dataclass(frozen=True)
class Graph:
    """One variant of a stage: ATen nodes whose placeholders are the weights, then the inputs.

    `graph` is never changed in place: a pass that rewrites copies it first. `cuts` are the names of the nodes
    after which a new partition starts; `templates` has, for each partition, the digest of the program it shares with
    every partition of the same digest, and is empty where nothing is shared; `estimated_bytes` is what the planner
    expects that it holds at most, cut so.
    """

    graph: fx.Graph
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    weights: Mapping[str, WeightRef]  # placeholder name -> reference
    cuts: tuple[str, ...] = ()
    templates: tuple[str, ...] = ()
    estimated_bytes: int = 0
    layout: TokenLayout | None = None

    def copy(self) -> fx.Graph:
        """A copy of the nodes, metadata included, for a pass to rewrite."""
        copied = fx.Graph()
        val_map: dict[fx.Node, fx.Node] = {}
        result = copied.graph_copy(self.graph, val_map)
        copied.output(result)
        next(iter(reversed(copied.nodes))).meta = dict(self.output_node.meta)
        assert len(val_map) == len(self.graph.nodes) - 1
        return copied

    @property
    def output_node(self) -> fx.Node:
        """The node that returns the stage's outputs."""
        return next(iter(reversed(self.graph.nodes)))

    @property
    def compute_nodes(self) -> list[fx.Node]:
        """Every node that computes, in order."""
        return [node for node in self.graph.nodes if node.op == "call_function"]


@dataclass(frozen=True)
class Stage:
    """One model of the pipeline, in one or more variants."""

    name: str
    cadence: Literal["once", "per_step", "per_chunk"]
    variants: Mapping[str, Graph]

    @property
    def layout(self) -> TokenLayout | None:
        """How the plain variant arranges video tokens, where the family says so."""
        return self.variants["plain"].layout if "plain" in self.variants else None


@dataclass(frozen=True)
class Program:
    """Everything that passes may rewrite: the stages and the sampler's plan."""

    spec: PipelineSpec
    machine: Machine
    stages: tuple[Stage, ...]
    sampler: Sampler
    decode: Decode
    prompt: Prompt
    tokenizer_json: bytes = field(repr=False)

    def map_graphs(self, rewrite: Mapping[tuple[str, str], Graph]) -> Program:
        """The program with the graphs at (stage, variant) replaced."""
        stages = tuple(
            replace(
                stage, variants={name: rewrite.get((stage.name, name), graph) for name, graph in stage.variants.items()}
            )
            for stage in self.stages
        )
        return replace(self, stages=stages)

    def graphs(self) -> list[tuple[str, str, Graph]]:
        """Every (stage name, variant name, graph)."""
        return [(stage.name, name, graph) for stage in self.stages for name, graph in stage.variants.items()]


def value_of(node: fx.Node) -> torch.Tensor:
    """The fake tensor a node produces."""
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor):
        raise InternalError(f"node {node.name} ({node.target}) produces {type(value).__name__}, not one tensor")
    return value


def spec_of(name: str, tensor: torch.Tensor) -> TensorSpec:
    """Name, dtype and shape of a tensor."""
    return TensorSpec(name=name, dtype=DTYPES[tensor.dtype], shape=tuple(int(size) for size in tensor.shape))
