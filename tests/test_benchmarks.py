"""The benchmark command: baselines that do the same work, figures that mean what they say, files that add up."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from stand_in_graphs import StandInGraphs
from torch import nn

import pfs_fast as pfs
from benchmarks import command, parts, roofline, rounding, tables, timing
from benchmarks.baselines import PlainSearch, cudnn_reason
from benchmarks.footprint import peak_bytes, saved_bytes
from benchmarks.machine import Machine
from benchmarks.roofline import Ceilings, Work, step_floor
from benchmarks.settings import PROFILES, Settings
from benchmarks.steps import gate_places
from benchmarks.suites import agreement, analysis, convs, drift, memory, ops, search, slim, step
from benchmarks.timing import Clock, Effort, Spread, time_variants
from pfs_fast._library import is_loaded
from pfs_fast.searching.config import PRECISIONS
from pfs_fast.searching.plan import prepare

CPU = torch.device("cpu")
needs_operators = pytest.mark.skipif(not is_loaded(), reason="needs the compiled operators")


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    """The smallest run of everything."""
    profile = replace(
        PROFILES["quick", "cpu"],
        batch=2,
        effort=Effort(seconds=0.0, least=2, most=2, warmup=0),
        search_networks=("resnet20",),
        search_batch=2,
        search_steps=2,
        baseline_steps=2,
        agreement_steps=2,
        drift_steps=4,
    )
    return Settings(
        device=CPU,
        profile=profile,
        networks=("resnet20",),
        out=tmp_path,
        data=("digits", None),
        compiled=False,
        ceilings=Ceilings(10.0, {"fp32": 100.0, "bf16": 100.0}),
        machine=Machine.here(CPU),
        parts=tmp_path / "parts",
    )


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


# -- baselines ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("baseline", ["naive", "best"])
@pytest.mark.parametrize(
    ("name", "expansion"), [("resnet20", 0.25), ("vgg16", 0.125), ("mobilenet_v2", 0.25)]
)
def test_baseline_takes_the_same_gate_steps_as_the_reference(name, expansion, baseline):
    model = pfs.models.get(name, num_classes=4, expansion=expansion)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)
    images, labels = torch.randn(6, 3, 32, 32).double(), torch.randint(4, (6,))
    config = pfs.SearchConfig(precision="fp64", backend="reference", target=0.3, compact=False)
    loop = prepare(model, images.float(), pfs.Budget(0.5), config, device=CPU).loop
    norms = loop.bank.layers
    make = getattr(PlainSearch, baseline)
    plain = make(model, norms, dtype=torch.float64, device=CPU, target=0.3)
    for _ in range(2):
        loop.step(images, labels)
        plain.step(plain.place(images), labels)
    expected = torch.cat([loop.bank.vector(norm) for norm in norms])
    assert len(expected.unique()) > 10
    torch.testing.assert_close(plain.flat, expected.detach(), rtol=0, atol=1e-8)


def test_only_the_naive_baseline_has_weight_gradients():
    model = pfs.models.get("resnet20", expansion=0.25)
    norms = [site.layer for site in gate_places(model, 32)[1]]
    naive = PlainSearch.naive(model, norms, device=CPU)
    best = PlainSearch.best(model, norms, dtype=torch.float32, device=CPU)
    for plain in (naive, best):
        plain.step(plain.place(torch.randn(2, 3, 32, 32)), torch.tensor([0, 1]))
    assert naive.network.conv1.weight.grad is not None
    assert best.network.conv1.weight.grad is None


def test_cudnn_row_says_what_is_missing():
    assert "CUDA" in cudnn_reason(CPU)


# -- figures -----------------------------------------------------------------------------------------------------------


def test_spread_has_median_and_quartiles():
    assert Spread.of([4.0, 1.0, 2.0, 3.0, 5.0]) == Spread(3.0, 2.0, 4.0, 5)


def test_variants_alternate(monkeypatch):
    order = []

    def variant(name):
        def run(clock: Clock) -> None:
            order.append(name)
            clock.lap("step")

        return run

    effort = Effort(seconds=0.0, least=4, most=4, warmup=0)
    found = time_variants({n: variant(n) for n in "ab"}, device=CPU, effort=effort)
    assert "".join(order) == "abbabaab"
    assert found.time("a").n == 4


def test_rounds_end_with_the_seconds(monkeypatch):
    now = iter(range(1000))
    monkeypatch.setattr(timing.time, "perf_counter", lambda: float(next(now)))
    effort = Effort(seconds=20.0, least=1, most=100, warmup=0)
    found = time_variants({"a": lambda clock: clock.lap("step")}, device=CPU, effort=effort)
    assert 1 < found.time("a").n < 10


def test_saved_bytes_counts_each_storage_once_and_no_weights():
    x, weight = torch.randn(64, 64, requires_grad=True), torch.randn(64, 64)
    assert saved_bytes(lambda: x * x) == 64 * 64 * 4
    assert saved_bytes(lambda: x * weight) == 64 * 64 * 4
    assert saved_bytes(lambda: x * weight, without=[weight]) == 0


def test_peak_bytes_is_the_most_at_once():
    def run():
        one = torch.empty(2**18)
        two = torch.empty(2**18)
        del one
        three = torch.empty(2**17)
        return two, three

    assert peak_bytes(run, CPU) == 2 * 2**20


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)

    def forward(self, x):
        y = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(y)) + y)


def test_work_counts_passes_and_flops():
    work = Work.of(_Block(), ["bn1"], size=8)
    maps = 4 * 8 * 8
    assert (work.norm, work.gated, work.act, work.add) == (2 * maps, maps, 2 * maps, maps)
    assert [conv.macs for conv in work.convs] == [maps * 27, maps * 36]
    # Two layers of 13 passes, a gate of 8, a sum of 6.
    assert work.traffic("naive", 4) == (2 * 13 + 8 + 6) * maps * 4
    assert work.traffic("folded", 4) == (2 * 13 + 6) * maps * 4
    assert work.traffic("ours", 2) == (2 * 8 + 3) * maps * 2 + 3 * maps / 8
    # The first convolution has no input gradient; only the naive variant has weight gradients.
    assert len(work.conv_work("ours", 4, 1)) == 3
    assert len(work.conv_work("naive", 4, 1)) == 5


def test_floor_is_arithmetic_or_traffic_whichever_is_longer():
    work = Work.of(_Block(), ["bn1"], size=8)
    slow_memory = step_floor(work, "ours", "fp32", 2, Ceilings(1e-6, {"fp32": 1e9}))
    assert slow_memory["floor_ms"] == pytest.approx(slow_memory["gbyte"] * 1e9)
    slow_gemm = step_floor(work, "ours", "fp32", 2, Ceilings(1e12, {"fp32": 1e-6}))
    assert slow_gemm["floor_ms"] == pytest.approx(slow_gemm["gflop"] * 1e9)


# -- files -------------------------------------------------------------------------------------------------------------


def test_rows_with_other_columns_go_to_another_file(tmp_path):
    machine, path = Machine.here(CPU), tmp_path / "a.csv"
    for row in ({"x": 1}, {"y": 2}, {"x": 3}, {"y": 4}):
        tables.append_csv(path, [row], machine)
    assert [row["x"] for row in read(path)] == ["1", "3"]
    assert [row["y"] for row in read(tmp_path / "a-2.csv")] == ["2", "4"]


def test_table_has_the_keys_of_all_lines():
    table = tables.markdown_table([{"a": 1, "b": 0.12345}, {"a": None, "c": "x"}])
    expected = ["| a | b | c |", "| --- | --- | --- |", "| 1 | 0.123 | - |", "| - | - | x |"]
    assert table.splitlines() == expected


def test_finished_part_is_not_computed_again(settings):
    calls = []

    def compute():
        calls.append(1)
        return {"value": len(calls)}

    first = parts.part(settings, "a", {"steps": 3}, compute)
    again = parts.part(settings, "a", {"steps": 3}, compute)
    other = parts.part(settings, "a", {"steps": 4}, compute)
    assert (first["value"], again["value"], other["value"]) == (1, 1, 2)
    assert first["measured_date"] == settings.machine.date


# -- the command -------------------------------------------------------------------------------------------------------


def test_command_line_parses():
    chosen = command.parse(
        "--suite step memory --network vgg16 --threads 2 --data cifar10 x.npz".split()
    )
    assert chosen.suite == ["step", "memory"]
    assert chosen.data == ["cifar10", "x.npz"]
    assert chosen.profile == "quick"
    suites = "ops convs step search agreement drift memory analysis slim".split()
    assert set(command.SUITES) == set(suites)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--data cifar10", "--data"),
        ("--data digits x", "--data"),
        ("--data moons", "--data"),
        ("--threads 0", "--threads"),
        ("--target 1.5", "--target"),
        ("--first-seed -1", "--first-seed must be at least 0, got -1"),
        ("--suite steps", "--suite"),
        ("--network resnet18", "--network"),
        ("--finished-only", "--finished-only"),
        ("--suite agreement drift --finished-only", "--finished-only"),
    ],
)
def test_wrong_argument_is_named(line, message, capsys):
    with pytest.raises(SystemExit):
        command.parse(line.split())
    assert message in capsys.readouterr().err


@needs_operators
def test_step_suite_writes_a_row_for_every_variant(tmp_path, monkeypatch, capsys):
    ceilings = Ceilings(10.0, {"fp32": 100.0, "bf16": 100.0})
    monkeypatch.setattr(Ceilings, "measure", classmethod(lambda cls, *args: ceilings))
    line = f"--suite step --network resnet20 --batch 2 --rounds 2 --out {tmp_path}"
    command.main(line.split())
    rows = {row["variant"]: row for row in read(tmp_path / "step_cpu.csv")}
    assert set(rows) == {"naive", "folded", "ours", "cudnn", "compiled"}
    for variant in ("naive", "folded", "ours"):
        row = rows[variant]
        assert row["n"] == "2"
        assert float(row["ms_p25"]) <= float(row["ms"]) <= float(row["ms_p75"])
        assert float(row["floor_ms"]) > 0
        assert int(row["peak_bytes"]) >= int(row["saved_bytes"]) > 0
        assert row["commit"] == Machine.here(CPU).commit
        assert float(row["copy_gbs"]) == 10.0
    assert float(rows["ours"]["ratio"]) == 1.0
    assert int(rows["ours"]["saved_bytes"]) < 0.5 * int(rows["naive"]["saved_bytes"])
    assert rows["cudnn"]["note"].startswith("not run: ")
    assert rows["compiled"]["ms"] == ""
    tables = (tmp_path / "step_cpu.md").read_text()
    assert "| resnet20 | 2 | ours |" in tables
    command.main(line.split())
    assert len((tmp_path / "step_cpu.md").read_text().splitlines()) == len(tables.splitlines())
    assert len(read(tmp_path / "step_cpu.csv")) == 2 * len(rows)


@pytest.fixture
def graphs(monkeypatch) -> StandInGraphs:
    """Runners of CUDA on the CPU."""
    stand_in = StandInGraphs()
    monkeypatch.setattr("pfs_fast.searching.loop.DEFERRED", frozenset({"cpu"}))
    monkeypatch.setattr("pfs_fast.searching.runner._graphs", lambda loop: stand_in)
    return stand_in


@needs_operators
def test_our_step_is_timed_as_the_replay_that_a_search_makes(settings, graphs, monkeypatch):
    """A capture is no part of any round, and the step call by call has a row of its own."""
    marks: list[str] = []
    monkeypatch.setattr(Clock, "lap", lambda clock, name: marks.append(graphs.log[-1]))
    built, _, images, labels = step.build("resnet20", settings)
    assert list(built.steps) == ["naive", "folded", "ours", "ours eager"]
    timed = {name: built.steps[name].timed(images, labels) for name in ("ours", "ours eager")}
    for _ in range(2):
        timed["ours"](Clock(CPU))
    assert graphs.log == ["capture", *["replay"] * 5]  # 3 + 2 + 1 steps, and then 1 + 1
    assert marks == ["replay", "replay"]
    timed["ours eager"](Clock(CPU))
    assert graphs.log.count("replay") == 5


@needs_operators
def test_memory_of_a_replay_is_that_of_its_step(settings, graphs):
    built, _, images, labels = step.build("resnet20", settings)
    found = {v: built.steps[v].footprint(images, labels) for v in ("ours", "ours eager")}
    assert found["ours"] == pytest.approx(found["ours eager"], rel=0.01)
    assert "replay" not in graphs.log


@needs_operators
def test_analysis_suite_holds_times_against_their_limits(settings, monkeypatch):
    def small() -> nn.Module:
        return pfs.models.get("resnet20", expansion=0.25)

    models = {"fast": (small, 1e9), "slow": (small, 0.0), "compared": (small, None)}
    monkeypatch.setattr(analysis, "MODELS", models)
    monkeypatch.setattr(analysis, "BUDGETS", {"half": pfs.Budget(0.5)})
    *groups, structures = analysis.run(settings)
    lines = [case.lines[analysis.GROUPS][0] for case in groups]
    assert [(line["network"], line["met"]) for line in lines] == [
        ("fast", "yes"),
        ("slow", "no"),
        ("compared", None),
    ]
    assert all(line["groups"] == 12 and line["ms"].n == 2 for line in lines)
    (line,) = structures.lines[analysis.STRUCTURES]
    assert line["MACs kept"] == pytest.approx(0.5 * 4089e6, rel=0.01)
    assert structures.rows[0]["limit_ms"] == analysis.STRUCTURE_LIMIT_MS


@needs_operators
def test_slim_suite_compares_every_multiple_with_the_dense_network(settings, monkeypatch):
    def small() -> nn.Module:
        return pfs.models.get("resnet20", expansion=0.5)

    monkeypatch.setattr(slim, "NETWORKS", {"resnet20": (small, 8, 4)})
    monkeypatch.setattr(slim, "LATENCY_NETWORKS", ())
    monkeypatch.setattr(slim, "STEPS", 2)
    monkeypatch.setattr(slim, "_runtimes", lambda: [("eager", "fp32"), ("folded", "fp32")])
    cases = list(slim.run(settings))
    forward = [line for case in cases for line in case.lines.get(slim.INFERENCE, ())]
    training = [line for case in cases for line in case.lines.get(slim.TRAINING, ())]
    assert [(line["scope"], line["runtime"]) for line in forward] == [
        (scope, runtime) for scope in ("paper", "all") for runtime in ("eager", "folded")
    ]
    assert [line["runtime"] for line in training] == ["fp32", "bf16"] * 2
    for line in (*forward, *training):
        assert line["x1"].n == line["xauto"].n == 2
        assert line["x32"] is None  # no width of this network is a multiple of 32 but whole ones
    columns = {tuple(row) for case in cases for row in case.rows}
    assert len(columns) == 1  # one file takes them all


def test_memory_suite_compares_with_the_naive_step(settings):
    (case,) = memory.run(settings)
    found = {row["variant"]: row for row in case.rows}
    assert set(found) == {"naive", "folded", "ours"}
    assert found["naive"]["peak_share"] == found["naive"]["saved_share"] == 1.0
    # Two of three saved tensors go, the third stays, in fewer bytes where bf16 is native.
    itemsize = PRECISIONS[found["ours"]["precision"]].itemsize
    assert 0.3 < found["ours"]["saved_share"] * 4 / itemsize < 0.45
    assert found["ours"]["saved_share"] < found["folded"]["saved_share"] < 1.0
    (line,) = case.lines[memory.TITLE]
    assert line["peak <= 0.4"] == ("yes" if found["ours"]["peak_share"] <= 0.4 else "no")


@needs_operators
def test_operators_are_measured_by_phase(settings, monkeypatch):
    monkeypatch.setattr(ops, "CPU_MAPS", ((2, 4, 6, 6), (2, 3, 4, 4)))
    monkeypatch.setattr(ops, "CPU_CONVS", (((2, 4, 6, 6), 5, 3),))
    cases = list(ops.run(settings))
    rows = [row for case in cases for row in case.rows if row["variant"] == "ours"]
    assert {row["phase"] for row in rows} == {"forward", "backward", "total"}
    first = {row["phase"]: row for row in rows[:3]}
    # 3 passes forward and 5 backward over 2x4x6x6 float32 values at 10 GB/s.
    assert first["forward"]["floor_ms"] == pytest.approx(3 * 4 * 288 / 10e6)
    assert first["backward"]["floor_ms"] == pytest.approx(5 * 4 * 288 / 10e6)
    assert first["total"]["saved_bytes"] == 4 * 288
    (line,) = cases[0].lines["`bn_gate_act`"]
    assert line["saved MiB naive, folded, ours"].count(",") == 2
    assert {row["op"] for row in rows} == {"bn_gate_act", "frozen_conv"}


@needs_operators
@pytest.mark.parametrize(("precision", "error"), [("fp32", 1e-5), ("bf16", 4e-3)])
def test_convolutions_are_measured_with_their_errors(settings, precision, error):
    case = convs.measure((8, 8, 8), precision, settings)
    found = {row["variant"]: row for row in case.rows if row["phase"] == "total"}
    assert set(found) == {"direct", "winograd2", "winograd4"}
    assert all(0 < row["error"] < error for row in found.values())
    assert {row["precision"] for row in found.values()} == {precision}
    assert case.lines[convs.TITLE][0]["chosen"] in (0, 4)


@needs_operators
def test_search_suite_extrapolates_the_baselines_alone(settings, monkeypatch):
    (case,) = search.run(settings)
    rows = [row for row in case.rows if row["phase"] == "whole"]
    plain = {row["variant"]: row for row in rows if row["variant"] != "ours"}
    assert set(plain) == {"naive", "folded"}
    assert all(row["extrapolated"] and row["n"] >= 2 for row in plain.values())
    ours = next(row for row in rows if row["variant"] == "ours")
    assert ours["steps"] == 2
    assert ours["extrapolated"] is False
    assert ours["naive_ratio"] == pytest.approx(plain["naive"]["seconds"] / ours["seconds"])
    early = [row for row in rows if row["early_stop"]]
    assert early
    assert all(
        ("not available" in row["note"]) == bool(search.early_stop_reason()) for row in early
    )
    monkeypatch.setattr(search, "one_search", lambda *args: pytest.fail("computed again"))
    (again,) = search.run(settings)
    assert again.rows == case.rows


def test_step_times_along_a_search_come_from_its_history():
    history = [
        {"step": 10, "seconds": 1.0, "channels": 100, "alive": 1.0},
        {"step": 20, "seconds": 1.5, "channels": 50, "alive": 0.4},
    ]
    points = search.along({"history": history, "num_gates": 100})
    assert [point["ms_per_step"] for point in points] == [100.0, 50.0]
    assert [point["computed"] for point in points] == [1.0, 0.5]


def test_plain_search_goes_on_where_it_was_broken_off(settings, tmp_path, monkeypatch):
    monkeypatch.setattr(rounding, "SAVE_EVERY", 2)

    def made() -> rounding.PlainRun:
        torch.manual_seed(0)
        model = pfs.models.get("resnet20", expansion=0.25)
        return rounding.PlainRun(model, 0, 0.2, rounding.kinds("fp32")["plain"], settings)

    whole = made()
    whole.run(4, tmp_path / "whole")
    made().run(2, tmp_path / "broken")
    second = made()
    second.run(4, tmp_path / "broken")
    assert second.steps == 4
    assert torch.equal(second.gates()[0], whole.gates()[0])


@pytest.mark.parametrize("native", ["fp32", "bf16"])
def test_plain_searches_that_round_differently_and_ours_are_compared(settings, native, monkeypatch):
    monkeypatch.setattr(Settings, "native", native)
    (case,) = agreement.run(settings)
    names = {"fp32": ["ours", "plain channels_last"]}
    names["bf16"] = [*names["fp32"], "ours fp32", "plain bf16"]
    assert [(row["first"], row["second"]) for row in case.rows] == [
        (name, "plain") for name in names[native]
    ]
    precisions = [row["precision"] for row in case.rows]
    assert precisions == [native, "fp32", "fp32", native][: len(precisions)]
    for row in case.rows:
        # A plain search in few bits rounds after every operation, and two steps of digits hardly tell gates apart.
        assert row["correlation"] > (0.5 if row["first"] == "plain bf16" else 0.9)
        assert row["mean_difference"] < 3
    stored = json.loads((settings.parts / "agreement-resnet20-r0.2-plain-0.json").read_text())
    assert stored["result"]["precision"] == "fp32"


def test_finished_searches_are_compared_and_no_other_is_computed(settings, monkeypatch):
    monkeypatch.setattr(Settings, "native", "fp32")
    agreement.measure("resnet20", settings)
    more = replace(settings, profile=replace(settings.profile, seeds=2), finished_only=True)
    (settings.parts / "agreement-resnet20-r0.2-plain-channels_last-0.json").unlink()
    files = sorted(settings.parts.iterdir())
    case = agreement.measure("resnet20", more)
    assert [(row["first"], row["seed"]) for row in case.rows] == [("ours", 0)]
    seeds = {line["pair"]: line["seeds"] for line in case.lines[agreement.TITLE]}
    assert seeds == {"ours : plain": "0", "plain channels_last : plain": "-"}
    assert sorted(settings.parts.iterdir()) == files


def test_seeds_measured_apart_meet_in_one_table(settings, monkeypatch):
    monkeypatch.setattr(Settings, "native", "fp32")
    for seed in (1, 2):
        case = agreement.measure("resnet20", replace(settings, first_seed=seed))
        assert [row["seed"] for row in case.rows] == [seed, seed]
    both = replace(settings.profile, seeds=2)
    case = agreement.measure(
        "resnet20", replace(settings, profile=both, first_seed=1, finished_only=True)
    )
    assert [row["seed"] for row in case.rows] == [1, 2, 1, 2]


def test_gates_drift_from_the_exact_ones_as_far_as_they_are_rounded(settings, monkeypatch):
    monkeypatch.setattr(Settings, "native", "bf16")
    (case,) = drift.run(settings)
    apart = {(row["search"], row["step"]): row["rms_difference"] for row in case.rows}
    assert {step for _, step in apart} == {1, 2, 3, 4}
    assert apart["ours fp64", 4] < 1e-12
    for search_of in ("ours fp32", "plain", "plain channels_last"):
        assert 0 < apart[search_of, 1] < 1e-5
    for search_of in ("ours", "plain bf16"):
        assert 1e-5 < apart[search_of, 1] < 0.01


def test_two_kept_counts_without_spread_have_no_correlation():
    assert search.correlation({"a": 1, "b": 1}, {"a": 1, "b": 2}) is None
    assert search.correlation({"a": 1, "b": 3}, {"a": 2, "b": 6}) == pytest.approx(1.0)


def test_networks_of_large_images_are_not_searched_silently(settings):
    large = replace(settings, networks=("resnet50_224",))
    for suite in (search, agreement, drift):
        (case,) = suite.run(large)
        assert "not run" in str(case.lines)


def test_same_seed_gives_the_same_batch(settings):
    first, second = (step.random_batch("resnet20", settings)[0] for _ in range(2))
    assert torch.equal(first, second)


def test_unknown_precision_has_no_peak():
    with pytest.raises(KeyError):
        roofline.Ceilings(1.0, {}).ms(1.0, 1.0, "bf16")
