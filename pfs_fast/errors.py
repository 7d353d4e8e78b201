"""Every error that pfs_fast raises on purpose.

Each class also derives from the built-in that a caller would expect, so ``except ValueError`` keeps working. Messages
have one form: ``<function>: <argument> must <rule>, got <value>; <repair>``.
"""

from __future__ import annotations


class PfsError(Exception):
    """Base class of all errors of pfs_fast."""


class ConfigError(PfsError, ValueError):
    """An option has a value outside its range."""


class BudgetError(PfsError, ValueError):
    """A budget is malformed, or asks for a limit that is not supported."""


class InfeasibleBudgetError(BudgetError):
    """No structure of the model satisfies the budget; the message prints the feasible range."""


class TraceError(PfsError, ValueError):
    """The model could not be traced into a graph; the message names the place."""


class ModelError(PfsError, ValueError):
    """The model cannot be searched, slimmed or counted as it is (wrapper, mixed devices, no channel to gate)."""


class StructureError(PfsError, ValueError):
    """A structure does not belong to the model, or the slim network is not equal to the masked one."""


class LoaderError(PfsError, ValueError):
    """A loader yields nothing, or batches of a wrong form."""


class FileFormatError(PfsError, ValueError):
    """A file is truncated, of another format or version, or made for another model."""


class BackendError(PfsError, RuntimeError):
    """A compiled backend or an optional package was asked for and is not there."""


class BusyMachineError(PfsError, RuntimeError):
    """A latency cannot be measured: the times scatter too widely to decide by; the message says what to do."""


class NonFiniteLossError(PfsError, RuntimeError):
    """The loss became NaN or infinite; the message says at which step and what to try.

    Attributes:
        result: What was found before (a ``SearchResult`` from ``search``), or None.
        results: ``SearchResults`` of the seeds that had ended before, from a search over several; else None.
    """

    result: object = None
    results: object = None


class FileWriteError(PfsError, OSError):
    """A file could not be written (missing folder, permissions, full disk); what was there before is intact."""


class BusyError(PfsError, RuntimeError):
    """Another thread of the process is in a search or a training, which a second one would disturb."""
