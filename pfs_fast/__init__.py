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
from .budgets.budget import Budget
from .budgets.cost import Cost, count
from .budgets.structure import Structure
from .errors import PfsError
from .measuring.comparison import Comparison, compare
from .searching.config import SearchConfig
from .searching.result import SearchResult
from .searching.search import search
from .searching.seeds import SearchResults
from .slimming.fold import fold
from .slimming.slim import slim
from .slimming.verify import verify
from .storage.io import export, load, save
from .training.recipes import TrainConfig, scratch_b_epochs
from .training.train import TrainResult, evaluate, train

try:
    __version__ = _version("pfs_fast")
except _PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0+unknown"

__all__ = [
    "Budget",
    "Comparison",
    "Cost",
    "PfsError",
    "SearchConfig",
    "SearchResult",
    "SearchResults",
    "Structure",
    "TrainConfig",
    "TrainResult",
    "backends",
    "compare",
    "count",
    "data",
    "errors",
    "evaluate",
    "export",
    "fold",
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
