"""What is done with one network of the coverage table: trace, search, slim, prove, count."""

from __future__ import annotations

import os
import re
import resource
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from coverage_networks import Network
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

import pfs_fast as pfs
from pfs_fast.budgets.cost import CostModel
from pfs_fast.graph import rules
from pfs_fast.graph.analysis import ChannelGraph, channel_graph
from pfs_fast.graph.groups import FIXED
from pfs_fast.slimming.verify import verify

SHARES = (0.5, 0.6, 0.7, 0.8, 0.9)  # the first that the floor allows is asked for
RTOL = 1e-9


@dataclass
class Record:
    """One line of the file of results.

    Attributes:
        status: ``"exact"``: masked = slim to 1e-9 in float64. ``"runs"``: another norm than batch norm sees the dropped
            channels, the slim network gives finite outputs of the right shape. ``"whole"``: no group can be pruned.
            ``"wrong"``: masked and slim differ though no norm explains it. ``"failed"``: an error before that.
        step: What was being done when it failed: build, trace, search, slim, verify, count or run.
        prunable: Convolutions and linear layers whose output channels can be pruned.
        layers: All convolutions and linear layers.
        asked: Share of the MACs that was asked for.
        got: Share of the MACs of the slim network, as counted on it.
        error: Largest error of the slim network's outputs against the masked one's, relative.
        norms: Normalisations other than ``nn.BatchNorm`` in the graphs.
        held: Reasons for what is held whole, with their number of layers.
        graph_seconds: CPU seconds of trace, propagation and groups.
        seconds: CPU seconds of everything.
    """

    name: str
    suite: str
    family: str
    shape: tuple[int, ...]
    status: str = "failed"
    step: str = "build"
    reason: str = ""
    prunable: int = 0
    layers: int = 0
    groups: int = 0
    units: int = 0
    asked: float | None = None
    got: float | None = None
    params: float | None = None
    error: float | None = None
    norms: list[str] = field(default_factory=list)
    held: dict[str, int] = field(default_factory=dict)
    graph_seconds: float = 0.0
    seconds: float = 0.0
    peak_mib: int = 0
    versions: dict[str, str] = field(default_factory=dict)

    def plain(self) -> dict[str, Any]:
        return asdict(self)


def check(network: Network) -> Record:
    """Everything with one network. Errors of the package under test end in the record, not in the caller."""
    record = Record(network.name, network.suite, network.family, network.shape)
    record.versions = _versions(network.suite)
    start = time.process_time()
    torch.manual_seed(0)
    try:
        _check(network, record)
    except Exception as error:  # whatever fails is what the table is for
        text = _without_folders(" ".join(str(error).split()))
        record.status, record.reason = "failed", f"{type(error).__name__}: {text}"[:600]
        if os.environ.get("COVERAGE_RAISE"):
            raise
    record.seconds = round(time.process_time() - start, 2)
    record.peak_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    return record


def _check(network: Network, record: Record) -> None:
    model = network.build()
    images = torch.randn(2, *network.shape)

    record.step = "trace"
    start = time.process_time()
    graph = channel_graph(model, images)
    record.graph_seconds = round(time.process_time() - start, 2)
    _describe(graph, record)
    if not graph.groups.groups:
        record.status, record.reason = "whole", next(iter(record.held), "no layers")
        return
    record.asked = _feasible(CostModel(graph.groups))
    if record.asked is None:
        record.status, record.reason = "whole", "the floor is above 90 % of the MACs"
        return
    del graph

    record.step = "search"
    result = _search(model, images, record.asked)
    record.step = "slim"
    narrow = result.slim(weights="inherit")

    record.step = "verify"
    report = verify(model, None, result.structure, images, trials=1, rtol=RTOL, raise_on_fail=False)
    record.error = report.max_error
    if report.passed:
        record.status = "exact"
    else:
        record.status = "runs" if record.norms else "wrong"
        record.reason = f"first differing layer {report.layer} ({report.layer_error:.1e})"

    record.step = "count"
    counted = pfs.count(narrow, images[:1])
    predicted = (result.structure.macs, result.structure.params)
    record.got = round(counted.macs / result.structure.base_macs, 4)
    record.params = round(counted.params / result.structure.base_params, 4)
    if (counted.macs, counted.params) != predicted:
        raise AssertionError(f"counted {counted.macs, counted.params}, predicted {predicted}")
    if record.got > record.asked:
        raise AssertionError(f"asked for {record.asked}, got {record.got}")

    record.step = "run"
    _compare_outputs(model, narrow, images)
    record.step = ""


def _describe(graph: ChannelGraph, record: Record) -> None:
    layers = [layer for layer in graph.groups.layers if layer.kind != "bn"]
    record.layers = len(layers)
    record.prunable = sum(bool((layer.out_units != FIXED).any()) for layer in layers)
    record.groups, record.units = len(graph.groups.groups), graph.groups.num_units
    reasons = Counter(_without_numbers(reason) for _, reason in graph.groups.fixed)
    record.held = dict(reasons.most_common(8))
    record.norms = sorted(_norms(graph))


def _without_folders(text: str) -> str:
    """Files of a package by their place in it: where it is installed tells nothing."""
    return re.sub(r"/\S*/site-packages/", "", text)


def _without_numbers(reason: str) -> str:
    """Nodes and layers that differ in their numbers alone count together."""
    return re.sub(r"[._]+\d+(?=[._]|\b)", "", reason)


def _norms(graph: ChannelGraph) -> set[str]:
    modules = dict(graph.traced.train.named_modules())
    found = set()
    for graph_module in graph.traced.graphs:
        for node in graph_module.graph.nodes:
            if node.op not in ("call_module", "call_function", "call_method"):
                continue
            module = modules[node.target] if node.op == "call_module" else None
            name = rules.plain_name(node, module)
            if "norm" in name and not isinstance(module, _BatchNorm):
                found.add(name)
    return found


def _feasible(cost_model: CostModel) -> float | None:
    floor = cost_model.floor()[0] / cost_model.base[0]
    return next((share for share in SHARES if floor <= share), None)


def _search(model: nn.Module, images: torch.Tensor, share: float) -> pfs.SearchResult:
    """Two steps on random images."""
    model.eval()
    with torch.no_grad():
        classes = model(images).shape[1]
    batches = [(torch.randn_like(images), torch.randint(classes, (2,))) for _ in range(2)]
    config = pfs.SearchConfig(epochs=1, max_steps=2, scope="all", ranking="gates", precision="fp32")
    return pfs.search(model, batches, share, config=config, progress=False)


def _compare_outputs(model: nn.Module, narrow: nn.Module, images: torch.Tensor) -> None:
    with torch.no_grad():
        whole, slim = model.eval()(images), narrow.eval()(images)
    if whole.shape != slim.shape or not bool(torch.isfinite(slim).all()):
        raise AssertionError(
            f"output must be finite, {tuple(whole.shape)}, got {tuple(slim.shape)}"
        )


def _versions(suite: str) -> dict[str, str]:
    import torchvision

    found = {"torch": torch.__version__, "torchvision": torchvision.__version__}
    if suite == "timm":
        import timm

        found["timm"] = timm.__version__
    return found
