"""The one page that lists the targets."""

from __future__ import annotations

from pkgutil import resolve_name

from movdc.compiler.configured import split_text
from movdc.compiler.errors import MovdcError
from movdc.compiler.target import Target

# Name of each target, and where its class is: a line adds one, and it is imported when it is asked for.
TARGETS: dict[str, str] = {
    "coreml": "movdc.targets.coreml:Coreml",
    "executorch-coreml": "movdc.targets.executorch_coreml:ExecutorchCoreml",
    "executorch-vulkan": "movdc.targets.executorch_vulkan:ExecutorchVulkan",
    "executorch-xnnpack": "movdc.targets.executorch_xnnpack:ExecutorchXnnpack",
    "onnx": "movdc.targets.onnx:Onnx",
    "null": "movdc.targets.null:Null",
}


def parse_target(text: str) -> Target:
    """The target of `name` or `name{option=value,...}`; raises MovdcError with what there is."""
    name, options = split_text(text)
    if name not in TARGETS:
        raise MovdcError(f"unknown target {name!r}; there are {', '.join(TARGETS)}")
    return target_class(name).configured(options)


def target_class(name: str) -> type[Target]:
    """The class of a target that there is."""
    found: type[Target] = resolve_name(TARGETS[name])
    return found
