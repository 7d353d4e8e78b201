"""Leaving absorbed channels out of a running search changes no gate."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import pfs_fast as pfs
from pfs_fast.gating import compaction
from pfs_fast.gating.absorbing import absorbing_groups
from pfs_fast.gating.gated import GatedNetwork
from pfs_fast.gating.gates import GateBank, GateState
from pfs_fast.gating.scope import chosen_units, gate_sites, gated_groups
from pfs_fast.gating.widths import WidthRule
from pfs_fast.graph.analysis import channel_graph
from pfs_fast.ops import reference
from pfs_fast.searching import plan as plan_module
from pfs_fast.searching import search as search_module


class Inception(nn.Module):
    """Two branches of different width, concatenated."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Sequential(nn.Conv2d(3, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU())
        self.b = nn.Sequential(nn.Conv2d(3, 20, 1), nn.BatchNorm2d(20), nn.ReLU6())
        self.mix = nn.Sequential(
            nn.Conv2d(32, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2)
        )
        self.fc = nn.Linear(16, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.mix(torch.cat([self.a(x), self.b(x)], 1)).mean((2, 3)))


class SqueezeExcite(nn.Module):
    """ReLU before a squeeze-excite product; the squeeze layer has no batch norm."""

    def __init__(self, act: type[nn.Module] = nn.ReLU) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), act())
        self.down, self.up = nn.Conv2d(16, 8, 1), nn.Conv2d(8, 16, 1)
        self.head = nn.Sequential(nn.Conv2d(16, 24, 3), nn.BatchNorm2d(24), nn.ReLU())
        self.fc = nn.Linear(24, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        scale = torch.sigmoid(self.up(torch.relu(self.down(x.mean((2, 3), keepdim=True)))))
        return self.fc(self.head(x * scale).mean((2, 3)))


class Regrouped(nn.Module):
    """Norm groups, a transposed convolution, shuffles and a norm that carries its activation."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm = nn.Conv2d(3, 24, 3, 2, 1), nn.GroupNorm(12, 24)
        self.up, self.shuffle = nn.ConvTranspose2d(24, 24, 2), nn.PixelShuffle(2)
        self.b = nn.Conv2d(6, 24, 3, 2, 1)
        self.mix = nn.ChannelShuffle(2)
        self.c, self.instance = nn.Conv2d(24, 16, 3), nn.InstanceNorm2d(16, affine=True)
        self.fc = nn.Linear(16, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.up(torch.relu(self.norm(self.a(x)))))
        x = self.mix(torch.relu(self.b(self.shuffle(x))))
        return self.fc(torch.relu(self.instance(self.c(x))).mean((2, 3)))


def batches(size: int = 16) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (
            torch.randn(6, 3, size, size, generator=generator),
            torch.randint(10, (6,), generator=generator),
        )
        for _ in range(10)
    ]


def run(model: nn.Module, compact: bool, **options: object) -> pfs.SearchResult:
    # Gates that start low die within a few steps of the paper's learning rate.
    config = pfs.SearchConfig(
        precision="fp64",
        backend="reference",
        gate_init=0.15,
        target=0.05,
        gamma=2.0,
        compact=compact,
        epochs=5,
        **options,
    )
    return pfs.search(model, batches(), 0.95, config=config, progress=False)


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Narrow as soon as anything has died, however few steps are left, and without keeping dead channels."""
    monkeypatch.setitem(search_module.COMPACT_EVERY, "cpu", 4)
    monkeypatch.setattr(compaction, "MIN_SAVING", 1e-9)
    monkeypatch.setattr(compaction, "MIN_STEPS_SAVED", 0.0)
    monkeypatch.setattr(plan_module, "preferred_multiple", lambda device: 2)


MODELS = {
    "vgg": lambda: pfs.models.vgg16(expansion=0.125),
    "resnet": lambda: pfs.models.resnet20(expansion=0.5),
    "concatenation": Inception,
    "squeeze_excite": SqueezeExcite,
}
REGROUPED = {"regrouped": Regrouped}  # none of its few gates dies in so few steps
# Their gates get gradients only through batch norm's eps, so two runs that round differently drift apart within tens of
# steps, whole or compacted; a single step shows that nothing else changes.
MOBILE = {
    "mobilenet_v1": lambda: pfs.models.mobilenet_v1(num_classes=10, expansion=0.25),
    "mobilenet_v2": lambda: pfs.models.mobilenet_v2(num_classes=10, expansion=0.25),
}


@pytest.mark.filterwarnings(
    "ignore:solve. all:UserWarning"
)  # a layer that dies out is a fine test case
@pytest.mark.parametrize("scope", ["paper", "all"])
@pytest.mark.parametrize("name", MODELS)
def test_compacted_search_ends_with_the_same_gates(name: str, scope: str, eager: None) -> None:
    torch.manual_seed(3)
    model = MODELS[name]()
    whole, compacted = run(model, False, scope=scope), run(model, True, scope=scope)
    assert (
        compacted.history[-1]["channels"] < whole.history[-1]["channels"] == len(whole.flat_gates)
    )
    torch.testing.assert_close(compacted.flat_gates, whole.flat_gates, rtol=0, atol=1e-10)
    assert torch.equal(compacted.died_at, whole.died_at)
    assert compacted.structure == whole.structure


@pytest.mark.parametrize("scope", ["paper", "all"])
@pytest.mark.parametrize("name", [*MODELS, *MOBILE, *REGROUPED])
def test_leaving_dead_channels_out_keeps_loss_and_gradients(name: str, scope: str) -> None:
    torch.manual_seed(3)
    network, bank, groups, sites, absorbs = gated((MODELS | MOBILE | REGROUPED)[name](), scope)
    bank.state.values.uniform_(0.2, 1.0)
    dead = torch.rand(groups.num_units) < 0.4
    bank.state.values[dead] = 0.0
    images, labels = batches(32)[0][0].double(), batches(32)[0][1]

    def step() -> tuple[torch.Tensor, torch.Tensor]:
        bank.zero_grad()
        loss = nn.functional.cross_entropy(network(images), labels)
        loss.backward()
        return loss.detach(), bank.grad.clone()

    loss, grad = step()
    widths = {group.name: WidthRule(1, 1) for group in groups.groups}
    compact = compaction.Compaction(network, bank, groups, sites, absorbs, widths)
    keep, saving = compact.candidates()
    assert absorbs and saving > 0.05
    compact.leave_out(keep)
    narrow_loss, narrow_grad = step()
    gone = ~torch.from_numpy(keep)
    assert bool(dead[gone].all()) and not grad[gone].any()
    torch.testing.assert_close(narrow_loss, loss, rtol=1e-12, atol=0)
    assert (narrow_grad - grad[~gone]).abs().max() <= 1e-11 * grad.abs().max()


def test_checkpoint_of_a_compacted_search_goes_on_as_if_never_interrupted(
    eager: None, tmp_path
) -> None:
    model = MODELS["resnet"]()
    config = pfs.SearchConfig(
        precision="fp64", backend="reference", gate_init=0.15, target=0.05, gamma=2.0, epochs=4
    )
    straight = pfs.search(model, batches(), 0.95, config=config, progress=False)

    class Interrupted(Exception):
        pass

    class Loader:
        passes = 0

        def __iter__(self):
            self.passes += 1
            if self.passes == 4:
                raise Interrupted
            return iter(batches())

    path = tmp_path / "search.safetensors"
    with pytest.raises(Interrupted):
        pfs.search(model, Loader(), 0.95, config=config, checkpoint=path, progress=False)
    resumed = pfs.search(model, batches(), 0.95, config=config, checkpoint=path, progress=False)
    assert resumed.history[-1]["channels"] < len(resumed.flat_gates)
    assert torch.equal(resumed.died_at, straight.died_at)
    torch.testing.assert_close(resumed.flat_gates, straight.flat_gates, rtol=0, atol=1e-12)


def gated(model: nn.Module, scope: str, track_stats: bool = False) -> tuple:
    graph = channel_graph(model, torch.zeros(1, 3, 32, 32))
    groups = gated_groups(graph, model, scope)
    sites = gate_sites(graph, groups, scope)
    bank = GateBank(
        groups, sites, GateState.create(groups.num_units, 1.0, torch.float64, torch.device("cpu"))
    )
    network = GatedNetwork(graph, bank, reference, dtype=torch.float64, track_stats=track_stats)
    return (
        network,
        bank,
        groups,
        sites,
        absorbing_groups(network, groups, chosen_units(graph, groups)),
    )


def absorbing(model: nn.Module, scope: str = "paper", track_stats: bool = False) -> frozenset[str]:
    return gated(model, scope, track_stats)[-1]


def test_silu_does_not_absorb() -> None:
    assert "stem.0" in absorbing(SqueezeExcite(nn.ReLU))
    assert "stem.0" not in absorbing(SqueezeExcite(nn.SiLU))


def test_linear_residual_stream_does_not_absorb() -> None:
    model = pfs.models.mobilenet_v2(num_classes=10)
    names = absorbing(model, "all")
    assert "stem.conv" in names
    assert not any("project" in name for name in names)


def test_shift_behind_a_depthwise_convolution_does_not_absorb() -> None:
    model = pfs.models.mobilenet_v1(num_classes=10)
    before = absorbing(model)
    nn.init.constant_(model.blocks[0].depthwise.bn.bias, 0.1)
    assert before - absorbing(model) == {"stem.conv"}
    assert "blocks.0.pointwise.conv" in before


def test_evaluated_network_keeps_channels_behind_running_statistics() -> None:
    model = pfs.models.mobilenet_v1(num_classes=10)
    assert absorbing(model, track_stats=True) == {"blocks.12.pointwise.conv"}


def test_wide_enough_widths_stay_multiples(eager: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_module, "preferred_multiple", lambda device: 8)
    result = run(MODELS["resnet"](), True)
    alive = sum(8 * -(-int((gate > 0).sum()) // 8) or 8 for gate in result.gates.values())
    assert result.history[-1]["channels"] <= len(result.flat_gates)
    assert result.history[-1]["channels"] % 8 == 0
    assert result.history[-1]["channels"] >= alive
