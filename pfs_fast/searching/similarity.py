"""How alike several structures of one network are, pair by pair."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from .._ambient import own_settings
from ..budgets.structure import Structure
from ..errors import ConfigError
from .compare import correlation, structure_distance


@own_settings()
def structure_similarity(
    structures: Sequence[Structure], measure: str = "width_correlation"
) -> Tensor:
    """Similarity of every two structures; symmetric, 1 on the diagonal.

    Args:
        structures: Of the same network and scope.
        measure: ``"width_correlation"``: Pearson correlation of the numbers of kept channels of the groups, as in the paper's
            figures, in [-1, 1]. ``"share_correlation"``: the same of the kept shares of the groups, where those differ in width.
            ``"widths"``: share of the numbers of channels that both have, in [0, 1]: 1 - ``StructureDistance.widths``.
            ``"channels"``: share of the channels that both keep, in [0, 1]: 1 - ``StructureDistance.channels``. Channels of
            differently initialised networks have nothing in common but their number, so this says something only where the
            weights are the same.

            A correlation is 1 where all numbers are equal, and 0 where they do not vary within one of two structures (a network
            with one group, for example).

    Returns:
        Tensor: [S, S], float64.

    Raises:
        ConfigError: Another measure. StructureError: Structures of different networks.
    """
    pairwise = _MEASURES.get(measure) if isinstance(measure, str) else None
    if pairwise is None:
        raise ConfigError(
            f"similarity: measure must be one of {', '.join(map(repr, _MEASURES))}, got {measure!r}"
        )
    matrix = torch.eye(len(structures), dtype=torch.float64)
    for i, first in enumerate(structures):
        for j, second in enumerate(structures[:i]):
            matrix[i, j] = matrix[j, i] = pairwise(first, second)
    return matrix


def _share_correlation(a: Structure, b: Structure) -> float:
    structure_distance(a, b)  # refuses structures of different networks
    shares = (
        np.array([len(s.kept[name]) / size for name, size in a.sizes.items()], dtype=np.float64)
        for s in (a, b)
    )
    return correlation(*shares)


_MEASURES: dict[str, Callable[[Structure, Structure], float]] = {
    "width_correlation": lambda a, b: structure_distance(a, b).width_correlation,
    "share_correlation": _share_correlation,
    "widths": lambda a, b: 1 - structure_distance(a, b).widths,
    "channels": lambda a, b: 1 - structure_distance(a, b).channels,
}
