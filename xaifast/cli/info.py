"""``xaifast info``: what is installed, what is missing and why, and a self-test."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Iterable, Mapping
from typing import Any

from xaifast import diagnostics
from xaifast.diagnostics import Check
from xaifast.diagnostics.installation import KERNELS

_WIDTH = 22  # of the first column


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add the command to a parser's ``add_subparsers()``."""
    parser = subparsers.add_parser(
        "info",
        help="what is installed, what is missing and why, and a self-test",
        description="Report versions, compiled modules, GPUs and the backend of every operator, say why anything is "
        "missing and what to do, and test that results are right.",
        epilog="Exit status: 0; 1 when the self-test fails, a compiled module is there but does not load, or "
        "XAIFAST_BACKEND is no backend. What is merely not installed is no failure.",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--no-self-test", action="store_true", help="only look, do not compute")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the report; return the exit status."""
    info = diagnostics.collect()
    checks = None if args.no_self_test else diagnostics.self_test()
    ok = not info["problems"] and all(check.ok for check in checks or ())
    if args.json:
        tested = None if checks is None else [dataclasses.asdict(check) for check in checks]
        print(json.dumps({**info, "self_test": tested, "ok": ok}, indent=2))
    else:
        print(as_text(info, checks))
    return 0 if ok else 1


def as_text(info: Mapping[str, Any], checks: list[Check] | None) -> str:
    """Lay the report out for reading: sections of two columns."""
    sections = [
        _section(f"xaifast {info['xaifast']}", _versions(info)),
        _section("Optional packages", _extras(info["extras"])),
        _section("Compiled modules", _modules(info["native"])),
        _section("GPUs", _gpus(info["gpus"])),
        _section("Operators", _operators(info["operators"])),
        _section("Environment", info["environment"].items()),
        _section("Notes", info["notes"].items()),
        _section("Problems", info["problems"].items()),
        _self_test(checks),
    ]
    return "\n\n".join(section for section in sections if section)


def _section(title: str, rows: Iterable[tuple[str, str]]) -> str:
    lines = []
    for name, text in rows:
        if len(name) <= _WIDTH:
            lines.append(f"  {name:<{_WIDTH}}  {text}")
        else:
            lines += [f"  {name}", f"  {'':<{_WIDTH}}  {text}"]
    return "\n".join([title, *lines]) if lines else ""


def _versions(info: Mapping[str, Any]) -> list[tuple[str, str]]:
    cuda = info["torch"]["cuda"]
    threads = info["torch"]["threads"]
    shown = f"{info['torch']['version']}, {'CUDA ' + cuda if cuda else 'no CUDA'}, {_count(threads, 'thread')}"
    others = [(name, version or "missing") for name, version in info["packages"].items() if name != "torch"]
    return [
        ("installed in", info["location"]),
        ("Python", f"{info['python']}, {info['executable']}"),
        ("platform", info["platform"]),
        ("torch", shown),
        *others,
    ]


def _extras(extras: Mapping[str, Mapping[str, str | None]]) -> list[tuple[str, str]]:
    return [
        (f"[{extra}]", ", ".join(f"{name} {version or 'missing'}" for name, version in versions.items()))
        for extra, versions in extras.items()
    ]


def _modules(native: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, str]]:
    cpu, cuda = native["_cpu"], native["_cuda"]
    rows = []
    if cpu["state"] == "loaded":
        kernels = [isa if isa in cpu["supported"] else f"{isa} (not on this processor)" for isa in cpu["isas"]]
        openmp = "OpenMP" if cpu["openmp"] else "no OpenMP"
        rows.append(
            ("xaifast._cpu", f"{cpu['isa']} chosen of {', '.join(kernels)}; {openmp}, compiler {cpu['compiler']}")
        )
    else:
        rows.append(("xaifast._cpu", cpu["state"]))
    if cuda["state"] == "loaded":
        rows.append(("xaifast._cuda", f"CUDA {cuda['cuda']} for {', '.join(cuda['archs'])}"))
    else:
        rows.append(("xaifast._cuda", cuda["state"]))
    return rows


def _gpus(gpus: list[Mapping[str, Any]]) -> list[tuple[str, str]]:
    return [
        (
            f"cuda:{i}",
            f"{gpu['name']}, {gpu['memory_gib']} GiB, compute capability {gpu['capability']}, "
            f"runs {gpu['code'] or 'no code'} of xaifast._cuda",
        )
        for i, gpu in enumerate(gpus)
    ]


def _operators(operators: Mapping[str, Mapping[str, tuple[str, str | None]]]) -> list[tuple[str, str]]:
    rows = []
    for name, devices in operators.items():
        served = ", ".join(f"{backend} on {device}" for device, (backend, _) in devices.items())
        reasons = dict.fromkeys(why for _, why in devices.values() if why)
        rows.append((name, "; ".join([f"{served}, for {KERNELS[name][0]}", *reasons])))
    return rows


def _self_test(checks: list[Check] | None) -> str:
    if checks is None:
        return ""
    failed = [check for check in checks if not check.ok]
    skipped = sum(check.skipped for check in checks)
    seconds = sum(check.seconds for check in checks)
    summary = f"{len(failed)} FAILED" if failed else "passed"
    rest = f", {skipped} skipped" if skipped else ""
    rows = [
        (check.name, f"{'skipped' if check.skipped else 'ok' if check.ok else 'FAILED':<8}{check.detail}")
        for check in checks
    ]
    return _section(f"Self-test: {summary} ({_count(len(checks), 'check')}{rest}, {seconds:.1f} s)", rows)


def _count(n: int, noun: str) -> str:
    return f"{n} {noun}" + ("" if n == 1 else "s")
