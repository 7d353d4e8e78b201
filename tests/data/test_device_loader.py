"""The device loader against a per-image oracle, its state, and what it refuses."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from pfs_fast import data
from pfs_fast.errors import LoaderError

RAW = {"mean": 0.0, "std": 1 / 255}  # batches then hold the bytes' own values


def some_images(count: int, channels: int = 3, height: int = 8, width: int = 8) -> torch.Tensor:
    """Random bytes from 1 up, [N, C, H, W], so that padding can be told from pixels."""
    return torch.randint(1, 256, (count, channels, height, width), dtype=torch.uint8)


def make_loader(images: torch.Tensor, **options) -> data.DeviceLoader:
    options = {"batch_size": 4, "train": True, "layout": "NCHW", **RAW, **options}
    return data.DeviceLoader(images, torch.arange(len(images)), **options)


def all_batches(loader: data.DeviceLoader) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return list(loader)


def same_batches(a, b) -> bool:
    return len(a) == len(b) and all(
        torch.equal(x, u) and torch.equal(y, v) for (x, y), (u, v) in zip(a, b, strict=True)
    )


def find_crops(image: torch.Tensor, output: torch.Tensor, p: int) -> list[tuple[int, int, bool]]:
    """Every (top, left, mirrored) that turns the image [C, H, W] into the output: one, if all is well."""
    height, width = image.shape[1:]
    padded = F.pad(image, (p, p, p, p))
    found = []
    for top in range(2 * p + 1):
        for left in range(2 * p + 1):
            window = padded[:, top : top + height, left : left + width]
            for mirrored in (False, True):
                if torch.equal(window.flip(2) if mirrored else window, output):
                    found.append((top, left, mirrored))
    return found


@pytest.mark.parametrize(
    ("channels", "height", "width", "padding"),
    [(3, 8, 8, 2), (1, 5, 7, 1), (3, 6, 4, 3), (2, 7, 5, 2), (3, 4, 4, 3)],
)
def test_train_batches_are_crops_of_their_images(channels, height, width, padding):
    images = some_images(22, channels, height, width)
    loader = make_loader(images, crop_padding=padding, dtype=torch.float64)
    seen = []
    for x, y in loader:
        assert x.dtype == torch.float64 and y.dtype == torch.int64
        for output, label in zip(x.round().to(torch.uint8), y, strict=True):
            assert len(find_crops(images[label], output, padding)) == 1
        seen += y.tolist()
    assert sorted(seen) == list(range(22)) and seen != list(range(22))


def test_crops_and_mirrors_are_uniform():
    images = some_images(1, height=5, width=5).expand(4050, -1, -1, -1)
    (x, _), *rest = make_loader(images, batch_size=4050, crop_padding=1)
    assert not rest
    crops, counts = torch.unique(x.flatten(1), dim=0, return_counts=True)
    assert len(crops) == 3 * 3 * 2
    # 4,050 draws over 18 outcomes: 225 each, standard deviation 14.6; five of these either way.
    assert counts.min() > 152 and counts.max() < 298


def test_float_images_are_augmented_like_bytes():
    images = some_images(9)
    from_bytes = all_batches(make_loader(images, dtype=torch.float64))
    from_floats = all_batches(make_loader(images.double() / 255, dtype=torch.float64))
    for (x, y), (u, v) in zip(from_bytes, from_floats, strict=True):
        assert torch.equal(y, v)
        torch.testing.assert_close(x, u, rtol=1e-12, atol=1e-12)


def test_without_augmentation_only_the_order_changes():
    images = some_images(10)
    for x, y in make_loader(images, crop_padding=0, flip=False):
        assert torch.equal(x.round().to(torch.uint8), images[y])


def test_eval_batches_keep_order_and_pixels():
    images = some_images(10)
    batches = all_batches(make_loader(images, train=False))
    assert torch.equal(torch.cat([x for x, _ in batches]).round().to(torch.uint8), images)
    assert torch.equal(torch.cat([y for _, y in batches]), torch.arange(10))
    assert same_batches(batches, all_batches(make_loader(images, train=False, seed=5)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_normalisation_is_rounded_once(dtype):
    images = some_images(6)
    mean, std = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
    loader = make_loader(images, train=False, batch_size=6, mean=mean, std=std, dtype=dtype)
    ((x, _),) = loader
    shape = (1, 3, 1, 1)
    m, s = (torch.tensor(v, dtype=torch.float64).view(shape) for v in (mean, std))
    exact = (images.double() / 255 - m) / s
    assert x.dtype == dtype
    # Half an ulp of the output, and for the two wide types the few roundings of the arithmetic, where m / s is near x / s.
    rtol = torch.finfo(dtype).eps * (0.51 if x.element_size() == 2 else 1)
    atol = 1e-6 if dtype != torch.float64 else 1e-14
    torch.testing.assert_close(x.double(), exact, rtol=rtol, atol=atol)


def test_default_statistics_are_the_papers():
    loader = data.DeviceLoader(some_images(2), torch.zeros(2, dtype=torch.int64))
    assert loader.mean == (0.4914, 0.4822, 0.4465) and loader.std == (0.2023, 0.1994, 0.2010)
    grey = data.DeviceLoader(some_images(2, channels=1), torch.zeros(2, dtype=torch.int64))
    assert (grey.mean, grey.std) == ((0.5,), (0.25,))


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("channels", [1, 3])
def test_batches_are_dense_in_the_asked_layout(train, channels):
    images = some_images(4, channels)
    ((x, _),) = make_loader(images, train=train)
    assert x.is_contiguous(memory_format=torch.channels_last)
    ((x, _),) = make_loader(images, train=train, channels_last=False)
    assert x.is_contiguous()


def test_layouts_and_kinds_of_arrays_give_the_same_batches():
    images = some_images(7)
    expected = all_batches(make_loader(images, layout=None))
    nhwc = images.permute(0, 2, 3, 1)
    read_only = nhwc.numpy().copy()
    read_only.setflags(write=False)
    last = images.contiguous(memory_format=torch.channels_last)
    for other in (nhwc, nhwc.contiguous(), last, images.numpy(), read_only):
        assert same_batches(all_batches(make_loader(other, layout=None)), expected)


def test_grey_images_may_lack_the_channel_axis():
    images = some_images(4, channels=1)
    ((x, _),) = make_loader(images[:, 0].numpy(), layout=None, train=False)
    assert torch.equal(x.round().to(torch.uint8), images)


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.int32, np.uint16, ">i4"])
def test_labels_of_every_integer_type_become_int64(dtype):
    labels = np.arange(5).astype(dtype)
    ((_, y),) = data.DeviceLoader(some_images(5), labels)
    assert torch.equal(y, torch.arange(5))


def test_images_given_are_left_as_they_are():
    images, labels = some_images(6), torch.arange(6)
    copy = images.clone()
    for x, y in data.DeviceLoader(images, labels, 6):
        x.zero_()
        y.zero_()
    assert torch.equal(images, copy) and torch.equal(labels, torch.arange(6))


def test_length_counts_the_last_batch_unless_dropped():
    images = some_images(10)
    assert len(make_loader(images)) == 3 == len(all_batches(make_loader(images)))
    dropped = make_loader(images, drop_last=True)
    assert len(dropped) == 2 and [len(y) for _, y in dropped] == [4, 4]


def test_same_seed_gives_the_same_batches_in_every_epoch():
    images = some_images(10)
    a, b = make_loader(images, seed=3), make_loader(images, seed=3)
    for _ in range(2):
        assert same_batches(all_batches(a), all_batches(b))
    assert a.epoch == 2


def test_other_seeds_and_epochs_give_other_batches():
    images = some_images(10)
    first = make_loader(images)
    epochs = [all_batches(first), all_batches(first), all_batches(make_loader(images, seed=1))]
    orders = {tuple(torch.cat([y for _, y in epoch]).tolist()) for epoch in epochs}
    assert len(orders) == 3


def test_batches_do_not_touch_the_global_generator():
    loader = make_loader(some_images(10))
    before = torch.random.get_rng_state()
    all_batches(loader)
    assert torch.equal(before, torch.random.get_rng_state())


def test_set_epoch_serves_that_epoch():
    images = some_images(10)
    loader, other = make_loader(images), make_loader(images)
    all_batches(loader)
    second = all_batches(loader)
    other.set_epoch(1)
    assert same_batches(all_batches(other), second)


def test_pass_broken_off_counts_as_an_epoch():
    images = some_images(10)
    loader, other = make_loader(images), make_loader(images)
    next(iter(loader))
    other.set_epoch(1)
    assert same_batches(all_batches(loader), all_batches(other))


@pytest.mark.parametrize("served", [0, 1, 2, 3, 4, 7])
def test_loaded_state_goes_on_with_the_next_batch(served):
    images = some_images(10)
    whole = make_loader(images, seed=7)
    expected = [batch for _ in range(3) for batch in whole]
    first, given = make_loader(images, seed=7), []
    while len(given) < served:
        for batch in first:
            given.append(batch)
            if len(given) == served:
                state = first.state_dict()
                break
    state = first.state_dict()
    second = make_loader(images, seed=0)
    second.load_state_dict(state)
    rest = list(second)
    while len(given) + len(rest) < len(expected):
        rest += list(second)
    assert same_batches(given + rest, expected)


def test_state_of_other_data_is_refused():
    loader = make_loader(some_images(10))
    state = loader.state_dict()
    with pytest.raises(LoaderError, match="num_images must be 9, got 10"):
        make_loader(some_images(9)).load_state_dict(state)
    with pytest.raises(LoaderError, match="batch_size must be 5, got 4"):
        make_loader(some_images(10), batch_size=5).load_state_dict(state)
    with pytest.raises(LoaderError, match="state must have epoch, got keys"):
        loader.load_state_dict({k: v for k, v in state.items() if k != "epoch"})
    with pytest.raises(LoaderError, match="batch must be < 3, got 3"):
        loader.load_state_dict({**state, "batch": 3})
    with pytest.raises(LoaderError, match="epoch must be an integer >= 0, got -1"):
        loader.set_epoch(-1)


def test_repr_tells_what_it_serves():
    text = repr(make_loader(some_images(10)))
    assert text == (
        "DeviceLoader(10 images 3x8x8, 10 classes, train, 3 batches of 4, torch.float32, cpu)"
    )


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("train", [False, True])
def test_cuda_batches_equal_those_of_the_cpu(train):
    images = some_images(50, height=32, width=32)
    expected = all_batches(make_loader(images, train=train, dtype=torch.float64))
    found = all_batches(make_loader(images, train=train, dtype=torch.float64, device="cuda"))
    assert all(x.is_cuda and y.is_cuda for x, y in found)
    for (x, y), (u, v) in zip(found, expected, strict=True):
        assert torch.equal(y.cpu(), v)
        torch.testing.assert_close(x.cpu(), u, rtol=1e-14, atol=1e-12)


IMAGES, LABELS = np.ones((4, 3, 8, 8), np.uint8), np.array([0, 1, 2, 1])
NAN = np.where(np.arange(4).reshape(4, 1, 1, 1) == 2, np.nan, 0.5) * np.ones((4, 3, 8, 8))
REFUSED = {
    "wrong dtype": (
        {"images": IMAGES.astype(np.int32)},
        r"images must be uint8 or floating, got torch\.int32",
    ),
    "strings": ({"images": np.array([["a"]])}, "images must be numeric, got an array of <U1"),
    "objects": ({"images": object()}, "images must be a tensor or an array, got object"),
    "ragged": ({"images": [[1, 2], [3]]}, "images must have rows of equal shape, got a ragged"),
    "flat": (
        {"images": IMAGES.reshape(4, -1)},
        r"images must have shape \[N, C, H, W\].*got \[4, 192\]",
    ),
    "empty": (
        {"images": IMAGES[:0], "labels": LABELS[:0]},
        r"at least one pixel, got shape \[0, 3, 8, 8\]",
    ),
    "no height": ({"images": IMAGES[:, :, :0]}, "images must hold at least one pixel"),
    "nan": ({"images": NAN}, "images must be finite, got NaN or infinity in image 2"),
    "five channels": (
        {"images": np.ones((4, 5, 8, 8), np.uint8)},
        r"pass layout=.NCHW. or layout=.NHWC.",
    ),
    "ambiguous": (
        {"images": np.ones((4, 3, 8, 3), np.uint8)},
        "1 or 3 channels on one of the axes 1 and 3",
    ),
    "layout": ({"layout": "CHWN"}, "layout must be .NCHW., .NHWC. or None, got 'CHWN'"),
    "few labels": (
        {"labels": LABELS[:3]},
        r"labels must have shape \[4\], one for each image, got \[3\]",
    ),
    "one-hot labels": (
        {"labels": np.eye(4, dtype=int)},
        r"labels must have shape \[4\].*got \[4, 4\]",
    ),
    "float labels": (
        {"labels": LABELS.astype(float)},
        r"labels must be integers.*got torch\.float64",
    ),
    "bool labels": ({"labels": LABELS > 0}, r"labels must be integers.*got torch\.bool"),
    "negative label": ({"labels": LABELS - 1}, "labels must be >= 0, got -1"),
    "label too large": ({"num_classes": 2}, "labels must be >= 0 and < num_classes = 2, got 2"),
    "batch size 0": ({"batch_size": 0}, "batch_size must be an integer >= 1, got 0"),
    "batch size 2.5": ({"batch_size": 2.5}, "batch_size must be an integer >= 1, got 2.5"),
    "padding": ({"crop_padding": -1}, "crop_padding must be an integer >= 0, got -1"),
    "seed": ({"seed": -1}, "seed must be an integer >= 0, got -1"),
    "output dtype": ({"dtype": torch.int32}, r"dtype must be a floating type, got torch\.int32"),
    "no full batch": (
        {"drop_last": True},
        "must fill one batch of 128 when drop_last is set, got 4",
    ),
    "mean": (
        {"mean": (0.1, 0.2)},
        "mean must be one finite number or one for each of the 3 channels",
    ),
    "nan mean": ({"mean": float("nan")}, "mean must be one finite number"),
    "std": (
        {"std": (0.1, 0.0, 0.1)},
        r"std must be > 0 in every channel, got \(0\.1, 0\.0, 0\.1\)",
    ),
}


@pytest.mark.parametrize(
    ("labels", "as_array"),
    [
        (torch.eye(4, dtype=torch.int64), True),
        (torch.eye(4), True),
        (torch.eye(4) > 0, True),
        (torch.arange(4.0), True),
        (torch.arange(4)[:, None], True),
        (torch.arange(4.0)[:, None], False),
    ],
)
def test_repair_of_class_indices_in_another_form_works(labels, as_array):
    for given in (labels, labels.numpy()) if as_array else (labels,):
        with pytest.raises(LoaderError) as caught:
            data.DeviceLoader(IMAGES, given)
        repair = re.search(r"use (\S+) where", str(caught.value))[1]
        repaired = eval(repair, {"torch": torch, "labels": given})
        loader = data.DeviceLoader(IMAGES, repaired)
        assert torch.equal(torch.cat([y for _, y in loader]), torch.arange(4))


def test_repair_of_other_labels_works():
    with pytest.raises(
        LoaderError, match="got 3; number the classes from 0, or set num_classes to 4"
    ):
        data.DeviceLoader(IMAGES, torch.arange(4), num_classes=2)
    data.DeviceLoader(IMAGES, torch.arange(4), num_classes=4)
    with pytest.raises(
        LoaderError, match="got -1; number the classes from 0, and leave out images"
    ):
        data.DeviceLoader(IMAGES, torch.arange(4) - 1)
    names = np.array(["cat", "dog", "cat", "ant"])
    with pytest.raises(LoaderError, match=r"must be numeric, got .*numpy\.unique") as caught:
        data.DeviceLoader(IMAGES, names)
    repair = re.search(r"as (numpy.+) does", str(caught.value))[1]
    data.DeviceLoader(IMAGES, eval(repair, {"numpy": np, "labels": names}))
    with pytest.raises(LoaderError, match=r"labels of pixels, .* are not supported"):
        data.DeviceLoader(IMAGES, torch.zeros(4, 8, 8, dtype=torch.int64))


def test_loaders_of_a_whole_data_set_have_all_three_parts():
    whole = data.digits(size=8)
    assert isinstance(whole, data.WholeSplits) and None not in whole.loaders()
    partial = data.digits(size=8, val=0)
    assert type(partial) is data.Splits and partial.loaders().val is None


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_refused(case):
    change, message = REFUSED[case]
    with pytest.raises(LoaderError, match=message) as caught:
        data.DeviceLoader(**{"images": IMAGES, "labels": LABELS, **change})
    assert str(caught.value).startswith("DeviceLoader: ") and "; " in str(caught.value)
