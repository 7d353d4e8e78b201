"""Arguments of every kind in every public call: what cannot be done ends in an error of this package, and at once."""

from __future__ import annotations

import os
import re
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_nets import batches, cbr, conv, head, tiny
from torch import Tensor, nn

import pfs_fast as pfs
from pfs_fast import data, models
from pfs_fast.errors import (
    BudgetError,
    ConfigError,
    LoaderError,
    ModelError,
    PfsError,
    StructureError,
)
from pfs_fast.proxies import ShortTraining

IMAGES = torch.zeros(4, 3, 6, 6)
LABELS = torch.zeros(4, dtype=torch.int64)
IMAGE = IMAGES[:1]

Row = tuple[Callable[[], Any], type[PfsError], str]


def made(value: Any) -> Any:
    """Models and unusual tensors are made when a row runs."""
    return value() if callable(value) and not isinstance(value, type) else value


def search(
    model: Callable[[], Any] | None = None, loader: Any = None, budget: Any = 0.6, **options: Any
):
    changes = options.pop("changes", {})
    config = pfs.SearchConfig(
        **{"epochs": 1, "max_steps": 2, "backend": "reference", "precision": "fp32"} | changes
    )
    options = {"config": config, "progress": False, "device": "cpu"} | options
    options["example_input"] = made(options.get("example_input"))
    return pfs.search(
        made(model or tiny), batches(2) if loader is None else loader, budget, **options
    )


def train(
    model: Callable[[], Any] | None = None, loader: Any = None, val_loader: Any = None, **options
):
    changes = options.pop("changes", {})
    config = pfs.TrainConfig(**{"epochs": 1} | changes)
    options = {"config": config, "progress": False} | options
    return pfs.train(
        made(model or tiny), batches(2) if loader is None else loader, val_loader, **options
    )


def evaluate(model: Callable[[], Any] | None = None, loader: Any = None, **options: Any):
    return pfs.evaluate(made(model or tiny), batches(2) if loader is None else loader, **options)


def lazy() -> nn.Module:
    return nn.Sequential(nn.LazyConv2d(4, 3), head(4))


def scripted() -> nn.Module:
    return torch.jit.trace(tiny().eval(), IMAGES)


def with_scripted_layer() -> nn.Module:
    return nn.Sequential(cbr(3, 4), torch.jit.script(nn.ReLU()), head(4))


def old_weight_norm() -> nn.Module:
    return nn.Sequential(nn.utils.weight_norm(conv(3, 4)), nn.BatchNorm2d(4), head(4))


def result() -> pfs.SearchResult:
    return search()


def structure_of_another() -> pfs.Structure:
    return search(lambda: nn.Sequential(cbr(3, 9), cbr(9, 5), head(5))).structure


def nested_too_deep() -> dict[str, Any]:
    document: dict[str, Any] = {}
    for _ in range(100_000):
        document = {"a": document}
    return document


def ragged() -> Tensor:
    return nested((3, 6, 6), (3, 5, 5))


def quantised(x: Tensor) -> Tensor:
    return torch.quantize_per_tensor(x, 0.1, 0, torch.quint8)


def nested(*shapes: tuple[int, ...]) -> Tensor:
    return torch.nested.nested_tensor([torch.zeros(shape) for shape in shapes])


# -- rows of the table, by the call that they are of ---------------------------------------------------------------------


def budgets() -> dict[str, Row]:
    def refused(match: str, **options: Any) -> Row:
        return (lambda: pfs.Budget(**options)), BudgetError, match

    def unread(text: str, match: str, **more: Any) -> Row:
        return (lambda: pfs.Budget.parse(text, **more)), BudgetError, match

    return {
        "macs of 400 digits": refused(r"macs must be at most 2\*\*63 - 1", macs=10**400),
        "macs of 5000 digits": refused(r"macs must be at most 2\*\*63 - 1", macs=10**5000),
        "macs a fraction": refused(r"macs must be at most", macs=Fraction(10**400)),
        "macs an array": refused("macs must be a number", macs=np.array([0.5, 0.6])),
        "weight bytes": refused("weight_bytes must be at most", weight_bytes=10**400),
        "latency": refused("latency_ms must be a finite number", latency_ms=10**400),
        "multiple of": refused(
            r"multiple_of must be at most 2\*\*31 - 1.*lower it", macs=0.5, multiple_of=2**70
        ),
        "multiple an array": refused("multiple_of must", macs=0.5, multiple_of=np.array([1, 2])),
        "min channels": refused("min_channels must be at most", macs=0.5, min_channels=2**70),
        "widths": refused("widths.*at most 2", macs=0.5, widths={"*": (10**400, None)}),
        "batch": refused("batch must be at most", macs=0.5, batch=2**70),
        "precision a list": refused("precision must be one of", macs=0.5, precision=["fp32"]),
        "text of a long exponent": unread("1e9999999", "got '1e9999999'.*write fewer digits"),
        "text of a small exponent": unread("1e-9999999", "write fewer digits"),
        "text of many digits": unread("9" * 5000, "write fewer digits"),
        "text of a long fraction": unread("0." + "9" * 5000, "write fewer digits"),
        "text above 64 bits": unread("1e30", r"macs must be at most 2\*\*63 - 1"),
        "text of a large share": unread("1e99%", "macs must be at most"),
        "text and keywords": unread("0.5", "may be given.*got macs", macs=0.5),
    }


def configs() -> dict[str, Row]:
    def of_search(match: str, **changes: Any) -> Row:
        return (lambda: pfs.SearchConfig(**changes)), ConfigError, match

    def of_train(match: str, **changes: Any) -> Row:
        return (lambda: pfs.TrainConfig(**changes)), ConfigError, match

    def scratch_b(match: str, epochs: Any, share: Any) -> Row:
        return (lambda: pfs.scratch_b_epochs(epochs, share)), ConfigError, match

    return {
        "search seed": of_search(r"seed must be a whole number of at most 2\*\*64 - 1", seed=2**64),
        "search seed of 5000 digits": of_search("seed must be a whole number", seed=10**5000),
        "search steps": of_search(r"max_steps must be a whole number of at most 2\*\*63 - 1", max_steps=2**70),
        "search epochs": of_search("epochs must be a whole number of at most", epochs=2**70),
        "search patience": of_search("patience must be a whole number of at most", patience=2**70),
        "search log_every": of_search("log_every must be a whole number", log_every=2**70),
        "search lr text": of_search("lr must be a finite number above 0", lr="x"),
        "search lr of 400 digits": of_search("lr must be a finite number above 0", lr=10**400),
        "search gamma": of_search("gamma must be a finite number at least 0", gamma=10**400),
        "search betas text": of_search("betas must be", betas="xy"),
        "search betas texts": of_search("betas must be a finite number", betas=("a", "b")),
        "search betas an array": of_search("betas must be two", betas=np.array([0.9, 0.99])),
        "search scope a list": of_search("scope must be one of 'paper', 'all'", scope=["all"]),
        "search precision": of_search("precision must be one of", precision=np.array([1, 2])),
        "train milestones None": of_train(r"milestones must be a tuple.*\(0.5, 0.75\)", milestones=None),
        "train milestones text": of_train("milestones must be a tuple", milestones="ab"),
        "train milestones a number": of_train("milestones must be a tuple", milestones=0.5),
        "train milestones texts": of_train("milestones must be a finite number", milestones=("a",)),
        "train seed text": of_train("seed must be None or a whole number from 0", seed="a"),
        "train seed": of_train(r"seed must be None or .* to 2\*\*64 - 1", seed=2**64),
        "train seed negative": of_train("seed must be None or a whole number from 0", seed=-1),
        "train nesterov text": of_train("nesterov must be True or False", nesterov="yes"),
        "train channels_last": of_train("channels_last must be True or False", channels_last=None),
        "train decay": of_train("decay_bn_bias must be True or False", decay_bn_bias="no"),
        "train budget_training": of_train("budget_training as a share must be", budget_training="half"),
        "train ema text": of_train("ema must be a finite number", ema="x"),
        "train label_smoothing": of_train("label_smoothing must be a finite", label_smoothing=None),
        "train lr": of_train("lr must be a finite number", lr=10**400),
        "train epochs": of_train("epochs must be an integer", epochs=2**70),
        "train schedule": of_train("schedule must be one of", schedule=np.array([1, 2])),
        "train batch": (
            lambda: pfs.TrainConfig.imagenet_resnet50(batch=10**400), ConfigError, "batch must be"
        ),
        "Scratch-B epochs text": scratch_b("epochs must be", "a", 0.5),
        "Scratch-B share text": scratch_b("share must be", 160, "a"),
        "Scratch-B epochs NaN": scratch_b("epochs must be", float("nan"), 0.5),
        "Scratch-B epochs of 400 digits": scratch_b("epochs must be", 10**400, 0.5),
        "Scratch-B share too small": scratch_b("share must be", 160, 1e-320),
    }  # fmt: skip


def searches() -> dict[str, Row]:
    def of(error: type[PfsError], match: str, *args: Any, **options: Any) -> Row:
        return (lambda: search(*args, **options)), error, match

    return {
        "budget of 400 digits": of(BudgetError, "macs must be at most", budget=10**400),
        "seeds too large": of(ConfigError, "seeds must be whole numbers", seeds=[2**64]),
        "seeds a text": of(ConfigError, "seeds must be a sequence", seeds="ab"),
        "seeds a number": of(ConfigError, "seeds must be a sequence", seeds=5),
        "loader a number": of(LoaderError, "loader must be an iterable", loader=5),
        "loader a class": of(LoaderError, "loader must be an iterable", loader=list),
        "loader a text": of(LoaderError, "loader must yield pairs", loader="ab"),
        "val_loader a number": of(LoaderError, "val_loader must be an iterable", val_loader=5),
        "example_input a text": of(
            ConfigError, "example_input must be a tensor", example_input="x"
        ),
        "example_input mixed": of(ConfigError, "example_input must", example_input=(IMAGE, 3)),
        "example_input empty": of(ConfigError, "example_input must", example_input=()),
        "example_input of no dimension": of(
            ConfigError, "example_input must", example_input=torch.tensor(1.0)
        ),
        "example_input sparse": of(
            ConfigError, "example_input must be .*dense.*to_dense", example_input=IMAGE.to_sparse()
        ),
        "example_input nested": of(
            ConfigError, "example_input must be .*dense", example_input=ragged
        ),
        "example_input quantised": of(
            ConfigError, "example_input must be .*dense", example_input=lambda: quantised(IMAGE)
        ),
        "reference a text": of(BudgetError, "reference must be a module", reference="x"),
        "reference a class": of(BudgetError, "reference must be a module", reference=nn.Linear),
        "reference infinite": of(BudgetError, "reference must be", reference=float("inf")),
        "reference of 400 digits": of(BudgetError, "reference must be", reference=10**400),
        "reference an array": of(BudgetError, "reference must be", reference=np.array([1, 2])),
        "reference of another input": of(
            ModelError, "example_input must be accepted", reference=nn.Linear(3, 4)
        ),
        "checkpoint a number": of(ConfigError, "checkpoint must be a path", checkpoint=5),
        "checkpoint a number with seeds": of(
            ConfigError, "checkpoint must be a path", checkpoint=5, seeds=[1]
        ),
        "progress a text": of(ConfigError, "progress must be True or False", progress="x"),
        "model of the old weight norm": of(
            ModelError, "deepcopy.*parametrizations", old_weight_norm
        ),
        "model None": (lambda: pfs.search(None, batches(), 0.5), ModelError, "model must be an nn"),
    }


def trainings() -> dict[str, Row]:
    def of(error: type[PfsError], match: str, *args: Any, **options: Any) -> Row:
        return (lambda: train(*args, **options)), error, match

    def judged(error: type[PfsError], match: str, *args: Any, **options: Any) -> Row:
        return (lambda: evaluate(*args, **options)), error, match

    return {
        "train config a dict": of(
            ConfigError, r"config must be a TrainConfig.*TrainConfig\(epochs", config={}
        ),
        "train device unknown": of(ConfigError, "train: device must be", device="gpu"),
        "train device a number": of(ConfigError, "train: device must be", device=1.5),
        "train device not there": of(ConfigError, "train: device must be there", device="cuda:99"),
        "train lazy": of(ModelError, "train: model must be initialised.*call the model once", lazy),
        "train a class": of(ModelError, "train: model must be an nn.Module", lambda: nn.Linear),
        "train None": (lambda: pfs.train(None, batches()), ModelError, "model must be an nn.Module"),
        "train loader a number": of(LoaderError, "loader must be an iterable", loader=5),
        "train loader None": (
            lambda: pfs.train(tiny(), None), LoaderError, "loader must be an iterable"
        ),
        "train val_loader a number": of(LoaderError, "val_loader must be", val_loader=5),
        "train progress": of(ConfigError, "progress must be True or False", progress="x"),
        "evaluate device unknown": judged(ConfigError, "evaluate: device must be", device="gpu"),
        "evaluate device not there": judged(
            ConfigError, "evaluate: device must be there", device="cuda:99"
        ),
        "evaluate a class": judged(ModelError, "evaluate: model must be", lambda: nn.Linear),
        "evaluate None": (
            lambda: pfs.evaluate(None, batches()), ModelError, "model must be an nn.Module"
        ),
        "evaluate lazy": judged(ModelError, "evaluate: model must be initialised", lazy),
        "evaluate amp": judged(ConfigError, "amp must be one of", amp=["bf16"]),
        "evaluate loader a number": judged(LoaderError, "loader must be an iterable", loader=5),
        "short training config": (
            lambda: pfs.SearchResults([result()]).best(ShortTraining(batches(), config={})),
            ConfigError,
            "config must be a TrainConfig",
        ),
    }  # fmt: skip


def batch_kinds() -> dict[str, Row]:
    images: dict[str, tuple[Callable[[], Tensor], str]] = {
        "meta": (lambda: IMAGES.to("meta"), "images must hold values, got a meta tensor"),
        "sparse": (IMAGES.to_sparse, r"images must be dense.*to_dense\(\)"),
        "compressed": (lambda: IMAGES[:, 0, 0].to_sparse_csr(), "images must be dense"),
        "nested": (lambda: nested(*[(3, 6, 6)] * 4), "images must be dense"),
        "ragged": (ragged, "images must be dense"),
        "complex": (lambda: IMAGES.to(torch.complex64), "images must be floating point"),
        "quantised": (lambda: quantised(IMAGES), "images must be (dense|floating point)"),
    }
    labels: dict[str, tuple[Callable[[], Tensor], str]] = {
        "meta": (lambda: LABELS.to("meta"), "labels must hold values"),
        "sparse": (LABELS.to_sparse, r"labels must be dense.*to_dense\(\)"),
        "nested": (lambda: nested((1,), (2,)), "labels must be dense"),
        "complex": (lambda: LABELS.to(torch.complex64), "labels must be integers"),
        "soft meta": (lambda: torch.ones(4, 4, device="meta") / 4, "labels must hold values"),
        "soft sparse": (lambda: (torch.ones(4, 4) / 4).to_sparse(), "labels must be dense"),
    }
    calls = {"search": search, "train": train, "evaluate": evaluate}
    rows: dict[str, Row] = {}
    for caller, call in calls.items():
        for kind, (make, match) in images.items():
            rows[f"{caller} images {kind}"] = (
                lambda call=call, make=make: call(loader=[(make(), LABELS)]),
                LoaderError,
                match,
            )
        for kind, (make, match) in labels.items():
            rows[f"{caller} labels {kind}"] = (
                lambda call=call, make=make: call(loader=[(IMAGES, make())]),
                LoaderError,
                match,
            )
    return rows  # fmt: skip


def slims() -> dict[str, Row]:
    def of(error: type[PfsError], match: str, *args: Any, **options: Any) -> Row:
        return (
            (lambda: pfs.slim(*(a() if callable(a) else a for a in args), **options)),
            error,
            match,
        )

    def own() -> pfs.Structure:
        return result().structure

    return {
        "slim None": of(StructureError, "structure must be a Structure.*result.structure", tiny, None),
        "slim text": of(StructureError, "structure must be a Structure", tiny, "text"),
        "slim JSON": of(
            StructureError, r"structure must be a Structure.*Structure\.from_json",
            tiny, lambda: own().to_json(),
        ),
        "slim of another model": of(
            StructureError, "use the structure with the model", tiny, structure_of_another
        ),
        "slim weights None": of(ConfigError, "weights must be 'fresh' or", tiny, own, None),
        "slim weights a list": of(ConfigError, "weights must be 'fresh'", tiny, own, ["fresh"]),
        "slim seed text": of(ConfigError, "seed must be", tiny, own, seed="a"),
        "slim seed too large": of(ConfigError, "seed must be", tiny, own, seed=2**70),
        "slim of a result, seed": (lambda: result().slim(seed="a"), ConfigError, "seed must be"),
        "slim of a result, budget": (
            lambda: result().slim("x"), BudgetError, "macs must be a number"
        ),
        "slim verify a text": of(
            ConfigError, "verify must be True or False", tiny, own, verify="yes"
        ),
        "structure for a text": (lambda: result().structure_for("x"), BudgetError, "Budget.parse"),
        "structure for None": (lambda: result().structure_for(None), BudgetError, "got None; pass"),
        "structure with a ranking": (
            lambda: result().structure_for(0.9, ranking=["gates"]), ConfigError, "ranking must be"
        ),
        "pareto share above 1": (lambda: result().pareto([2.0]), BudgetError, r"shares in \(0, 1\]"),
        "pareto text": (lambda: result().pareto("ab"), BudgetError, r"shares in \(0, 1\]"),
        "pareto texts": (lambda: result().pareto(["a"]), BudgetError, r"shares in \(0, 1\]"),
        "pareto None inside": (lambda: result().pareto([None]), BudgetError, "shares in"),
        "pareto NaN": (lambda: result().pareto([float("nan")]), BudgetError, "shares in"),
        "pareto a number": (lambda: result().pareto(0.5), BudgetError, r"write e\.g\. \[0\.3, 0\.5\]"),
        "pareto multiple": (
            lambda: result().pareto([0.9], multiple_of="a"), BudgetError, "multiple_of must be"
        ),
        "pareto large multiple": (
            lambda: result().pareto(multiple_of=2**70), BudgetError, "multiple_of must be"
        ),
        "pareto min_channels": (
            lambda: result().pareto(min_channels=None), BudgetError, "min_channels must be"
        ),
    }  # fmt: skip


def counts() -> dict[str, Row]:
    def of(error: type[PfsError], match: str, model: Callable[[], Any], x: Any = IMAGE) -> Row:
        return (lambda: pfs.count(model(), made(x))), error, match

    return {
        "count None": of(ModelError, "model must be an nn.Module", lambda: None),
        "count weight norm": of(
            ModelError, "deepcopy.*torch.nn.utils.parametrizations", old_weight_norm
        ),
        "count scripted": of(ModelError, "pass the module before torch.jit.script", scripted),
        "count a scripted layer": of(
            ModelError, "layer '1'; pass the module before torch.jit", with_scripted_layer
        ),
        "count lazy": of(ModelError, "call the model once first", lazy),
        "count input None": of(ModelError, r"example_input must be.*torch\.zeros", tiny, None),
        "count input a list": of(ModelError, "example_input must be", tiny, [IMAGE]),
        "count input nested": of(ModelError, "example_input must be", tiny, ragged),
        "count input quantised": of(
            ModelError, "example_input must be", tiny, lambda: quantised(IMAGE)
        ),
        "count input sparse": of(ModelError, "example_input must be", tiny, IMAGE.to_sparse()),
    }


def files() -> dict[str, Row]:
    def saved(error: type[PfsError], match: str, **options: Any) -> Row:
        model = options.pop("model", tiny)
        given = {"path": "m"} | options
        return (lambda: pfs.save(model(), **given)), error, match

    def loaded(error: type[PfsError], match: str, path: Any) -> Row:
        return (lambda: pfs.load(path, tiny())), error, match

    def exported(error: type[PfsError], match: str, **options: Any) -> Row:
        model = options.pop("model", tiny)
        given = {"path": "m.pt2", "example_input": IMAGE} | options
        return (
            (lambda: pfs.export(model(), given["path"], made(given["example_input"]))),
            error,
            match,
        )

    cyclic: dict[str, Any] = {}
    cyclic["a"] = cyclic
    return {
        "save metadata NaN": saved(ConfigError, "metadata must", metadata={"a": float("nan")}),
        "save metadata an object": saved(ConfigError, "metadata must", metadata={"a": object()}),
        "save metadata a number": saved(ConfigError, "metadata must", metadata=5),
        "save metadata cyclic": saved(ConfigError, "metadata must", metadata=cyclic),
        "save metadata deep": saved(ConfigError, "metadata must", metadata=nested_too_deep()),
        "save None": saved(ModelError, "model must be an nn.Module", model=lambda: None),
        "save lazy": saved(ModelError, "call the model once", model=lazy),
        "load into None": (
            lambda: pfs.load("m", None), ModelError, "model must be an nn.Module"
        ),
        "export no suffix": exported(ConfigError, "path must end in .pt2", path="m"),
        "export None": exported(ConfigError, "path must end in .pt2 or .onnx.*write", path=None),
        "export a number": exported(ConfigError, "path must end in .pt2 or .onnx.*write", path=5.5),
        "export no module": exported(ModelError, "model must be an nn.Module", model=lambda: None),
        "export lazy": exported(ModelError, "call the model once", model=lazy),
        "export input a tuple": exported(ConfigError, "example_input", example_input=(IMAGE,)),
        "export input meta": exported(
            ConfigError, "example_input must hold values", example_input=IMAGE.to("meta")
        ),
        "export input sparse": exported(
            ConfigError, "example_input must be .*dense", example_input=IMAGE.to_sparse()
        ),
        "export input nested": exported(
            ConfigError, "example_input must be .*dense", example_input=ragged
        ),
        "export input quantised": exported(
            ConfigError, "example_input must be .*dense", example_input=lambda: quantised(IMAGE)
        ),
        "export weight norm": exported(ModelError, "deepcopy", model=old_weight_norm),
        "npz of a huge shape": (lambda: data.from_npz(huge()), LoaderError, "path must be"),
        "npz encrypted": (lambda: data.from_npz(encrypted()), LoaderError, "path must be"),
        "npz of no known compression": (
            lambda: data.from_npz(compressed()), LoaderError, "path must be"
        ),
        "npz None": (lambda: data.from_npz(None), LoaderError, "path must be"),
        "npz a zero byte": (lambda: data.from_npz("a\0.npz"), LoaderError, "path must be"),
    }  # fmt: skip


def sources() -> dict[str, Row]:
    def loader(match: str, **options: Any) -> Row:
        given = {"images": IMAGES, "labels": LABELS, "batch_size": 2} | options
        return (
            lambda: next(iter(data.DeviceLoader(**given | {"images": made(given["images"])}))),
            LoaderError,
            match,
        )

    return {
        "digits size 0": (lambda: data.digits(size=0), LoaderError, "size must be an integer"),
        "digits size text": (lambda: data.digits(size="a"), LoaderError, "size must be an integer"),
        "digits channels 0": (lambda: data.digits(channels=0), LoaderError, "channels must be"),
        "digits val text": (lambda: data.digits(val="a"), LoaderError, "val must be"),
        "synthetic text": (lambda: data.synthetic("a"), LoaderError, "num_images must be"),
        "synthetic shape": (lambda: data.synthetic(8, 5), LoaderError, "shape must be"),
        "synthetic two sizes": (lambda: data.synthetic(8, (3, 4)), LoaderError, "shape must be"),
        "synthetic noise": (lambda: data.synthetic(8, noise="a"), LoaderError, "noise must be"),
        "synthetic seed": (lambda: data.synthetic(8, seed=2**70), LoaderError, "seed must be"),
        "load None": (lambda: data.load(None), LoaderError, "source must be"),
        "load a zero byte": (lambda: data.load("a\0b"), LoaderError, "source must be|path must"),
        "classes a text": loader("num_classes must be an integer", num_classes="x"),
        "classes negative": loader("num_classes must be an integer", num_classes=-1),
        "device unknown": loader("device must be", device="gpu"),
        "device meta": loader("device must be", device="meta"),
        "images meta": loader("images must hold values", images=IMAGES.to("meta")),
        "images sparse": loader("images must be dense", images=IMAGES.to_sparse()),
        "images quantised": loader("images must be", images=lambda: quantised(IMAGES)),
        "labels meta": loader("labels must hold values", labels=LABELS.to("meta")),
        "labels sparse": loader("labels must be dense", labels=LABELS.to_sparse()),
        "padding": loader("crop_padding must be an integer", train=True, crop_padding=2**70),
    }


def networks() -> dict[str, Row]:
    rows: dict[str, Row] = {}
    for name in ("resnet20", "resnet50", "vgg16", "mobilenet_v1", "mobilenet_v2"):
        build = getattr(models, name)
        for value in (-1, "a", 2**70):
            rows[f"{name} classes {value}"] = (
                lambda build=build, value=value: build(num_classes=value),
                ConfigError,
                "num_classes must be an integer",
            )
        for value in ("a", float("nan"), 10**400, 1e300):
            rows[f"{name} expansion {value!s:.9}"] = (
                lambda build=build, value=value: build(expansion=value),
                ConfigError,
                "expansion must be a finite number",
            )
    rows["multiplier"] = (
        lambda: models.mobilenet_v2(multiplier=10**400),
        ConfigError,
        "multiplier must be a finite",
    )
    rows["get None"] = (lambda: models.get(None), ModelError, "name must be a string")
    rows["get an option that is not there"] = (
        lambda: models.get("resnet20", depth=3),
        ModelError,
        "keyword arguments must be",
    )
    return rows  # fmt: skip


def archive(path: Path) -> bytearray:
    np.savez(path, images=np.zeros((2, 3, 4, 4), np.uint8), labels=np.zeros(2, int))
    return bytearray(path.read_bytes())


def changed(path: Path, local: int, central: int, change: Callable[[int], int]) -> Path:
    """A zip file with one byte changed in both headers of every member."""
    content = archive(path)
    for mark, offset in ((b"PK\x03\x04", local), (b"PK\x01\x02", central)):
        at = content.find(mark)
        while at >= 0:
            content[at + offset] = change(content[at + offset])
            at = content.find(mark, at + 4)
    path.write_bytes(content)
    return path


def encrypted() -> Path:
    return changed(Path("encrypted.npz"), 6, 8, lambda byte: byte | 1)


def compressed() -> Path:
    return changed(Path("compressed.npz"), 8, 10, lambda _: 97)


def huge() -> Path:
    header = (
        b"{'descr':'<f8','fortran_order':False,'shape':(1000000000000,1000000),}".ljust(117) + b"\n"
    )
    member = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header
    with zipfile.ZipFile(Path("huge.npz"), "w") as file:
        file.writestr("images.npy", member)
        file.writestr("labels.npy", member)
    return Path("huge.npz")


PARTS = {
    "budget": budgets(),
    "config": configs(),
    "search": searches(),
    "train": trainings(),
    "batch": batch_kinds(),
    "slim": slims(),
    "count": counts(),
    "file": files(),
    "data": sources(),
    "model": networks(),
}
ROWS = {f"{part}: {name}": row for part, rows in PARTS.items() for name, row in rows.items()}


@pytest.mark.filterwarnings("ignore:.*torch.jit.*is deprecated")
@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
@pytest.mark.filterwarnings("ignore:.*(weight|spectral)_norm.* is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support")
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
@pytest.mark.parametrize("name", ROWS)
def test_argument_that_cannot_be_served_is_an_error_of_this_package(name, tmp_path, monkeypatch):
    call, error, match = ROWS[name]
    monkeypatch.chdir(tmp_path)
    with pytest.raises(PfsError, match=match) as caught:
        call()
    assert type(caught.value) is error


# -- parameters in shards --------------------------------------------------------------------------------------------------

SHARDED = """
import sys
import tempfile

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

import pfs_fast as pfs

store = dist.FileStore(tempfile.mktemp(), 1)
dist.init_process_group("gloo", store=store, rank=0, world_size=1)
mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(64, 4))
fully_shard(model, mesh=mesh)
x, y = torch.zeros(4, 3, 6, 6), torch.zeros(4, dtype=torch.int64)
for call in (
    lambda: pfs.train(model, [(x, y)], config=pfs.TrainConfig(epochs=1), progress=False),
    lambda: pfs.evaluate(model, [(x, y)]),
    lambda: pfs.search(model, [(x, y)], 0.5, progress=False),
    lambda: pfs.count(model, x),
    lambda: pfs.save(model, "model.safetensors"),
    lambda: pfs.export(model, "model.pt2", x),
):
    try:
        call()
        print("no error")
    except Exception as error:
        print(type(error).__name__, str(error).replace(chr(10), " "))
dist.destroy_process_group()
"""


def test_model_in_shards_is_refused_by_every_call(tmp_path):
    root = str(Path(pfs.__file__).parents[1])
    run = subprocess.run(
        [sys.executable, "-c", SHARDED],
        capture_output=True,
        text=True,
        timeout=200,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": root},
    )
    lines = run.stdout.splitlines()
    assert len(lines) == 6, run.stderr
    for line in lines:
        assert re.match(
            r"ModelError \w+: model must have whole parameters.*before fully_shard", line
        )


# -- errors that are the caller's own --------------------------------------------------------------------------------------


MINE = re.compile("^mine$")


class OwnError(Exception):
    """Of nobody but the caller."""


class OwnValueError(ValueError):
    """Of the caller, and of a kind that this package looks for in forwards."""


class BrokenLoader:
    """One good batch, then an error. ``at`` 0: at once, in ``__iter__``."""

    def __init__(self, error: type[Exception], at: int) -> None:
        self.error, self.at = error, at

    def __iter__(self):
        if self.at == 0:
            raise self.error("mine")
        return self.batches()

    def batches(self):
        yield from batches(self.at)
        raise self.error("mine")


class BrokenSet(torch.utils.data.Dataset):
    def __init__(self, error: type[Exception]) -> None:
        self.error = error

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int):
        raise self.error("mine")


class BrokenForward(nn.Module):
    """Breaks in its third forward, which is past the first batch of every call."""

    def __init__(self, error: type[Exception]) -> None:
        super().__init__()
        self.body, self.error, self.calls = tiny(), error, 0

    def forward(self, x):
        self.calls += 1
        if self.calls > 2:
            raise self.error("mine")
        return self.body(x)


@pytest.mark.parametrize("error", [OwnError, OwnValueError, KeyboardInterrupt])
@pytest.mark.parametrize("call", [search, train, evaluate])
@pytest.mark.parametrize("at", [0, 1])
def test_error_of_the_callers_loader_comes_out_as_it_is(call, error, at):
    with pytest.raises(error, match=MINE) as caught:
        call(loader=BrokenLoader(error, at))
    assert type(caught.value) is error


@pytest.mark.parametrize("call", [search, train, evaluate])
def test_error_of_the_callers_data_set_comes_out_as_it_is(call):
    loader = torch.utils.data.DataLoader(BrokenSet(OwnError), batch_size=4)
    with pytest.raises(OwnError, match=MINE):
        call(loader=loader)


@pytest.mark.parametrize("error", [OwnError, OwnValueError])
@pytest.mark.parametrize("call", [train, evaluate])
def test_error_of_the_callers_forward_comes_out_as_it_is(call, error):
    with pytest.raises(error, match=MINE) as caught:
        call(lambda: BrokenForward(error), batches(4))
    assert type(caught.value) is error


def test_error_of_the_callers_hook_comes_out_of_a_search_as_it_is():
    calls = []

    def hook(*_args: Any) -> None:
        calls.append(None)
        if len(calls) > 4:  # past the analysis
            raise OwnError("mine")

    def model() -> nn.Module:
        network = tiny()
        network[2][1].register_forward_hook(hook)
        return network

    with pytest.raises(OwnError, match=MINE):
        search(model, batches(8), changes={"max_steps": 8})


def test_error_of_the_callers_proxy_comes_out_as_it_is():
    def score(_result: pfs.SearchResult) -> float:
        raise OwnError("mine")

    with pytest.raises(OwnError, match=MINE):
        pfs.SearchResults([result()]).best(score)
