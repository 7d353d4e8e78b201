from __future__ import annotations

import json

import numpy as np
import pytest
from structure_cases import chain, plain_cost, random_groups

from pfs_fast.budgets.limit_check import LimitCheck
from pfs_fast.budgets.structure import Structure
from pfs_fast.errors import FileFormatError, StructureError

KEEP = np.array([True, False, True, True, False, True])


def structure() -> Structure:
    return Structure.from_keep(chain(4, 2), KEEP)


def test_from_keep_lists_channels_by_group_and_layer():
    s = structure()
    assert s.kept == {"conv0": (0, 2, 3), "conv1": (1,)}
    assert s.sizes == {"conv0": 4, "conv1": 2}
    assert s.layers == {"conv0": (0, 2, 3), "bn0": (0, 2, 3), "conv1": (1,), "bn1": (1,)}
    assert s.inputs == {"conv1": (0, 2, 3), "fc": (1,)}
    assert s.widths == {
        "conv0": (3, 4),
        "bn0": (4, 4),
        "conv1": (4, 2),
        "bn1": (2, 2),
        "fc": (2, 10),
    }
    assert (s.macs, s.params) == plain_cost(chain(4, 2), KEEP)
    assert (s.base_macs, s.base_params) == plain_cost(chain(4, 2), np.ones(6, dtype=bool))


def test_from_keep_keeps_fixed_channels_of_mixed_axes():
    groups = random_groups(3)
    keep = np.random.default_rng(0).random(groups.num_units) < 0.5
    keep[[g.start for g in groups.groups]] = True
    s = Structure.from_keep(groups, keep)
    for layer in groups.layers:
        expected = tuple(i for i, unit in enumerate(layer.in_units) if unit < 0 or keep[unit])
        if (layer.in_units >= 0).any() and layer.kind != "bn":
            assert s.inputs[layer.name] == expected
        else:
            assert layer.name not in s.inputs


@pytest.mark.parametrize(
    ("keep", "text"),
    [
        (np.ones(5, dtype=bool), r"keep must be bool of shape \[6\], got bool of shape \[5\]"),
        (np.ones(6), "got float64 of shape"),
        (np.arange(6) < 4, "every group must keep a channel, got none in conv1"),
    ],
)
def test_from_keep_names_bad_masks(keep, text):
    with pytest.raises(StructureError, match=text):
        Structure.from_keep(chain(4, 2), keep)


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("seed", range(5))
def test_json_round_trip_is_exact(seed, indent):
    groups = random_groups(seed)
    keep = np.random.default_rng(seed).random(groups.num_units) < 0.7
    for layer in groups.layers:  # no layer without channels
        keep[[u for u in (layer.out_units[0], layer.in_units[0]) if u >= 0]] = True
    for g in groups.groups:
        keep[g.start] = True
    s = Structure.from_keep(groups, keep)
    assert Structure.from_json(s.to_json(indent)) == s
    assert Structure.from_json(s.to_json(indent)).to_json() == s.to_json()


def edited(**changes: object) -> str:
    return json.dumps({**json.loads(structure().to_json()), **changes})


def without(field: str) -> str:
    data = json.loads(structure().to_json())
    del data[field]
    return json.dumps(data)


def limited(**changes) -> str:
    check = {
        "name": "macs",
        "asked": 9,
        "predicted": 8,
        "whole": 9,
        "measured": None,
        "spread": None,
    }
    return edited(limits=[{**check, **changes}])


BAD_TEXTS = {
    "truncated": (structure().to_json()[:-20], "text must be complete JSON, got an error"),
    "empty": ("", "text must be complete JSON"),
    "other json": ("[1, 2]", "format must be 'pfs_fast.structure', got 'list'"),
    "other format": (
        edited(format="pfs_fast.model"),
        "format must be 'pfs_fast.structure', got 'pfs_fast.model'",
    ),
    "other version": (
        edited(version=4),
        "version must be 1 to 3, got 4; use the release of pfs_fast that wrote it",
    ),
    "multiple of nothing": (
        edited(multiple_of=0),
        "multiple_of must be an integer of at least 1, got 0",
    ),
    "version 0": (edited(version=0), "version must be 1 to 3, got 0"),
    "limits of text": (
        edited(limits="macs"),
        "limits must be a list of checks with asked, .* got macs",
    ),
    "limit of nothing": (edited(limits=[{}]), "limits must be a list of checks"),
    "limit of another cost": (limited(name="energy"), "limits must be a list of checks"),
    "limit without a number": (limited(asked=None), "limits must be a list of checks"),
    "negative limit": (limited(predicted=-1), "limits must be a list of checks"),
    "limit of NaN": (limited(measured=float("nan")), "limits must be a list of checks"),
    "boolean version": (edited(version=True), "version must be 1 to 3, got True"),
    "missing field": (without("inputs"), r"got missing \['inputs'\] and unknown \[\]"),
    "unknown field": (edited(extra=1), r"got missing \[\] and unknown \['extra'\]"),
    "no object": (edited(kept=[1]), "kept must be an object, got list"),
    "out of range": (
        edited(kept={"conv0": [0, 4], "conv1": [1]}),
        r"kept\['conv0'\] must be ascending indices in 0..3",
    ),
    "negative": (
        edited(inputs={"conv1": [-1, 2], "fc": [1]}),
        r"inputs\['conv1'\] must be ascending",
    ),
    "unsorted": (
        edited(kept={"conv0": [2, 0], "conv1": [1]}),
        r"kept\['conv0'\] must be ascending",
    ),
    "duplicate": (
        edited(kept={"conv0": [2, 2], "conv1": [1]}),
        r"kept\['conv0'\] must be ascending",
    ),
    "empty list": (
        edited(kept={"conv0": [], "conv1": [1]}),
        r"kept\['conv0'\] must be .* at least one",
    ),
    "float index": (
        edited(kept={"conv0": [0.5], "conv1": [1]}),
        r"kept\['conv0'\] must be a list of integers",
    ),
    "boolean index": (
        edited(kept={"conv0": [True], "conv1": [1]}),
        r"kept\['conv0'\] must be a list of integers",
    ),
    "string size": (
        edited(sizes={"conv0": "4", "conv1": 2}),
        r"sizes\['conv0'\] must be an integer, got 4",
    ),
    "other groups": (
        edited(sizes={"conv0": 4}),
        r"kept and sizes must name the same groups, .* \['conv1'\]",
    ),
    "other layers": (
        edited(inputs={"conv1": [0, 2, 3]}),
        r"widths must name the layers .* \['fc'\]",
    ),
    "short width": (
        edited(widths={**structure().widths, "fc": [2]}),
        r"widths\['fc'\] must be \(in, out\) above 0, got \[2\]",
    ),
    "negative cost": (edited(macs=-1), "macs must be an integer of at least 0, got -1"),
    "float cost": (edited(params=1.5), "params must be an integer of at least 0, got 1.5"),
    "above base": (edited(macs=10**9), "macs and params must not exceed base_macs and base_params"),
}


@pytest.mark.parametrize("case", BAD_TEXTS)
def test_from_json_names_what_is_wrong(case):
    text, message = BAD_TEXTS[case]
    with pytest.raises(FileFormatError, match=f"Structure.from_json: .*{message}"):
        Structure.from_json(text)


def test_from_json_refuses_bytes_of_another_kind():
    with pytest.raises(FileFormatError, match="text must be complete JSON"):
        Structure.from_json(None)


def test_limits_go_through_json_and_leave_equality_alone():
    checks = (
        LimitCheck("macs", 600, 500, 900),
        LimitCheck("latency_ms", 2.5, 2.4, 4.0, measured=2.45, spread=0.1),
    )
    s = Structure.from_keep(chain(4, 2), KEEP, limits=checks)
    again = Structure.from_json(s.to_json())
    assert again.limits == checks
    assert again == s == structure()
    assert [c.holds for c in checks] == [True, True]
    assert not LimitCheck("latency_ms", 2.5, 2.4, 4.0, measured=2.6, spread=0.1).holds
    *_, title, macs, latency, predicted, measured = str(s).splitlines()
    assert predicted.startswith("predicted latency: ") and measured.startswith("measured latency: ")
    assert [line.split() for line in (title, macs, latency)] == [
        ["limit", "asked", "predicted", "measured", "whole", "network"],
        ["MACs", "600", "500", "-", "900"],
        ["latency,", "ms", "2.5", "2.4", "2.45", "±", "0.1", "4"],
    ]


def test_texts_of_earlier_versions_still_load():
    text = json.loads(structure().to_json())
    del text["multiple_of"]
    assert Structure.from_json(json.dumps({**text, "version": 2})) == structure()
    del text["limits"]
    assert Structure.from_json(json.dumps({**text, "version": 1})) == structure()


def test_structure_says_where_the_preferred_multiple_was_dropped():
    keep = np.array([True] * 3 + [False] * 5 + [True] * 4 + [False] * 2)
    s = Structure.from_keep(chain(8, 6), keep, multiple_of=4)
    assert s.off_multiple == {"conv0": 3}
    assert "multiples of 4 channels, which run fast, but those of conv0 (3): the budget" in str(s)
    again = Structure.from_json(s.to_json())
    assert again.multiple_of == 4 and str(again) == str(s)
    whole = Structure.from_keep(chain(8, 6), np.ones(14, dtype=bool), multiple_of=4)
    assert whole.off_multiple == {} and "multiples" not in str(whole)


def test_structure_prints_as_a_table():
    s = structure()
    rows = [line.split() for line in str(s).splitlines()]
    assert rows[:3] == [
        ["group", "kept", "of", "share"],
        ["conv0", "3", "4", "75.0%"],
        ["conv1", "1", "2", "50.0%"],
    ]
    assert rows[3] == ["MACs", f"{s.macs:,}", f"{s.base_macs:,}", f"{s.macs / s.base_macs:.1%}"]
    assert rows[4][:2] == ["params", f"{s.params:,}"]


def limit(**changes: object) -> str:
    check = {
        "name": "macs",
        "asked": 9,
        "predicted": 8,
        "whole": 10,
        "measured": None,
        "spread": None,
    }
    return edited(limits=[{**check, **changes}])


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000 + "]" * 100_000,
        '{"a":' * 100_000 + "1" + "}" * 100_000,
        edited(sizes=json.loads("[" * 150 + "]" * 150)),
        limit(asked=10**400),
        limit(predicted=float("nan")),
        limit(whole=float("inf")),
        limit(name="latency_ms", measured=2.5),
        edited(macs=10**30, base_macs=10**30),
        edited(sizes={"conv0": 10**30, "conv1": 2}),
    ],
    ids=lambda text: text[:5] + text[-60:],
)
def test_from_json_refuses_depth_and_numbers_beyond_all_reason(text):
    with pytest.raises(FileFormatError, match=r"^Structure\.from_json: .* must "):
        Structure.from_json(text)
