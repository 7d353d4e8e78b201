"""Networks as they are deployed: every runtime computes the network, and shares of the dense network's latency are met."""

from __future__ import annotations

import importlib.util
import warnings

import numpy as np
import pytest
import torch
from small_nets import batches
from test_latency import BusyTimer, FakeTimer, network

import pfs_fast as pfs
from pfs_fast.budgets.deployment import Deployment
from pfs_fast.errors import BackendError, BudgetError, BusyMachineError, ConfigError
from pfs_fast.measuring import comparison, latency, runtimes
from pfs_fast.measuring.runtimes import task_of
from pfs_fast.measuring.timing import Timing

has_onnx = all(importlib.util.find_spec(n) for n in ("onnx", "onnxscript", "onnxruntime"))
needs_onnx = pytest.mark.skipif(
    not has_onnx, reason="onnx, onnxscript and onnxruntime are optional"
)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PFS_FAST_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def timer(monkeypatch):
    timer = FakeTimer(drift=0.2)
    monkeypatch.setattr(latency, "DeviceTimer", lambda device, threads: timer)
    return timer


def search(budget, net=None, **options) -> pfs.SearchResult:
    config = pfs.SearchConfig(epochs=1, backend="reference", precision="fp32", scope="all", lr=0.1)
    net = network() if net is None else net
    return pfs.search(
        net, batches(2), budget, config=config, device="cpu", progress=False, **options
    )


# -- runtimes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "runtime", ["eager", "folded", "compile", pytest.param("onnxruntime", marks=needs_onnx)]
)
def test_every_runtime_computes_the_network(runtime):
    net = network().eval()
    run = Deployment("cpu", batch=3, runtime=runtime)
    task, eager = task_of(net, (3, 6, 6), run), task_of(net, (3, 6, 6), Deployment("cpu", batch=3))
    with torch.inference_mode():
        found, plain = task.run(), eager.run()
    found = found[0] if runtime == "onnxruntime" else found
    torch.testing.assert_close(torch.as_tensor(found), plain, rtol=1e-4, atol=1e-5)


def test_many_networks_of_one_class_are_compiled_each():
    run = Deployment("cpu", runtime="compile")
    tasks = [
        task_of(torch.nn.Sequential(torch.nn.Conv2d(3, width, 1)), (3, 4, 4), run)
        for width in range(1, 12)
    ]
    before = torch._dynamo.utils.counters["frames"]["ok"]
    with torch.inference_mode():
        outputs = [task.run() for task in tasks]
    assert (
        torch._dynamo.utils.counters["frames"]["ok"] == before
    )  # each was compiled when it was made
    assert [output.size(1) for output in outputs] == list(range(1, 12))
    assert before >= 11


def test_runtime_that_is_not_installed_is_an_error(monkeypatch):
    monkeypatch.setattr(runtimes, "_ONNX_PACKAGES", ("no_such_package",))
    with pytest.raises(BackendError, match="runtime 'onnxruntime' must be installed"):
        task_of(network(), (3, 6, 6), Deployment(runtime="onnxruntime"))
    assert runtimes.installed() == ("eager", "folded")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"latency": 1.5}, r"latency must be a share in \(0, 1\], got 1.5; pass e.g. 0.5"),
        ({"latency": 0}, r"latency must be a share in \(0, 1\], got 0"),
        ({"latency": "half"}, r"latency must be a share in \(0, 1\], got 'half'"),
        ({"latency": True}, r"latency must be a share in \(0, 1\], got True"),
        ({"latency": 0.5, "latency_ms": 3}, "latency must be the only limit on time"),
        ({"latency": 0.5, "runtime": "tflite"}, "runtime must be one of 'eager', 'folded'"),
        (
            {"latency": 0.5, "runtime": "onnxruntime", "precision": "bf16"},
            "runtime 'onnxruntime' must be measured on the CPU with precision 'fp32'",
        ),
        (
            {"latency": 0.5, "runtime": "onnxruntime", "device": "cuda"},
            "runtime 'onnxruntime' must be measured on the CPU",
        ),
    ],
)
def test_budgets_with_a_wrong_share_or_runtime_are_refused(values, message):
    with pytest.raises(BudgetError, match=message):
        pfs.Budget(**values)


def test_budgets_of_latency_have_a_text():
    budget = pfs.Budget.parse("latency=50%,runtime=folded,batch=8,threads=2")
    assert budget == pfs.Budget(latency=0.5, runtime="folded", batch=8, threads=2)
    assert str(budget) == (
        "latency <= 0.5 of the dense network's, batch 8, threads 2, runtime folded"
    )


# -- shares of the dense network's latency ---------------------------------------------------------------------------


@pytest.mark.parametrize("runtime", ["eager", "folded"])
@pytest.mark.parametrize("share", [0.4, 0.7])
def test_share_of_latency_is_met_on_a_machine_whose_speed_drifts(timer, share, runtime):
    net = network()
    budget = pfs.Budget(latency=share, device="cpu", runtime=runtime)
    result = search(budget, net)
    own_ms = timer.network_ms(result.slim())
    assert 0.85 * share <= own_ms / timer.network_ms(net) <= share * 1.001
    (check,) = result.structure.limits
    assert check.holds and check.measured <= check.asked
    assert 0 < result.config.target < 1


def test_share_of_latency_holds_together_with_other_limits(timer):
    net = network()
    result = search(pfs.Budget(latency=0.9, macs=0.5, device="cpu"), net)
    assert result.structure.macs_share <= 0.5
    assert timer.network_ms(result.slim()) <= 0.9 * timer.network_ms(net)


def test_runtimes_other_than_eager_time_no_layers(timer):
    search(pfs.Budget(latency=0.6, device="cpu", runtime="folded"))
    assert timer.layers == [] and timer.networks > 2


def test_share_of_a_busy_machine_is_an_error(monkeypatch):
    timer = BusyTimer(scatter=lambda call: 0.5)
    monkeypatch.setattr(latency, "DeviceTimer", lambda device, threads: timer)
    with pytest.raises(BusyMachineError, match="the machine must be quiet while it is measured"):
        search(pfs.Budget(latency=0.5, device="cpu"))


# -- dense beside slim -----------------------------------------------------------------------------------------------


class ScriptedTimer:
    """Gives the dense and the slim network these milliseconds."""

    def __init__(self, dense: float, slim: float, spread: float = 0.01) -> None:
        self.times = [Timing(ms, spread * ms, ms) for ms in (dense, slim)]

    def __call__(self, tasks, samples):
        for task in tasks:
            task.run()
        return self.times


def test_comparison_shows_both_networks():
    result = search(0.5)
    found = result.compare(batch=2, device="cpu", runtimes=["folded"], timer=ScriptedTimer(4, 2))
    assert found.speeds[0].ratio == 2 and found.slower == ()
    assert found.slim.macs == result.structure.macs
    assert found.dense.params == result.structure.base_params
    rows = {line.split("  ")[0]: line.split() for line in str(found).splitlines()}
    assert rows["ms, folded"][-1] == "2.00"
    assert rows["parameters"][1:3] == [
        f"{result.structure.base_params:,}",
        f"{result.structure.params:,}",
    ]
    assert rows["bytes of weights"][-2] == f"{4 * result.structure.params:,}"
    assert "batch 2, fp32, cpu" in str(found)


def test_slower_slim_network_warns_with_a_repair():
    result = search(0.5)
    options = {"device": "cpu", "runtimes": ["eager"]}
    with pytest.warns(UserWarning, match=r"slim network should be faster .*Budget\(|latency=0.5"):
        found = result.compare(timer=ScriptedTimer(2, 4), **options)
    assert found.slower == ("eager",) and found.advice in str(found)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        noisy = result.compare(timer=ScriptedTimer(3.9, 4, spread=0.2), **options)
    assert noisy.slower == () and "times are rough" in str(noisy)


def test_report_measures_on_demand(monkeypatch):
    result = search(0.5)
    monkeypatch.setattr(comparison, "DeviceTimer", lambda *_: ScriptedTimer(2, 4))
    monkeypatch.setattr(comparison, "installed", lambda: ("eager",))
    assert "ms, eager" not in result.report()
    text = result.report(measure=True)
    assert "ms, eager" in text and "should be faster" in text


def test_comparison_names_what_is_missing():
    net = network()
    with pytest.raises(ConfigError, match="compare: example_input must be given"):
        pfs.compare(net, net)
    with pytest.raises(BudgetError, match="runtime must be one of"):
        pfs.compare(net, net, torch.zeros(1, 3, 6, 6), runtimes=["fast"])


def test_comparison_leaves_networks_and_generator_alone():
    net = network()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    state = torch.random.get_rng_state()
    pfs.compare(net, net, torch.zeros(1, 3, 6, 6), batch=2, device="cpu", timer=ScriptedTimer(1, 1))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    assert net.training and np.isfinite(float(sum(v.double().sum() for v in before.values())))


class LuckyTimer(FakeTimer):
    """The first measurement of each slim network comes out a little too fast, with a spread that says so."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[float, int] = {}

    def __call__(self, tasks, samples):
        found = super().__call__(tasks, samples)
        if len(tasks) == 2:
            own = round(self.network_ms(tasks[0].network), 9)
            self.seen[own] = self.seen.get(own, 0) + 1
            factor = 0.95 if self.seen[own] == 1 else 1.0
            found[0] = Timing(factor * found[0].median, 0.07 * found[0].median, found[0].best)
        return found


def test_place_within_the_limit_by_luck_is_measured_again(monkeypatch):
    timer = LuckyTimer()
    monkeypatch.setattr(latency, "DeviceTimer", lambda device, threads: timer)
    net = network()
    result = search(pfs.Budget(latency=0.6, device="cpu", runtime="folded"), net)
    own = round(timer.network_ms(result.slim()), 9)
    assert timer.seen[own] > 1
    # The mean of a lucky and a true measurement is 2.5 % too fast.
    assert timer.network_ms(result.slim()) <= 0.6 / 0.975 * timer.network_ms(net) * 1.001
