"""Is a slim network faster? Latency of the dense network over that of slim ones, by multiples of widths and by runtime.

Every network is searched for some steps on random images, cut to half of its MACs with widths in multiples of 1 (the paper's
exact ones), 8, 16, 32 and those of ``"auto"``, and timed in turns with the dense network:

- forward passes in eager PyTorch, with batch norms folded (channels_last; float32 and bf16), and in ONNX Runtime;
- training steps of ResNet-20 (SGD, channels_last; float32 and bf16 autocast);
- ``Budget(latency=0.5)``, measured again by this timer.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
import torchvision
from torch import nn

import pfs_fast as pfs
from benchmarks.settings import Settings
from benchmarks.tables import Case, timing_rows
from benchmarks.timing import Clock, Timings, Variant, time_variants
from pfs_fast.budgets.deployment import Deployment
from pfs_fast.errors import InfeasibleBudgetError
from pfs_fast.measuring.runtimes import installed, task_of

INFERENCE = "Dense / slim at 50 % of the MACs: forward pass"
TRAINING = "Dense / slim at 50 % of the MACs: training step"
LATENCY = "`Budget(latency=0.5)`: slim / dense, measured again"
MULTIPLES = (1, 8, 16, 32, "auto")
STEPS = 60
CPU = torch.device("cpu")

# name: (model, side of an image, images of a batch)
NETWORKS: dict[str, tuple[Callable[[], nn.Module], int, int]] = {
    "resnet20": (lambda: pfs.models.resnet20(), 32, 128),
    "resnet18": (lambda: torchvision.models.resnet18(num_classes=10), 128, 8),
    "mobilenet_v2": (lambda: torchvision.models.mobilenet_v2(num_classes=10), 128, 8),
    "resnet50": (lambda: torchvision.models.resnet50(num_classes=10), 128, 4),
}
LATENCY_NETWORKS = ("resnet18", "mobilenet_v2")


def run(settings: Settings) -> Iterator[Case]:
    if settings.device.type != "cpu":
        yield Case([], {INFERENCE: [{"not run": "slim runs on the CPU"}]})
        return
    for name, (build, side, batch) in NETWORKS.items():
        for scope in ("paper", "all"):
            result = _searched(build, side, scope)
            dense, slim = result.model, _slim_networks(result)
            assert dense is not None
            for runtime, precision in _runtimes():
                deployed = Deployment("cpu", batch, precision, runtime=runtime)
                what = runtime if precision == "fp32" else f"{runtime}, {precision}"
                yield _inference(name, scope, what, deployed, dense, slim, settings)
            if name == "resnet20":
                for precision in ("fp32", "bf16"):
                    yield _training(name, scope, precision, dense, slim, batch, settings)
            if name in LATENCY_NETWORKS and scope == "all":
                for runtime in ("folded", "onnxruntime"):
                    if runtime in installed():
                        yield _latency(name, result, runtime, batch, settings)


def _runtimes() -> list[tuple[str, str]]:
    found = [(runtime, "fp32") for runtime in installed()]
    if torch.cpu._is_avx512_bf16_supported():
        found.insert(2, ("folded", "bf16"))
    return found


def _searched(build: Callable[[], nn.Module], side: int, scope: str) -> pfs.SearchResult:
    torch.manual_seed(0)
    model = build()
    data = [(torch.randn(8, 3, side, side), torch.randint(0, 10, (8,))) for _ in range(3)]
    config = pfs.SearchConfig(max_steps=STEPS, lr=0.02, scope=scope, epochs=STEPS)
    return pfs.search(model, data, 0.95, config=config, device=CPU, progress=False)


def _slim_networks(result: pfs.SearchResult) -> dict[str, nn.Module | None]:
    """Networks by their multiple; None where no structure has such widths."""
    networks: dict[str, nn.Module | None] = {}
    for multiple in MULTIPLES:
        try:
            networks[f"x{multiple}"] = result.slim(pfs.Budget(0.5, multiple_of=multiple), seed=0)
        except InfeasibleBudgetError:
            networks[f"x{multiple}"] = None
    return networks


def _forward(call: Callable[[], object]) -> Variant:
    def timed(clock: Clock) -> None:
        with torch.inference_mode():
            call()
        clock.lap("forward")

    return timed


def _inference(
    name: str,
    scope: str,
    what: str,
    deployed: Deployment,
    dense: nn.Module,
    slim: dict[str, nn.Module | None],
    settings: Settings,
) -> Case:
    shape = next(n.pfs_input_shape for n in slim.values() if n is not None)
    networks = {"dense": dense} | {k: n for k, n in slim.items() if n is not None}
    variants = {
        key: _forward(task_of(network, shape, deployed).run) for key, network in networks.items()
    }
    timings = time_variants(variants, device=CPU, effort=settings.profile.effort)
    case = {"what": "forward", "network": name, "scope": scope, "runtime": what}
    return _case(INFERENCE, case | {"batch": deployed.batch}, timings, slim)


def _case(title: str, case: dict, timings: Timings, slim: dict[str, nn.Module | None]) -> Case:
    line: dict[str, object] = dict(case) | {"dense ms": timings.time("dense")}
    line.pop("what")
    for key, network in slim.items():
        line[key] = None if network is None else timings.ratio("dense", key)
    return Case(timing_rows(case, timings, baseline_of="dense"), {title: [line]})


def _training(
    name: str,
    scope: str,
    precision: str,
    dense: nn.Module,
    slim: dict[str, nn.Module | None],
    batch: int,
    settings: Settings,
) -> Case:
    shape = next(n.pfs_input_shape for n in slim.values() if n is not None)
    images = torch.randn(batch, *shape).contiguous(memory_format=torch.channels_last)
    labels = torch.randint(0, 10, (batch,))

    def step_of(network: nn.Module) -> Variant:
        network = copy.deepcopy(network).train().to(memory_format=torch.channels_last)
        optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9, fused=True)

        def timed(clock: Clock) -> None:
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
                loss = F.cross_entropy(network(images).float(), labels)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            clock.lap("step")

        return timed

    # A strided 1x1 convolution with few inputs is one that PyTorch cannot train in channels_last (oneDNN 6035): ResNet-20
    # has none, its shortcuts have no parameters.
    networks = {"dense": dense} | {k: n for k, n in slim.items() if n is not None}
    variants = {key: step_of(network) for key, network in networks.items()}
    timings = time_variants(variants, device=CPU, effort=settings.profile.effort)
    case = {"what": "training step", "network": name, "scope": scope, "runtime": precision}
    return _case(TRAINING, case | {"batch": batch}, timings, slim)


def _latency(
    name: str, result: pfs.SearchResult, runtime: str, batch: int, settings: Settings
) -> Case:
    result.progress = False
    budget = pfs.Budget(latency=0.5, runtime=runtime, batch=batch, device="cpu")
    structure = result.structure_for(budget)
    slim = pfs.slim(result.model, structure, seed=0)
    variants = {
        key: _forward(task_of(network, result.input_shape, budget.run).run)
        for key, network in {"dense": result.model, "slim": slim}.items()
    }
    timings = time_variants(variants, device=CPU, effort=settings.profile.effort)
    case = {
        "what": "latency 0.5",
        "network": name,
        "scope": "all",
        "runtime": runtime,
        "batch": batch,
    }
    line = case | {
        "dense ms": timings.time("dense"),
        "slim / dense": timings.ratio("slim", "dense"),
        "MACs kept": f"{structure.macs_share:.1%}",
    }
    line.pop("what")
    return Case(timing_rows(case, timings, baseline_of="dense"), {LATENCY: [line]})
