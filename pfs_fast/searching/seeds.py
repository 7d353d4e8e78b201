"""One search for each of several random initialisations, and what they give together."""

from __future__ import annotations

import copy
import math
import numbers
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, overload

from torch import Tensor, nn

from .._ambient import own_settings
from ..budgets.budget import Budget
from ..budgets.structure import Structure, aligned
from ..errors import ConfigError, FileFormatError, ModelError, NonFiniteLossError, StructureError
from ..proxies import Proxy, proxy_of
from ..slimming.init import draw, some
from ..storage.files import read_safetensors, write_safetensors
from .config import SearchConfig
from .result import SearchResult
from .similarity import structure_similarity

FORMAT, VERSION = "pfs_fast.searches", 1

SearchOne = Callable[[nn.Module, SearchConfig, "Path | None", str], SearchResult]
"""A search of a model with its own options, checkpoint and name on the progress line."""


class SearchResults(Sequence[SearchResult]):
    """Searches of one network from several random initialisations, in the order of their seeds.

    Every result knows the copy of the model that it was found on, so as many copies are held as there are seeds.

    Args:
        results: Of the same network and scope, each with a ``config.seed`` of its own.

    Raises:
        ConfigError: No result, something else, or one seed twice. StructureError: Results of different networks.

    Example:
        >>> import torch, pfs_fast as pfs
        >>> loader = [(torch.randn(8, 3, 32, 32), torch.randint(10, (8,)))]
        >>> config = pfs.SearchConfig(epochs=2, backend="reference")
        >>> model = pfs.models.resnet20(expansion=0.25)
        >>> results = pfs.search(model, loader, 0.5, config=config, progress=False, seeds=[0, 1, 2])
        >>> results.seeds, results.similarity().shape
        ((0, 1, 2), torch.Size([3, 3]))
        >>> results.best(by="params").slim() is not None
        True
    """

    def __init__(self, results: Iterable[SearchResult]) -> None:
        self._results = tuple(results)
        odd = next((r for r in self._results if not isinstance(r, SearchResult)), None)
        if not self._results or odd is not None:
            got = "none" if odd is None else type(odd).__name__
            raise ConfigError(
                f"SearchResults: results must be at least one SearchResult, got {got}; pass what searches returned"
            )
        if len(set(self.seeds)) != len(self.seeds):
            raise ConfigError(
                f"SearchResults: results must have different config.seed, got {list(self.seeds)}; leave out the repeated ones"
            )
        first = _sizes(self._results[0])
        for result in self._results[1:]:
            if _sizes(result) != first:
                names = sorted(dict(first.items() ^ _sizes(result).items()))
                raise StructureError(
                    f"SearchResults: results must be of one network and scope, got seed {result.config.seed} with other "
                    f"groups in {names[:5]}; put only searches of the same network together"
                )

    @property
    def seeds(self) -> tuple[int, ...]:
        """Seed of every result."""
        return tuple(result.config.seed for result in self._results)

    def structures_for(self, budget: float | int | Budget | None = None) -> list[Structure]:
        """The structure of every seed.

        Args:
            budget: As in ``SearchResult.structure_for``, which says what is raised; default: the budget of each search.
        """
        return [r.structure if budget is None else r.structure_for(budget) for r in self._results]

    def similarity(
        self, budget: float | int | Budget | None = None, *, measure: str = "width_correlation"
    ) -> Tensor:
        """How alike the structures of every two seeds are: the matrix of the paper's figures.

        Args:
            budget: As in ``structures_for``.
            measure: ``"width_correlation"`` (the paper's), ``"share_correlation"``, ``"widths"`` or ``"channels"``; see
                ``pfs_fast.searching.similarity.structure_similarity``.

        Returns:
            Tensor: [S, S] in the order of ``seeds``, float64; symmetric, 1 on the diagonal.
        """
        return structure_similarity(self.structures_for(budget), measure)

    def scores(self, by: str | Proxy) -> dict[int, float]:
        """What a proxy says of every seed. Larger is better.

        Args:
            by: As in ``best``.

        Raises:
            ConfigError: An unknown name, or a function that gives something else than a number.
        """
        proxy, scores = proxy_of(by), {}
        for result in self._results:
            score = proxy(result)
            single = isinstance(score, Tensor) and score.numel() == 1
            if not (single or isinstance(score, numbers.Real)) or math.isnan(score):
                raise ConfigError(
                    f"SearchResults: by must give a number for every result, got {score!r} for seed {result.config.seed}"
                )
            scores[result.config.seed] = float(score)
        return scores

    def best(self, by: str | Proxy) -> SearchResult:
        """The result with the largest score, the first of equals. Nothing is chosen unasked: ``by`` has no default.

        Args:
            by: A function of a ``SearchResult`` that gives a number, larger for better, such as ``proxies.ShortTraining``; or
                ``"params"`` (of the structure) or ``"search_loss"`` (the smallest), which need nothing but the result and have
                not been found to predict how well a structure trains.

        Raises:
            ConfigError: As in ``scores``.
        """
        scores = self.scores(by)
        return self._results[self.seeds.index(max(scores, key=scores.__getitem__))]

    def report(self, budget: float | int | Budget | None = None) -> str:
        """The structures of all seeds and their similarity, as tables.

        Args:
            budget: As in ``structures_for``.
        """
        structures = self.structures_for(budget)
        heads = [f"seed {seed}" for seed in self.seeds]
        rows = [("kept channels", *heads, "of")]
        for name, size in structures[0].sizes.items():
            rows.append((name, *(f"{len(s.kept[name]):,}" for s in structures), f"{size:,}"))
        for title, now, base in (
            ("MACs", "macs", "base_macs"),
            ("params", "params", "base_params"),
        ):
            whole = getattr(structures[0], base)
            rows.append((title, *(f"{getattr(s, now):,}" for s in structures), f"{whole:,}"))
        matrix = structure_similarity(structures).tolist()
        alike = [("correlation of the widths", *heads)]
        alike += [
            (head, *(f"{value:.3f}" for value in row))
            for head, row in zip(heads, matrix, strict=True)
        ]
        return f"{aligned(rows)}\n\n{aligned(alike)}"

    @overload
    def __getitem__(self, index: int) -> SearchResult: ...

    @overload
    def __getitem__(self, index: slice) -> SearchResults: ...

    def __getitem__(self, index: int | slice) -> SearchResult | SearchResults:
        """A result by its place, not by its seed; or several, in a ``SearchResults``."""
        found = self._results[index]
        return SearchResults(found) if isinstance(found, tuple) else found

    def __len__(self) -> int:
        return len(self._results)

    def __iter__(self) -> Iterator[SearchResult]:
        return iter(self._results)

    def __repr__(self) -> str:
        return f"SearchResults(seeds={list(self.seeds)}, budget={self._results[0].budget})"

    # -- files -----------------------------------------------------------------------------------------------------

    @own_settings()
    def save(self, path: str | os.PathLike[str]) -> None:
        """Write all results, without models, to one safetensors file, whole or not at all.

        Raises:
            FileWriteError: The place cannot be written; an old file there stays as it was.
        """
        tensors: dict[str, Tensor] = {}
        entries = []
        for i, result in enumerate(self._results):
            own, metadata = result.content()
            tensors |= {f"{i}.{name}": tensor for name, tensor in own.items()}
            entries.append(metadata)
        document = {"format": FORMAT, "version": VERSION, "results": entries}
        write_safetensors(path, tensors, document, caller="SearchResults.save")

    @classmethod
    @own_settings()
    def load(cls, path: str | os.PathLike[str], model: nn.Module | None = None) -> SearchResults:
        """Read a file of ``save``.

        Args:
            path: The file.
            model: A model of the searched class and widths; never modified. Each result gets a copy with the weights of its
                seed, which are those that were searched if they are drawn on the same kind of device.

        Raises:
            FileFormatError: Truncated, of another format or version, inconsistent, or made for another model.
        """
        tensors, meta = read_safetensors(path, FORMAT, VERSION, caller="SearchResults.load")
        entries = meta.get("results")
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise _damaged(path, "no list of results")
        found = []
        for i, entry in enumerate(entries):
            own = {k.removeprefix(f"{i}."): t for k, t in tensors.items() if k.startswith(f"{i}.")}
            found.append(SearchResult.from_content(path, own, entry, None))
        try:
            results = cls(found)
        except (ConfigError, StructureError) as error:
            raise _damaged(path, str(error)) from error
        if model is None:
            return results
        return cls(
            SearchResult.from_content(
                path, *result.content(), fresh_copy(model, seed, "SearchResults.load")
            )
            for seed, result in zip(results.seeds, results, strict=True)
        )


def fresh_copy(model: nn.Module, seed: int, function: str = "search") -> nn.Module:
    """A copy of a model with the random weights of a seed, drawn on the model's device as its class draws them.

    Batch norms start anew too, statistics included. The global random state is left alone.

    Args:
        model: Never modified.
        seed: Of the weights.
        function: Name of the public function, for messages.

    Raises:
        ModelError: No parameter has a known initialiser, so that all seeds would be the same.

    Warns:
        UserWarning: For parameters that no initialiser reaches; they are the same in all copies.
    """
    fresh = copy.deepcopy(model)
    untouched = draw(fresh, seed, function)
    if untouched and len(untouched) == sum(1 for _ in fresh.parameters()):
        raise ModelError(
            f"{function}: model must have weights that can be drawn anew for each seed, got no initialiser for "
            f"{some(untouched)}; give their modules a reset_parameters method, or search models of your own one by one"
        )
    if untouched:
        warnings.warn(
            f"{function}: no initialiser is known for {some(untouched)}; they keep the model's values for every seed; give their "
            "module a reset_parameters method",
            UserWarning,
            stacklevel=2,
        )
    return fresh


def checked_seeds(seeds: Any) -> list[int]:
    """The seeds as plain integers.

    Raises:
        ConfigError: Not a sequence of different integers from 0, or an empty one.
    """
    repair = "write seeds=[0, 1, 2]"
    if not isinstance(seeds, Sequence) or isinstance(seeds, str | bytes) or not len(seeds):
        raise ConfigError(
            f"search: seeds must be a sequence of at least one integer, got {seeds!r}; {repair}"
        )
    for seed in seeds:
        whole = isinstance(seed, numbers.Integral) and not isinstance(seed, bool)
        if not whole or not 0 <= seed < 2**64:
            raise ConfigError(
                f"search: seeds must be whole numbers from 0 to 2**64 - 1, got {seed!r}; {repair}"
            )
    found = [int(seed) for seed in seeds]
    twice = sorted({seed for seed in found if found.count(seed) > 1})
    if twice:
        raise ConfigError(
            f"search: seeds must be different, got {twice} more than once; the same seed gives the same result"
        )
    return found


def checkpoint_of(path: str | os.PathLike[str], seed: int) -> Path:
    """The checkpoint of one seed: ``search.ckpt`` becomes ``search.seed3.ckpt``."""
    path = Path(path)
    return path.with_name(f"{path.stem}.seed{seed}{path.suffix}")


def search_seeds(
    search_one: SearchOne,
    model: nn.Module,
    seeds: Sequence[int],
    config: SearchConfig,
    checkpoint: str | os.PathLike[str] | None,
) -> SearchResults:
    """Search a fresh copy of the model for each seed, one after another."""
    done: list[SearchResult] = []
    for i, seed in enumerate(seeds):
        path = None if checkpoint is None else checkpoint_of(checkpoint, seed)
        name = f"seed {seed} ({i + 1}/{len(seeds)})"
        try:
            fresh = fresh_copy(model, seed)
            done.append(search_one(fresh, replace(config, seed=seed), path, name))
        except NonFiniteLossError as error:
            error.args = (f"{error} (at seed {seed})",)
            error.results = SearchResults(done) if done else None
            raise
    return SearchResults(done)


def _sizes(result: SearchResult) -> dict[str, int]:
    return {group.name: group.size for group in result.groups.groups}


def _damaged(path: str | os.PathLike[str], what: str) -> FileFormatError:
    return FileFormatError(
        f"SearchResults.load: path must hold whole search results, got '{path}' with {what}; save the results again"
    )
