"""The Family protocol: what a model family declares so that its pipeline can be traced and run."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from movdc.compiler.checkpoints import Checkpoint
from movdc.compiler.device import Machine
from movdc.compiler.program import Program
from movdc.compiler.spec import SpecFile
from movdc.runtime.bundle import Sampler


class Family(ABC):
    """One family of text-to-video pipelines: its checkpoint layouts, stages, sampler and prompt rules."""

    name: ClassVar[str]
    micro_batches: ClassVar[tuple[int, ...]]  # frames decoded at once by the spatial decoder, best first

    @abstractmethod
    def checkpoints(self, spec_file: SpecFile) -> tuple[Checkpoint, ...]:
        """Where the weights come from, and whatever else is read beside the spec; fetches what is on the hub."""

    @abstractmethod
    def sampler(self, spec_file: SpecFile) -> Sampler:
        """The sampler's plan before any pass; needs no trace."""

    @abstractmethod
    def trace(self, spec_file: SpecFile, machine: Machine, micro_batch_frames: int) -> Program:
        """Check the checkpoints and trace every stage; raises MovdcError for what does not fit the family."""
