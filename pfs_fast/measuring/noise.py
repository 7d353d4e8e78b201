"""When a measured latency is too noisy to decide by, and the error that says so."""

from __future__ import annotations

import torch

from ..budgets.deployment import Deployment
from ..errors import BusyMachineError
from .timing import Timing

_SHARE = 0.25


def decides(timing: Timing, limit: float) -> bool:
    """Whether a measured figure tells a structure that is within a limit from one that is not.

    It does while its spread is at most a quarter of the figure itself, or of its distance from the limit.

    Args:
        timing: Milliseconds.
        limit: Milliseconds.
    """
    return timing.spread <= _SHARE * max(timing.median, abs(limit - timing.median))


def shown(timing: Timing) -> str:
    """A measured figure and its spread as text."""
    spread = f"{timing.spread:.2g}" if timing.spread < 100 else f"{timing.spread:,.0f}"
    return f"{timing.median:.4g} ms with a spread of {spread} ms"


def busy(got: str, limit: float, run: Deployment) -> BusyMachineError:
    """The error of a machine that is too busy to measure on.

    Args:
        got: What was seen, with its spread.
        limit: Milliseconds.
        run: Device, batch, precision, threads.
    """
    device = run.place()
    threads = torch.get_num_threads() if run.threads is None else run.threads
    on, fewer = str(device), ""
    if device.type == "cpu":
        on += f", {threads} threads" if threads > 1 else ", 1 thread"
        fewer = f"ask for fewer threads than {threads}, " if threads > 1 else ""
    return BusyMachineError(
        f"latency: the machine must be quiet while it is measured, got {got}, for a limit of {limit:.4g} ms (on {on}, batch "
        f"{run.batch}, {run.precision}); other work was running or the clocks vary: stop the other work and ask again, {fewer}"
        "measure on a quiet machine, or limit macs instead of latency_ms; the times of single layers are kept"
    )
