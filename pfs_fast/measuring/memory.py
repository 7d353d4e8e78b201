"""Peak memory of the activations of a forward pass, exactly, for any set of kept channels.

What counts: every tensor that an operation of the traced eval forward allocates, from that operation until the last
one that reads it. The images count until they are last read, the outputs until the end. Views (flatten, reshape, slices,
chunks) and operations that write in place or return their input (dropout) allocate nothing. Weights, constants and workspaces inside an
operation are not activations. This is what an executor needs that frees each value after its last use (``torch.compile``,
``torch.export``, ONNX Runtime, ``torch.fx``); Python code that keeps a value in a variable holds it longer.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import fx

from ..graph.forward_record import ForwardRecord, storage_of, tensors_of
from ..graph.sides import Sides


class Allocation(NamedTuple):
    """One block of memory of a forward pass.

    Attributes:
        node: Name of the operation that allocates it.
        born: Position of that operation in the graph.
        dies: Position of the last operation that reads it.
        elements: Elements of the whole network's tensor, of the whole batch.
        itemsize: Bytes of an element; 0: as many as the precision has.
        labels: Label of every channel that the size is proportional to; None: the size never changes.
    """

    node: str
    born: int
    dies: int
    elements: int
    itemsize: int
    labels: np.ndarray | None


def allocations(graph_module: fx.GraphModule, inputs: tuple[torch.Tensor, ...]) -> list[Allocation]:
    """Every allocation of the forward of a traced network, in eval mode.

    Args:
        graph_module: Traced network. Not modified; labels are those of ``node.meta["labelled"]`` where there are any.
        inputs: Only shape, dtype and device are used.
    """
    record = ForwardRecord(graph_module, inputs)
    owner: dict[int, tuple[fx.Node, torch.Tensor]] = {}
    last: dict[int, int] = {}
    labels: dict[int, np.ndarray] = {}
    position = {node: i for i, node in enumerate(graph_module.graph.nodes)}
    for node, value in record.values.items():
        read = [t for source in node.all_input_nodes for t in tensors_of(record.values[source])]
        for tensor in [*read, *tensors_of(value)]:
            key = storage_of(tensor)
            if key not in record.constants:
                owner.setdefault(key, (node, tensor))
                last[key] = position[node]
        for tensor in tensors_of(value):
            # The labels of a block are those of the first tensor that fills it and has any.
            key, seen = storage_of(tensor), node.meta.get("labelled")
            known = key in labels or getattr(seen, "dim", None) is None
            if not known and key in owner and tensor.numel() == owner[key][1].numel():
                labels[key] = seen.labels
    found = []
    for key, (node, tensor) in owner.items():
        elements = tensor.untyped_storage().nbytes() // tensor.element_size()
        itemsize = 0 if tensor.is_floating_point() else tensor.element_size()
        axis = labels.get(key)
        axis = None if axis is None or elements % len(axis) else axis
        found.append(Allocation(node.name, position[node], last[key], elements, itemsize, axis))
    return found


class ActivationModel:
    """Peak bytes of activations for any set of kept units.

    Args:
        found: Allocations of the whole network.
        unit_of_label: Unit of each label, ``FIXED`` where it is held whole. [num_labels], int64.
        num_units: Number of units.
        itemsize: Bytes of a floating-point element in the precision of the slim network.

    Attributes:
        base: Peak bytes of the whole network.
    """

    def __init__(
        self, found: list[Allocation], unit_of_label: np.ndarray, num_units: int, itemsize: int
    ) -> None:
        labelled = [a for a in found if a.labels is not None]
        plain = [a for a in found if a.labels is None]
        self._sides = Sides(num_units, [unit_of_label[a.labels] for a in labelled])
        self._nodes = [a.node for a in (*labelled, *plain)]
        width = np.array([len(a.labels) for a in labelled], dtype=np.int64)
        size = np.array([a.itemsize or itemsize for a in (*labelled, *plain)], dtype=np.int64)
        elements = np.array([a.elements for a in (*labelled, *plain)], dtype=np.int64)
        self._per_channel = elements[: len(labelled)] * size[: len(labelled)] // width
        self._plain = elements[len(labelled) :] * size[len(labelled) :]
        born = np.array([a.born for a in (*labelled, *plain)], dtype=np.int64)
        dies = np.array([a.dies for a in (*labelled, *plain)], dtype=np.int64)
        # Allocations ordered by birth, and by death: memory in use is the difference of two running sums.
        self._by_birth = np.argsort(born, kind="stable")
        self._by_death = np.argsort(dies, kind="stable")
        # When one is born, those have died whose last reader came before.
        self._dead_before = np.searchsorted(dies[self._by_death], born[self._by_birth], side="left")
        self.base: int = self.evaluate(np.ones(num_units, dtype=bool))

    def evaluate(self, keep: np.ndarray) -> int:
        """Peak bytes of the network that keeps these units. ``keep``: [num_units], bool."""
        return int(self._in_use(keep).max(initial=0))

    def peak_at(self, keep: np.ndarray) -> str:
        """Name of the operation at which the peak is reached."""
        return self._nodes[self._by_birth[int(self._in_use(keep).argmax())]]

    def _in_use(self, keep: np.ndarray) -> np.ndarray:
        """Bytes in use after each allocation."""
        widths = self._sides.widths(keep)[self._sides.index]
        size = np.concatenate([self._per_channel * widths, self._plain])
        born = np.cumsum(size[self._by_birth])
        died = np.concatenate([[0], np.cumsum(size[self._by_death])])
        return born - died[self._dead_before]
