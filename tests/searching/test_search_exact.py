"""The search against an independent float64 loop of the paper's method."""

from __future__ import annotations

import pytest
import torch
from plain_method import plain_search

import pfs_fast as pfs
from pfs_fast import _library

STEPS = 30


def _backend(name: str) -> str:
    if name == "fused" and not _library.backends().cpu:
        pytest.skip(f"no compiled operators: {_library.backends().cpu_reason}")
    return name


def _batches(size: int, batch: int, classes: int, steps: int = STEPS) -> list:
    """Random images with a faint class signal, the same few classes again and again: enough to pull gates both ways."""
    generator = torch.Generator().manual_seed(7)
    patterns = torch.randn(classes, 3, size, size, generator=generator)
    found = []
    for _ in range(steps):
        labels = torch.randint(classes, (batch,), generator=generator)
        noise = torch.randn(batch, 3, size, size, generator=generator)
        found.append((patterns[labels] + noise, labels))
    return found


# name: model, image size, batch, options
CASES = {
    "vgg16": (lambda: pfs.models.vgg16(expansion=0.125), 32, 4, {}),
    "vgg16-dying": (lambda: pfs.models.vgg16(expansion=0.125), 32, 4, {"lr": 0.1}),
    "resnet20-dying": (pfs.models.resnet20, 16, 3, {"lr": 0.1}),
    "mobilenet_v1": (lambda: pfs.models.mobilenet_v1(10, expansion=0.125), 32, 4, {}),
    "mobilenet_v2": (
        lambda: pfs.models.mobilenet_v2(10, expansion=0.125, multiplier=0.25),
        32,
        4,
        {},
    ),
}


@pytest.fixture(scope="module")
def oracle():
    """Runs of the plain loop, one for each case, shared by the backends."""
    runs = {}

    def run(case: str):
        if case not in runs:
            make, size, batch, options = CASES[case]
            torch.manual_seed(0)
            model = make()
            batches = _batches(size, batch, 10)
            found = plain_search(
                model,
                model.paper_gates(),
                batches,
                gamma=options.get("gamma", 0.5),
                target=0.25,
                lr=options.get("lr", 0.01),
            )
            runs[case] = model, batches, found
        return runs[case]

    return run


@pytest.mark.parametrize("backend", ["reference", "fused"])
@pytest.mark.parametrize("case", CASES)
def test_search_gates_equal_plain_float64_loop(case, backend, oracle):
    model, batches, expected = oracle(case)
    config = pfs.SearchConfig(
        epochs=1,
        target=0.25,
        precision="fp64",
        backend=_backend(backend),
        compact=False,
        log_every=STEPS,
        **CASES[case][3],
    )
    result = pfs.search(model, batches, 1.0, config=config, device="cpu", progress=False)

    assert list(result.gates) == list(expected.gates)
    for name, gate in expected.gates.items():
        assert result.gates[name].dtype == torch.float64
        assert (result.gates[name] - gate).abs().max() <= 1e-9, name
    died_at = torch.cat(list(expected.died_at.values()))
    assert torch.equal(result.died_at.long(), died_at)
    assert result.history[-1]["loss"] == pytest.approx(sum(expected.losses) / STEPS, rel=1e-10)


@pytest.mark.parametrize("case", [case for case in CASES if case.endswith("dying")])
def test_search_exactness_cases_reach_zero(case, oracle):
    """The clamp and the absorbing zero are exercised: some gates died, some did so early and stayed dead."""
    _, _, expected = oracle(case)
    died_at = torch.cat(list(expected.died_at.values()))
    assert 0 < (died_at > 0).float().mean() < 1
    assert int(died_at[died_at > 0].min()) < STEPS - 10


@pytest.mark.parametrize("case", ["vgg16", "mobilenet_v1", "mobilenet_v2"])
def test_search_exactness_cases_move_gates(case, oracle):
    """Gates differ within every group: the comparison is not one of constants."""
    _, _, expected = oracle(case)
    assert all(gate.std() > 1e-4 for gate in expected.gates.values())
