"""The command line: ``pfs-fast search | train | info``, one file for each command."""

from __future__ import annotations

from .main import main

__all__ = ["main"]
