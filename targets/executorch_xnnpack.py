"""ExecuTorch with the XNNPACK delegate: CPUs of hosts and Android phones."""

from __future__ import annotations

import logging
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import fx

from movdc.compiler.program import DTYPES
from movdc.compiler.target import Artifact, Target
from movdc.runtime.bundle import Constant

_TAG = "weights"


@dataclass(frozen=True)
class ExecutorchXnnpack(Target):
    """A small .pte program and a .ptd file with all its weights, which stock ExecuTorch runs too."""

    name: ClassVar[str] = "executorch-xnnpack"
    load_copies: ClassVar[float] = 2.0  # XNNPACK packs the mapped weights into its own copy

    def refuse(self, node: fx.Node) -> str | None:
        """Why the XNNPACK and portable kernels cannot run a node."""
        if node.target in (torch.ops.aten.conv3d.default, torch.ops.aten.conv3d.padding):
            return "XNNPACK and the portable kernels convolve in two dimensions; run the pass conv3d-to-conv2d before"
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor) and value.is_complex():
            return "complex numbers have no kernels; write them as pairs of real ones"
        return None

    def emit(self, module: fx.GraphModule, directory: Path) -> Artifact:
        """Lower through to_edge_transform_and_lower with every weight outside the program."""
        logging.getLogger("torch").setLevel(logging.ERROR)
        from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
        from executorch.exir import ExecutorchBackendConfig, to_edge_transform_and_lower
        from executorch.exir.passes import MemoryPlanningPass

        arguments = tuple(
            torch.zeros(node.meta["val"].shape, dtype=node.meta["val"].dtype)
            for node in module.graph.find_nodes(op="placeholder")
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            exported = torch.export.export(module, arguments, strict=False)
            for node in exported.graph.find_nodes(op="placeholder"):
                if node.name not in exported.graph_signature.user_inputs:
                    node.meta.setdefault("custom", {})["delegate_constant_tag"] = _TAG
            edge = to_edge_transform_and_lower(exported, partitioner=[XnnpackPartitioner()])
            program = edge.to_executorch(
                ExecutorchBackendConfig(
                    external_constants=lambda _: _TAG,
                    # Inputs and outputs are the engine's buffers, so that none is copied between partitions.
                    memory_planning_pass=MemoryPlanningPass(alloc_graph_input=False, alloc_graph_output=False),
                )
            )
        path = directory / "program.pte"
        path.write_bytes(program.buffer)
        program.write_tensor_data_to_file(str(directory))
        weights = directory / f"{_TAG}.ptd"
        scratch_bytes = sum(program.executorch_program.execution_plan[0].non_const_buffer_sizes)
        if not weights.exists():
            return Artifact(path, None, (), scratch_bytes)
        return Artifact(path, weights, constants_of(weights.read_bytes()), scratch_bytes)


def constants_of(ptd: bytes) -> tuple[Constant, ...]:
    """Where each named tensor lies in a .ptd file; data without a layout, packed by a delegate, is bytes."""
    from executorch.extension.flat_tensor.serialize.serialize import (
        _deserialize_to_flat_tensor,
        _get_extended_header,
    )

    header: Any = _get_extended_header(ptd)
    table = _deserialize_to_flat_tensor(ptd[: header.flatbuffer_offset + header.flatbuffer_size])
    constants = []
    for entry in table.named_data:
        segment = table.segments[entry.segment_index]
        layout = entry.tensor_layout
        constants.append(
            Constant(
                key=entry.key,
                offset_bytes=header.segment_base_offset + segment.offset,
                size_bytes=segment.size,
                dtype=DTYPES[_TORCH_DTYPES[int(layout.scalar_type)]] if layout else "u8",
                shape=tuple(layout.sizes) if layout else (segment.size,),
            )
        )
    return tuple(sorted(constants, key=lambda constant: constant.key))


# ExecuTorch's ScalarType numbers, which are PyTorch's.
_TORCH_DTYPES = {
    0: torch.uint8, 1: torch.int8, 3: torch.int32, 4: torch.int64, 5: torch.float16, 6: torch.float32, 11: torch.bool,
    15: torch.bfloat16,
}  # fmt: skip
