"""Does anything cheap say which seed's structure trains best? Searches several seeds, trains every structure, ranks the proxies.

Run: ``python -m benchmarks.experiments.seeds --data cifar10.npz --out runs/seeds``. Every search and every training is written when
it ends, and skipped when the command is given again; ``--worker 0/2`` and ``--worker 1/2`` share them between two processes,
``--limit`` ends a command after so many seconds. ``--report`` prints the tables of what is there.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pfs_fast as pfs
from pfs_fast.budgets.structure import Structure
from pfs_fast.slimming.init import initialise
from pfs_fast.storage.files import write_text_atomic

NETWORK, EXPANSION, BUDGET = "resnet20", 0.5, 0.5
TRAIN, VAL = 10_000, 2_000
SEARCH_STEPS, EPOCHS = 300, 4
UNIFORM = -1  # in the place of a seed: every group narrowed evenly


def shrunk(images: np.ndarray) -> Tensor:
    """Images [N, H, W, C] uint8 at a quarter of the size, by 4x4 means. [N, C, H / 4, W / 4] uint8."""
    x = torch.from_numpy(images).permute(0, 3, 1, 2)
    return torch.cat([F.avg_pool2d(p.float(), 4).round().to(torch.uint8) for p in x.split(5000)])


def loaders(path: Path, seed: int) -> tuple[pfs.data.DeviceLoader, ...]:
    """Training images, images to validate on, all test images."""
    data = np.load(path)
    options = {"mean": pfs.data.CIFAR10_MEAN, "std": pfs.data.CIFAR10_STD, "num_classes": 10}
    x, y = shrunk(data["x_train"][: TRAIN + VAL]), data["y_train"][: TRAIN + VAL]
    train = pfs.data.DeviceLoader(
        x[:TRAIN], y[:TRAIN], 128, train=True, seed=seed, crop_padding=1, drop_last=True, **options
    )
    val = pfs.data.DeviceLoader(x[TRAIN:], y[TRAIN:], 500, train=False, **options)
    test = pfs.data.DeviceLoader(
        shrunk(data["x_test"]), data["y_test"], 500, train=False, **options
    )
    return train, val, test


def network() -> nn.Module:
    return pfs.models.get(NETWORK, num_classes=10, expansion=EXPANSION)


def search(seed: int, data: Path) -> pfs.SearchResult:
    model = network()
    initialise(model, seed=seed)
    config = pfs.SearchConfig(
        epochs=20, max_steps=SEARCH_STEPS, precision="fp32", seed=seed, log_every=25
    )
    train, _, _ = loaders(data, 0)
    return pfs.search(model, train, BUDGET, config=config, progress=False)


def evenly(result: pfs.SearchResult) -> Structure:
    """The structure that keeps the same share of every group, at the same budget."""
    even = copy.copy(result)
    even.flat_gates = torch.cat(
        [torch.linspace(1, 0.01, len(gate)) for gate in result.gates.values()]
    )
    even.died_at = torch.full_like(result.died_at, -1)
    even._structure = None
    return even.structure


def train(structure: Structure, repeat: int, data: Path) -> dict[str, object]:
    """Trains the structure from scratch."""
    train_loader, val, test = loaders(data, 100 + repeat)
    slim = pfs.slim(network(), structure, seed=100 + repeat)
    config = pfs.TrainConfig(
        channels_last=False, epochs=EPOCHS, schedule="cosine", eval_every=EPOCHS
    )
    started = time.perf_counter()
    result = pfs.train(slim, train_loader, test, config, progress=False)
    return {
        "accuracy": result.accuracy,
        "val": pfs.evaluate(slim, val).top1,
        "loss": result.history[-1]["loss"],
        "seconds": time.perf_counter() - started,
    }


def proxies(result: pfs.SearchResult, structure: Structure, data: Path) -> dict[str, float]:
    """Every proxy of one structure; larger should mean better."""
    found = {"params": float(structure.params)}
    last = result.history[-5:]
    found["search loss"] = -float(np.mean([entry["loss"] for entry in last]))
    found["search accuracy"] = float(np.mean([entry["accuracy"] for entry in last]))
    kept = torch.cat(
        [
            torch.isin(torch.arange(len(gate)), torch.tensor(structure.kept[name]))
            for name, gate in result.gates.items()
        ]
    )
    gates = result.flat_gates
    found["gate margin"] = float(gates[kept].mean() - gates[~kept].mean())
    shares = [len(structure.kept[name]) / size for name, size in structure.sizes.items()]
    found["narrowest group"] = min(shares)
    found["evenness"] = -float(np.std(shares))
    train_loader, val, _ = loaders(data, 7)
    images, labels = next(iter(train_loader))
    wots, norms, losses, accuracies = [], [], [], []
    for draw in range(3):
        slim = pfs.slim(network(), structure, seed=200 + draw)
        wots.append(naswot(slim, images))
        norms.append(gradient_norm(slim, images, labels))
    for draw in range(2):
        slim = pfs.slim(network(), structure, seed=300 + draw)
        train_loader, _, _ = loaders(data, 300 + draw)
        config = pfs.TrainConfig(epochs=1, lr=0.05, schedule="constant", channels_last=False)
        losses.append(
            -pfs.train(slim, train_loader, config=config, progress=False).history[-1]["loss"]
        )
        accuracies.append(pfs.evaluate(slim, val).top1)
    found["naswot"], found["gradient norm"] = float(np.mean(wots)), float(np.mean(norms))
    found["short training, loss"] = float(np.mean(losses))
    found["short training, accuracy"] = float(np.mean(accuracies))
    return found


def naswot(net: nn.Module, images: Tensor) -> float:
    """log |det K| of the kernel of ReLU patterns of a batch (Mellor et al., 2021)."""
    kernel = torch.zeros(len(images), len(images), dtype=torch.float64)

    def add(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        on = (output > 0).flatten(1).float()
        kernel.add_((on @ on.T + (1 - on) @ (1 - on).T).double())

    hooks = [m.register_forward_hook(add) for m in net.modules() if isinstance(m, nn.ReLU)]
    with torch.no_grad():
        net.train()(images)
    for hook in hooks:
        hook.remove()
    return float(torch.linalg.slogdet(kernel).logabsdet)


def gradient_norm(net: nn.Module, images: Tensor, labels: Tensor) -> float:
    net.train().zero_grad()
    F.cross_entropy(net(images), labels).backward()
    return float(torch.stack([p.grad.square().sum() for p in net.parameters()]).sum().sqrt())


def rank_correlation(a: np.ndarray, b: np.ndarray) -> float:
    a, b = (np.argsort(np.argsort(x)).astype(float) for x in (a, b))
    return float(np.corrcoef(a, b)[0, 1])


def report(out: Path, seeds: list[int], repeats: int) -> None:
    seeds = [s for s in seeds if (out / f"proxies-{s}.json").exists()]
    results = pfs.SearchResults(
        pfs.SearchResult.load(out / f"search-{s}.safetensors") for s in seeds
    )
    print(results.report())
    pairs = torch.triu_indices(len(seeds), len(seeds), 1).unbind()
    for measure in ("width_correlation", "share_correlation", "widths", "channels"):
        alike = results.similarity(measure=measure)[pairs]
        print(f"{measure:26} {alike.mean():.3f} ({alike.min():.3f} to {alike.max():.3f})")
    found = [json.loads((out / f"proxies-{s}.json").read_text()) for s in seeds]
    for target in ("short training, accuracy", "short training, loss"):
        print(f"\nrank correlation with {target}")
        print_correlations(found, np.array([f[target] for f in found]))
    accuracy = {s: accuracies(out, s, repeats) for s in [*seeds, UNIFORM]}
    for seed, values in accuracy.items():
        if values:
            text = " ".join(f"{100 * a:.2f}" for a in values)
            print(f"{'uniform' if seed == UNIFORM else f'seed {seed}'}: {text} %")
    full = [s for s in seeds if len(accuracy[s]) == repeats]
    if repeats < 2 or len(full) < 3:
        print("too few whole trainings to compare: three seeds with two repeats are the least")
        return
    table = np.array([accuracy[s] for s in full]) * 100
    within, between = table.var(1, ddof=1).mean(), table.mean(1).var(ddof=1)
    half = repeats // 2
    print(
        f"{len(full)} seeds x {repeats} trainings: sd within a structure {np.sqrt(within):.2f}, of the means "
        f"{np.sqrt(between):.2f}, by chance {np.sqrt(within / repeats):.2f}; rank correlation of the first {half} and the "
        f"other trainings {rank_correlation(table[:, :half].mean(1), table[:, half:].mean(1)):+.2f}"
    )
    print("\nrank correlation with the test accuracy, and the accuracy of the choice")
    print_correlations([found[seeds.index(s)] for s in full], table.mean(1))


def accuracies(out: Path, seed: int, repeats: int) -> list[float]:
    paths = (out / f"train-{seed}-{repeat}.json" for repeat in range(repeats))
    return [json.loads(path.read_text())["accuracy"] for path in paths if path.exists()]


def print_correlations(found: list[dict[str, float]], target: np.ndarray) -> None:
    for name in found[0]:
        values = np.array([f[name] for f in found])
        choice, mean, best = target[values.argmax()], target.mean(), target.max()
        correlation = rank_correlation(values, target)
        print(
            f"{name:26} {correlation:+.2f}  its choice {choice:.3f} (mean {mean:.3f}, best {best:.3f})"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=6)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--worker", default="0/1")
    parser.add_argument("--limit", type=float, default=1e9)
    parser.add_argument("--report", action="store_true")
    arguments = parser.parse_args()
    out, seeds = arguments.out, list(range(arguments.seeds))
    if arguments.report:
        report(out, seeds, arguments.repeats)
        return
    out.mkdir(parents=True, exist_ok=True)
    index, workers = map(int, arguments.worker.split("/"))
    started = time.perf_counter()
    for repeat in range(-1, arguments.repeats):
        for seed in [*seeds[index::workers], *([UNIFORM] if index == 0 and repeat >= 0 else [])]:
            if time.perf_counter() - started > arguments.limit:
                return
            path = out / f"search-{max(seed, 0)}.safetensors"
            if not path.exists():
                search(seed, arguments.data).save(path)
            result = pfs.SearchResult.load(path)
            structure = evenly(result) if seed == UNIFORM else result.structure
            name = f"proxies-{seed}.json" if repeat < 0 else f"train-{seed}-{repeat}.json"
            if (out / name).exists():
                continue
            found = (
                proxies(result, structure, arguments.data)
                if repeat < 0
                else train(structure, repeat, arguments.data)
            )
            write_text_atomic(out / name, json.dumps(found) + "\n", caller="seeds")
            print(name, json.dumps(found), f"{time.perf_counter() - started:.0f} s", flush=True)


if __name__ == "__main__":
    main()
