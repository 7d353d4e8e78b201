#!/usr/bin/env python3
"""Fill and print the coverage table: every network is traced, searched, slimmed and proved, each in a process of its own.

python scripts/coverage.py run                        # all; goes on where it was stopped
python scripts/coverage.py run --suite timm --minutes 7
python scripts/coverage.py run resnet18 timm/dla34 --again
python scripts/coverage.py table                      # writes docs/coverage.md
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import sys
import time
from collections import Counter
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

ROOT = Path(__file__).resolve().parents[1]
RECORDS = ROOT / "benchmarks" / "results" / "coverage.jsonl"
TABLE = ROOT / "docs" / "coverage.md"


def main() -> int:
    args = _arguments()
    from coverage_networks import networks

    if args.command == "table":
        from coverage_table import render

        listed = Counter(network.suite for network in networks())
        TABLE.write_text(render(read_records(args.records), listed))
        return 0
    chosen = [n for n in networks(tuple(args.suite)) if _named(n.name, n.key, args.names)]
    done = {} if args.again else read_records(args.records)
    chosen.sort(key=lambda network: network.key in done)  # what has not been tried comes first
    started = time.monotonic()
    for network in chosen:
        old = done.get(network.key)
        if old is not None and not (args.retry and old["status"] in ("failed", "wrong", "whole")):
            continue
        if time.monotonic() - started > 60 * args.minutes:
            print("out of time; run the same command again to go on")
            return 3
        record = _in_process(network, args.seconds, args.gib)
        with args.records.open("a") as file:
            file.write(json.dumps(record) + "\n")
        print(_line(record), flush=True)
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("command", choices=("run", "table"))
    parser.add_argument("names", nargs="*", help="only these networks")
    parser.add_argument(
        "--suite", action="append", default=[], help="only this suite; may be repeated"
    )
    parser.add_argument("--records", type=Path, default=RECORDS, help="JSON lines, one a network")
    parser.add_argument("--again", action="store_true", help="run also what is recorded")
    parser.add_argument(
        "--retry", action="store_true", help="run again what failed or could not be pruned"
    )
    parser.add_argument(
        "--minutes", type=float, default=1e9, help="start no network after this time"
    )
    parser.add_argument("--seconds", type=float, default=240, help="limit of one network")
    parser.add_argument("--gib", type=float, default=20, help="address space of one network")
    return parser.parse_intermixed_args()


def _named(name: str, key: str, names: list[str]) -> bool:
    return not names or name in names or key in names


def read_records(path: Path) -> dict[str, dict]:
    """The last record of each network, by ``suite/name``."""
    if not path.exists():
        return {}
    records = [json.loads(line) for line in path.read_text().splitlines()]
    return {f"{record['suite']}/{record['name']}": record for record in records}


def _in_process(network: object, seconds: float, gib: float) -> dict:
    """The record of one network, made in a forked process with limits."""
    context = multiprocessing.get_context("fork")  # the libraries are loaded once
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(network, sender, gib))
    process.start()
    sender.close()
    try:
        if receiver.poll(seconds):
            return receiver.recv()
        reason = f"not done after {seconds:.0f} s"
    except EOFError:
        process.join()
        reason = f"the process died (exit code {process.exitcode}); its limit was {gib:g} GiB"
    finally:
        process.kill()
        process.join()
    from coverage_check import Record

    record = Record(network.name, network.suite, network.family, network.shape)
    record.step, record.reason = "limit", reason
    return record.plain()


def _child(network: object, sender: object, gib: float) -> None:
    import warnings

    warnings.simplefilter("ignore")
    resource.setrlimit(resource.RLIMIT_AS, (int(gib * 2**30),) * 2)
    from coverage_check import check

    sender.send(check(network).plain())


def _line(record: dict) -> str:
    error = "" if record["error"] is None else f"error {record['error']:.1e}"
    got = "" if record["got"] is None else f"{record['got']:.1%} of {record['asked']:.0%} MACs"
    return (
        f"{record['status']:7}{record['suite']}/{record['name']}: {record['prunable']}/{record['layers']} layers, "
        f"{record['groups']} groups {got} {error} graph {record['graph_seconds']} s, all {record['seconds']} s, "
        f"{record['peak_mib']} MiB {record['step']} {record['reason'][:200]}"
    )


if __name__ == "__main__":
    sys.exit(main())
