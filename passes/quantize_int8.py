"""quantize-int8: linear layers and convolutions with int8 weights and activations quantized as they come."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import ClassVar

from movdc.compiler.abilities import Abilities
from movdc.compiler.errors import MovdcError
from movdc.compiler.int8_readers import quantized_graph, reader_kind
from movdc.compiler.pass_base import Pass, PassResult
from movdc.compiler.pieces import Piece
from movdc.compiler.program import Graph, Program, value_of
from movdc.compiler.weights import INT8, INT8_SCALE

MIN_SQNR_DB = 27.0  # of a cosine of 0.999


@dataclass(frozen=True)
class QuantizeInt8(Pass):
    """Store the weights of matrix products as int8, with one scale for each output channel.

    Before:  %w: f32[32,16] = weight(toy:w)           After:  %w_scale: f32[32] = weight(toy:w int8-scale)
             %y = aten.linear(%x, %w)                         %zeros_32: i32[32] = weight(zeros:32)
                                                              %w: i8[32,16] = weight(toy:w int8)
             %q = quantized_decomposed.choose_qparams_per_token_asymmetric(%x), then quantize_, dequantize_per_token
             %d = quantized_decomposed.dequantize_per_channel(%w, %w_scale, %zeros_32, 0, -127, 127, torch.int8)
             %y = aten.linear(%dequantize_per_token_default, %d)

    A tensor is read, quantized and dropped when its partition is lowered; nothing is calibrated. Each product quantizes
    its own input, also where several read one: from the choice of the scale to the product all is one kernel, which a
    shared input would tear apart. Scales are per token because that is what XNNPACK computes, whatever the graph says.
    Leaves as it is: 1. a weight that something else reads too, which would be stored twice; 2. grouped convolutions
    and computed biases, which have no quantized kernel; 3. norms and biases, few bytes that cost much quality;
    4. embeddings, unless `embeddings` asks for int8 rows (no arithmetic in int8: only the rows read are restored);
    5. convolutions behind a change of shape, which XNNPACK cannot lower; 6. weights whose key matches `keep`.
    A convolution's input has one scale in the graph; XNNPACK takes one an image, which is closer to fp32.
    Cost: 1 byte a weight and 4 a channel instead of 4 a weight; the loss of each tensor is listed in the bundle.
    Paper: extended version of arXiv 2502.04363, appendix B.2 (T5 from 18 to 4.64 GB); scales for each token and each
    channel as in ZeroQuant (arXiv 2206.01861).
    """

    name: ClassVar[str] = "quantize-int8"
    exact: ClassVar[bool] = False
    figure: ClassVar[str] = "text embedding cosine >= 0.999, video PSNR >= 30 dB against fp32"
    paper: ClassVar[str] = "arXiv 2502.04363 (extended version), appendix B.2"
    # Merging traces a stage again; folding would store what is restored; conv3d has no quantized kernel, conv2d has.
    after: ClassVar[tuple[str, ...]] = ("merge-tokens", "canonicalize", "conv3d-to-conv2d")

    stages: tuple[str, ...] = ("text_encoder",)  # patterns of stage names
    keep: tuple[str, ...] = ()  # patterns of weight keys that stay as they are
    embeddings: bool = False  # also the rows that are looked up

    def unable(self, abilities: Abilities) -> str | None:
        """Targets differ in what they do with int8."""
        if abilities.int8_products is None:
            return "it has no products with int8 weights"
        return (
            "it has no rows in int8, which `embeddings` asks for"
            if self.embeddings and not abilities.int8_rows
            else None
        )

    def requires(self, program: Program) -> None:
        """Every pattern means something: a misspelt one would leave a model large, or inexact, without a word."""
        stages = [stage.name for stage in program.stages]
        keys = {
            ref.key for stage, _, graph in program.graphs() if self._chosen(stage) for ref in graph.weights.values()
        }
        for option, patterns, names in (("stages", self.stages, stages), ("keep", self.keep, sorted(keys))):
            for pattern in patterns:
                if not any(fnmatchcase(name, pattern) for name in names):
                    known = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
                    raise MovdcError(f"pass {self.name}: {option}: nothing matches {pattern!r}; there are {known}")

    def apply(self, program: Program) -> PassResult:
        """Quantize every weight that qualifies, in every variant of the chosen stages."""
        changed: dict[tuple[str, str], Graph] = {}
        count = 0
        for stage, variant, graph in program.graphs():
            if self._chosen(stage) and (names := self._weights(graph)):
                changed[stage, variant] = quantized_graph(graph, names)
                count += len(names)
        return PassResult(program.map_graphs(changed), bool(changed), f"{count} weights in int8")

    def min_sqnr_db(self, piece: Piece) -> float | None:
        """The figure, for pieces that have int8 weights."""
        return MIN_SQNR_DB if any(INT8 in weight.ref.transforms for weight in piece.weights) else None

    def _chosen(self, stage: str) -> bool:
        return any(fnmatchcase(stage, pattern) for pattern in self.stages)

    def _weights(self, graph: Graph) -> list[str]:
        """Names of the weights that are read in one way that can be int8."""
        wanted: list[set[str | None]] = [{"product"}, {"lookup"}] if self.embeddings else [{"product"}]
        return [
            node.name
            for node in graph.graph.find_nodes(op="placeholder")
            if node.name in graph.weights
            and value_of(node).is_floating_point()
            and INT8_SCALE not in graph.weights[node.name].transforms  # rows of scales are looked up, too
            and not any(fnmatchcase(graph.weights[node.name].key, pattern) for pattern in self.keep)
            and {reader_kind(node, user, graph) for user in node.users} in wanted
        ]
