"""What a call sets of PyTorch's settings for GPUs, and that all of it is back afterwards. No GPU is needed to set them."""

from __future__ import annotations

import pytest
import torch
from small_nets import batches, tiny

import pfs_fast as pfs
from pfs_fast._cuda_settings import cuda_settings

CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")
backends = torch.backends


def old_settings() -> tuple[object, ...]:
    """In PyTorch's older names; "mixed" where they cannot be read beside the newer ones."""

    def read(get):
        try:
            return get()
        except RuntimeError:
            return "mixed"

    return (
        read(lambda: backends.cudnn.allow_tf32),
        read(lambda: backends.cuda.matmul.allow_tf32),
        read(torch.get_float32_matmul_precision),
    )


def new_settings() -> tuple[str, ...]:
    parts = (backends.cudnn.conv, backends.cudnn.rnn, backends.cuda.matmul, backends.mkldnn.matmul)
    return (backends.fp32_precision, backends.cudnn.fp32_precision, *(p.fp32_precision for p in parts))  # fmt: skip


def all_settings() -> tuple[object, ...]:
    return old_settings(), new_settings(), backends.cudnn.deterministic, backends.cudnn.benchmark


def _set(path: str, value: object) -> None:
    *owners, name = path.split(".")
    owner = backends
    for part in owners:
        owner = getattr(owner, part)
    setattr(owner, name, value)


CALLERS = {
    "default": {},
    "no tf32 in convolutions": {"cudnn.allow_tf32": False},
    "tf32 in products": {"cuda.matmul.allow_tf32": True},
    "new names": {"cudnn.conv.fp32_precision": "ieee", "cuda.matmul.fp32_precision": "tf32"},
    "everything": {"fp32_precision": "tf32"},
    "benchmark": {"cudnn.benchmark": True, "cudnn.deterministic": False},
    "deterministic": {"cudnn.deterministic": True},
}


@pytest.fixture
def restored():
    """The process's settings, put back in the order in which they do not disturb each other."""
    cudnn, matmul = backends.cudnn, backends.cuda.matmul
    old = cudnn.allow_tf32, torch.get_float32_matmul_precision()
    new, algorithms = new_settings(), (cudnn.deterministic, cudnn.benchmark)
    yield
    backends.fp32_precision = new[0]
    cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision = new[2:4]
    matmul.fp32_precision = new[4]
    cudnn.allow_tf32 = old[0]
    torch.set_float32_matmul_precision(old[1])
    cudnn.fp32_precision = new[1]
    cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision = new[2:4]
    matmul.fp32_precision, backends.mkldnn.matmul.fp32_precision = new[4:]
    cudnn.deterministic, cudnn.benchmark = algorithms
    assert new_settings() == new


@pytest.fixture(params=CALLERS)
def caller(request, restored):
    for path, value in CALLERS[request.param].items():
        _set(path, value)


@pytest.mark.parametrize("float32", ["ieee", "tf32"])
def test_float32_products_are_as_asked_and_the_callers_afterwards(caller, float32):
    before = all_settings()
    with cuda_settings(CUDA, float32, repeatable=True):
        assert new_settings()[2:5] == (float32,) * 3
        assert backends.cudnn.deterministic and not backends.cudnn.benchmark
        if "mixed" not in before[0]:  # older code may ask, too
            assert old_settings()[:2] == (float32 == "tf32",) * 2
    assert all_settings() == before


def test_settings_are_the_callers_after_an_error(caller):
    before = all_settings()
    with pytest.raises(KeyError), cuda_settings(CUDA, repeatable=True):
        raise KeyError
    assert all_settings() == before


@pytest.mark.parametrize(("device", "float32"), [(CPU, "ieee"), (CUDA, None)])
def test_settings_that_do_not_matter_are_left_alone(caller, device, float32):
    before = all_settings()
    with cuda_settings(device, float32):
        assert all_settings() == before


@pytest.fixture
def asked(monkeypatch):
    """What each module asks for, by the name of the module."""
    found = {}
    for module in ("searching.search", "training.train", "training.evaluation"):

        def note(device, float32="ieee", *, repeatable=False, module=module):
            found[module.split(".")[1]] = (float32, repeatable)
            return cuda_settings(device, float32, repeatable=repeatable)

        monkeypatch.setattr(f"pfs_fast.{module}.cuda_settings", note)
    return found


def test_search_asks_for_float32_and_for_the_same_bits(asked):
    config = pfs.SearchConfig(epochs=1, backend="reference", precision="fp32")
    pfs.search(tiny(), batches(2), 0.6, config=config, progress=False)
    assert asked == {"search": ("ieee", True)}


@pytest.mark.parametrize(("amp", "float32"), [("off", "ieee"), ("bf16", None)])
def test_training_without_autocast_asks_for_float32(asked, amp, float32):
    loader = [(x.float(), y) for x, y in batches(2)]
    model = tiny().float()
    pfs.train(model, loader, config=pfs.TrainConfig(epochs=1, amp=amp), progress=False)
    assert asked == {"train": (float32, False)}
    pfs.evaluate(model, loader, amp=amp)
    assert asked["evaluation"] == (float32, False)


def test_tf32_must_be_asked_for_on_a_cuda_device():
    config = pfs.SearchConfig(epochs=1, backend="reference", precision="tf32")
    with pytest.raises(pfs.errors.ConfigError, match="precision 'tf32' needs a CUDA device, got cpu; use 'fp32'"):  # fmt: skip
        pfs.search(tiny(), batches(2), 0.6, config=config, device="cpu", progress=False)
    with pytest.raises(pfs.errors.ConfigError, match="train: amp 'tf32' needs a CUDA device, got cpu; use 'off'"):  # fmt: skip
        pfs.train(tiny(), batches(2), config=pfs.TrainConfig(epochs=1, amp="tf32"), device="cpu")
    with pytest.raises(pfs.errors.ConfigError, match="evaluate: amp 'tf32' needs a CUDA device, got cpu; use 'off'"):  # fmt: skip
        pfs.evaluate(tiny(), batches(2), amp="tf32")


def test_tf32_is_float32_with_other_products():
    from pfs_fast.searching.config import compute_dtype
    from pfs_fast.training.recipes import autocast_dtype, float32_products

    assert compute_dtype("tf32", CUDA) == torch.float32
    assert autocast_dtype("tf32", CUDA) is None
    assert float32_products("tf32") == "tf32"
