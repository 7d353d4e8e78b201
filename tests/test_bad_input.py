"""Every wrong argument of a search: a clear error, the model unchanged, no file written."""

from __future__ import annotations

import copy
import os
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from small_nets import Frozen, Net, Net2, batches, cbr, conv, head, tiny
from torch import nn

import pfs_fast as pfs
from pfs_fast import _library
from pfs_fast.errors import (
    BackendError,
    BudgetError,
    ConfigError,
    InfeasibleBudgetError,
    LoaderError,
    ModelError,
    PfsError,
    TraceError,
)


@dataclass
class Case:
    """What is passed, and the error that must come. Callables are called when the test runs."""

    error: type[PfsError]
    message: str
    model: Any = tiny
    loader: Any = batches
    budget: Any = 0.6
    config: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)

    def forward(self, x):
        return self.conv(x) if x.mean() > 0 else x


def mixed_devices() -> nn.Module:
    model = tiny()
    model[1].to("meta")
    return model


def compiled() -> nn.Module:
    return torch.compile(tiny(), backend="eager")


def scripted() -> nn.Module:
    return torch.jit.trace(tiny().eval(), torch.zeros(2, 3, 6, 6))


def labelled(*labels: int):
    return lambda: [(torch.zeros(len(labels), 3, 6, 6), torch.tensor(labels))]


def later(*bad: Any):
    """Good batches first, then what is given."""
    return lambda: [*batches(2), *bad]


def images(*shape: int, dtype: torch.dtype = torch.float32):
    return torch.zeros(shape, dtype=dtype)


FOUR = torch.zeros(4, dtype=torch.int64)

CASES = {
    # budget
    "budget 0": Case(BudgetError, "macs must be above 0, got 0", budget=0),
    "budget 0.0": Case(BudgetError, r"macs must be above 0, got 0\.0", budget=0.0),
    "budget negative": Case(BudgetError, "macs must be above 0, got -1", budget=-1),
    "budget negative share": Case(BudgetError, r"macs must be above 0, got -0\.5", budget=-0.5),
    "budget above 1": Case(BudgetError, r"a share must be in \(0, 1\]", budget=1.5),
    "budget integer 1": Case(BudgetError, r"got the integer 1; write 1\.0", budget=1),
    "budget NaN": Case(BudgetError, "macs must be finite, got nan", budget=float("nan")),
    "budget infinite": Case(BudgetError, "macs must be finite, got inf", budget=float("inf")),
    "budget text": Case(BudgetError, r"macs must be a number, got '0\.5'; use Budget\.parse", budget="0.5"),
    "budget None": Case(BudgetError, "got None; pass e.g. 0.5", budget=None),
    "budget True": Case(BudgetError, "macs must be a number, got True", budget=True),
    "budget below the floor": Case(
        InfeasibleBudgetError, r"budget must be feasible: macs must be in \[1,300, 7,796\] \(16\.68% to 100 %\), got 77;", budget=0.01
    ),
    "budget in MACs below the floor": Case(InfeasibleBudgetError, r"macs must be in \[1,300, 7,796\] .*, got 5;", budget=5),
    "peak activations below the floor": Case(
        InfeasibleBudgetError, r"peak_activation_bytes must be in \[\d+, [\d,]+\] .*, got 10;", budget=lambda: pfs.Budget(peak_activation_bytes=10)
    ),
    "weight bytes below the floor": Case(
        InfeasibleBudgetError, r"weight_bytes must be in \[192, 1,024\] .*, got 8;", budget=lambda: pfs.Budget(weight_bytes=8)
    ),
    "one of two limits below the floor": Case(
        InfeasibleBudgetError, r"feasible: params must be in \[48, 256\] .*, got 3; raise", budget=lambda: pfs.Budget(macs=0.9, params=3)
    ),
    "below the floor of ignored layers": Case(
        InfeasibleBudgetError,
        r"macs must be in .* got 2,000; .* widen widths or ignore less \(without them from macs 1,300\)",
        budget=lambda: pfs.Budget(macs=2000, widths={"1": (5, None)}),
    ),
    "unknown layer": Case(
        BudgetError, r"ignore must name layers of the model, got '1\.7', which matches none; the closest names are '1\.", budget=lambda: pfs.Budget(macs=0.5, ignore=["1.7"])
    ),
    "unknown layer in widths": Case(
        BudgetError, "widths must name layers of the model, got 'layer3'", budget=lambda: pfs.Budget(macs=0.5, widths={"layer3": (1, 2)})
    ),
    "widths that contradict": Case(
        BudgetError,
        r"group '0\.0' must not contradict each other, got at least 3 channels by .* and at most 2 by .*; its width can be 3 to 3",
        budget=lambda: pfs.Budget(macs=0.5, widths={"0.0": (3, None), "0": (None, 2)}),
    ),
    "width of a layer that is held whole": Case(
        BudgetError, r"got '2\.2' with 4 channels, held whole: it is an output of the network", budget=lambda: pfs.Budget(macs=0.5, widths={"2": (None, 2)})
    ),
    "everything ignored": Case(
        ModelError, r"that the budget does not ignore, got none; .*\n  2\.2: .*\n  0\.0: the budget ignores it", budget=lambda: pfs.Budget(macs=0.5, ignore=["*"])
    ),
    "latency on a device that is not there": Case(
        BudgetError, "Budget: device must be there, got 'cuda:99'", budget=lambda: pfs.Budget(latency_ms=5, device="cuda:99")
    ),
    "multiple for a device that is not there": Case(
        BudgetError, "Budget: device must be there, got 'cuda:99'", budget=lambda: pfs.Budget(latency_ms=5, device="cuda:99")
    ),
    "latency 0": Case(BudgetError, "latency_ms must be above 0, got 0", budget=lambda: pfs.Budget(latency_ms=0)),
    "share of weights of a number of MACs": Case(
        BudgetError, "reference must be a module for a share of parameters", budget=lambda: pfs.Budget(weight_bytes=0.5), options={"reference": 10_000}
    ),
    "params below the floor": Case(InfeasibleBudgetError, r"params must be in \[48, 256\] .*, got 3;", budget=lambda: pfs.Budget(params=3)),
    # loader
    "loader empty": Case(LoaderError, "loader must yield at least one batch, got none", loader=list),
    "loader None": Case(LoaderError, "loader must be an iterable of .*, got NoneType", loader=lambda: None),
    "loader generator": Case(
        LoaderError, "re-iterable for 2 passes, got a generator", loader=lambda: (b for b in batches())
    ),
    "loader iterator used up": Case(
        LoaderError, r"re-iterable, got no batch in pass 2 \(a generator or iterator", loader=lambda: iter(batches())
    ),
    "loader of tensors": Case(LoaderError, "must yield pairs .*, got Tensor", loader=lambda: [images(4, 3, 6, 6)]),
    "loader of triples": Case(LoaderError, "must yield pairs .*, got tuple of 3", loader=lambda: [(1, 2, 3)]),
    "loader of dicts": Case(LoaderError, "must yield pairs .*, got dict", loader=lambda: [{"image": 1, "label": 2}]),
    "loader of arrays": Case(
        LoaderError, "must yield tensors, got ndarray and ndarray", loader=lambda: [(np.zeros((4, 3, 6, 6)), np.zeros(4))]
    ),
    "val_loader empty": Case(LoaderError, "val_loader must yield at least one batch", options={"val_loader": []}),
    # labels
    "label negative": Case(LoaderError, r"labels must be in \[0, 3\], the model's outputs, got -1;", loader=labelled(0, -1)),
    "label too large": Case(LoaderError, r"labels must be in \[0, 3\], the model's outputs, got 4;", loader=labelled(0, 4)),
    "label too large later": Case(
        LoaderError, r"labels must be in \[0, 3\], .* got 9", loader=later((images(4, 3, 6, 6), FOUR + 9))
    ),
    "labels of floats": Case(LoaderError, "labels must be integers", loader=lambda: [(images(4, 3, 6, 6), FOUR.float())]),
    "labels of another number": Case(
        LoaderError, "as many as images, got 3 labels for 4 images", loader=lambda: [(images(4, 3, 6, 6), FOUR[:3])]
    ),
    "soft labels of another width": Case(
        LoaderError, r"one column per class \(4\), got 7", loader=lambda: [(images(4, 3, 6, 6), torch.ones(4, 7) / 7)]
    ),
    # images
    "images uint8": Case(
        LoaderError, "images must be floating point, got torch.uint8; .*DeviceLoader", loader=lambda: [(images(4, 3, 6, 6, dtype=torch.uint8), FOUR)]
    ),
    "images of another channel count": Case(
        TraceError, r"example_input must fit the model, but call_module '0\.0' fails", loader=lambda: batches(images=(1, 6, 6))
    ),
    "images of another size": Case(
        TraceError,
        "example_input must fit the model, but call_module '2' fails",
        model=lambda: nn.Sequential(cbr(3, 4), nn.Flatten(), nn.Linear(144, 4)),
        loader=lambda: batches(images=(3, 7, 7)),
    ),
    "images of another channel count later": Case(
        LoaderError, r"images must fit the model in every batch, got shape \[4, 1, 6, 6\]", loader=later((images(4, 1, 6, 6), FOUR))
    ),
    "images of another size later": Case(
        LoaderError,
        r"images must fit the model in every batch, got shape \[4, 3, 7, 7\]",
        model=lambda: nn.Sequential(cbr(3, 4), nn.Flatten(), nn.Linear(144, 4)),
        loader=later((images(4, 3, 7, 7), FOUR)),
    ),
    "images unlike example_input": Case(
        LoaderError,
        r"images must fit the model in every batch, got shape \[4, 1, 6, 6\]",
        loader=lambda: batches(images=(1, 6, 6)),
        options={"example_input": images(1, 3, 6, 6)},
    ),
    "no images in a batch": Case(LoaderError, "N >= 1", loader=lambda: [(images(0, 3, 6, 6), FOUR[:0])]),
    "one image, one position": Case(
        LoaderError,
        r"got shape \[1, 3, 1, 1\]: .*more than 1 value per channel",
        loader=lambda: [(images(1, 3, 1, 1), FOUR[:1])],
    ),
    # models
    "model a class": Case(ModelError, "search: model must be an nn.Module, got type", model=lambda: nn.Linear),
    "model without layers": Case(ModelError, "convolution or linear layers", model=lambda: nn.Sequential(nn.Flatten())),
    "model of one layer": Case(
        ModelError, r"can be gated with scope='paper', got none; .*\n  1: it is an output", model=lambda: nn.Sequential(nn.Flatten(), nn.Linear(108, 4))
    ),
    "model with residual sums only": Case(
        ModelError,
        r"a\.0: scope 'paper' holds channels of a residual sum whole(.|\n)*try scope='all'",
        model=lambda: Net(lambda m, x: m.fc(m.a(x) + m.b(x)), a=cbr(3, 4), b=cbr(3, 4), fc=head(4)),
    ),
    "model that branches on data": Case(
        TraceError,
        r"module '1' \(Branching\) is not \(.*test_bad_input\.py:\d+: return self\.conv\(x\) if x\.mean\(\) > 0",
        model=lambda: nn.Sequential(cbr(3, 3), Branching(), head(3)),
    ),
    "model with two inputs": Case(
        TraceError,
        "placeholder 'y' fails",
        model=lambda: Net2(lambda m, x, y: m.fc(m.a(x) + m.b(y)), a=cbr(3, 4), b=cbr(3, 4), fc=head(4)),
    ),
    "model of feature maps": Case(
        ModelError, r"must return logits of shape \[4, classes\], got \[4, 5, 6, 6\]", model=lambda: nn.Sequential(cbr(3, 4), conv(4, 5))
    ),
    "model of text": Case(
        ModelError, "must return logits of shape .*, got (str|NoneType)", model=lambda: Net(lambda m, x: {"logits": "none", "x": m.b(m.a(x))}, a=cbr(3, 4), b=conv(4, 4))
    ),
    "model on mixed devices": Case(ModelError, "must lie on one device, got tensors on cpu, meta", model=mixed_devices),
    "model on meta": Case(ModelError, "must hold values, got tensors on the meta device", model=lambda: tiny().to("meta")),
    "model parallel": Case(ModelError, "search: model must be a plain module, got DataParallel; pass model.module", model=lambda: nn.DataParallel(tiny())),
    "model compiled": Case(ModelError, "search: model must be uncompiled, got OptimizedModule; .*_orig_mod", model=compiled),
    "model scripted": Case(ModelError, "search: model must be a Python module, got TopLevelTracedModule", model=scripted),
    "model lazy": Case(
        ModelError, "must be initialised, got the lazy parameter 0.weight", model=lambda: nn.Sequential(nn.LazyConv2d(4, 3), head(4))
    ),
    # options
    "config a dict": Case(ConfigError, "config must be a SearchConfig, got dict", options={"config": {"epochs": 2}}),
    "device of no kind": Case(ConfigError, "device must be a torch device .*, got 'gpu'", options={"device": "gpu"}),
    "device a float": Case(ConfigError, r"device must be a torch device .*, got 1\.5", options={"device": 1.5}),
    "device meta": Case(ConfigError, "device must be a CPU or CUDA device, got 'meta'", options={"device": "meta"}),
    "device not there": Case(ConfigError, "device must be there, got 'cuda:99'", options={"device": "cuda:99"}),
    "fp16 on the CPU": Case(ConfigError, "'fp16' needs a CUDA device, got cpu", config={"precision": "fp16"}),
    "best without val_loader": Case(ConfigError, "val_loader must be given with select='best'", config={"select": "best"}),
    "reference 0": Case(BudgetError, "reference must be a module or a number of MACs", options={"reference": 0}),
    "example_input a list": Case(ConfigError, "example_input must be a tensor or a tuple", options={"example_input": [1.0]}),
}  # fmt: skip


def call(case: Case, folder) -> None:
    options = {
        "device": "cpu",
        "checkpoint": folder / "search.ckpt",
        "progress": False,
        **case.options,
    }
    config = pfs.SearchConfig(
        **{"epochs": 2, "backend": "reference", "precision": "fp32", **case.config}
    )
    options.setdefault("config", config)
    budget = case.budget() if callable(case.budget) else case.budget
    pfs.search(case.built, case.loader(), budget, **options)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*is deprecated")
@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
@pytest.mark.parametrize("name", CASES)
def test_bad_input_is_refused_and_touches_nothing(name, tmp_path):
    case = CASES[name]
    if case.options.get("device") == "cuda:99" and torch.cuda.device_count() > 99:
        pytest.skip("there is such a device")
    case.built = case.model()
    pictured = isinstance(case.built, nn.Module) and name != "model lazy"
    frozen = Frozen(case.built) if pictured else None
    random_state = torch.random.get_rng_state()
    with pytest.raises(case.error, match=case.message) as caught:
        call(case, tmp_path)
    assert type(caught.value) is case.error
    assert str(caught.value).split(":")[0] in ("search", "trace", "solve", "Budget", "SearchConfig")
    if frozen is not None:
        frozen.check()
    assert torch.equal(torch.random.get_rng_state(), random_state)
    if name not in LATE:
        assert os.listdir(tmp_path) == []


# Found in the second epoch: the checkpoint of the first is there, whole.
LATE = {"loader iterator used up"}


def test_bad_input_found_late_leaves_a_whole_checkpoint(tmp_path):
    case = CASES["loader iterator used up"]
    case.built = tiny()
    with pytest.raises(case.error):
        call(case, tmp_path)
    assert os.listdir(tmp_path) == ["search.ckpt"]
    good = copy.copy(case)
    good.loader = batches
    call(good, tmp_path)


def test_fused_backend_that_is_missing_is_an_error_with_advice(monkeypatch):
    monkeypatch.setattr(_library, "require_ops", _missing)
    for backend in ("auto", "fused"):
        config = pfs.SearchConfig(epochs=1, backend=backend)
        with pytest.raises(BackendError, match="not built"):
            pfs.search(tiny(), batches(), 0.6, config=config, progress=False, device="cpu")


def _missing() -> None:
    raise BackendError("search: not built")


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
def test_model_that_cannot_be_copied_is_refused():
    model = nn.Sequential(nn.utils.weight_norm(conv(3, 4)), head(4))
    with pytest.raises(ModelError, match=r"must be one that copy\.deepcopy copies"):
        pfs.search(
            model, batches(), 0.6, config=pfs.SearchConfig(backend="reference"), progress=False
        )
