"""pfs_fast: slim CNNs by Pruning from Scratch (Wang et al., AAAI 2020, arXiv 1909.12579).

Train one gate per channel of a random, frozen network, cut it to a budget, train what is left from scratch::

    result = pfs_fast.search(model, loader, budget=0.5)
    slim = result.slim()  # plain nn.Module with fewer channels, fresh weights
    pfs_fast.train(slim, train_loader, val_loader)
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError as _PackageNotFoundError
from importlib.metadata import version as _version

from . import data, errors, models, ops
from ._library import backends
from .budget import Budget
from .config import SearchConfig
from .cost import Cost, count
from .errors import PfsError
from .io import export, load, save
from .recipes import TrainConfig, scratch_b_epochs
from .result import SearchResult
from .search import search
from .seeds import SearchResults
from .slim import slim
from .structure import Structure
from .train import TrainResult, evaluate, train
from .verify import verify

try:
    __version__ = _version("pfs_fast")
except _PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0+unknown"

__all__ = [
    "Budget",
    "Cost",
    "PfsError",
    "SearchConfig",
    "SearchResult",
    "SearchResults",
    "Structure",
    "TrainConfig",
    "TrainResult",
    "backends",
    "count",
    "data",
    "errors",
    "evaluate",
    "export",
    "load",
    "models",
    "ops",
    "save",
    "scratch_b_epochs",
    "search",
    "slim",
    "train",
    "verify",
]
