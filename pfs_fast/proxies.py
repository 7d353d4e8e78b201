"""Cheap scores of a search result, to choose among those of several seeds. Larger is better.

None is known to find the structure that trains best, and those that read the result alone did no better than chance; see
"Several seeds" in ``docs/design.md``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from .errors import ConfigError
from .searching.result import SearchResult
from .training.batches import Loader, check_reiterable
from .training.evaluation import evaluate
from .training.recipes import TrainConfig
from .training.train import train

Proxy = Callable[[SearchResult], Any]
"""Gives a number, or a tensor of one element."""


SHORT = TrainConfig(epochs=1, lr=0.05, schedule="constant")
"""A first pass, before the rate falls."""


def params(result: SearchResult) -> float:
    """Parameters of the structure. Those of one budget of MACs differ in how many they buy with it."""
    return float(result.structure.params)


def search_loss(result: SearchResult) -> float:
    """Minus the mean loss of the last five entries of the history.

    Raises:
        ConfigError: A result without a history.
    """
    last = result.history[-5:]
    if not last:
        raise ConfigError(
            "search_loss: result must have a history, got none; choose by another proxy"
        )
    return -sum(float(entry["loss"]) for entry in last) / len(last)


@dataclass(frozen=True)
class ShortTraining:
    """Trains the slim network of a result for a short while, from scratch, and says how well it did.

    Attributes:
        loader: Training batches, as for ``pfs_fast.train``.
        val_loader: Batches whose top-1 accuracy is the score; None: minus the mean loss of the last epoch.
        config: How to train; default: one epoch at a constant rate of 0.05.
        repeats: Trainings from different random weights, whose scores are averaged.
        device: Where to train; default: where the model is.

    Example:
        >>> import torch, pfs_fast as pfs
        >>> from pfs_fast.proxies import ShortTraining
        >>> batches = [(torch.randn(8, 3, 32, 32), torch.randint(10, (8,)))]
        >>> config = pfs.SearchConfig(epochs=1, backend="reference")
        >>> model = pfs.models.vgg16(expansion=0.05)
        >>> results = pfs.search(model, batches, 0.5, config=config, progress=False, seeds=[0, 1])
        >>> chosen = results.best(by=ShortTraining(batches))
    """

    loader: Loader
    val_loader: Loader | None = None
    config: TrainConfig = SHORT
    repeats: int = 1
    device: torch.device | str | None = None

    def __post_init__(self) -> None:
        whole = isinstance(self.repeats, int) and not isinstance(self.repeats, bool)
        if not whole or self.repeats < 1:
            raise ConfigError(
                f"ShortTraining: repeats must be a whole number of at least 1, got {self.repeats!r}"
            )
        # Each result is trained on the same batches, so one pass is never enough.
        check_reiterable(self.loader, 2, "ShortTraining")
        if self.val_loader is not None:
            check_reiterable(self.val_loader, 2, "ShortTraining", "val_loader")

    def __call__(self, result: SearchResult) -> float:
        """The mean score of a result; its model and the global random state are left alone.

        Raises:
            ModelError: The result was loaded without a model.
        """
        return sum(self._once(result, seed) for seed in range(self.repeats)) / self.repeats

    def _once(self, result: SearchResult, seed: int) -> float:
        network = result.slim(seed=seed)
        trained = train(network, self.loader, None, self.config, device=self.device, progress=False)
        if self.val_loader is None:
            return -float(trained.history[-1]["loss"])
        return evaluate(network, self.val_loader).top1


PROXIES: dict[str, Callable[[SearchResult], float]] = {
    "params": params,
    "search_loss": search_loss,
}
"""Those that need nothing but the result, by the names that ``SearchResults.best`` takes."""


def proxy_of(by: str | Proxy) -> Proxy:
    """The function that ``by`` means.

    Raises:
        ConfigError: An unknown name, or no function.
    """
    if isinstance(by, str) and by in PROXIES:
        return PROXIES[by]
    if isinstance(by, str) or not callable(by):
        raise ConfigError(
            f"SearchResults: by must be one of {', '.join(map(repr, PROXIES))} or a function of a SearchResult, got {by!r}; "
            "ShortTraining(loader) makes one"
        )
    return by
