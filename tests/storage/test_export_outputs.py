"""Models whose outputs have names of their own: a file knows no classes, so it gives tuples and dictionaries."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import pytest
import torch
from small_nets import Net, cbr, head

import pfs_fast as pfs


class Named(NamedTuple):
    logits: torch.Tensor
    features: torch.Tensor


@dataclass
class Fields:
    logits: torch.Tensor
    features: torch.Tensor


@pytest.mark.parametrize(
    ("outputs", "kind"), [(Named, tuple), (Fields, dict), (lambda a, b: [Named(a, b)], list)]
)
def test_export_gives_named_outputs_as_plain_ones(outputs, kind, tmp_path):
    model = Net(lambda m, x: outputs(m.b(m.a(x)), m.a(x)), a=cbr(3, 4), b=head(4)).eval()
    path = tmp_path / "model.pt2"
    pfs.export(model, path, torch.zeros(1, 3, 6, 6))
    program = torch.export.load(path)
    assert set(program.state_dict) == set(model.state_dict())
    found = program.module()(torch.ones(3, 3, 6, 6))
    assert type(found) is kind
    logits = model.b(model.a(torch.ones(3, 3, 6, 6)))
    first = found["logits"] if kind is dict else found[0][0] if kind is list else found[0]
    torch.testing.assert_close(first, logits)
    assert "forward" not in vars(model)
