"""Labels: what is taken, what is refused, and that the repair that an error names works."""

from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F
from small_training import CPU, Net, batches, fit, state_of
from torch import Tensor, nn

import pfs_fast as pfs
from pfs_fast.errors import LoaderError, ModelError
from pfs_fast.training.batches import LabelWatch
from pfs_fast.training.train import evaluate

N, CLASSES = 8, 4
INDEX = torch.arange(N) % CLASSES
ONE_HOT = F.one_hot(INDEX, CLASSES)
MULTI_HOT = ONE_HOT.float() + ONE_HOT.roll(1, 1)


class Searchable(nn.Sequential):
    def __init__(self, outputs: int = CLASSES) -> None:
        super().__init__(
            nn.Conv2d(2, 4, 3, padding=1, bias=False),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(4, outputs),
        )


def run_search(model: nn.Module, loader: object) -> None:
    config = pfs.SearchConfig(epochs=2, backend="reference", precision="fp32")
    pfs.search(model, loader, 0.8, config=config, device="cpu", progress=False)


def run_train(model: nn.Module, loader: object) -> None:
    fit(model, loader, epochs=2)


RUNS = {"search": run_search, "train": run_train, "evaluate": evaluate}


def images() -> Tensor:
    return torch.randn(N, 2, 4, 4, generator=torch.Generator().manual_seed(0))


def run(caller: str, labels: Tensor, outputs: int = CLASSES) -> None:
    RUNS[caller](Searchable(outputs), [(images(), labels)])


def message_of(caller: str, labels: Tensor, outputs: int = CLASSES) -> str:
    with pytest.raises(LoaderError, match=f"^{caller}: ") as caught:
        run(caller, labels, outputs)
    return str(caught.value)


def repaired(labels: Tensor, message: str) -> Tensor:
    """The labels after what the message says to call on them."""
    calls = re.search(r"labels((?:\.\w+\(\d?\))+)", message.partition("; ")[2])
    assert calls is not None, message
    return eval(f"labels{calls[1]}", {"labels": labels})


# Probabilities


@pytest.mark.parametrize("caller", RUNS)
@pytest.mark.parametrize(
    ("labels", "miss"),
    [
        (MULTI_HOT, "1"),
        (torch.zeros(N, CLASSES), "1"),
        (0.9 * ONE_HOT.double(), "0.1"),
        (MULTI_HOT.half(), "1"),
        (torch.tensor([[2.0, -1.0, 0.0, 0.0]]).expand(N, -1), "1"),
        (ONE_HOT * torch.nan, "nan"),
        (ONE_HOT / 0, "nan"),
    ],
)
def test_rows_that_are_no_probabilities_are_refused(caller: str, labels: Tensor, miss: str):
    message = message_of(caller, labels)
    assert "with a sum of 1 in each row" in message and f"misses this by {miss};" in message
    run(caller, repaired(labels, message))


@pytest.mark.parametrize("caller", RUNS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_smoothed_and_mixed_rows_are_taken(caller: str, dtype: torch.dtype):
    smooth = 0.9 * ONE_HOT.to(dtype) + 0.1 / CLASSES
    share = torch.rand(N, 1, generator=torch.Generator().manual_seed(0)).to(dtype)
    run(caller, share * smooth + (1 - share) * smooth.roll(1, 0))
    run(caller, torch.rand(N, CLASSES).softmax(1).to(dtype))


@pytest.mark.parametrize("classes", [10, 1000, 21841])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_rounding_of_many_classes_is_no_error(classes: int, dtype: torch.dtype):
    watch = LabelWatch(CPU, "train")
    rows = torch.randn(4, classes, generator=torch.Generator().manual_seed(0)).mul(3).softmax(1)
    watch.checked(rows.to(dtype), classes)
    smooth = F.one_hot(torch.arange(4), classes).to(dtype) * 0.9 + 0.1 / classes
    if dtype == torch.float32:  # an off value of 1e-6 is rounded to a step of 6e-8 in float16
        watch.checked(smooth, classes)


class OnDevice(Tensor):
    """A tensor that only claims to be on a device."""

    @property
    def device(self):
        return torch.device("cuda", 0)


def test_rows_on_a_device_are_noted_and_read_late():
    for enabled in (True, False):  # soft labels are made anew in each epoch
        watch = LabelWatch(CPU, "train", enabled=enabled)
        good = ONE_HOT.float().as_subclass(OnDevice)
        assert watch.checked(good, CLASSES) is good
        watch.read()
        for bad, miss in ((MULTI_HOT, "1"), (ONE_HOT * torch.nan, "nan"), (-ONE_HOT.float(), "2")):
            watch.checked(bad.as_subclass(OnDevice), CLASSES)
            watch.checked(good, CLASSES)
            with pytest.raises(LoaderError, match=f"a row that misses this by {miss};"):
                watch.read()
        watch.checked(good, CLASSES)
        watch.read()


# Other forms


@pytest.mark.parametrize("caller", RUNS)
@pytest.mark.parametrize(
    ("labels", "outputs"),
    [
        (INDEX.float(), CLASSES),
        (INDEX[:, None], CLASSES),
        (INDEX[:, None].float(), CLASSES),
        (INDEX.bool(), CLASSES),
        (ONE_HOT, CLASSES),
        (ONE_HOT.bool(), CLASSES),
    ],
)
def test_repair_of_class_indices_in_another_form_works(caller: str, labels: Tensor, outputs: int):
    run(caller, repaired(labels, message_of(caller, labels, outputs)), outputs)


@pytest.mark.parametrize("caller", RUNS)
@pytest.mark.parametrize(
    ("labels", "outputs"),
    [
        (MULTI_HOT, 3),  # columns and rows are both wrong
        (ONE_HOT.float(), 3),
        (INDEX, 2),
        (INDEX + 3, CLASSES),
    ],
)
def test_repair_by_another_number_of_outputs_works(caller: str, labels: Tensor, outputs: int):
    message = message_of(caller, labels, outputs)
    needed = int(re.search(r"build the model with (\d+) outputs", message)[1])
    run(caller, repaired(labels, message) if "labels." in message else labels, needed)


@pytest.mark.parametrize("caller", RUNS)
def test_one_output_with_a_column_of_labels_is_refused(caller: str):
    """The form of binary cross-entropy: the softmax of one output is 1 whatever the network does."""
    column = (INDEX % 2).float()[:, None]
    message = message_of(caller, column, outputs=1)
    assert "build the model with an output for each class" in message
    run(caller, repaired(column, message), outputs=2)


@pytest.mark.parametrize("caller", RUNS)
@pytest.mark.parametrize(
    "labels",
    [
        torch.zeros(N, 4, 4, dtype=torch.long),  # of pixels
        torch.zeros(N * 16, dtype=torch.long),
        torch.zeros(N, 1, 4, 4),
    ],
)
def test_labels_of_pixels_are_said_to_be_unsupported(caller: str, labels: Tensor):
    message = message_of(caller, labels)
    assert "; give each image one label; labels of pixels" in message
    assert "labels." not in message


@pytest.mark.parametrize("caller", RUNS)
def test_regression_is_said_to_be_unsupported(caller: str):
    for labels in (torch.randn(N), torch.randn(N, 1)):
        assert "other targets, as of regression, are not supported" in message_of(caller, labels)


@pytest.mark.parametrize("caller", RUNS)
def test_negative_label_is_told_as_it_is(caller: str):
    message = message_of(caller, INDEX - 5)
    assert "got -5; number the classes from 0, and leave out images without a class" in message


# Batches


class Items(torch.utils.data.Dataset):
    """Images one by one; ``make`` gives their form."""

    def __init__(self, make) -> None:
        self.make = make

    def __len__(self) -> int:
        return N

    def __getitem__(self, index: int):
        if index >= N:
            raise IndexError
        return self.make(images()[index], int(INDEX[index]))


def test_data_set_in_place_of_a_loader_is_told_to_be_batched():
    items = Items(lambda image, label: (image, label))
    with pytest.raises(
        LoaderError, match=r"got Tensor and int; yield batches .* as a DataLoader with a batch_size"
    ):
        fit(Net(CLASSES), items)
    fit(Net(CLASSES), torch.utils.data.DataLoader(items, batch_size=4))
    scalars = [(images()[0], INDEX[0])]
    with pytest.raises(LoaderError, match=r"got torch.int64 of shape \[\]; yield batches"):
        fit(Net(CLASSES), scalars)


def test_dict_batches_are_repaired_by_a_collate_fn():
    items = Items(lambda image, label: {"image": image, "label": label})
    with pytest.raises(LoaderError, match="got dict; return just these two from the collate_fn"):
        fit(Net(CLASSES), torch.utils.data.DataLoader(items, batch_size=4))

    def collate(parts):
        parts = torch.utils.data.default_collate(parts)
        return parts["image"], parts["label"]

    fit(Net(CLASSES), torch.utils.data.DataLoader(items, batch_size=4, collate_fn=collate))


class Siamese(nn.Module):
    """Two images of one channel each, in one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1)
        )
        self.head = nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        first, second = x.chunk(2, 1)
        return self.head((self.body(first) - self.body(second)).mean((2, 3)))


@pytest.mark.parametrize("caller", RUNS)
def test_several_inputs_are_repaired_by_joining_them(caller: str):
    left, right = images().split(1, 1)
    if caller == "search":
        pair = (left, right)
        with pytest.raises(
            LoaderError, match=r"got tuple and Tensor; .* joined along the channels"
        ):
            run_search(Siamese(), [(pair, INDEX)])
    RUNS[caller](Siamese(), [(torch.cat([left, right], 1), INDEX)])


def test_labels_of_several_parts_are_said_to_be_unsupported():
    boxes = [{"boxes": torch.zeros(1, 4)} for _ in range(N)]
    with pytest.raises(LoaderError, match="got Tensor and list; give each image one label"):
        fit(Net(CLASSES), [(images(), boxes)])


# Outputs


class Maps(nn.Module):
    """A logit for each pixel."""

    def __init__(self, mean: bool) -> None:
        super().__init__()
        self.net = nn.Sequential(*list(Searchable())[:3], nn.Conv2d(4, CLASSES, 1))
        self.mean = mean

    def forward(self, x: Tensor) -> Tensor:
        outputs = self.net(x)
        return outputs.mean((2, 3)) if self.mean else outputs


@pytest.mark.parametrize("caller", RUNS)
def test_repair_of_maps_works(caller: str):
    with pytest.raises(
        ModelError, match=r"must return logits .* outputs\.mean\(\(2, 3\)\) of maps"
    ):
        RUNS[caller](Maps(mean=False), [(images(), INDEX)])
    RUNS[caller](Maps(mean=True), [(images(), INDEX)])


def test_refused_labels_leave_the_model_alone():
    net = Net(CLASSES)
    before = state_of(net)
    with pytest.raises(LoaderError):
        fit(net, [*batches(2, classes=CLASSES), (images(), MULTI_HOT)])
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
