"""Valid files with a few values changed at random: whatever reads them succeeds or raises an error of pfs_fast."""

from __future__ import annotations

import copy
import json
import random
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from small_nets import batches, tiny

import pfs_fast as pfs
from pfs_fast.cli import main
from pfs_fast.errors import PfsError
from pfs_fast.measuring.latency_cache import LatencyCache
from pfs_fast.searching.seeds import SearchResults
from pfs_fast.storage.files import read_metadata, read_safetensors, write_safetensors

MUTATIONS = {"model": 200, "search": 100, "searches": 60, "checkpoint": 50, "text": 300}
ODD_VALUES = (
    None, True, -1, 0, 1, 2, 3, 2**31, 2**40, 2**62, 2**63, -(2**63) - 1, 10**400, -0.5, 0.5, 1e308, float("inf"), float("nan"), "",
    "a", "\x1b[2J", "conv", [], [0], [[]], {}, {"a": 1}, [None], ["a", "b"], [0, 1, 2], json.loads("[" * 90 + "]" * 90),
)  # fmt: skip


def mutated(document: Any, rng: random.Random) -> Any:
    """A copy with one or two values replaced, removed, repeated or renamed, at any depth."""
    document = copy.deepcopy(document)
    for _ in range(rng.choice((1, 1, 2))):
        place, steps = document, rng.randint(1, 6)
        for _ in range(steps):
            inner = list(place.values()) if isinstance(place, dict) else place
            inner = [value for value in inner if isinstance(value, dict | list) and value]
            if not inner or rng.random() < 0.2:
                break
            place = rng.choice(inner)
        key = rng.choice(list(place)) if isinstance(place, dict) else rng.randrange(len(place))
        change = rng.randrange(6)
        if change == 0:
            del place[key]
            if not document:
                return document
        elif change == 1 and isinstance(place, dict):
            place[rng.choice(("a", "name", "0.0"))] = place.pop(key)
        elif change == 1:
            place.append(copy.deepcopy(place[key]))
        elif change == 2 and isinstance(place[key], int | float):
            place[key] += rng.choice((-1, 1, 1000))
        else:
            place[key] = copy.deepcopy(rng.choice(ODD_VALUES))
    return document


def mutated_tensors(
    tensors: dict[str, torch.Tensor], rng: random.Random
) -> dict[str, torch.Tensor]:
    tensors = dict(tensors)
    name = rng.choice(sorted(tensors))
    tensor = tensors[name]
    change = rng.randrange(7)
    if change == 0:
        del tensors[name]
    elif change == 1:
        tensors[name] = tensor.to(rng.choice((torch.float16, torch.int64, torch.bool, torch.uint8)))
    elif change == 2:
        tensors[name] = tensor.reshape(-1)[:-1]
    elif change == 3:
        tensors[name] = tensor[None]
    elif change == 4:
        tensors[name] = tensors[rng.choice(sorted(tensors))]
    elif change == 5:
        tensors[rng.choice(("a", name + ".more"))] = tensors.pop(name)
    elif tensor.numel():
        flat = tensor.clone().reshape(-1)
        value = rng.choice((-1, 0, 1, 100)) if tensor.dtype != torch.bool else True
        flat[rng.randrange(len(flat))] = value
        tensors[name] = flat.reshape(tensor.shape)
    return tensors


def flipped(content: bytes, rng: random.Random) -> bytes:
    content = bytearray(content)
    for _ in range(rng.choice((1, 2, 8))):
        place = rng.randrange(len(content))
        content[place] = rng.choice((content[place] ^ (1 << rng.randrange(8)), rng.randrange(256)))
    return bytes(content[: rng.randrange(len(content))] if rng.random() < 0.1 else content)


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """One good file of each kind."""
    folder = tmp_path_factory.mktemp("files")
    torch.manual_seed(0)
    found = find(folder / "checkpoint")
    found.save(folder / "search")
    SearchResults([found]).save(folder / "searches")
    pfs.save(
        found.slim(),
        folder / "model",
        metadata={"accuracy": {"top1": 0.5, "n": 3, "images": "test"}},
    )
    (folder / "structure.json").write_text(found.structure.to_json())
    return folder


def find(checkpoint: Path) -> pfs.SearchResult:
    torch.manual_seed(0)
    config = pfs.SearchConfig(
        epochs=2,
        backend="reference",
        precision="fp32",
        lr=0.1,
        patience=2,
        tolerance=0.0,
        scope="all",
    )
    budget = pfs.Budget(macs=0.6, peak_activation_bytes=1.0, widths={"0": (1, None)})
    return pfs.search(
        tiny(), batches(11), budget, config=config, checkpoint=checkpoint, progress=False
    )


def read_model(path: Path) -> None:
    pfs.load(path, tiny()).float()(torch.zeros(1, 3, 6, 6))


def read_search(path: Path) -> None:
    torch.manual_seed(0)
    result = pfs.SearchResult.load(path, tiny())
    result.slim()(torch.zeros(1, 3, 6, 6))
    result.structure_for(0.7)
    pfs.SearchResult.load(path).report()


def read_searches(path: Path) -> None:
    SearchResults.load(path).report()


def read_structure(path: Path) -> None:
    structure = pfs.Structure.from_json(path.read_text())
    str(structure)
    pfs.slim(tiny(), structure)(torch.zeros(1, 3, 6, 6))


SAFETENSORS = {
    "search": read_search,
    "searches": read_searches,
    "model": read_model,
    "checkpoint": find,
}


def holds(path: Path, read: Callable[[Path], object], case: object) -> bool:
    """Whether the file was read; any error but those of pfs_fast ends the test."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            read(path)
        except PfsError:
            return False
        except Exception as error:
            raise AssertionError(f"{read.__name__} of {case}: {type(error).__name__}") from error
    return True


@pytest.mark.parametrize("kind", SAFETENSORS)
def test_changed_values_of_a_safetensors_file_are_an_error_or_none(files, tmp_path, kind):
    form = read_metadata(files / kind)
    tensors, metadata = read_safetensors(files / kind, form["format"], form["version"])
    assert holds(files / kind, SAFETENSORS[kind], "the good file")
    path = tmp_path / kind
    good = 0
    for seed in range(MUTATIONS[kind]):
        rng = random.Random(seed)
        if rng.random() < 0.4:
            content = mutated_tensors(tensors, rng), metadata
        else:
            content = tensors, mutated(metadata, rng)
        try:
            write_safetensors(path, *content)  # with a checksum that is right
        except (TypeError, ValueError):
            continue  # NaN, or no format
        good += holds(path, SAFETENSORS[kind], seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert main(["info", str(path)]) in (0, 1), seed
    assert good < MUTATIONS[kind] / 2


@pytest.mark.parametrize("kind", SAFETENSORS)
def test_changed_bytes_of_a_safetensors_file_are_an_error(files, tmp_path, kind):
    content = (files / kind).read_bytes()
    path = tmp_path / kind
    for seed in range(MUTATIONS[kind]):
        changed = flipped(content, random.Random(seed))
        path.write_bytes(changed)
        assert holds(path, SAFETENSORS[kind], seed) == (changed == content), seed


def test_changed_values_of_a_structure_are_an_error_or_none(files, tmp_path):
    document = json.loads((files / "structure.json").read_text())
    path = tmp_path / "structure.json"
    for seed in range(MUTATIONS["text"]):
        path.write_text(json.dumps(mutated(document, random.Random(seed))))
        holds(path, read_structure, seed)
        assert main(["info", str(path)]) in (0, 1)


def test_changed_bytes_of_a_latency_cache_are_a_warning_or_none(tmp_path):
    cache = LatencyCache({"machine": "a", "threads": 2}, tmp_path)
    cache.add({"conv 3x3": {"8,16": 0.5, "16,16": 0.75}, "linear": {"8,8": 1e-3}})
    content, document = cache.path.read_bytes(), json.loads(cache.path.read_text())
    for seed in range(MUTATIONS["text"]):
        rng = random.Random(seed)
        changed = flipped(content, rng) if seed % 2 else json.dumps(mutated(document, rng)).encode()
        cache.path.write_bytes(changed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for times in LatencyCache(cache.key, tmp_path).points.values():
                assert all(
                    type(time) is float and 0 < time < float("inf") for time in times.values()
                )


def test_changed_values_of_a_record_are_an_error_or_none(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pfs, "train", lambda *_, **__: pytest.fail("nothing is trained here"))
    command = [
        "search",
        "--model",
        "resnet20",
        "--expansion",
        "0.25",
        "--max-steps",
        "1",
        "--quiet",
    ]
    assert main([*command, "--backend", "reference", "--out", "run"]) == 0
    record = tmp_path / "run" / "run.json"
    document = json.loads(record.read_text())
    del document["arguments"]["model"]  # one of many values that only the reader looks at
    (tmp_path / "run" / "structure.json").write_text("{}")  # ends a train whose record is good
    for seed in range(MUTATIONS["text"]):
        rng = random.Random(seed)
        content = json.dumps(mutated(document, rng)).encode()
        record.write_bytes(flipped(content, rng) if seed % 4 == 0 else content)
        assert main(["train", "run", "--quiet"]) == 1
        assert main(["info", str(record)]) in (0, 1)


@pytest.mark.parametrize("opening", ["[", '{"a":'])
def test_texts_nested_without_end_are_an_error_or_a_warning(tmp_path, opening):
    text = '{"format": "pfs_fast.model", "version": 1, "a": ' + opening * 100_000
    text += {"[": "]", '{"a":': "1" + "}"}[opening] * 100_000 + "}"
    (tmp_path / "a.json").write_text(text)
    assert main(["info", str(tmp_path / "a.json")]) == 1
    header = json.dumps({"__metadata__": {"pfs_fast": text}}).encode()
    (tmp_path / "a").write_bytes(len(header).to_bytes(8, "little") + header)
    for read in SAFETENSORS.values():
        assert not holds(tmp_path / "a", read, opening)
    (tmp_path / "b").write_bytes(len(text).to_bytes(8, "little") + text.encode())
    for read in SAFETENSORS.values():
        assert not holds(tmp_path / "b", read, opening)
    cache = LatencyCache({"machine": "a"}, tmp_path)
    cache.path.write_text(text)
    with pytest.warns(UserWarning, match="must be a whole table of times"):
        assert LatencyCache({"machine": "a"}, tmp_path).points == {}
