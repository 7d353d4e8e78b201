"""``python -m pfs_fast`` and the command ``pfs-fast``."""

from __future__ import annotations

from .cli import main

if __name__ == "__main__":
    raise SystemExit(main())
