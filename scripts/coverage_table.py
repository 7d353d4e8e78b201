"""The records of all networks as ``docs/coverage.md``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

_TITLES = {
    "torchvision": "torchvision: classification",
    "segmentation": "torchvision: segmentation",
    "detection": "torchvision: backbones of detection models",
    "video": "torchvision: video (3-d)",
    "1-d": "1-d networks",
    "timm": "timm",
}
_STATUS = {
    "exact": "slim = masked to 1e-9 in float64",
    "runs": "slimmed; a norm over channels sees the dropped ones, so the two cannot be equal; finite output of the right shape",
    "whole": "traced; nothing can be pruned",
    "wrong": "slim and masked differ without such a norm",
    "failed": "error; the reason is in the list below the table",
}
_HEADER = """# Coverage

Which networks `pfs_fast` cuts, and how that was proved. Every network has random weights. It is traced, searched for two steps with
`scope="all"` on random images, ranked by its gates, and slimmed to 50 % of its MACs, or to the first of 60, 70, 80, 90 % that its smallest structure
allows. In float64, with random batch-norm statistics, the slim network is compared with the whole one whose dropped channels are
set to 0; *error* is the largest difference of the outputs, relative to the largest output. MACs and parameters of the slim
network are counted by `torch.utils.flop_counter` on the real module and must equal the prediction, or the row is a failure.

- *prunable*: convolutions and linear layers whose output channels can be dropped, of all. The classifier is always held.
- *graph*: CPU seconds of tracing both modes, following the channels and forming groups; *all*: of everything in the row. One thread
  of a shared machine, so they tell orders of magnitude.
- Inputs are about the smallest that each network takes.

```sh
python scripts/coverage.py run      # some twenty minutes; goes on where it was stopped
python scripts/coverage.py table    # this file
```
"""


def render(records: dict[str, dict], listed: Counter[str]) -> str:
    """Markdown of all records, by ``suite/name``. ``listed``: number of networks in each suite."""
    parts = [_HEADER, f"Versions: {_versions(records.values())}.\n"]
    parts.append(_summary(records.values(), listed))
    for suite, title in _TITLES.items():
        rows = [r for r in records.values() if r["suite"] == suite]
        if rows:
            parts += [f"## {title}\n", *_suite(rows)]
    return "\n".join(parts)


def _versions(records: Iterable[dict]) -> str:
    found: dict[str, set[str]] = {}
    for record in records:
        for name, version in record["versions"].items():
            found.setdefault(name, set()).add(version)
    return ", ".join(f"{name} {' and '.join(sorted(v))}" for name, v in sorted(found.items()))


def _summary(records: Iterable[dict], listed: Counter[str]) -> str:
    by_suite: dict[str, Counter[str]] = {}
    families: dict[str, set[str]] = {}
    for record in records:
        by_suite.setdefault(record["suite"], Counter())[record["status"]] += 1
        if record["status"] == "exact":
            families.setdefault(record["suite"], set()).add(record["family"])
    lines = ["| | " + " | ".join(_STATUS) + " | not run yet | all | families with an exact one |"]
    lines.append("|---|" + "---:|" * (len(_STATUS) + 3))
    for suite in _TITLES:
        if suite in by_suite or listed[suite]:
            counts = by_suite.get(suite, Counter())
            cells = [str(counts[status]) for status in _STATUS]
            cells += [str(listed[suite] - counts.total()), str(listed[suite])]
            lines.append(f"| {suite} | {' | '.join(cells)} | {len(families.get(suite, ()))} |")
    lines += ["", *(f"- **{status}**: {text}." for status, text in _STATUS.items()), ""]
    return "\n".join(lines)


def _suite(rows: list[dict]) -> Iterable[str]:
    yield "| network | input | prunable | groups | MACs asked | got | params | error | graph s | all s | |"
    yield "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|---|"
    for row in sorted(rows, key=lambda r: (r["family"], r["name"])):
        shape = "x".join(map(str, row["shape"]))
        yield (
            f"| {row['name']} | {shape} | {row['prunable']}/{row['layers']} | {row['groups']} | {_share(row['asked'], 0)} | "
            f"{_share(row['got'])} | {_share(row['params'])} | {_error(row['error'])} | {row['graph_seconds']:.1f} | "
            f"{row['seconds']:.0f} | {row['status']} |"
        )
    yield ""
    reasons = [r for r in rows if r["status"] in ("failed", "wrong", "whole")]
    if reasons:
        yield "Not cut, and why:\n"
        for row in sorted(reasons, key=lambda r: r["name"]):
            step = f" at {row['step']}" if row["status"] == "failed" else ""
            yield f"- `{row['name']}`{step}: {_plain(row['reason'])}"
        yield ""
    held = [r for r in rows if r["status"] in ("exact", "runs") and _notable(r)]
    if held:
        yield "Held whole in part, and why (number of layers; the outputs apart):\n"
        for row in sorted(held, key=lambda r: r["name"]):
            reasons_of = [f"{_plain(why)} ({n})" for why, n in _notable(row).items()]
            yield f"- `{row['name']}`: {'; '.join(reasons_of)}"
        yield ""


def _notable(row: dict) -> dict[str, int]:
    return {why: n for why, n in row["held"].items() if "output of the network" not in why}


def _plain(text: str) -> str:
    """Safe in a Markdown list."""
    return " ".join(text.replace("|", "/").replace("<", "(").replace(">", ")").split())[:300]


def _share(value: float | None, digits: int = 1) -> str:
    return "" if value is None else f"{100 * value:.{digits}f} %"


def _error(value: float | None) -> str:
    return "" if value is None else f"{value:.0e}"
