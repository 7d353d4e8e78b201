"""Who imports whom: data flows one way, half of the library works without a compiler, models and twins stand alone."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "pfs_fast"
MODULES = sorted(PACKAGE.rglob("*.py"))
# Each imports only what stands before it.
ORDER = (
    ("errors", "_ambient", "_cuda_settings", "_json", "_modules", "_tensors", "_library"),
    ("models", "data", "ops"),
    ("graph",),
    ("budgets",),
    ("slimming",),
    ("storage",),
    ("gating",),
    ("measuring",),
    ("training",),
    ("searching", "proxies"),
    ("cli",),
)


def imported(path: Path) -> set[str]:
    """Full names of all modules that a file imports, relative imports included."""
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = list(parts[: len(parts) - node.level]) if node.level else []
            origin = ".".join([*base, *([node.module] if node.module else [])])
            names |= {origin} | {f"{origin}.{alias.name}" for alias in node.names}
    return names


def within(names: set[str], package: str) -> set[str]:
    return {name for name in names if name == package or name.startswith(package + ".")}


def test_reference_imports_torch_alone():
    names = imported(PACKAGE / "ops" / "reference.py")
    assert {name.partition(".")[0] for name in names} <= {"torch", "collections", "__future__"}


@pytest.mark.parametrize("path", sorted(PACKAGE.glob("models/*.py")), ids=lambda path: path.stem)
def test_models_import_nothing_of_the_rest_but_errors(path):
    allowed = ("pfs_fast.models", "pfs_fast.errors")
    foreign = within(imported(path), "pfs_fast") - {"pfs_fast"}
    assert [name for name in foreign if not name.startswith(allowed)] == []


PLACE = {part: place for place, parts in enumerate(ORDER) for part in parts}


def part_of(name: str) -> str:
    """The package, or the module at the top, that a full name is in."""
    return name.split(".")[1]


@pytest.mark.parametrize(
    "path",
    [path for path in MODULES if path.stem not in ("__init__", "__main__")],
    ids=lambda path: path.relative_to(PACKAGE).as_posix(),
)
def test_every_part_imports_only_what_comes_before_it(path):
    own = path.relative_to(PACKAGE).with_suffix("").parts[0]
    names = within(imported(path), "pfs_fast") - {"pfs_fast"}
    parts = {part_of(name) for name in names} & PLACE.keys()
    assert [part for part in sorted(parts) if PLACE[part] > PLACE[own]] == []


def test_every_part_has_its_place():
    found = {
        path.stem
        for path in PACKAGE.iterdir()
        if path.suffix == ".py" or (path / "__init__.py").is_file()
    }
    assert found - {"__init__", "__main__"} == PLACE.keys()


@pytest.mark.parametrize(
    "package", ["graph", "budgets", "slimming", "storage", "measuring", "training"]
)
def test_stage_works_without_the_operators(package):
    paths = sorted((PACKAGE / package).rglob("*.py"))
    assert paths
    for path in paths:
        assert not within(imported(path), "pfs_fast.ops"), path


@pytest.mark.parametrize("path", sorted((PACKAGE / "ops").glob("*.py")), ids=lambda path: path.stem)
def test_operators_know_tensors_only(path):
    allowed = ("pfs_fast.ops", "pfs_fast._library", "pfs_fast.errors")
    foreign = within(imported(path), "pfs_fast") - {"pfs_fast"}
    assert [name for name in foreign if not name.startswith(allowed)] == []


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_nothing_imports_tests_benchmarks_or_examples(path):
    for package in ("tests", "benchmarks", "examples"):
        assert not within(imported(path), package)
