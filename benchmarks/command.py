"""The one command: which suites on which machine, where the results go."""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import torch

from benchmarks.machine import Machine
from benchmarks.parts import write_whole
from benchmarks.roofline import Ceilings
from benchmarks.settings import NETWORKS, PROFILES, Settings, precision_name
from benchmarks.suites import agreement, analysis, convs, drift, memory, ops, search, slim, step
from benchmarks.tables import Case, append_csv, markdown_table
from pfs_fast.searching.config import compute_dtype

SUITES: dict[str, ModuleType] = {
    "ops": ops,
    "convs": convs,
    "step": step,
    "search": search,
    "agreement": agreement,
    "drift": drift,
    "memory": memory,
    "analysis": analysis,
    "slim": slim,
}


def parser() -> argparse.ArgumentParser:
    """Of the command line."""
    made = argparse.ArgumentParser(
        prog="python -m benchmarks", description="Benchmarks of pfs_fast against plain PyTorch."
    )
    add = made.add_argument
    add("--suite", nargs="+", default=["all"], choices=(*SUITES, "all"))
    add("--device", default="cpu", choices=("cpu", "cuda"))
    add("--threads", type=int, help="CPU threads; default: PyTorch's")
    add("--profile", default="quick", choices=("quick", "full"), help="how much is measured")
    add("--network", nargs="+", choices=NETWORKS, help="default: those of the suite and profile")
    add("--out", type=Path, default=Path(__file__).parent / "results", metavar="DIR")
    add(
        "--parts",
        type=Path,
        metavar="DIR",
        help="finished parts of long suites; default: DIR/parts",
    )
    add(
        "--finished-only",
        action="store_true",
        help="suite agreement: tables of the finished parts, nothing is computed",
    )
    add(
        "--data",
        nargs="+",
        default=["random"],
        metavar="NAME",
        help="images of the searches: cifar10 FILE, digits, or random ones (default)",
    )
    add("--compile", default="auto", choices=("auto", "yes", "no"), help="auto: on CUDA only")
    add("--batch", type=int, help="images of a batch, instead of the profile's")
    add("--steps", type=int, help="steps of a search, instead of the profile's")
    add("--baseline-steps", type=int, help="timed steps of each baseline of a search")
    add("--target", type=float, nargs="+", help="mean gates r of the searches")
    add("--seeds", type=int, help="how many seeds of the suites agreement and drift")
    add("--first-seed", type=int, default=0, metavar="S", help="the seeds are S, S + 1, ...")
    add("--rounds", type=int, help="rounds of a case, instead of the profile's")
    return made


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line, checked."""
    made = parser()
    chosen = made.parse_args(arguments)
    name, *files = chosen.data
    if name not in ("cifar10", "digits", "random") or len(files) != (name == "cifar10"):
        made.error(
            f"argument --data must be 'cifar10 FILE', 'digits' or 'random', got {chosen.data}"
        )
    for option in ("threads", "batch", "steps", "baseline_steps", "seeds", "rounds"):
        value = getattr(chosen, option)
        if value is not None and value < 1:
            made.error(f"argument --{option.replace('_', '-')} must be at least 1, got {value}")
    if chosen.first_seed < 0:
        made.error(f"argument --first-seed must be at least 0, got {chosen.first_seed}")
    if chosen.target is not None and not all(0 < target <= 1 for target in chosen.target):
        made.error(f"argument --target must be in (0, 1], got {chosen.target}")
    if chosen.finished_only and chosen.suite != ["agreement"]:
        made.error(f"argument --finished-only must come with --suite agreement, got {chosen.suite}")
    if chosen.device == "cuda" and not torch.cuda.is_available():
        made.error("argument --device must be there, got cuda without a CUDA device; use cpu")
    return chosen


def settings_of(chosen: argparse.Namespace) -> Settings:
    """Measures the machine's limits, too."""
    if chosen.threads is not None:
        torch.set_num_threads(chosen.threads)
    device = torch.device(chosen.device)
    profile = PROFILES[chosen.profile, device.type]
    effort = profile.effort
    if chosen.rounds is not None:
        effort = replace(effort, least=chosen.rounds, most=chosen.rounds)
    changes = {
        "batch": chosen.batch,
        "large_batch": chosen.batch,
        "search_batch": chosen.batch,
        "search_steps": chosen.steps,
        "agreement_steps": chosen.steps,
        "drift_steps": chosen.steps,
        "baseline_steps": chosen.baseline_steps,
        "targets": None if chosen.target is None else tuple(chosen.target),
        "seeds": chosen.seeds,
        "effort": effort,
    }
    profile = replace(profile, **{k: v for k, v in changes.items() if v is not None})
    native = precision_name(compute_dtype("auto", device))
    return Settings(
        device=device,
        profile=profile,
        networks=None if chosen.network is None else tuple(dict.fromkeys(chosen.network)),
        out=chosen.out,
        data=(chosen.data[0], chosen.data[1] if len(chosen.data) > 1 else None),
        compiled=chosen.compile == "yes" or (chosen.compile == "auto" and device.type == "cuda"),
        ceilings=Ceilings.measure(device, dict.fromkeys(("fp32", native))),
        machine=Machine.here(device),
        parts=chosen.out / "parts" if chosen.parts is None else chosen.parts,
        finished_only=chosen.finished_only,
        first_seed=chosen.first_seed,
    )


def run_suite(name: str, settings: Settings) -> str:
    """Runs one suite, writes its CSV file case by case, and returns its section in Markdown."""
    path = settings.out / f"{name}_{settings.device.type}.csv"
    limits = {"copy_gbs": settings.ceilings.copy_gbs} | {
        f"gemm_{precision}_gflops": settings.ceilings.gemm_gflops.get(precision)
        for precision in ("fp32", "bf16")
    }
    tables: dict[str, list[dict[str, object]]] = {}
    start = time.perf_counter()
    for case in _announced(name, SUITES[name].run(settings)):
        append_csv(path, [row | limits for row in case.rows], settings.machine)
        for title, lines in case.lines.items():
            tables.setdefault(title, []).extend(lines)
    took = f"Suite `{name}`: {time.perf_counter() - start:.0f} s."
    sections = [f"### {title}\n\n{markdown_table(lines)}" for title, lines in tables.items()]
    return "\n\n".join([*sections, took])


def _announced(suite: str, cases: Iterator[Case]) -> Iterator[Case]:
    start = time.perf_counter()
    for number, case in enumerate(cases, start=1):
        print(f"{suite}: case {number} after {time.perf_counter() - start:.1f} s", flush=True)
        yield case


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs what the command line asks for."""
    chosen = parse(arguments)
    settings = settings_of(chosen)
    machine = settings.machine
    print(f"{machine}\n{settings.ceilings}\n", flush=True)
    suites = SUITES if "all" in chosen.suite else dict.fromkeys(chosen.suite)
    header = (
        f"## {machine.date}, profile {chosen.profile}\n\n{machine}\n\nLimits: {settings.ceilings}"
    )
    for name in suites:
        section = run_suite(name, settings)
        tables = settings.out / f"{name}_{settings.device.type}.md"
        write_whole(tables, f"{header}\n\n{section}\n".encode())
        print(f"\n{section}\n\ntables: {tables}\n", flush=True)
