"""What is measured, and how much of it: networks, profiles, and the choices of the command line."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

import pfs_fast as pfs
from benchmarks.machine import Machine
from benchmarks.roofline import Ceilings
from benchmarks.timing import Effort
from pfs_fast.searching.config import PRECISIONS, compute_dtype


@dataclass(frozen=True)
class Network:
    """A network of ``pfs_fast.models`` at one image size."""

    model: str
    classes: int
    size: int

    def build(self, expansion: float = 1.0) -> nn.Module:
        """With the weights that the global random state gives."""
        return pfs.models.get(self.model, num_classes=self.classes, expansion=expansion)


NETWORKS = {
    "vgg16": Network("vgg16", 10, 32),
    "resnet20": Network("resnet20", 10, 32),
    "resnet56": Network("resnet56", 10, 32),
    "mobilenet_v2_32": Network("mobilenet_v2", 10, 32),
    "mobilenet_v2_224": Network("mobilenet_v2", 1000, 224),
    "resnet50_224": Network("resnet50", 1000, 224),
}


@dataclass(frozen=True)
class Profile:
    """How much a run measures.

    Attributes:
        batch: Images of a batch of 32x32 images.
        large_batch: Of a batch of 224x224 images.
        effort: Of one case of the suites ops and step.
        every_op_case: All dtypes and layouts of the operators, not only those that a search uses.
        search_networks: Networks of the suites search and agreement.
        search_batch: Images of their batches.
        targets: The mean gates r of the suite search.
        search_steps: Steps of a search; None: ten epochs.
        baseline_steps: Timed steps of each baseline that its time is extrapolated from.
        patience: Steps without a change after which a search with early stop ends.
        seeds: How many of the suites agreement and drift.
        agreement_networks: Networks of the suites agreement and drift.
        agreement_steps: Steps of the searches of the suite agreement; None: ten epochs.
        drift_steps: Steps of those of the suite drift.
    """

    batch: int
    large_batch: int
    effort: Effort
    every_op_case: bool
    search_networks: tuple[str, ...]
    search_batch: int
    targets: tuple[float, ...]
    search_steps: int | None
    baseline_steps: int
    patience: int
    seeds: int
    agreement_networks: tuple[str, ...]
    agreement_steps: int | None
    drift_steps: int


_CIFAR_PAIR = ("vgg16", "resnet20")

PROFILES = {
    # Under five minutes for all suites on two cores.
    ("quick", "cpu"): Profile(
        batch=32,
        large_batch=4,
        effort=Effort(seconds=4.0, least=3, most=15),
        every_op_case=False,
        search_networks=_CIFAR_PAIR,
        search_batch=16,
        targets=(0.2,),
        search_steps=160,
        baseline_steps=8,
        patience=40,
        seeds=1,
        agreement_networks=("resnet20",),
        agreement_steps=130,
        drift_steps=24,
    ),
    ("full", "cpu"): Profile(
        batch=128,
        large_batch=16,
        effort=Effort(seconds=60.0, least=7, most=31),
        every_op_case=True,
        search_networks=_CIFAR_PAIR,
        search_batch=128,
        targets=(0.2, 0.5),
        search_steps=None,
        baseline_steps=100,
        patience=352,  # an epoch of CIFAR-10
        seeds=3,
        agreement_networks=_CIFAR_PAIR,
        agreement_steps=None,
        drift_steps=256,
    ),
    # Beside build and tests in eight minutes on an H100.
    ("quick", "cuda"): Profile(
        batch=128,
        large_batch=256,
        effort=Effort(seconds=2.0, least=5, most=51, warmup=4),
        every_op_case=False,
        search_networks=("vgg16", "resnet56"),
        search_batch=128,
        targets=(0.2,),
        search_steps=None,
        baseline_steps=100,
        patience=352,  # an epoch of CIFAR-10
        seeds=1,
        agreement_networks=("resnet20",),
        agreement_steps=300,
        drift_steps=96,
    ),
    ("full", "cuda"): Profile(
        batch=128,
        large_batch=256,
        effort=Effort(seconds=20.0, least=21, most=201, warmup=10),
        every_op_case=True,
        search_networks=("vgg16", "resnet20", "resnet56"),
        search_batch=128,
        targets=(0.2, 0.5),
        search_steps=None,
        baseline_steps=100,
        patience=352,  # an epoch of CIFAR-10
        seeds=3,
        agreement_networks=_CIFAR_PAIR,
        agreement_steps=None,
        drift_steps=256,
    ),
}


@dataclass(frozen=True)
class Settings:
    """One run of the command.

    Attributes:
        device: Where to run.
        profile: How much to measure.
        networks: Those asked for; None: those of the suite.
        out: Folder of the results.
        data: ``("cifar10", file)``, ``("digits", None)`` or ``("random", None)``: images of the searches.
        compiled: Whether to run the compiled baseline.
        ceilings: Of this machine, measured in this run.
        machine: The record of it.
        parts: Folder of the finished parts of long suites.
        finished_only: Whether the suite agreement makes its tables of these parts alone.
        first_seed: Of the suites agreement and drift.
    """

    device: torch.device
    profile: Profile
    networks: tuple[str, ...] | None
    out: Path
    data: tuple[str, str | None]
    compiled: bool
    ceilings: Ceilings
    machine: Machine
    parts: Path
    finished_only: bool = False
    first_seed: int = 0

    def chosen(self, default: tuple[str, ...] = tuple(NETWORKS)) -> tuple[str, ...]:
        """Names of the networks of a suite."""
        return default if self.networks is None else self.networks

    def batch(self, name: str) -> int:
        """Images of a batch of a single step."""
        return self.profile.batch if NETWORKS[name].size <= 64 else self.profile.large_batch

    @property
    def seeds(self) -> range:
        """Those of the suites agreement and drift."""
        return range(self.first_seed, self.first_seed + self.profile.seeds)

    @property
    def native(self) -> str:
        """The lowest precision that the device computes natively, as in ``SearchConfig``."""
        return precision_name(compute_dtype("auto", self.device))


def precision_name(dtype: torch.dtype) -> str:
    """``fp32`` for torch.float32 and so on."""
    return next(name for name, value in PRECISIONS.items() if value == dtype)
