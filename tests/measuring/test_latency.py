"""Latency as a budget, with made-up times: no test waits for a clock."""

from __future__ import annotations

import itertools
import json
import os
import re

import numpy as np
import pytest
import torch
from small_nets import batches, cbr, head
from torch import nn

import pfs_fast as pfs
from pfs_fast.budgets import deployment
from pfs_fast.budgets.deployment import Deployment
from pfs_fast.errors import BudgetError, BusyMachineError, InfeasibleBudgetError, ModelError
from pfs_fast.graph.analysis import channel_graph
from pfs_fast.measuring import latency, latency_fit
from pfs_fast.measuring.latency import LatencyModel
from pfs_fast.measuring.latency_cache import LatencyCache, cache_folder
from pfs_fast.measuring.latency_layers import operations
from pfs_fast.measuring.latency_table import Table
from pfs_fast.measuring.noise import decides
from pfs_fast.measuring.timing import DeviceTimer, Task, Timing
from pfs_fast.searching.loop import SearchLoop

CPU = Deployment(device="cpu")


class FakeTimer:
    """Layers take a time by their widths; whole networks another one, that no sum of layers gives."""

    def __init__(self, noise: float = 0.0, slope: float = 1e-3, drift: float = 0.0) -> None:
        self.noise, self.slope, self.drift = noise, slope, drift
        self.layers: list[tuple[str, tuple[int, ...]]] = []
        self.networks = 0
        self._random = np.random.default_rng(0)

    def network_ms(self, network: nn.Module) -> float:
        weights = sum(p.numel() for p in network.parameters() if p.dim() == 4)
        return 2.0 + self.slope * (36 * weights) ** 0.9

    spread = 0.02

    def __call__(self, tasks, samples):
        found = []
        busy = 1 + self.drift * self._random.random()  # what else the machine does just now
        for task in tasks:
            task.run()  # every layer can be run at every width
            if task.network is None:
                self.layers.append((task.name, task.widths))
                inputs, outputs = (max(1, width) for width in task.widths)
                time = 0.01 + 1e-4 * inputs * outputs
                found.append(Timing(time, 0.0, time))
            else:
                self.networks += 1
                factor = busy + self.noise * self._random.standard_normal()
                time = self.network_ms(task.network) * factor
                found.append(Timing(time, self.spread, time))
        return found


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PFS_FAST_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def timer(monkeypatch):
    timer = FakeTimer()
    monkeypatch.setattr(latency, "DeviceTimer", lambda device, threads: timer)
    return timer


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(cbr(3, 24), cbr(24, 24, groups=24), cbr(24, 40, 1), cbr(40, 32), head(32))


def model_of(net: nn.Module, timer, run: Deployment = CPU) -> LatencyModel:
    graph = channel_graph(net, torch.zeros(1, 3, 6, 6))
    return LatencyModel(
        graph.traced.eval, graph.unit_of_label, graph.groups.num_units, (3, 6, 6), run, timer=timer
    )


# -- operations ----------------------------------------------------------------------------------------------------


def found_in(net: nn.Module, size: int = 6):
    graph = channel_graph(net, torch.zeros(1, 3, size, size))
    images = torch.zeros(2, 3, size, size)
    return operations(
        graph.traced.eval, (images,), graph.unit_of_label, torch.device("cpu"), torch.float32, False
    )


def kinds(net: nn.Module) -> list[str]:
    return [json.loads(op.signature)[0] for op in found_in(net)]


def test_every_computing_operation_is_found_and_views_are_free():
    net = nn.Sequential(cbr(3, 8), nn.Dropout(0.5), nn.Identity(), head(8))
    assert kinds(net) == ["conv", "batch norm", "ReLU", "AdaptiveAvgPool2d", "linear"]


def test_layers_that_differ_only_in_width_share_their_measurements():
    ops = found_in(nn.Sequential(cbr(3, 8), cbr(8, 16), cbr(16, 16), head(16)))
    convs = [op.signature for op in ops if op.signature.startswith('["conv"')]
    assert convs[0] != convs[1] == convs[2]  # the first reads 3 channels that never change
    assert [op.grid() for op in ops if op.signature == convs[1]] == [
        ((1, 2, 4, 6, 8), (8, 16)),
        ((8, 16), (8, 16)),
    ]


def test_every_operation_runs_at_every_width_of_its_grid():
    net = pfs.models.mobilenet_v2(num_classes=5)
    for op in {op.signature: op for op in found_in(net, 32)}.values():
        assert not op.signature.startswith("not timed"), op.signature
        for task in op.tasks():
            with torch.inference_mode():
                task.run()


def test_an_operation_of_fixed_shape_is_timed_as_it_is():
    class Reshaped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.norm, self.head = cbr(3, 8), nn.GroupNorm(2, 8), head(8)

        def forward(self, x):
            return self.head(self.norm(self.body(x)))

    (norm,) = [op for op in found_in(Reshaped()) if "GroupNorm" in op.signature]
    assert norm.grid() == ((0,), (0,))


# -- tables --------------------------------------------------------------------------------------------------------


def test_table_interpolates_and_never_falls():
    table = Table(((8, 16), (10, 20, 40)), np.array([[1.0, 3.0, 2.0], [2.0, 2.0, 9.0]]))
    at = lambda i, o: float(table(np.array([i]), np.array([o]))[0])  # noqa: E731
    assert at(8, 10) == 1 and at(16, 40) == 9
    assert at(8, 40) == 3  # not 2: a narrower one took 3
    assert at(8, 15) == 2 and at(12, 10) == 1.5
    assert at(1, 1) == 1 and at(99, 99) == 9
    for i in range(1, 20):
        rows = [at(i, o) for o in range(1, 50)]
        # Up to the last digit of the interpolation.
        assert all(after >= before - 1e-12 for before, after in itertools.pairwise(rows))


def test_prediction_is_the_sum_of_the_layers_and_rises_with_the_width():
    net, timer = network(), FakeTimer()
    model = model_of(net, timer)
    keep = np.ones(
        sum(g.size for g in channel_graph(net, torch.zeros(1, 3, 6, 6)).groups.groups), bool
    )
    expected = 0.0
    for op in found_in(net):
        inputs, outputs = (grid[-1] or 1 for grid in op.grid())
        expected += 0.01 + 1e-4 * inputs * outputs
    assert model.evaluate(keep) == pytest.approx(expected)
    before = 0.0
    keep[:] = False
    for unit in np.random.default_rng(0).permutation(len(keep)):
        keep[unit] = True
        assert model.evaluate(keep) >= before
        before = model.evaluate(keep)


# -- the cache -----------------------------------------------------------------------------------------------------


def test_a_machine_measures_each_layer_once(tmp_path):
    first, second = FakeTimer(), FakeTimer()
    a, b = model_of(network(), first), model_of(network(), second)
    assert len(first.layers) == len(set(first.layers)) > 20
    assert second.layers == []
    whole = np.ones(96, dtype=bool)
    assert a.evaluate(whole) == b.evaluate(whole)
    (file,) = (tmp_path / "cache").iterdir()
    document = json.loads(file.read_text())
    assert (document["format"], document["version"]) == ("pfs_fast.latency", 1)
    assert set(document["key"]) == {
        "machine", "device", "torch", "threads", "precision", "batch", "input_shape", "layout",
    }  # fmt: skip


@pytest.mark.parametrize(
    "run", [Deployment("cpu", 2), Deployment("cpu", 1, "bf16"), Deployment("cpu", 1, threads=7)]
)
def test_another_way_of_running_is_measured_anew(run):
    model_of(network(), FakeTimer())
    timer = FakeTimer()
    model_of(network(), timer, run)
    assert timer.layers


BROKEN = {
    "truncated": lambda text: text[: len(text) // 2],
    "empty": lambda text: "",
    "no object": lambda text: "[1, 2]",
    "another format": lambda text: text.replace("pfs_fast.latency", "pfs_fast.run"),
    "another version": lambda text: text.replace('"version": 1', '"version": 2'),
    "another machine": lambda text: text.replace('"machine": "', '"machine": "x'),
    "negative time": lambda text: text.replace('"points": {', '"points": {"a": {"1,1": -1.0}, '),
    "time of text": lambda text: text.replace('"points": {', '"points": {"a": {"1,1": "b"}, '),
    "NaN": lambda text: text.replace('"points": {', '"points": {"a": {"1,1": NaN}, '),
    "no points": lambda text: text.replace('"points"', '"dots"'),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_damaged_file_is_reported_and_measured_anew(case, tmp_path):
    first, second, third = FakeTimer(), FakeTimer(), FakeTimer()
    model_of(network(), first)
    (file,) = (tmp_path / "cache").iterdir()
    file.write_text(BROKEN[case](file.read_text()))
    with pytest.warns(
        UserWarning, match=r"latency: '.*' must be a whole table of times, got .*measured anew"
    ):
        model_of(network(), second)
    assert second.layers == first.layers
    model_of(network(), third)  # whole again
    assert third.layers == []


def test_a_cache_that_cannot_be_written_is_reported(tmp_path):
    (tmp_path / "cache").write_text("a file where the folder should be")
    with pytest.warns(UserWarning, match=r"latency: .*(must be kept in a folder|must be a whole)"):
        model_of(network(), FakeTimer())


def test_cache_keeps_what_another_process_added(tmp_path):
    mine, other = LatencyCache({"a": 1}, tmp_path), LatencyCache({"a": 1}, tmp_path)
    other.add({"conv": {"1,1": 2.0}})
    mine.add({"conv": {"1,2": 3.0}})
    assert LatencyCache({"a": 1}, tmp_path).points == {"conv": {"1,1": 2.0, "1,2": 3.0}}
    assert LatencyCache({"a": 2}, tmp_path).points == {}


def test_cache_folder_follows_the_environment(monkeypatch, tmp_path):
    assert cache_folder() == tmp_path / "cache"
    monkeypatch.delenv("PFS_FAST_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "pfs_fast"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder().parts[-2:] == (".cache", "pfs_fast")


# -- the budget ----------------------------------------------------------------------------------------------------


def search(budget, net=None) -> pfs.SearchResult:
    config = pfs.SearchConfig(epochs=1, backend="reference", precision="fp32", scope="all", lr=0.1)
    net = network() if net is None else net
    return pfs.search(net, batches(2), budget, config=config, device="cpu", progress=False)


@pytest.mark.parametrize("slope", [1e-3, 1e-2])
@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
def test_measured_latency_is_within_the_limit_and_close_to_it(timer, share, slope):
    timer.slope = slope
    net = network()
    whole = timer.network_ms(net)
    limit = 2.0 + share * (whole - 2.0)
    structure = search(pfs.Budget(latency_ms=limit, device="cpu"), net).structure
    measured = timer.network_ms(pfs.slim(net, structure))
    (check,) = structure.limits
    assert check.measured == pytest.approx(measured)
    assert 0.9 * limit <= measured <= limit
    assert check.holds


def test_noise_does_not_lift_the_result_above_the_limit(monkeypatch):
    timer = FakeTimer(noise=0.02, slope=1e-2)
    monkeypatch.setattr(latency, "DeviceTimer", lambda device, threads: timer)
    net = network()
    limit = 0.6 * timer.network_ms(net)
    structure = search(pfs.Budget(latency_ms=limit, device="cpu"), net).structure
    assert 0.85 * limit <= timer.network_ms(pfs.slim(net, structure)) <= 1.02 * limit


def test_a_machine_that_is_busy_now_and_then_is_no_trouble(monkeypatch):
    timer = FakeTimer(slope=1e-2, drift=1.0)
    monkeypatch.setattr(latency, "DeviceTimer", lambda device, threads: timer)
    net = network()
    limit = 1.5 * 0.6 * timer.network_ms(net)  # half as slow again at the median
    structure = search(pfs.Budget(latency_ms=limit, device="cpu"), net).structure
    assert 0.6 * limit <= 1.5 * timer.network_ms(pfs.slim(net, structure)) <= 1.3 * limit


def test_times_that_scatter_widely_are_reported(timer):
    timer.spread = 0.3 * timer.network_ms(network())
    with pytest.warns(
        UserWarning, match="latency: the machine must have no other work .* with a spread of"
    ):
        search(pfs.Budget(latency_ms=1e6, device="cpu"))


def test_a_limit_that_does_not_bind_keeps_everything(timer):
    structure = search(pfs.Budget(latency_ms=1e6, device="cpu")).structure
    assert structure.macs == structure.base_macs


def test_latency_and_macs_hold_together(timer):
    net = network()
    whole = timer.network_ms(net)
    for latency_ms, macs in ((0.95 * whole, 0.3), (2.0 + 0.3 * (whole - 2.0), 0.9)):
        budget = pfs.Budget(latency_ms=latency_ms, macs=macs, device="cpu")
        structure = search(budget, net).structure
        assert structure.macs <= macs * structure.base_macs
        assert timer.network_ms(pfs.slim(net, structure)) <= latency_ms
        assert {c.name for c in structure.limits} == {"latency_ms", "macs"}
        assert all(c.holds for c in structure.limits)


def test_infeasible_latency_is_an_error_before_training_with_its_measured_range(timer, monkeypatch):
    monkeypatch.setattr(SearchLoop, "step", lambda *_: pytest.fail("trained"))
    message = r"solve: budget must be feasible: latency_ms must be in \[2\.\d+, [\d.]+\] \(measured on cpu, batch 1, fp32, .*got 1;"
    with pytest.raises(InfeasibleBudgetError, match=message):
        search(pfs.Budget(latency_ms=1.0, device="cpu"))


def test_the_search_is_the_same_whatever_is_measured(timer):
    by_macs = search(pfs.Budget(macs=1.0))
    state = torch.random.get_rng_state()
    by_latency = search(pfs.Budget(latency_ms=1e6, device="cpu"))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(by_macs.flat_gates, by_latency.flat_gates)


def test_device_that_is_not_there_is_an_error():
    if torch.cuda.device_count() > 99:
        pytest.skip("there is such a device")
    result = search(0.5)
    with pytest.raises(BudgetError, match=r"Budget: device must be there, got 'cuda:99' of \d+"):
        result.structure_for(pfs.Budget(latency_ms=5, device="cuda:99"))
    # No latency is asked for: where the network will run does not matter.
    assert result.structure_for(pfs.Budget(macs=0.5, device="cuda:99")).macs


def test_result_keeps_the_structure_that_only_the_model_can_tell(timer, tmp_path):
    result = search(pfs.Budget(latency_ms=0.5 * timer.network_ms(network()) + 1, device="cpu"))
    result.save(tmp_path / "r.safetensors")
    networks = timer.networks
    loaded = pfs.SearchResult.load(tmp_path / "r.safetensors")
    assert loaded.structure == result.structure
    assert loaded.report() == result.report()
    assert timer.networks == networks
    with pytest.raises(ModelError, match=r"structure_for: latency_ms must be found on the model"):
        loaded.structure_for(pfs.Budget(latency_ms=9, device="cpu"))


def test_report_shows_what_was_asked_predicted_and_measured(timer):
    whole = timer.network_ms(network())
    result = search(
        pfs.Budget(
            macs=0.5, latency_ms=whole, weight_bytes=0.9, peak_activation_bytes=0.99, device="cpu"
        )
    )
    rows = {line.split("  ")[0]: line.split() for line in result.report().splitlines()}
    assert rows["limit"][1:4] == ["asked", "predicted", "measured"]
    assert rows["MACs"] and "±" in rows["latency, ms"]
    text = result.report()
    assert re.search(r"predicted latency: .*layers timed alone", text)
    assert re.search(r"measured latency: .*end to end", text)
    assert "predicted latency" not in search(0.5).report()
    report = result.report(measure=True).splitlines()
    (macs,) = [line.split() for line in report if line.startswith("MACs")][1:]
    assert macs[2] == macs[3] == f"{result.structure.macs:,}"
    for check in result.measured().limits:
        assert check.holds
        if check.name != "latency_ms":
            assert check.measured == check.predicted <= check.asked


# -- a busy machine ------------------------------------------------------------------------------------------------


class BusyTimer(FakeTimer):
    """Networks whose times scatter, or come out too long, in the calls that a test names.

    Args:
        scatter: Spread as a share of the median, by the number of the call.
        stretch: Factor on the time, by the network's own time and how often it was timed before.
        pace: Factor on all times.
    """

    def __init__(self, scatter=lambda call: 0.01, stretch=lambda ms, before: 1.0, pace=1.0) -> None:
        super().__init__(slope=1e-4)
        self.scatter, self.stretch, self.pace = scatter, stretch, pace
        self.timed: list[tuple[float, ...]] = []  # own times of the networks of each call

    def __call__(self, tasks, samples):
        if tasks[0].network is None:
            return super().__call__(tasks, samples)
        own = [self.network_ms(task.network) for task in tasks]
        share = self.scatter(len(self.timed))
        found = []
        for ms in own:
            before = sum(ms in call for call in self.timed)
            time = self.pace * ms * self.stretch(ms, before)
            found.append(Timing(time, share * time, time))
        self.timed.append(tuple(own))
        return found


@pytest.fixture
def on(monkeypatch):
    """Makes a timer the machine's clock."""

    def use(timer: FakeTimer) -> FakeTimer:
        monkeypatch.setattr(latency, "DeviceTimer", lambda device, threads: timer)
        return timer

    return use


WHOLE = FakeTimer(slope=1e-4).network_ms(network())


def test_figure_decides_while_its_spread_is_small_beside_it_or_its_distance_from_the_limit():
    assert decides(Timing(10.0, 2.5, 9.0), 10.0)
    assert not decides(Timing(10.0, 2.6, 9.0), 10.0)
    assert decides(Timing(10.0, 8.0, 9.0), 1e6)
    for limit in (1.0, 4.0, 79.7):  # within the limit and with a spread as large: never
        for share in np.linspace(0.01, 1, 50):
            assert not decides(Timing(share * limit, limit, limit), limit)


@pytest.mark.parametrize("share", [0.3, 0.9])
@pytest.mark.parametrize("spread", [0.5, 1.0, 3.0])  # of the median
def test_spread_as_large_as_the_limit_is_a_busy_machine_before_training(
    on, monkeypatch, share, spread
):
    monkeypatch.setattr(SearchLoop, "step", lambda *_: pytest.fail("trained"))
    timer = on(BusyTimer(scatter=lambda call: spread))
    budget = pfs.Budget(latency_ms=share * WHOLE, device="cpu", threads=2)
    with pytest.raises(BusyMachineError) as caught:
        search(budget)
    text = str(caught.value)
    seen = f"got {WHOLE:.4g} ms with a spread of {spread * WHOLE:.2g} ms in the calmest of 6 tries"
    assert text.startswith(f"latency: the machine must be quiet while it is measured, {seen}")
    assert f"limit of {share * WHOLE:.4g} ms" in text
    for repair in ("other work", "clocks", "fewer threads than 2", "macs"):
        assert repair in text
    assert len(timer.timed) == latency_fit._TRIES_OF_NOISE  # and no other network was tried


def test_one_thread_on_a_busy_machine_is_not_told_to_use_fewer(on):
    on(BusyTimer(scatter=lambda call: 1.0))
    with pytest.raises(BusyMachineError) as caught:
        search(pfs.Budget(latency_ms=0.5 * WHOLE, device="cpu", threads=1))
    assert "fewer threads" not in str(caught.value)


def test_noise_that_passes_gives_the_structure_of_a_quiet_machine(on):
    on(BusyTimer())
    budget = pfs.Budget(latency_ms=0.6 * WHOLE, device="cpu")
    quiet = search(budget).structure
    noisy = on(BusyTimer(scatter=lambda call: 2.0 if call % 6 < 4 else 0.01))
    assert search(budget).structure == quiet
    assert noisy.timed[:5] == [(WHOLE,)] * 5


def test_quiet_machine_measures_each_network_once_in_a_search_of_the_limit(on):
    timer = on(BusyTimer())
    result = search(pfs.Budget(latency_ms=0.6 * WHOLE, device="cpu"))
    timer.timed.clear()
    assert result.structure.limits[0].holds
    assert len(timer.timed) == len(set(timer.timed)) <= latency_fit._ROUNDS + 1


def test_a_slow_network_is_not_measured_again_and_again(on):
    timer = on(BusyTimer(scatter=lambda call: 1.0, pace=1500.0))  # about 20 s a pass
    with pytest.raises(BusyMachineError):
        search(pfs.Budget(latency_ms=1000 * WHOLE, device="cpu"))
    assert len(timer.timed) == 2


def floor_ms(net: nn.Module) -> float:
    """Of the narrowest network."""
    groups = channel_graph(net, torch.zeros(1, 3, 6, 6)).groups
    keep = np.zeros(groups.num_units, dtype=bool)
    keep[[group.start for group in groups.groups]] = True
    narrow = pfs.slim(net, pfs.Structure.from_keep(groups, keep), seed=0)
    return FakeTimer(slope=1e-4).network_ms(narrow)


def ends(text: str) -> tuple[float, float]:
    low, high = re.search(r"latency_ms must be in \[([\d.]+), ([\d.]+)\]", text).groups()
    return float(low), float(high)


@pytest.mark.parametrize("other", [{}, {"macs": 0.5}])
def test_smallest_network_slower_than_the_whole_is_a_busy_machine(on, other):
    low = floor_ms(network())
    timer = on(BusyTimer(stretch=lambda ms, before: 3 * WHOLE / low if ms == low else 1.0))
    with pytest.raises(
        BusyMachineError, match=r"for the smallest structure and .* for the whole network"
    ) as caught:
        search(pfs.Budget(latency_ms=0.9 * low, device="cpu", **other))
    assert "must be in [" not in str(caught.value)
    assert sum(low in call for call in timer.timed) == latency_fit._TRIES


@pytest.mark.parametrize("other", [{}, {"macs": 0.5}])
def test_range_of_an_infeasible_limit_is_never_inverted(on, other):
    low = floor_ms(network())
    slow_once = lambda ms, before: 3 * WHOLE / low if ms == low and not before else 1.0  # noqa: E731
    on(BusyTimer(stretch=slow_once))
    with pytest.raises(InfeasibleBudgetError) as caught:
        search(pfs.Budget(latency_ms=0.9 * low, device="cpu", **other))
    assert ends(str(caught.value)) == (
        pytest.approx(low, rel=1e-3),
        pytest.approx(WHOLE, rel=1e-3),
    )


def test_smallest_network_that_was_slow_once_makes_no_limit_infeasible(on):
    low = floor_ms(network())
    slow_once = lambda ms, before: 3 * WHOLE / low if ms == low and not before else 1.0  # noqa: E731
    timer = on(BusyTimer(stretch=slow_once))
    result = search(pfs.Budget(latency_ms=1.02 * low, device="cpu"))
    assert timer.network_ms(pfs.slim(network(), result.structure)) <= 1.02 * low


def test_gates_are_saved_when_the_machine_is_too_busy_for_the_structure(on, tmp_path):
    on(BusyTimer())
    net, budget = network(), pfs.Budget(latency_ms=0.6 * WHOLE, device="cpu")
    result = search(budget, net)
    on(BusyTimer(scatter=lambda call: 1.0))
    result.meters._latency.clear()
    with pytest.warns(
        UserWarning, match=r"SearchResult: structure must be found .*the machine must be quiet"
    ):
        result.save(tmp_path / "r.safetensors")
    on(BusyTimer())
    loaded = pfs.SearchResult.load(tmp_path / "r.safetensors", net)
    assert torch.equal(loaded.flat_gates, result.flat_gates)
    assert loaded.structure.limits[0].holds


def test_structure_that_only_the_prediction_refuses_ends_no_search(on):
    limit = 1.02 * floor_ms(network())
    on(BusyTimer())
    config = pfs.SearchConfig(
        epochs=12, backend="reference", precision="fp32", scope="all", patience=20
    )
    budget = pfs.Budget(latency_ms=limit, device="cpu")
    result = pfs.search(network(), batches(2), budget, config=config, device="cpu", progress=False)
    (check,) = result.structure.limits
    assert check.measured <= limit < check.predicted


# -- progress ------------------------------------------------------------------------------------------------------


def test_measuring_shows_progress_as_the_search_does(on, capsys):
    timer = on(BusyTimer())
    config = pfs.SearchConfig(epochs=1, backend="reference", precision="fp32", scope="all")
    budget = pfs.Budget(latency_ms=0.6 * WHOLE, device="cpu")
    result = pfs.search(network(), batches(2), budget, config=config, device="cpu")
    text = capsys.readouterr().err
    assert re.search(r"measuring layers: (\d+)/\1 \(100 %\)", text)
    most = latency_fit._ROUNDS + 1
    assert re.search(rf"measuring networks: \d+/{most} .*, limit {0.6 * WHOLE:.4g} ms", text)
    timer.timed.clear()
    assert result.structure.limits[0].holds
    done = re.search(rf"^measuring networks: (\d+)/{most}", capsys.readouterr().err)
    assert int(done[1]) == len(timer.timed)
    result.progress = False
    result.structure_for(budget)
    assert capsys.readouterr().err == ""


def test_measuring_is_silent_without_progress(on, capsys):
    on(BusyTimer())
    result = search(pfs.Budget(latency_ms=0.6 * WHOLE, device="cpu"))
    assert result.structure.limits[0].holds
    assert capsys.readouterr().err == ""


# -- threads -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("threads", [17, 100_000, 2**31 - 1])
def test_threads_are_bounded_by_the_processors_before_anything_is_measured(
    on, monkeypatch, threads
):
    monkeypatch.setattr(deployment, "_processors", lambda: 2)
    timer = on(BusyTimer())
    budget = pfs.Budget(latency_ms=0.6 * WHOLE, device="cpu", threads=threads)
    message = (
        rf"Budget: threads must be at most 16, 8 for each of the 2 processors .*, got {threads};"
    )
    with pytest.raises(BudgetError, match=message):
        search(budget)
    assert not timer.layers and not timer.timed
    assert search(pfs.Budget(latency_ms=1e6, device="cpu", threads=16)).structure.limits


def test_result_of_a_larger_machine_is_loaded_on_a_smaller_one(on, monkeypatch, tmp_path):
    on(BusyTimer())
    monkeypatch.setattr(deployment, "_processors", lambda: 64)
    result = search(pfs.Budget(latency_ms=1e6, device="cpu", threads=64))
    result.save(tmp_path / "r.safetensors")
    monkeypatch.setattr(deployment, "_processors", lambda: 2)
    assert pfs.SearchResult.load(tmp_path / "r.safetensors").structure == result.structure


# -- the clock -----------------------------------------------------------------------------------------------------


def test_device_timer_takes_turns_and_gives_milliseconds(monkeypatch):
    clock, calls = [0.0], []

    def work(name: str, seconds: float):
        def run() -> None:
            calls.append(name)
            clock[0] += seconds

        return Task(name, (), run)

    monkeypatch.setattr("time.perf_counter", lambda: clock[0])
    threads = torch.get_num_threads()
    fast, slow = DeviceTimer(torch.device("cpu"), 1)([work("a", 1e-3), work("b", 2e-3)], 5)
    assert (fast.median, slow.median) == (pytest.approx(1), pytest.approx(2))
    assert fast.spread == pytest.approx(0)
    assert calls[-6:] == ["a", "b"] * 3
    assert torch.get_num_threads() == threads


def test_real_clock_measures_a_small_network(tmp_path):
    net = nn.Sequential(cbr(3, 4), head(4))
    graph = channel_graph(net, torch.zeros(1, 3, 6, 6))
    model = LatencyModel(
        graph.traced.eval, graph.unit_of_label, 4, (3, 6, 6), CPU, cache=tmp_path / "mine"
    )
    assert os.listdir(tmp_path) == ["mine"]
    timing = model.measure(net)
    assert 0 < timing.median < 1e3 and timing.spread >= 0
    assert model.evaluate(np.ones(4, dtype=bool)) > 0
