"""The two commands that most of these tests begin with."""

from __future__ import annotations

from pfs_fast._library import is_loaded
from pfs_fast.cli import main

TINY = ["--model", "tiny_network:make"]  # not taken from run.json, which may not name code
BACKEND = "fused" if is_loaded() else "reference"


def search(*more: str) -> int:
    arguments = [*TINY, "--data", "images.npz", "--out", "runs/tiny"]
    return main(
        [
            "search",
            *arguments,
            "--epochs",
            "2",
            "--batch-size",
            "16",
            "--quiet",
            "--backend",
            BACKEND,
            *more,
        ]
    )


def train(*more: str) -> int:
    arguments = [*TINY, "--epochs", "2", "--batch-size", "16", "--quiet"]
    return main(["train", "runs/tiny", *arguments, *more])
