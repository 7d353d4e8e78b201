"""Budgets: what a slim network may cost at most, as a user writes it and as integers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from ..errors import BudgetError
from .budget_values import (
    Width,
    Widths,
    absolute,
    checked_count,
    checked_limit,
    checked_patterns,
    checked_share,
    checked_time,
    checked_widths,
    parsed_number,
)
from .deployment import Deployment

COSTS = ("macs", "params", "weight_bytes", "peak_activation_bytes", "latency_ms")
"""Everything that has an upper limit, in the order in which it is asked for and reported."""


@dataclass(frozen=True)
class Limits:
    """A budget in absolute numbers; ``None`` where nothing is limited.

    Attributes:
        macs: Largest number of multiply-accumulates of one image.
        params: Largest number of parameters.
        multiple_of: Widths of prunable groups are multiples of this many channels.
        preferred: The multiple may be dropped for single groups where the budget could not be met otherwise; every width up
            to the whole one can be reached.
        min_channels: Every group keeps at least this many channels.
        weight_bytes: Largest number of bytes of all parameters.
        peak_activation_bytes: Largest number of bytes of activations that live at once.
        latency_ms: Longest forward pass, milliseconds.
        latency: The share of the dense network's latency that ``latency_ms`` is, where that is what was asked.
        widths: ``(pattern, (least, most))`` channels of layers, as in ``Budget``.
        ignore: Patterns of layers that keep every channel.
        run: How the slim network will run: batch, precision, device.
    """

    macs: int | None = None
    params: int | None = None
    multiple_of: int = 1
    min_channels: int = 1
    weight_bytes: int | None = None
    peak_activation_bytes: int | None = None
    latency_ms: float | None = None
    widths: Widths = field(default=(), repr=False)
    ignore: tuple[str, ...] = field(default=(), repr=False)
    preferred: bool = field(default=False, repr=False)
    latency: float | None = field(default=None, repr=False)
    run: Deployment = field(default_factory=Deployment, repr=False)

    def allow(self, cost: tuple[int, int]) -> bool:
        """Whether ``(macs, params)`` exceeds no limit."""
        return not self.exceeded({"macs": cost[0], "params": cost[1]})

    def asked(self) -> dict[str, int | float]:
        """The limits that are set. ``{cost: limit}``."""
        values = {name: getattr(self, name) for name in COSTS}
        return {name: value for name, value in values.items() if value is not None}

    def exceeded(self, costs: Mapping[str, int | float]) -> list[str]:
        """Names of the limits that costs are above; a cost that is not given is not judged."""
        return [
            name for name, limit in self.asked().items() if name in costs and costs[name] > limit
        ]


@dataclass(frozen=True)
class Budget:
    """Upper limits on a slim network. All limits that are set hold together.

    A float in (0, 1] is a share, a whole number is absolute: ``Budget(macs=0.5)``, ``Budget(macs=150_000_000, params=0.3)``.
    MACs are multiply-accumulates of one image.

    Args:
        macs: Share of the reference's, or number of, multiply-accumulates.
        params: Share of the reference's, or number of, parameters.
        latency_ms: Milliseconds of one forward pass of ``batch`` images, as measured on ``device`` in ``runtime``.
        latency: Share of the dense network's latency in (0, 1], measured in the same way, in turns with the slim one's.
        peak_activation_bytes: Share of the searched network's, or number of, bytes of the activations of ``batch`` images
            that live at the same time (``pfs_fast.measuring.memory`` says what counts).
        multiple_of: Widths are multiples of this many channels. ``"auto"``: the multiple that the target computes fast
            (`Deployment.preferred_multiple`), dropped for single groups where the budget could not be met otherwise. A
            number holds strictly, and a group narrower than it keeps its full width; 1 gives the paper's exact structures.
        min_channels: Every prunable group keeps at least this many channels (or all, if it has fewer).
        weight_bytes: Share of the reference's, or number of, bytes of all parameters in ``precision``.
        widths: Least and most channels of layers, ``{"layer3.*": (8, 64)}``. An integer is a number of channels, a float in
            (0, 1] a share of the layer's, None an open end. The pattern is a shell-style one and means layers by their own
            name or that of a module around them. Channels that are joined with those of another layer follow it; where
            patterns overlap, all hold.
        ignore: Patterns of layers that keep every channel.
        batch: Images in one forward pass, for latency and activations.
        precision: dtype of the slim network: ``"fp32"``, ``"bf16"``, ``"fp16"`` or ``"fp64"``; for bytes and latency.
        device: Where the slim network will run, for latency and ``"auto"``; None: the current CUDA device where there is
            one, else the CPU.
        threads: CPU threads, for latency, at most 8 for each processor that the process may use; None: as many as PyTorch
            uses.
        runtime: What latency is measured in: ``"eager"`` PyTorch; ``"folded"``, batch norms folded into convolutions (`fold`)
            and channels last; ``"compile"``, folded and compiled by ``torch.compile``; ``"onnxruntime"``, exported to ONNX.

    Raises:
        BudgetError: For a value outside its range, or if no limit is set.

    Example:
        >>> Budget(macs=0.5, multiple_of=8).resolve((1000, 90))
        Limits(macs=500, params=None, multiple_of=8, min_channels=1, weight_bytes=None, peak_activation_bytes=None, latency_ms=None)
    """

    macs: float | int | None = None
    params: float | int | None = None
    latency_ms: float | None = None
    peak_activation_bytes: float | int | None = None
    multiple_of: int | str = "auto"
    min_channels: int = 1
    weight_bytes: float | int | None = None
    widths: Mapping[str, tuple[Width, Width]] | Widths = ()
    ignore: tuple[str, ...] = ()
    batch: int = 1
    precision: str = "fp32"
    device: str | None = None
    threads: int | None = None
    latency: float | None = None
    runtime: str = "eager"

    def __post_init__(self) -> None:
        if all(getattr(self, name) is None for name in (*COSTS, "latency")):
            raise BudgetError(
                "Budget: at least one limit must be set, got none; set macs or params, e.g. macs=0.5"
            )
        for name in ("macs", "params", "weight_bytes", "peak_activation_bytes"):
            object.__setattr__(self, name, checked_limit(name, getattr(self, name)))
        object.__setattr__(self, "latency_ms", checked_time(self.latency_ms))
        object.__setattr__(self, "latency", checked_share("latency", self.latency))
        if self.latency is not None and self.latency_ms is not None:
            raise BudgetError(
                f"Budget: latency must be the only limit on time, got latency={self.latency:g} and "
                f"latency_ms={self.latency_ms:g}; leave one of them out"
            )
        if not isinstance(self.multiple_of, str) or self.multiple_of != "auto":
            object.__setattr__(self, "multiple_of", checked_count("multiple_of", self.multiple_of))
        object.__setattr__(self, "min_channels", checked_count("min_channels", self.min_channels))
        object.__setattr__(self, "widths", checked_widths(self.widths))
        object.__setattr__(self, "ignore", checked_patterns(self.ignore))
        run = Deployment(self.device, self.batch, self.precision, self.threads, self.runtime)
        for name in ("device", "batch", "threads"):
            object.__setattr__(self, name, getattr(run, name))

    @staticmethod
    def of(value: float | int | Budget) -> Budget:
        """A budget as it is, or a share (float) or number (int) of MACs as a budget."""
        if isinstance(value, Budget):
            return value
        if value is None:
            raise BudgetError(
                "Budget: budget must be a share, a number of MACs or a Budget, got None; pass e.g. 0.5"
            )
        return Budget(macs=value)

    @staticmethod
    def parse(text: str, **more: Any) -> Budget:
        """The budget of a command-line text: ``"0.5"``, ``"50%"``, ``"macs=150M"``, ``"params=1M,latency_ms=20,batch=8"``.

        Args:
            text: ``key=number`` pairs with commas between them; numbers with K, M, G (thousands), KiB, MiB, GiB or %.
            more: ``widths`` and ``ignore``, which have no text form here.

        Raises:
            BudgetError: For an unknown key, a key given twice, or a value that is not a number.
        """
        if not isinstance(text, str):
            raise BudgetError(
                f"Budget.parse: text must be a string, got {text!r}; pass numbers to Budget itself"
            )
        unknown = sorted(more.keys() - {"widths", "ignore"})
        if unknown:
            raise BudgetError(
                f"Budget.parse: only widths and ignore may be given beside the text, got {', '.join(unknown)}; write it into the text"
            )
        known = [f.name for f in fields(Budget) if f.name not in ("widths", "ignore")]
        values: dict[str, Any] = {}
        for part in text.split(","):
            key, equals, number = (piece.strip() for piece in part.partition("="))
            if not equals:
                key, number = "macs", key
            if key not in known:
                raise BudgetError(
                    f"Budget.parse: key must be one of {', '.join(known)}, got {key!r} in {text!r}"
                )
            if key in values:
                raise BudgetError(
                    f"Budget.parse: each key must be given once, got {key!r} twice in {text!r}"
                )
            if key == "latency_ms" and number.endswith("%"):
                raise BudgetError(
                    f"Budget.parse: latency_ms must be in milliseconds, never a share, got {number!r} in {text!r}; write e.g. 20, or "
                    f"latency={number}"
                )
            plain = key in ("device", "precision", "runtime") or (key, number) == (
                "multiple_of",
                "auto",
            )
            values[key] = number if plain else parsed_number(number, text)
        return Budget(**values, **more)

    @property
    def run(self) -> Deployment:
        """How the slim network will run."""
        return Deployment(self.device, self.batch, self.precision, self.threads, self.runtime)

    def resolve(
        self,
        reference: tuple[int, int],
        whole_peak: int | None = None,
        whole_latency: float | None = None,
    ) -> Limits:
        """Absolute limits for a reference network.

        Args:
            reference: ``(macs, params)`` that shares refer to.
            whole_peak: Peak bytes of activations of the searched network, for a share of them.
            whole_latency: Milliseconds of the searched network, for a share of them.

        Returns:
            Limits: Shares become ``floor(share * reference)``, in exact arithmetic on the share as printed.

        Raises:
            BudgetError: For ``multiple_of="auto"`` on a device that is not there.
        """
        macs, params = reference
        run = self.run
        latency_ms = self.latency_ms
        if self.latency is not None:
            assert whole_latency is not None
            latency_ms = self.latency * whole_latency
        return Limits(
            macs=absolute(self.macs, macs),
            params=absolute(self.params, params),
            multiple_of=run.preferred_multiple()
            if self.multiple_of == "auto"
            else self.multiple_of,
            min_channels=self.min_channels,
            weight_bytes=absolute(self.weight_bytes, params * run.dtype.itemsize),
            peak_activation_bytes=absolute(self.peak_activation_bytes, whole_peak),
            latency_ms=latency_ms,
            latency=self.latency,
            widths=self.widths,
            ignore=self.ignore,
            preferred=self.multiple_of == "auto",
            run=run,
        )

    def __str__(self) -> str:
        return ", ".join(self._parts())

    def _parts(self) -> Iterator[str]:
        for name in COSTS:
            value = getattr(self, name)
            if name == "latency_ms" and value is not None:
                yield f"latency <= {value:g} ms"
            elif isinstance(value, int):
                yield f"{name} <= {value:,}"
            elif value is not None:
                whole = "whole network" if name == "peak_activation_bytes" else "reference"
                yield f"{name} <= {value:g} of the {whole}"
        if self.latency is not None:
            yield f"latency <= {self.latency:g} of the dense network's"
        for name, default in (("multiple_of", "auto"), ("min_channels", 1)):
            if getattr(self, name) != default:
                yield f"{name} = {getattr(self, name)}"
        for pattern, (least, most) in self.widths:
            yield f"width of {pattern} in {_end(least)}..{_end(most)}"
        if self.ignore:
            yield f"ignore {', '.join(self.ignore)}"
        usual = Deployment()
        for name in ("batch", "precision", "device", "threads", "runtime"):
            if getattr(self, name) != getattr(usual, name):
                yield f"{name} {getattr(self, name)}"


def _end(width: Width) -> str:
    return "" if width is None else f"{width:g}"
