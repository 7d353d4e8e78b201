"""``python -m benchmarks``: see benchmarks/README.md."""

from __future__ import annotations

from benchmarks.command import main

if __name__ == "__main__":
    main()
