"""The parser, and what a command's end means: 0 done, 1 an error told in one line, 2 usage, 130 Ctrl-C."""

from __future__ import annotations

import argparse
import os
import sys
import traceback
import warnings
from collections.abc import Sequence
from typing import Any

import torch

import pfs_fast

from ..errors import PfsError
from . import info, search, train
from .options import UsageError
from .terminal import say

_DESCRIPTION = """\
Slim CNNs by Pruning from Scratch: train one gate for each channel of a random, frozen network, keep the
channels that a budget allows, train the slim network from scratch.

  pfs-fast search --budget 0.5 --out runs/digits     search ResNet-20 on scikit-learn's digits
  pfs-fast train runs/digits                         train, save and reload the slim network
  pfs-fast info runs/digits                          what is in a folder or file
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        argv: Arguments without the program's name; None: those of the process.

    Returns:
        Exit code: 0 done, 1 an error of pfs_fast or the system, 2 wrong usage, 130 interrupted.
    """
    try:
        arguments = make_parser().parse_args(argv)
    except SystemExit as stop:  # how argparse ends after --help and after wrong usage
        return int(stop.code or 0)
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        try:
            arguments.run(arguments)
            sys.stdout.flush()
            return 0
        except KeyboardInterrupt:
            return _end(arguments, "interrupted", 130)
        except UsageError as error:
            return _end(arguments, f"error: {error}; see pfs-fast {arguments.command} --help", 2)
        except BrokenPipeError:
            # The reader of a pipe (head, less) has seen enough; nothing may be written to it any more.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 1
        except torch.OutOfMemoryError as error:
            advice = "lower --batch-size"
            return _end(arguments, f"error: {str(error).splitlines()[0]}; {advice}", 1)
        except (PfsError, OSError) as error:
            return _end(arguments, f"error: {error}", 1)


def make_parser() -> argparse.ArgumentParser:
    """The parser with all commands; each sets ``run`` to its function."""
    parser = argparse.ArgumentParser(
        prog="pfs-fast",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"pfs_fast {pfs_fast.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="search | train | info")
    for command in (search, train, info):
        name = command.__name__.rpartition(".")[2]
        summary = (command.__doc__ or "").splitlines()[0]
        sub = commands.add_parser(
            name,
            help=summary,
            description=command.__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        command.add_arguments(sub)
        sub.add_argument("--debug", action="store_true", help="show the traceback of an error")
        sub.set_defaults(run=command.run)
    return parser


def _end(arguments: argparse.Namespace, message: str, code: int) -> int:
    """Says why a command ended early."""
    if arguments.debug:
        say(traceback.format_exc().rstrip(), file=sys.stderr)
    say(f"pfs-fast {arguments.command}: {message}", file=sys.stderr)
    return code


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    say(f"pfs-fast: warning: {message}", file=sys.stderr)
