"""Build backend: setuptools, building against the PyTorch that is already installed.

The extension must be compiled with the headers of the PyTorch it will run with. Build isolation
hides that one and would fetch the newest PyTorch instead, of another ABI and several gigabytes. So
the environment's own site-packages go to the END of ``sys.path`` (the isolated setuptools still
wins), and what is found there is not asked for.

Only pip's own isolation can be seen through: it runs this Python with another path. A front end
that builds in a virtual environment of its own (``python -m build``, ``uv``) should be told to use
no isolation.
"""

from __future__ import annotations

import importlib.util
import site
import sys
import sysconfig
from pathlib import Path

from setuptools import build_meta
from setuptools.build_meta import (  # noqa: F401  (the hooks of a build backend)
    build_sdist,
    get_requires_for_build_sdist,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)

# PyTorch warns at import when NumPy is missing; ninja compiles in parallel and only what has
# changed.
_BUILD_NEEDS = {"torch": "torch>=2.11", "numpy": "numpy", "ninja": "ninja"}


def _site_packages() -> list[str]:
    """Where this Python installs packages, and what such an environment sees beside it."""
    folders = [sysconfig.get_path("platlib"), sysconfig.get_path("purelib")]
    settings = Path(sys.prefix, "pyvenv.cfg")
    is_venv = sys.prefix != sys.base_prefix and settings.is_file()
    if not is_venv or "include-system-site-packages = true" in settings.read_text().lower():
        folders += site.getsitepackages([sys.base_prefix])
        folders.append(site.getusersitepackages())
    return [folder for folder in dict.fromkeys(folders) if Path(folder).is_dir()]


def _show_environment() -> None:
    sys.path.extend(folder for folder in _site_packages() if folder not in sys.path)
    importlib.invalidate_caches()


def _missing() -> list[str]:
    _show_environment()
    return [need for name, need in _BUILD_NEEDS.items() if importlib.util.find_spec(name) is None]


def get_requires_for_build_wheel(config_settings=None):
    """Setuptools' own needs, and PyTorch only where there is none."""
    needs = _missing()
    return needs + _without_torch(build_meta.get_requires_for_build_wheel(config_settings), needs)


def get_requires_for_build_editable(config_settings=None):
    """As for a wheel."""
    needs = _missing()
    own = build_meta.get_requires_for_build_editable(config_settings)
    return needs + _without_torch(own, needs)


def _without_torch(requires: list[str], already: list[str]) -> list[str]:
    return [require for require in requires if require not in already]


def build_wheel(wheel_directory, config_settings=None, metadata_directory=None):
    """Compiles and packs a wheel."""
    _show_environment()
    return build_meta.build_wheel(wheel_directory, config_settings, metadata_directory)


def build_editable(wheel_directory, config_settings=None, metadata_directory=None):
    """Compiles in place and packs a wheel that points to the tree."""
    _show_environment()
    return build_meta.build_editable(wheel_directory, config_settings, metadata_directory)
