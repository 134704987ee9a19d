"""The runtime's errors: each is one sentence for the person who runs a bundle."""

from __future__ import annotations


class RunError(Exception):
    """Something in the bundle, its inputs or this machine stops the run; the message says what to do."""


class BundleError(RunError):
    """A file of the bundle is missing, damaged, foreign or not where it should be."""


class PartitionError(RunError):
    """A partition cannot be loaded or run; the message names it."""


class InputError(RunError):
    """A tensor given to a stage has the wrong name, type or shape."""


class BudgetError(RunError):
    """The memory budget, or the memory that is left, does not hold what the stage needs at least."""


class CancelledError(RunError):
    """The run was cancelled."""
