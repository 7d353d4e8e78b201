"""Whatever a caller has set for PyTorch, and whatever other threads do: a call gives what it gives alone, and leaves both as they were."""

from __future__ import annotations

import contextlib
import copy
import os
import random
import threading
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_nets import Net, batches, cbr, head
from torch import Tensor, nn

import pfs_fast as pfs
from pfs_fast import Budget, SearchConfig, TrainConfig
from pfs_fast._ambient import _Settings, alone, own_settings
from pfs_fast._library import is_loaded
from pfs_fast.errors import BusyError, ModelError
from pfs_fast.graph.trace import trace

needs_operators = pytest.mark.skipif(not is_loaded(), reason="needs the compiled operators")


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def default_device(device: str) -> Iterator[None]:
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextlib.contextmanager
def autocast_dtype_float16() -> Iterator[None]:
    torch.set_autocast_dtype("cpu", torch.float16)
    try:
        yield
    finally:
        torch.set_autocast_dtype("cpu", torch.bfloat16)


@contextlib.contextmanager
def everything() -> Iterator[None]:
    with (
        torch.inference_mode(),
        torch.autocast("cpu", torch.bfloat16),
        default_dtype(torch.float64),
        default_device("meta"),
    ):
        yield


AMBIENTS: dict[str, Callable[[], Any]] = {
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "autocast dtype": autocast_dtype_float16,
    "float64": lambda: default_dtype(torch.float64),
    "device meta": lambda: torch.device("meta"),
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "everything": everything,
}


class Dropping(Net):
    """A region of autocast of its own, a tensor of the default dtype and device, and random numbers."""

    def __init__(self) -> None:
        super().__init__(
            lambda m, x: m.c(m.drop(m.b(m.a(x) * torch.full((3, 1, 1), 0.5)))),
            a=cbr(3, 3),
            b=cbr(3, 5),
            drop=nn.Dropout(0.2),
            c=head(5),
        )


def exact(value: Any) -> Any:
    """Something that compares equal where every bit, dtype, device and number is the same."""
    if isinstance(value, Tensor):
        value = value.detach()
        bits = value.contiguous().reshape(-1).view(torch.uint8) if value.numel() else value
        return value.dtype, value.shape, value.device, value.is_inference(), bytes(bits.tolist())
    if isinstance(value, nn.Module):
        return {
            name: (exact(tensor), tensor.requires_grad)
            for name, tensor in value.state_dict(keep_vars=True).items()
        }
    if isinstance(value, dict):
        return {key: exact(entry) for key, entry in value.items() if key != "seconds"}
    if isinstance(value, list | tuple):
        return [exact(entry) for entry in value]
    return value


def dropping() -> nn.Module:
    torch.manual_seed(1)
    return Dropping()


def search(model: nn.Module, loader: Any, **options: Any) -> Any:
    """A short search in float32 of ``options`` of `SearchConfig` and of `pfs_fast.search`."""
    others = {k: options.pop(k) for k in ("seeds", "val_loader") if k in options}
    config = SearchConfig(**{"epochs": 2, "precision": "fp32", "backend": "reference", **options})
    return pfs.search(model, loader, 0.6, config=config, device="cpu", progress=False, **others)


class Given:
    """What the calls below are given, made under PyTorch's own settings."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        torch.manual_seed(1)
        self.model = Dropping()
        self.network = copy.deepcopy(self.model)  # to be trained
        self.batches, self.val_batches = batches(), batches(1)
        self.images = self.batches[0][0]
        self.result = search(self.model, self.batches, epochs=1)
        self.structure = self.result.structure
        self.slim = self.result.slim(seed=0)
        pfs.save(self.slim, folder / "given.safetensors")
        self.result.save(folder / "given.search")

    def again(self) -> Given:
        """The same as it was first."""
        given = copy.copy(self)
        given.network = copy.deepcopy(self.model)
        given.result = pfs.SearchResult.load(self.folder / "given.search", self.model)
        return given


@pytest.fixture(scope="module")
def expected(tmp_path_factory) -> tuple[Given, dict[Any, Any]]:
    """What the calls give where nothing was set, each found once."""
    return Given(tmp_path_factory.mktemp("given")), {}


def run_search(given: Given, backend: str) -> Any:
    result = search(given.model, given.batches, backend=backend, val_loader=given.val_batches)
    return exact([result.flat_gates, result.died_at, result.history]), str(result.structure)


def run_seeds(given: Given) -> Any:
    results = search(given.model, given.batches, epochs=1, seeds=[3, 4])
    results.save(given.folder / "again.searches")
    loaded = pfs.SearchResults.load(given.folder / "again.searches", given.model)
    found = [[(r.flat_gates, r.model) for r in some] for some in (results, loaded)]
    return exact(found), exact(results.similarity()), results.report()


def run_train(given: Given, **options: Any) -> Any:
    config = TrainConfig(**{"epochs": 2, "seed": 0, **options})
    done = pfs.train(given.network, given.batches, given.val_batches, config, progress=False)
    return exact([given.network, done.history, done.last_state, done.best_state, done.accuracy])


def run_export(given: Given) -> Any:
    path = given.folder / "slim.pt2"
    report = pfs.export(given.slim, path)
    with own_settings():
        outputs = torch.export.load(path).module()(given.images)
    return exact(outputs), report.max_error, report.runtime


def run_save(given: Given) -> Any:
    path = given.folder / "again.safetensors"
    pfs.save(given.model, path, metadata={"note": 1})
    return path.read_bytes()


def run_save_search(given: Given) -> Any:
    given.result.save(given.folder / "again.search")
    return (given.folder / "again.search").read_bytes()


def run_load_search(given: Given) -> Any:
    result = pfs.SearchResult.load(given.folder / "given.search", given.model)
    return exact([result.flat_gates, result.died_at]), result.report()


CALLS: dict[str, Callable[[Given], Any]] = {
    "search fused": lambda given: run_search(given, "fused"),
    "search reference": lambda given: run_search(given, "reference"),
    "search seeds": run_seeds,
    "train": run_train,
    "train bf16": lambda given: run_train(given, amp="bf16"),
    "evaluate": lambda given: pfs.evaluate(given.model, given.batches),
    "evaluate bf16": lambda given: pfs.evaluate(given.model, given.batches, amp="bf16"),
    "verify": lambda given: pfs.verify(given.model, None, given.structure, given.images),
    "count": lambda given: pfs.count(given.model, given.images),
    "slim": lambda given: exact(pfs.slim(given.model, given.structure, seed=5)),
    "slim inherit": lambda given: exact(pfs.slim(given.model, given.structure, "inherit")),
    "SearchResult.slim": lambda given: exact(given.result.slim(0.5, seed=5)),
    "structure_for": lambda given: str(
        given.result.structure_for(Budget(macs=0.7, peak_activation_bytes=0.9))
    ),
    "report": lambda given: given.result.report(),
    "measured": lambda given: str(given.result.measured()),
    "export": run_export,
    "save": run_save,
    "load": lambda given: exact(pfs.load(given.folder / "given.safetensors", given.model)),
    "SearchResult.save": run_save_search,
    "SearchResult.load": run_load_search,
}


@needs_operators
@pytest.mark.parametrize("ambient", AMBIENTS.values(), ids=AMBIENTS)
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_call_gives_the_same_under_any_settings_and_leaves_them(call, ambient, expected):
    given, found = expected
    if call not in found:
        found[call] = call(given.again())
    given = given.again()
    with ambient():
        before = _Settings.now()
        got = call(given)
        assert _Settings.now() == before
    assert got == found[call]


@pytest.mark.parametrize("call", [run_train, CALLS["search reference"], CALLS["verify"]])
def test_error_leaves_settings_and_random_states(call, expected):
    given = expected[0].again()
    given.network.body = given.model.body = failing
    torch.manual_seed(7)
    try:
        with everything():
            before, states = _Settings.now(), random_states()
            with pytest.raises((RuntimeError, ValueError), match="on purpose"):
                call(given)
            assert _Settings.now() == before
            assert random_states() == states
    finally:
        given.model.body = Dropping().body


def failing(model: nn.Module, x: Tensor) -> Tensor:
    raise RuntimeError("failed on purpose")


def random_states() -> Any:
    return (
        torch.random.get_rng_state().numpy().tobytes(),
        repr(np.random.get_state()),
        random.getstate(),
    )


@needs_operators
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_call_leaves_random_generators_of_all_devices(call, expected, monkeypatch):
    seeded: list[int] = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    given = expected[0].again()
    before = random_states()
    call(given)
    assert random_states() == before
    assert seeded == []


class Loader:
    """Makes its batches anew, of what PyTorch's settings say; ``visit`` is called where it has begun."""

    def __init__(self, visit: Callable[[], Any] = lambda: None) -> None:
        self.visit = visit
        self.seen: list[_Settings] = []

    def set_epoch(self, epoch: int) -> None:
        self.seen.append(_Settings.now())

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        self.visit()
        for i in range(2):
            self.seen.append(_Settings.now())
            labels = torch.arange(4, device="cpu")
            yield torch.full((4, 3, 6, 6), 0.1 * i, device="cpu") + labels.view(4, 1, 1, 1), labels


@pytest.mark.parametrize("ambient", [contextlib.nullcontext, everything])
@pytest.mark.parametrize("function", ["search", "train", "evaluate"])
def test_loader_runs_under_the_settings_of_the_caller(function, ambient, expected):
    given, loader = expected[0].again(), Loader()
    calls = {
        "search": lambda: search(given.model, loader, val_loader=loader),
        "train": lambda: run_train(given),
        "evaluate": lambda: pfs.evaluate(given.model, loader),
    }
    given.batches = given.val_batches = loader
    with ambient():
        before = _Settings.now()
        calls[function]()
    assert len(loader.seen) > 1
    assert set(loader.seen) == {before}


def test_device_loader_gives_the_same_under_any_settings():
    images = torch.randint(256, (10, 3, 8, 8), dtype=torch.uint8)
    for train in (True, False):
        loader = pfs.data.DeviceLoader(images, torch.arange(10), 4, train=train)
        expected = list(loader)
        loader.set_epoch(0)
        with everything():
            got = list(loader)
        for pair, other in zip(expected, got, strict=True):
            for a, b in zip(pair, other, strict=True):
                assert a.dtype == b.dtype and torch.equal(a, b)


@pytest.mark.parametrize("call", ["search reference", "train", "evaluate"])
def test_batches_made_in_inference_mode_are_like_others(call, expected):
    run, given = CALLS[call], expected[0].again()
    with torch.inference_mode():
        given.batches = [(x.clone(), y.clone()) for x, y in given.batches]
        given.val_batches = [(x.clone(), y.clone()) for x, y in given.val_batches]
    assert run(given) == run(expected[0].again())


@needs_operators
@pytest.mark.parametrize("call", [name for name in CALLS if "train" not in name])
def test_model_made_in_inference_mode_is_like_others(call, expected):
    run, given = CALLS[call], expected[0].again()
    with torch.inference_mode():
        given.model, given.slim = copy.deepcopy(given.model), copy.deepcopy(given.slim)
    given.result.model = given.model
    assert run(given) == run(expected[0].again())


def test_train_refuses_a_model_made_in_inference_mode_and_takes_its_copy(expected):
    given = expected[0].again()
    with torch.inference_mode():
        given.network = copy.deepcopy(given.network)
    with pytest.raises(ModelError, match=r"train: model must .*'a\.0\.weight'.*copy\.deepcopy"):
        run_train(given)
    given.network = copy.deepcopy(given.network)
    assert run_train(given) == run_train(expected[0].again())


def test_train_forgets_what_autocast_had_cast_before(expected):
    """Weights that the caller's region had cast before the training are not those after it."""
    given = expected[0].again()
    network = nn.Conv2d(3, 4, 6)
    model = nn.Sequential(network, nn.Flatten())
    with torch.autocast("cpu", torch.bfloat16):
        model(given.images)
        pfs.train(model, given.batches, config=TrainConfig(epochs=1), progress=False)
        after = model(given.images)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(after, model(given.images))


class OwnRegion(nn.Module):
    """Computes in half precision where it says so itself."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = cbr(3, 3), head(3)
        self.seen: set[torch.dtype] = set()

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu"):
            x = self.first[0](x)
        self.seen.add(x.dtype)
        return self.last(self.first[1:](x.float()))


@pytest.mark.parametrize("ambient", [contextlib.nullcontext, *AMBIENTS.values()])
def test_region_of_autocast_inside_a_model_is_its_own(ambient, expected):
    given, model = expected[0].again(), OwnRegion()
    with ambient():
        pfs.evaluate(model, given.batches)
        pfs.train(model, given.batches, config=TrainConfig(epochs=1), progress=False)
    assert model.seen == {torch.bfloat16}


def test_warning_names_the_line_of_the_caller(expected):
    """Where it is made differs by as many frames as the calls are wrapped in."""
    given = expected[0].again()
    given.network.gamma = nn.Parameter(torch.ones(1))  # no module draws it
    given.model = given.network
    with pytest.warns(UserWarning, match="no initialiser is known for gamma") as caught:
        pfs.slim(given.model, given.structure)
    assert [w.filename for w in caught] == [__file__]


# -- threads -----------------------------------------------------------------------------------------------------------


def in_thread(work: Callable[[], Any]) -> Any:
    """What ``work`` gives in another thread, which has ended then."""
    with ThreadPoolExecutor(1, thread_name_prefix="other") as pool:
        return pool.submit(work).result()


DRAWING = {
    *("search fused", "search reference", "search seeds", "train", "train bf16"),
    *("verify", "slim", "SearchResult.slim", "measured", "export"),
}
"""Calls that another thread may not make while a search or a training runs."""


def outer(name: str, given: Given, visit: Callable[[], Any]) -> Any:
    """A search or a training with ``visit`` in its loader."""
    given.batches = given.val_batches = Loader(visit)
    return run_train(given) if name == "train" else run_search(given, "reference")


@needs_operators
@pytest.mark.parametrize("running", ["search", "train"])
def test_other_thread_is_refused_while_one_runs_or_gives_the_same(running, expected):
    given = expected[0]
    alone_, others = outer(running, given.again(), lambda: None), {}
    for name in CALLS:
        others[name] = "refused" if name in DRAWING else CALLS[name](given.again())

    def visit() -> None:
        for name, expected_ in others.items():
            try:
                got = in_thread(lambda name=name: CALLS[name](given.again()))
            except BusyError as error:
                assert "thread must be the only one" in str(error)
                assert f"got {running} in thread 'MainThread'" in str(error)
                got = "refused"
            assert got == expected_, name

    assert outer(running, given.again(), visit) == alone_


@pytest.mark.parametrize("running", ["search", "train"])
@pytest.mark.parametrize("inner", ["search reference", "train", "verify", "SearchResult.slim"])
def test_same_thread_may_enter_again(running, inner, expected):
    given = expected[0]
    alone_ = outer(running, given.again(), lambda: None)
    within = CALLS[inner](given.again())
    got = []
    assert outer(running, given.again(), lambda: got.append(CALLS[inner](given.again()))) == alone_
    assert got
    assert all(entry == within for entry in got)


def test_thread_may_run_after_another_has_failed(expected):
    given = expected[0].again()

    def fail() -> None:
        raise RuntimeError("failed on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        outer("search", given, fail)
    assert in_thread(lambda: run_train(expected[0].again())) == run_train(expected[0].again())


def test_forked_process_may_run_while_its_parent_does():
    def fork() -> int:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of Python 3.12: threads and fork
            child = os.fork()
        if child == 0:
            try:
                with alone("train"):
                    os._exit(0)
            finally:
                os._exit(1)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    with alone("search"):
        assert in_thread(fork) == 0


def test_modules_of_other_threads_run_while_a_model_is_traced():
    other, x = cbr(3, 3).eval(), torch.randn(1, 3, 4, 4)
    want, got = other(x), []

    class Slow(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(cbr(3, 3), head(3))

        def forward(self, images: Tensor) -> Tensor:
            got.append(in_thread(lambda: other(x)))
            return self.layers(images)

    model, images = Slow(), torch.randn(1, 3, 6, 6)
    traced = trace(model, images)
    assert got
    assert all(torch.equal(found, want) for found in got)
    assert traced.macs == pfs.count(model.layers, images).macs


def test_threads_trace_and_verify_in_turn(expected):
    given = expected[0]
    names = ["structure_for", "count", "verify", "SearchResult.slim"]
    want = [CALLS[name](given.again()) for name in names]
    before = random_states()
    with ThreadPoolExecutor(4) as pool:
        jobs = [pool.submit(CALLS[name], given.again()) for _ in range(8) for name in names]
        got = [job.result() for job in jobs]
    assert got == want * 8
    assert random_states() == before


def test_default_dtype_comes_back_when_the_last_thread_leaves():
    inside, leave = threading.Event(), threading.Event()
    seen = []

    def second() -> None:
        with own_settings():
            inside.set()
            leave.wait(60)
            seen.append(torch.get_default_dtype())

    with default_dtype(torch.float64), ThreadPoolExecutor(1) as pool:
        with own_settings():
            job = pool.submit(second)
            assert inside.wait(60)
        assert torch.get_default_dtype() == torch.float32
        leave.set()
        job.result()
        assert seen == [torch.float32]
        assert torch.get_default_dtype() == torch.float64
