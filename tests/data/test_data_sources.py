"""Where images come from: files, packages, data sets by name; what is read, and what is refused."""

from __future__ import annotations

import gzip
import os
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from test_device_loader import IMAGES, LABELS, make_loader, some_images
from torch.utils.data import TensorDataset

from pfs_fast import data
from pfs_fast.errors import BackendError, LoaderError


def test_split_holds_out_the_last():
    (x, y), (u, v) = data.split(torch.arange(10), torch.arange(10), last=3)
    assert x.tolist() == y.tolist() == list(range(7))
    assert u.tolist() == v.tolist() == [7, 8, 9]


@pytest.mark.parametrize("last", [0, 10, -1, 2.0])
def test_split_refuses_to_leave_a_part_empty(last):
    with pytest.raises(LoaderError, match=r"split: last must be an integer in \[1, 9\]"):
        data.split(range(10), range(10), last=last)


def test_split_refuses_unequal_lengths():
    with pytest.raises(LoaderError, match="labels must be as many as images, got 9 and 10"):
        data.split(range(10), range(9))


def test_npz_is_read_under_both_sets_of_names(tmp_path):
    images, labels = some_images(6).permute(0, 2, 3, 1).numpy(), np.arange(6, dtype=np.uint8)
    np.savez(
        tmp_path / "a.npz", x_train=images, y_train=labels, x_test=images[:2], y_test=labels[:2]
    )
    np.savez_compressed(tmp_path / "b.npz", images=images, labels=labels)
    a, b = data.from_npz(tmp_path / "a.npz", val=2), data.from_npz(str(tmp_path / "b.npz"))
    assert [len(part) for part in (a.train, a.val, a.test)] == [4, 2, 2]
    assert a.val.labels.tolist() == [4, 5] and a.num_classes == 6
    assert (len(b.train), b.val, b.test) == (6, None, None)
    assert torch.equal(b.train.images, torch.from_numpy(images).permute(0, 3, 1, 2))
    assert str(a) == "a: 4 train, 2 val, 2 test; 3x8x8, 6 classes"


def write_npz(path: Path, **arrays) -> Path:
    np.savez(path, **arrays)
    return path


def write_bytes(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def truncated_npz(path: Path) -> Path:
    write_npz(path, images=IMAGES, labels=LABELS)
    return write_bytes(path, path.read_bytes()[:-100])


def corrupted_npz(path: Path) -> Path:
    np.savez_compressed(
        path,
        images=np.random.default_rng(0).integers(0, 255, (9, 3, 8, 8), np.uint8),
        labels=LABELS,
    )
    content = bytearray(path.read_bytes())
    content[200:400] = bytes(200)
    return write_bytes(path, bytes(content))


def single_array(path: Path) -> Path:
    with path.open("wb") as file:
        np.save(file, IMAGES)
    return path


NPZ_REFUSED = {
    "missing file": (lambda p: p, r"path must be an existing \.npz file"),
    "folder": (lambda p: p.parent, r"path must be a readable \.npz file"),
    "text": (lambda p: write_bytes(p, b"hello"), r"path must be a readable \.npz file"),
    "empty": (lambda p: write_bytes(p, b""), r"path must be a readable \.npz file"),
    "truncated": (truncated_npz, r"path must be a readable \.npz file"),
    "corrupted": (corrupted_npz, r"path must be a readable \.npz file"),
    "one array": (single_array, "it holds one array, not an archive"),
    "pickle": (
        lambda p: write_npz(p, images=np.array([{}, None]), labels=LABELS),
        "without pickled objects",
    ),
    "other names": (
        lambda p: write_npz(p, a=IMAGES, b=LABELS),
        r"got \['a', 'b'\]; add images and labels",
    ),
    "no labels": (lambda p: write_npz(p, x_train=IMAGES), r"got \['x_train'\]; add y_train"),
    "no test labels": (
        lambda p: write_npz(p, x_train=IMAGES, y_train=LABELS, x_test=IMAGES),
        "add y_test",
    ),
    "wrong labels": (
        lambda p: write_npz(p, images=IMAGES, labels=LABELS[:2]),
        r"\(images and labels\): labels must",
    ),
    "other test shape": (
        lambda p: write_npz(
            p, x_train=IMAGES, y_train=LABELS, x_test=IMAGES[..., 1:], y_test=LABELS
        ),
        "test images must have the shape of the training images",
    ),
}


@pytest.mark.parametrize("case", NPZ_REFUSED)
def test_bad_npz_is_refused(case, tmp_path):
    make, message = NPZ_REFUSED[case]
    with pytest.raises(LoaderError, match=message) as caught:
        data.from_npz(make(tmp_path / "file.npz"))
    assert str(caught.value).startswith("from_npz: ")


@pytest.mark.parametrize("val", [-1, 4, 1.5, True])
def test_npz_refuses_to_hold_out_everything(val, tmp_path):
    path = write_npz(tmp_path / "file.npz", images=IMAGES, labels=LABELS)
    with pytest.raises(LoaderError, match=r"from_npz: val must be an integer in \[0, 3\]"):
        data.from_npz(path, val=val)


def test_loaders_share_the_statistics_of_the_training_part():
    splits = data.synthetic(200, (3, 16, 16), num_classes=4, val=40)
    train, val, test = splits.loaders(32, seed=1, drop_last=True, eval_batch_size=25)
    assert [loader.num_images for loader in (train, val, test)] == [160, 40, 50]
    assert train.mean == val.mean == test.mean == splits.mean
    assert (train.train, val.train, test.train) == (True, False, False)
    assert (len(train), len(val), len(test)) == (5, 2, 2)
    assert all(loader.num_classes == 4 for loader in (train, val, test))


def test_statistics_normalise_to_mean_0_and_std_1():
    images = some_images(1500, height=6, width=6)
    images[:, 1] //= 3
    images[:, 2] = 7
    part = data.ImageSet.of(images, torch.zeros(1500, dtype=torch.int64))
    mean, std = part.statistics()
    loader = make_loader(
        images, train=False, batch_size=1500, mean=mean, std=std, dtype=torch.float64
    )
    ((x, _),) = loader
    torch.testing.assert_close(
        x.mean((0, 2, 3)), torch.zeros(3, dtype=torch.float64), atol=1e-12, rtol=0
    )
    expected = torch.tensor([1.0, 1.0, 0.0], dtype=torch.float64)
    torch.testing.assert_close(x.std((0, 2, 3), correction=0), expected, atol=1e-9, rtol=0)


def test_digits_are_the_1797_of_scikit_learn():
    splits = data.digits()
    assert [len(p) for p in (splits.train, splits.val, splits.test)] == [1257, 180, 360]
    assert splits.train.images.shape[1:] == (3, 32, 32) and splits.train.images.dtype == torch.uint8
    assert splits.train.images.max() > 200 and splits.num_classes == 10
    assert not splits.loaders().train.flip
    assert data.digits(size=8, channels=1).test.images.shape == (360, 1, 8, 8)


def test_digits_without_scikit_learn_name_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(BackendError, match="pip install scikit-learn"):
        data.digits()


def test_synthetic_images_can_be_told_apart_by_their_class():
    splits = data.synthetic(400, num_classes=5)
    x = splits.train.images.double()
    means = torch.stack([x[splits.train.labels == c].mean(0) for c in range(5)])
    distance = torch.cdist(splits.test.images.double().flatten(1), means.flatten(1))
    assert (distance.argmin(1) == splits.test.labels).double().mean() > 0.95


def test_synthetic_repeats_with_its_seed():
    a, b, c = (data.synthetic(20, seed=seed).train.images for seed in (1, 1, 2))
    assert torch.equal(a, b) and not torch.equal(a, c)
    with pytest.raises(LoaderError, match="synthetic: num_images must be an integer >= 1, got 0"):
        data.synthetic(0)


def write_idx(path: Path, array: np.ndarray) -> None:
    header = struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
    path.write_bytes(gzip.compress(header + array.tobytes()))


def write_fashion(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    images, labels = rng.integers(1, 256, (20, 28, 28), np.uint8), rng.integers(0, 10, 20, np.uint8)
    for prefix, count in (("train", 20), ("t10k", 5)):
        write_idx(folder / f"{prefix}-images-idx3-ubyte.gz", images[:count])
        write_idx(folder / f"{prefix}-labels-idx1-ubyte.gz", labels[:count])
    return images, labels


def test_fashion_mnist_is_padded_and_repeated_over_channels(tmp_path):
    images, labels = write_fashion(tmp_path)
    splits = data.fashion_mnist(tmp_path, val=4)
    assert [len(p) for p in (splits.train, splits.val, splits.test)] == [16, 4, 5]
    x = splits.train.images
    assert x.shape == (16, 3, 32, 32) and x.sum() == 3 * images[:16].sum(dtype=np.int64)
    assert torch.equal(x[:, 1, 2:30, 2:30], torch.from_numpy(images[:16]))
    assert splits.val.labels.tolist() == labels[16:].tolist()


def test_fashion_mnist_names_the_package_where_files_are_missing(tmp_path):
    with pytest.raises(LoaderError, match="apt-get install dataset-fashion-mnist"):
        data.fashion_mnist(tmp_path)
    with pytest.raises(LoaderError, match="size must be >= 28, got 20"):
        data.fashion_mnist(tmp_path, size=20)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda raw: raw[:-20], "must be a whole gzip file"),
        (lambda raw: b"no gzip", "must be a whole gzip file"),
        (
            lambda raw: gzip.compress(gzip.decompress(raw)[:-1]),
            "must be an idx file of unsigned bytes",
        ),
        (lambda raw: gzip.compress(b"\0\0\x0d" + gzip.decompress(raw)[3:]), "must be an idx file"),
        (lambda raw: gzip.compress(b""), "must be an idx file"),
    ],
)
def test_damaged_idx_files_are_refused(damage, message, tmp_path):
    write_fashion(tmp_path)
    path = tmp_path / "train-images-idx3-ubyte.gz"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(LoaderError, match=message):
        data.fashion_mnist(tmp_path)


class ArrayDataset:
    """A data set that keeps arrays, as torchvision's CIFAR10 does."""

    transform = None

    def __init__(self, images, labels):
        self.data, self.targets = images, labels

    def __len__(self):
        return len(self.data)

    def __getitem__(self, index):
        image = self.data[index]
        return (image if self.transform is None else self.transform(image)), self.targets[index]


def test_dataset_with_arrays_is_taken_whole():
    images = some_images(5).permute(0, 2, 3, 1).numpy()
    part = data.from_dataset(ArrayDataset(images, [0, 1, 2, 0, 1]))
    assert torch.equal(part.images, torch.from_numpy(images).permute(0, 3, 1, 2))
    assert part.labels.tolist() == [0, 1, 2, 0, 1]


def test_dataset_with_a_transform_is_read_through_it():
    images = some_images(5).permute(0, 2, 3, 1).numpy()
    dataset = ArrayDataset(images, [0, 1, 2, 0, 1])
    dataset.transform = lambda image: image[:4, :4] // 2
    part = data.from_dataset(dataset)
    assert torch.equal(part.images, torch.from_numpy(images[:, :4, :4] // 2).permute(0, 3, 1, 2))


def test_dataset_of_tensors_is_read_item_by_item():
    images = torch.rand(4, 3, 8, 8)
    part = data.from_dataset(TensorDataset(images, torch.tensor([1, 0, 1, 0])))
    assert torch.equal(part.images, images) and part.labels.tolist() == [1, 0, 1, 0]


def test_dataset_that_cannot_be_stacked_is_refused():
    items = [(torch.zeros(3, 8, 8), 0), (torch.zeros(3, 8, 9), 1)]
    with pytest.raises(
        LoaderError, match=r"images must all have the shape \[8, 8, 3\] of the first"
    ):
        data.from_dataset(items)
    with pytest.raises(LoaderError, match="dataset must hold at least one image, got length 0"):
        data.from_dataset([])
    with pytest.raises(LoaderError, match="dataset must have a length and items, got generator"):
        data.from_dataset(x for x in items)
    with pytest.raises(LoaderError, match=r"must fit into max_bytes = 0\.00 GiB, got 1 of 8x8x3"):
        data.from_dataset(items[:1], max_bytes=100)
    with pytest.raises(LoaderError, match="images must be PIL images, arrays"):
        data.from_dataset([("picture", 0)])


def write_image_folders(root: Path, parts: tuple[str, ...], count: int = 4) -> None:
    image_module = pytest.importorskip("PIL.Image")
    for part in parts:
        for label, name in enumerate(("cat", "dog")):
            folder = root / part / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = np.full((20 + i, 30, 3), 100 * label + 10 * i, np.uint8)
                image_module.fromarray(pixels).save(folder / f"{i}.png")


def test_imagefolder_resizes_and_holds_out_the_last_of_each_class(tmp_path):
    write_image_folders(tmp_path, ("train", "val"))
    splits = data.imagefolder(tmp_path, 16, val_per_class=1)
    assert [len(p) for p in (splits.train, splits.val, splits.test)] == [6, 2, 8]
    assert splits.train.images.shape == (6, 3, 16, 16)
    assert splits.train.images[:, 0, 8, 8].tolist() == [0, 10, 20, 100, 110, 120]
    assert splits.val.images[:, 0, 8, 8].tolist() == [30, 130]
    assert splits.val.labels.tolist() == [0, 1] and splits.num_classes == 2


def test_imagefolder_without_parts_is_all_training(tmp_path):
    write_image_folders(tmp_path, (".",))
    splits = data.imagefolder(tmp_path, 16)
    assert (len(splits.train), splits.val, splits.test) == (8, None, None)


def test_bad_imagefolder_is_refused(tmp_path):
    with pytest.raises(LoaderError, match="directory must be a folder, got"):
        data.imagefolder(tmp_path / "none")
    with pytest.raises(LoaderError, match="must hold one folder of images for each class"):
        data.imagefolder(tmp_path)
    write_image_folders(tmp_path, ("train", "val"))
    with pytest.raises(LoaderError, match=r"must fit into max_bytes = 0\.00 GiB, got 8 of 16x16x3"):
        data.imagefolder(tmp_path, 16, max_bytes=1000)
    with pytest.raises(LoaderError, match=r"val_per_class must leave a training image.*class of 4"):
        data.imagefolder(tmp_path, 16, val_per_class=4)
    (tmp_path / "val" / "dog").rename(tmp_path / "val" / "wolf")
    with pytest.raises(LoaderError, match=r"difference in \['dog', 'wolf'\]"):
        data.imagefolder(tmp_path, 16)
    (tmp_path / "train" / "cat" / "2.png").write_bytes(b"no image")
    with pytest.raises(LoaderError, match=r"2\.png must be a readable image"):
        data.imagefolder(tmp_path, 16)


def test_load_finds_data_by_name_and_path(tmp_path):
    write_npz(tmp_path / "file.npz", images=IMAGES, labels=LABELS)
    write_image_folders(tmp_path / "pictures", (".",))
    assert data.load("digits", size=16).train.images.shape[1:] == (3, 16, 16)
    assert data.load("synthetic").name == "synthetic"
    assert len(data.load(str(tmp_path / "file.npz")).train) == 4
    assert data.load(str(tmp_path / "pictures"), size=12).train.images.shape[-1] == 12


def test_load_refuses_unknown_sources(tmp_path):
    with pytest.raises(LoaderError, match="got 'digit'; did you mean digits"):
        data.load("digit")
    with pytest.raises(LoaderError, match="check the path"):
        data.load(str(tmp_path / "nothing"))
    with pytest.raises(LoaderError, match="size must be None for 'synthetic', got 16"):
        data.load("synthetic", size=16)


def test_cifar10_without_a_place_is_refused(monkeypatch, tmp_path):
    monkeypatch.delenv("PFS_FAST_CIFAR10", raising=False)
    with pytest.raises(LoaderError, match="cifar10: path must name the data, got None"):
        data.cifar10()
    with pytest.raises(LoaderError, match="must be a folder with torchvision's CIFAR10"):
        data.cifar10(tmp_path)
    monkeypatch.setenv("PFS_FAST_CIFAR10", str(tmp_path / "none.npz"))
    with pytest.raises(LoaderError, match=r"cifar10: path must be an existing \.npz file"):
        data.load("cifar10")
    other = write_npz(tmp_path / "other.npz", images=IMAGES, labels=LABELS)
    with pytest.raises(
        LoaderError, match=r"images must be 3x32x32 of 10 classes, got \[3, 8, 8\] of 3"
    ):
        data.cifar10(other)


@pytest.fixture(scope="module")
def cifar10_test_part(tmp_path_factory) -> data.ImageSet:
    """The 10,000 test images: from PFS_FAST_CIFAR10, or from the image sheets beside the repository."""
    if os.environ.get("PFS_FAST_CIFAR10"):
        return data.cifar10().test
    sheets = Path(__file__).resolve().parents[3] / "shared" / "data" / "cifar10" / "sheets"
    if not sheets.is_dir():
        pytest.skip("no CIFAR-10: set PFS_FAST_CIFAR10 to an .npz file")
    image_module = pytest.importorskip("PIL.Image")
    parts = [
        np.asarray(image_module.open(p).convert("RGB")) for p in sorted(sheets.glob("test_*.webp"))
    ]
    tiles = np.stack(parts).reshape(-1, 50, 32, 50, 32, 3).transpose(0, 1, 3, 2, 4, 5)
    path = tmp_path_factory.mktemp("cifar10") / "test.npz"
    labels = np.fromfile(sheets / "test_labels.u8", np.uint8)
    np.savez(path, x_train=tiles.reshape(-1, 32, 32, 3), y_train=labels)
    return data.cifar10(path, val=0).train


def test_cifar10_images_come_out_normalised(cifar10_test_part):
    images, labels = cifar10_test_part.images, cifar10_test_part.labels
    assert len(images) == 10_000 and torch.bincount(labels).tolist() == [1000] * 10
    mean, std = cifar10_test_part.statistics()
    assert mean == pytest.approx(data.CIFAR10_MEAN, abs=0.005)
    # The customary CIFAR-10 deviations are averages over images; those over all pixels are a fifth larger.
    assert std == pytest.approx([1.22 * s for s in data.CIFAR10_STD], rel=0.08)
    loader = data.DeviceLoader(images, labels, 1000)
    x, y = next(iter(loader))
    assert abs(x.mean()) < 0.1 and 1.0 < x.std() < 1.4
    assert torch.equal(y, labels[:1000])
