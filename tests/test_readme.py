"""What the documents show runs: Python blocks of the README, and examples of docstrings that are not skipped."""

from __future__ import annotations

import doctest
import importlib
import inspect
import os
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest

import pfs_fast as pfs
from pfs_fast._library import is_loaded
from pfs_fast.cli.main import make_parser

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
LINK = re.compile(r"\]\((?!https?:)([^)#]+)")

needs_operators = pytest.mark.skipif(not is_loaded(), reason="needs the compiled operators")


def blocks(language: str) -> list[str]:
    """Code blocks of the README in a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def modules() -> list[str]:
    """Names of all modules of the package that can be imported without side effects."""
    found = pkgutil.walk_packages(pfs.__path__, "pfs_fast.")
    hidden = ("pfs_fast._C", "pfs_fast.__main__")
    return ["pfs_fast", *(module.name for module in found if module.name not in hidden)]


class Finder(doctest.DocTestFinder):
    """Finds those of decorated functions, too."""

    def _from_module(self, module, object):
        return super()._from_module(module, inspect.unwrap(object))


def examples() -> list[doctest.DocTest]:
    """Docstrings with examples."""
    finder = Finder(exclude_empty=True)
    found = (finder.find(importlib.import_module(name), name) for name in modules())
    return [test for tests in found for test in tests if test.examples]


EXAMPLES = examples()


@needs_operators
def test_readme_example_runs(tmp_path, monkeypatch, capsys):
    (code,) = blocks("python")
    few = pfs.data.digits(size=16)
    parts = (
        pfs.data.ImageSet(p.images[:64], p.labels[:64]) for p in (few.train, few.val, few.test)
    )
    small = pfs.data.Splits(
        *parts, *(getattr(few, n) for n in ("num_classes", "mean", "std", "name", "flip"))
    )
    monkeypatch.setattr(pfs.data, "digits", lambda: small)
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    exec(compile(code, "README.md", "exec"), names)
    assert names["result"].structure.macs_share <= 0.5
    assert names["small"].macs_share <= 0.3
    assert (tmp_path / "slim.safetensors").exists()
    assert "MACs" in capsys.readouterr().out


@pytest.mark.parametrize("source", ["README.md", "examples/quickstart.py", "examples/cifar10.py"])
def test_example_passes_a_strict_type_checker(source, tmp_path):
    pytest.importorskip("mypy", reason="mypy is not installed")
    code = blocks("python")[0] if source == "README.md" else (ROOT / source).read_text("utf-8")
    (tmp_path / "example.py").write_text(code, encoding="utf-8")
    # PyTorch's own annotations take half a minute, and say nothing of this package's.
    skipped = "[mypy]\n" + "".join(
        f"[mypy-{name}.*]\nfollow_imports = skip\n" for name in ("torch", "numpy")
    )
    (tmp_path / "mypy.ini").write_text(skipped, encoding="utf-8")
    package = Path(pfs.__file__).parents[1]
    path = {} if package.name == "site-packages" else {"MYPYPATH": str(package)}
    checked = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--follow-imports=silent", "example.py"],
        cwd=tmp_path,
        env={**os.environ, **path},
        capture_output=True,
        text=True,
    )
    assert checked.returncode == 0, checked.stdout + checked.stderr


@pytest.mark.parametrize("example", EXAMPLES, ids=[example.name for example in EXAMPLES])
def test_docstring_example_runs(example, tmp_path, monkeypatch):
    if not is_loaded() and "bn_gate_act" in example.name:
        pytest.skip("needs the compiled operators")
    monkeypatch.chdir(tmp_path)
    report: list[str] = []
    result = doctest.DocTestRunner(verbose=False).run(example, out=report.append)
    assert result.failed == 0, "".join(report)


def test_public_names_have_documentation():
    undocumented = [name for name in pfs.__all__ if not (getattr(pfs, name).__doc__ or "").strip()]
    assert undocumented == []


def test_readme_commands_are_ones_the_parser_takes():
    lines = [
        line for block in blocks("sh") for line in block.splitlines() if line.startswith("pfs-fast")
    ]
    assert {line.split()[1] for line in lines} == {"search", "train", "info"}
    for line in lines:
        make_parser().parse_args(line.split()[1:])


def test_readme_make_targets_exist():
    targets = set(
        re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    )
    named = set(re.findall(r"^make (\w+)", "\n".join(blocks("sh")), re.MULTILINE))
    assert named == {"demo", "test"}
    assert named <= targets


@pytest.mark.parametrize(
    "path",
    [
        "README.md",
        "CONTRIBUTING.md",
        "CHANGELOG.md",
        *(f"docs/{p.name}" for p in ROOT.glob("docs/*.md")),
    ],
)
def test_links_lead_to_files(path):
    links = LINK.findall((ROOT / path).read_text(encoding="utf-8"))
    assert [link for link in links if not ((ROOT / path).parent / link).exists()] == []


def test_files_named_in_the_design_exist():
    names = set(
        re.findall(r"\b(\w+\.py)\b", (ROOT / "docs/design.md").read_text(encoding="utf-8") + README)
    )
    package = Path(pfs.__file__).parent
    there = {path.name for path in package.rglob("*.py")} | {"setup.py"}
    assert len(names) > 15
    assert names - there == set()
