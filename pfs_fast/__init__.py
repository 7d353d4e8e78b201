"""pfs_fast: slim CNNs by Pruning from Scratch (Wang et al., AAAI 2020, arXiv 1909.12579)."""

from __future__ import annotations
