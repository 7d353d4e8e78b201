"""Files: round trips, wrong files, and that nothing half-written is ever left."""

from __future__ import annotations

import copy
import importlib.util
import json
import os
import pickle
import struct
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

from pfs_fast.errors import (
    BackendError,
    ConfigError,
    FileFormatError,
    FileWriteError,
    ModelError,
)
from pfs_fast.slimming.slim import narrow_to
from pfs_fast.storage import exporters, files
from pfs_fast.storage.io import (
    export,
    load,
    read_metadata,
    read_safetensors,
    save,
    write_safetensors,
    write_text_atomic,
)

HEADER = {"format": "pfs_fast.test", "version": 1}


class Net(nn.Module):
    """Two convolutions, the second depthwise, and a classifier."""

    def __init__(self, width: int = 8, classes: int = 3) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(width)
        self.depthwise = nn.Conv2d(width, width, 3, groups=width)
        self.fc = nn.Linear(width, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.bn(self.conv(x)))
        return self.fc(torch.relu(self.depthwise(x)).mean((2, 3)))


class Other(Net):
    pass


def slim_net(width: int = 5) -> Net:
    layers = {
        "conv": {"kind": "conv", "in": 3, "out": width, "groups": 1},
        "bn": {"kind": "bn", "in": width, "out": width, "groups": 1},
        "depthwise": {"kind": "conv", "in": width, "out": width, "groups": width},
        "fc": {"kind": "linear", "in": width, "out": 3, "groups": 1},
    }
    net = narrow_to(Net(), layers)
    for tensor in (*net.parameters(), *net.buffers()):
        if tensor.is_floating_point():
            nn.init.uniform_(tensor.detach(), 0.1, 1.0)
    return net


def assert_same_state(first: nn.Module, second: nn.Module) -> None:
    torch.testing.assert_close(
        dict(second.state_dict()), dict(first.state_dict()), rtol=0, atol=0, check_stride=False
    )


# Models


def test_slim_model_comes_back_exactly(tmp_path: Path):
    net = slim_net().eval()
    save(net, tmp_path / "net.safetensors")
    back = load(tmp_path / "net.safetensors", Net().eval())
    assert type(back) is Net and not back.training
    assert back.depthwise.groups == 5 and back.bn.num_features == 5
    assert_same_state(net, back)
    images = torch.randn(2, 3, 6, 6)
    assert torch.equal(net(images), back(images))


def test_prelu_left_with_one_slope_comes_back(tmp_path: Path):
    def prelus(width: int) -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(3, width, 1), nn.PReLU(width), nn.PReLU(), nn.Conv2d(width, 2, 1)
        )

    net = prelus(1)
    nn.init.constant_(net[1].weight, 0.5)
    save(net, tmp_path / "net.safetensors")
    back = load(tmp_path / "net.safetensors", prelus(6))
    assert back[1].num_parameters == 1
    assert_same_state(net, back)


def test_load_leaves_the_dense_model_alone(tmp_path: Path):
    save(slim_net(), tmp_path / "net.safetensors")
    dense = Net()
    before = copy.deepcopy(dense.state_dict())
    load(tmp_path / "net.safetensors", dense)
    torch.testing.assert_close(dense.state_dict(), before, rtol=0, atol=0)
    assert dense.conv.out_channels == 8


def test_structure_shape_and_user_metadata_are_kept(tmp_path: Path):
    net = slim_net()
    net.pfs_structure = '{"some": "structure"}'
    net.pfs_input_shape = (3, 6, 6)
    save(net, tmp_path / "net.safetensors", metadata={"accuracy": 0.9})
    back = load(tmp_path / "net.safetensors", Net())
    assert back.pfs_structure == net.pfs_structure and back.pfs_input_shape == (3, 6, 6)
    assert read_metadata(tmp_path / "net.safetensors")["user"] == {"accuracy": 0.9}


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dtype_of_the_file_wins(tmp_path: Path, dtype: torch.dtype):
    net = slim_net().to(dtype)
    save(net, tmp_path / "net.safetensors")
    back = load(tmp_path / "net.safetensors", Net())
    assert back.conv.weight.dtype == dtype and back.bn.running_mean.dtype == dtype
    assert isinstance(back.conv.weight, nn.Parameter) and back.conv.weight.requires_grad
    assert_same_state(net, back)


def test_channels_last_model_is_saved_by_value(tmp_path: Path):
    net = slim_net().to(memory_format=torch.channels_last)
    save(net, tmp_path / "net.safetensors")
    assert_same_state(net, load(tmp_path / "net.safetensors", Net()))


def test_tied_weights_come_back_tied(tmp_path: Path):
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(4, 4)
            self.second = nn.Linear(4, 4, bias=False)
            self.second.weight = self.first.weight

    net = Tied()
    save(net, tmp_path / "net.safetensors")
    back = load(tmp_path / "net.safetensors", Tied().double())
    assert back.second.weight is back.first.weight
    assert_same_state(net, back)


def test_file_opens_without_this_package(tmp_path: Path):
    net = slim_net()
    save(net, tmp_path / "net.safetensors")
    plain = slim_net()
    plain.load_state_dict(safetensors.torch.load_file(tmp_path / "net.safetensors"))
    assert_same_state(net, plain)


@pytest.mark.parametrize(
    ("dense", "message"),
    [
        (Other(), r"load: model must be an instance of the class in .*Net, got .*Other"),
        (Net(width=4), r"'conv' has 5 out channels in the file and only 4 in the model"),
        (Net(classes=2), r"'fc' has 3 out channels in the file and only 2 in the model"),
    ],
)
def test_another_models_file_is_refused(tmp_path: Path, dense: nn.Module, message: str):
    save(slim_net(), tmp_path / "net.safetensors")
    with pytest.raises(FileFormatError, match=message):
        load(tmp_path / "net.safetensors", dense)


def _without_fc(net: Net) -> Net:
    net.fc = nn.Identity()
    return net


def _with_linear_conv(net: Net) -> Net:
    net.conv = nn.Linear(3, 8)
    return net


def _with_extra(net: Net) -> Net:
    net.extra = nn.Embedding(2, 2)
    return net


def _with_other_kernel(net: Net) -> Net:
    net.conv = nn.Conv2d(3, 8, 5, bias=False)
    return net


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_without_fc, "'fc' is only in the file"),
        (_with_linear_conv, "'conv' is a conv in the file and a linear in the model"),
        (_with_extra, r"parameters and buffers of .*extra\.weight"),
        (_with_other_kernel, "parameters and buffers of .*size mismatch for conv.weight"),
    ],
)
def test_a_changed_model_is_refused_by_what_differs(tmp_path: Path, change, message: str):
    save(slim_net(), tmp_path / "net.safetensors")
    with pytest.raises(FileFormatError, match=message):
        load(tmp_path / "net.safetensors", change(Net()))


@pytest.mark.parametrize("call", [save, lambda model, path: load(path, model), export])
def test_wrappers_are_refused(tmp_path: Path, call):
    with pytest.raises(ModelError, match=r"DataParallel; pass model.module"):
        call(nn.DataParallel(Net()), tmp_path / "net.pt2")
    assert not list(tmp_path.iterdir())


def test_state_that_is_no_tensor_is_refused(tmp_path: Path):
    with torch.device("meta"):
        net = Net()
    with pytest.raises(ModelError, match=r"save: model .* got a meta tensor for 'conv.weight'"):
        save(net, tmp_path / "net.safetensors")


# Wrong files


def _header(document: dict) -> bytes:
    text = json.dumps({"__metadata__": {"pfs_fast": json.dumps(document)}}).encode()
    return struct.pack("<Q", len(text)) + text


def _saved(tmp_path: Path) -> bytes:
    save(slim_net(), tmp_path / "good.safetensors")
    return (tmp_path / "good.safetensors").read_bytes()


def _torch_saved(tmp_path: Path) -> bytes:
    torch.save({"a": torch.zeros(2)}, tmp_path / "pickle.pt")
    return (tmp_path / "pickle.pt").read_bytes()


WRONG_FILES = {
    "empty": (lambda _: b"", "it is empty"),
    "five bytes": (lambda _: b"12345", "truncated after 5 bytes"),
    "cut in the header": (lambda p: _saved(p)[:100], "truncated after 100 bytes"),
    "cut in the data": (lambda p: _saved(p)[:-3], "truncated after"),
    "random bytes": (lambda _: bytes(range(7, 207)), "header"),
    "a huge header length": (lambda _: b"\xff" * 64, "header"),
    "text": (lambda _: b"just some words, nothing else", "header"),
    "bytes after the end": (lambda p: _saved(p) + b"more", "not fully covered"),
    "a pickle": (lambda _: pickle.dumps({"a": 1}), "pickle .*never read here"),
    "a torch.save file": (_torch_saved, "zip archive .*never read here"),
    "foreign safetensors": (
        lambda _: safetensors.torch.save({"a": torch.zeros(2)}),
        "of another program",
    ),
    "another format": (
        lambda _: _header({"format": "pfs_fast.search", "version": 1}),
        "of format 'pfs_fast.model', got .* of format 'pfs_fast.search'",
    ),
    "a newer version": (
        lambda _: _header({"format": "pfs_fast.model", "version": 99}),
        "of version 1 or older, got .* of version 99; update pfs_fast",
    ),
    "no version": (lambda _: _header({"format": "pfs_fast.model"}), "no format and version"),
    "no layers": (
        lambda _: _header({"format": "pfs_fast.model", "version": 1}),
        "must name the model's class and layers",
    ),
    "layers of a wrong form": (
        lambda _: _header(
            {
                "format": "pfs_fast.model",
                "version": 1,
                "class": "Net",
                "layers": {"conv": {"kind": "conv", "in": "x"}},
            }
        ),
        "in which 'conv' has no valid widths",
    ),
}


@pytest.mark.parametrize("case", WRONG_FILES)
def test_wrong_file_is_refused_with_its_reason(tmp_path: Path, case: str):
    content, message = WRONG_FILES[case]
    path = tmp_path / "wrong.safetensors"
    path.write_bytes(content(tmp_path))
    with pytest.raises(FileFormatError, match=message) as caught:
        load(path, Net())
    assert str(caught.value).startswith("load: ") and "wrong.safetensors" in str(caught.value)


def test_missing_file_and_folder_are_refused(tmp_path: Path):
    with pytest.raises(FileFormatError, match=r"load: path .*there is no such file"):
        load(tmp_path / "none.safetensors", Net())
    with pytest.raises(FileFormatError, match=r"load: path .*it is a folder"):
        load(tmp_path, Net())


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read and write everything")
def test_unreadable_file_and_unwritable_folder_are_refused(tmp_path: Path):
    path = tmp_path / "net.safetensors"
    save(slim_net(), path)
    path.chmod(0)
    with pytest.raises(FileFormatError, match=r"Permission denied"):
        load(path, Net())
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(FileWriteError, match=r"save: path must be writable.*Permission denied"):
            save(slim_net(), tmp_path / "other.safetensors")
    finally:
        tmp_path.chmod(0o700)


# Writing


def test_tensors_and_metadata_come_back(tmp_path: Path):
    flat = torch.arange(6.0)
    tensors = {"a": flat[:2], "b": flat[2:], "c": torch.ones(2, 3).t(), "d": torch.zeros(0)}
    write_safetensors(tmp_path / "x", tensors, HEADER | {"note": ["ä", 1.5, None]})
    back, metadata = read_safetensors(tmp_path / "x", "pfs_fast.test", 1)
    torch.testing.assert_close(back, tensors, rtol=0, atol=0, check_stride=False)
    assert metadata == HEADER | {"note": ["ä", 1.5, None]}


def test_older_version_is_handed_to_the_caller(tmp_path: Path):
    write_safetensors(tmp_path / "x", {}, HEADER)
    assert read_safetensors(tmp_path / "x", "pfs_fast.test", 3)[1]["version"] == 1


@pytest.mark.parametrize("metadata", [{}, {"format": "a"}, {"format": 1, "version": 1}])
def test_metadata_without_format_or_version_is_refused(tmp_path: Path, metadata: dict):
    with pytest.raises(TypeError, match=r"metadata must have"):
        write_safetensors(tmp_path / "x", {}, metadata)


def test_failure_in_the_middle_keeps_the_old_file(tmp_path: Path, monkeypatch):
    path = tmp_path / "net.safetensors"
    save(slim_net(), path)
    before = path.read_bytes()

    def half(tensors, filename, metadata) -> None:
        Path(filename).write_bytes(before[: len(before) // 2])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.safetensors.torch, "save_file", half)
    with pytest.raises(FileWriteError, match=r"save: path must be writable.*No space left"):
        save(slim_net(width=3), path)
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["net.safetensors"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_no_temporary_file_stays_after_any_error(tmp_path: Path, monkeypatch, error):
    def half(descriptor: int) -> None:
        raise error

    monkeypatch.setattr(files.os, "fsync", half)
    with pytest.raises(error):
        write_text_atomic(tmp_path / "a.json", "text")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("write", [lambda p: write_text_atomic(p, "x"), lambda p: save(Net(), p)])
def test_bad_target_is_refused(tmp_path: Path, write):
    with pytest.raises(FileWriteError, match=r"got the folder"):
        write(tmp_path)
    with pytest.raises(FileWriteError, match=r"existing folder, got .*create"):
        write(tmp_path / "none" / "a")
    assert not list(tmp_path.iterdir())


def test_write_error_is_an_os_error():
    assert issubclass(FileWriteError, OSError)


def test_text_is_replaced_and_keeps_its_permissions(tmp_path: Path):
    path = tmp_path / "a.json"
    write_text_atomic(path, "old")
    path.chmod(0o640)
    write_text_atomic(path, "neu: ü")
    assert path.read_text(encoding="utf-8") == "neu: ü"
    assert path.stat().st_mode & 0o777 == 0o640


def test_new_file_has_the_permissions_of_the_umask(tmp_path: Path):
    before = os.umask(0o027)
    try:
        save(slim_net(), tmp_path / "net.safetensors")
    finally:
        os.umask(before)
    assert (tmp_path / "net.safetensors").stat().st_mode & 0o777 == 0o640


def test_link_is_followed(tmp_path: Path):
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "a").write_text("old")
    (tmp_path / "link").symlink_to(tmp_path / "real" / "a")
    write_text_atomic(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real" / "a").read_text() == "new"


# Export

needs_onnx = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("onnx", "onnxscript")),
    reason="needs the packages onnx and onnxscript",
)


def test_pt2_has_a_free_batch_and_equals_the_model(tmp_path: Path):
    net = slim_net()
    report = export(net, tmp_path / "net.pt2", torch.zeros(1, 3, 6, 6))
    assert report.max_error < 1e-6 and report.batches == (1, 3) and report.bytes > 0
    module = torch.export.load(tmp_path / "net.pt2").module()
    images = torch.randn(5, 3, 6, 6)
    torch.testing.assert_close(module(images), net.eval()(images))
    assert str(tmp_path / "net.pt2") in str(report)


def test_export_leaves_the_model_alone(tmp_path: Path):
    net = slim_net()
    before = copy.deepcopy(net.state_dict())
    export(net, tmp_path / "net.pt2", torch.zeros(1, 3, 6, 6))
    torch.testing.assert_close(net.state_dict(), before, rtol=0, atol=0)
    assert net.training and all(parameter.requires_grad for parameter in net.parameters())


@needs_onnx
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the exporter's own dependencies
def test_onnx_equals_the_model(tmp_path: Path):
    net = slim_net()
    net.pfs_input_shape = (3, 6, 6)
    report = export(net, tmp_path / "net.onnx")
    assert report.max_error < 1e-4 and report.runtime in ("onnxruntime", "onnx.reference")
    assert [entry.name for entry in tmp_path.iterdir()] == ["net.onnx"]


@needs_onnx
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_onnx_is_compared_by_the_reference_without_onnxruntime(tmp_path: Path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        exporters.importlib.util,
        "find_spec",
        lambda name, *rest: None if name == "onnxruntime" else find(name, *rest),
    )
    report = export(slim_net(), tmp_path / "net.onnx", torch.zeros(1, 3, 6, 6))
    assert report.runtime == "onnx.reference" and report.max_error < 1e-4


def test_missing_onnx_is_named(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(exporters.importlib.util, "find_spec", lambda name, *rest: None)
    with pytest.raises(BackendError, match=r"onnx and onnxscript is not installed.*pip install"):
        export(Net(), tmp_path / "net.onnx", torch.zeros(1, 3, 6, 6))


def test_unknown_suffix_lists_the_two(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"must end in \.pt2 or \.onnx, got .*net\.pth"):
        export(Net(), tmp_path / "net.pth", torch.zeros(1, 3, 6, 6))


@pytest.mark.parametrize("example", [None, torch.zeros(3), torch.zeros(0, 3, 6, 6), "image"])
def test_missing_or_bad_example_is_refused(tmp_path: Path, example):
    with pytest.raises(ConfigError, match=r"export: example_input must be a tensor"):
        export(Net(), tmp_path / "net.pt2", example)


def test_model_that_fixes_its_batch_is_refused(tmp_path: Path):
    class Fixed(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.reshape(2, 12)

    with pytest.raises(ModelError, match=r"export: model must be traceable"):
        export(Fixed(), tmp_path / "net.pt2", torch.zeros(1, 3, 2, 2))
    assert not list(tmp_path.iterdir())


def test_export_that_differs_from_the_model_is_not_written(tmp_path: Path, monkeypatch):
    (tmp_path / "net.pt2").write_bytes(b"old")
    monkeypatch.setattr(
        exporters, "_pt2_runner", lambda path: lambda images: [torch.ones(len(images), 3)]
    )
    with pytest.raises(ModelError, match=r"outputs must equal the model's.*at batch size 1"):
        export(Net(), tmp_path / "net.pt2", torch.zeros(1, 3, 6, 6))
    assert (tmp_path / "net.pt2").read_bytes() == b"old"
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(("name", "dtype"), [("conv.weight", torch.int64), ("bn.running_mean", torch.bool), ("bn.num_batches_tracked", torch.float32), ("fc.bias", torch.complex64)])  # fmt: skip
def test_values_of_another_kind_are_refused(tmp_path: Path, name: str, dtype: torch.dtype):
    save(slim_net(), tmp_path / "net")
    tensors, metadata = read_safetensors(tmp_path / "net", "pfs_fast.model", 1)
    tensors[name] = tensors[name].to(dtype)
    write_safetensors(tmp_path / "net", tensors, metadata)
    with pytest.raises(FileFormatError, match=rf"a model that differs: '{name}' is {dtype} in the"):
        load(tmp_path / "net", Net())
