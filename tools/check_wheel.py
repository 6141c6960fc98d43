"""Checks wheels of xaifast and prints a table: tag, GPU architectures, libraries, size, installation, self-test.

    python tools/check_wheel.py WHEEL ... [--torch SPEC_OR_PYTHON ...] [--manylinux 2.28] [--strict] [--offline]

Exit status 1 where a check fails. What cannot be checked here is a failure with --strict alone: the table says why.
docs/wheels.md explains the columns.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shutil
import sys
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cuda_resources import find_nvcc
from interpreters import ROOT, Interpreter, find_interpreters, install, make_environment, output, probe
from setup_env import TESTED_TORCH

RELEASE_ARCHS = ["80", "90", "100", "120", "120+PTX"]  # of +cu130 wheels, in the order of numbers, as in pyproject.toml
SIZE_LIMIT = 3_000_000
FOREIGN = ("torch", "c10", "cudart", "cuda", "python")  # libraries that a module must not ask for
DEPENDENCIES = ("numpy", "safetensors", "tqdm")
COLUMNS = ("wheel", "size", "tag", "archs", "needed", "install", "self-test")

# Both run in an environment that holds the wheel. This one has no torch: `import xaifast` would fail.
LOAD_MODULES = """
import importlib.metadata, importlib.util, json, sys
distribution = importlib.metadata.distribution("xaifast")
modules = {}
for file in distribution.files:
    if file.suffix == ".so":
        name = file.name.partition(".")[0]
        spec = importlib.util.spec_from_file_location("xaifast." + name, distribution.locate_file(file))
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        modules[name] = module.build_info()
assert "torch" not in sys.modules
print(json.dumps({"version": distribution.version, "modules": modules}))
"""
USE_OPERATORS = """
import torch, xaifast
weights = torch.arange(1.0, 7.0, dtype=torch.float64)
x = torch.randn(2, 6, dtype=torch.float64, requires_grad=True)
values = xaifast.kernel_shap(lambda rows: rows @ weights, x.detach(), n_samples=64).values
assert torch.allclose(values, x.detach() * weights), values
present = torch.rand(5, 6) < 0.5
xaifast.ops.mask_inputs(x, present).sum().backward()
assert torch.equal(x.grad, present.sum(0).double().expand(2, 6)), x.grad
"""


@dataclass(frozen=True)
class Finding:
    """One cell of the table; `ok` is None where nothing could be checked."""

    text: str
    ok: bool | None = True


@dataclass(frozen=True)
class WheelName:
    """What the file name of a wheel says."""

    version: str
    python: str  # "3.11"
    platforms: tuple[str, ...]

    @property
    def modules(self) -> list[str]:
        """The compiled modules that it promises."""
        return ["_cpu", "_cuda"] if "+cu" in self.version else ["_cpu"]


def parse_name(wheel: Path) -> WheelName:
    """Read the name of one of our wheels; ValueError if it is none."""
    match = re.fullmatch(r"xaifast-([^-]+)-cp3(\d+)-cp3\2-([^-]+)\.whl", wheel.name)
    if match is None:
        raise ValueError(f"check_wheel: a wheel must be named xaifast-<version>-cp3X-cp3X-<tag>.whl, got {wheel.name}")
    return WheelName(match[1], f"3.{match[2]}", tuple(match[3].split(".")))


def glibc(platform: str) -> tuple[int, int] | None:
    """Return the oldest glibc that a platform tag allows; None where it makes no promise."""
    match = re.match(r"manylinux_(\d+)_(\d+)_", platform)
    return (int(match[1]), int(match[2])) if match else None


def needed_libraries(readelf: str) -> list[str]:
    """Read the libraries that a module asks for from the output of `readelf -d`."""
    return re.findall(r"\(NEEDED\).*\[(.+?)\]", readelf)


def listed_archs(cuobjdump: str) -> list[str]:
    """Read architectures from the output of `cuobjdump --list-elf --list-ptx`: "90" is code, "90+PTX" is PTX."""
    code = re.findall(r"^ELF file.*\.sm_(\w+)\.cubin", cuobjdump, flags=re.M)
    ptx = [f"{arch}+PTX" for arch in re.findall(r"^PTX file.*\.(?:sm|compute)_(\w+)\.ptx", cuobjdump, flags=re.M)]
    return sorted(set(code + ptx), key=lambda arch: (int(re.match(r"\d+", arch)[0]), arch))


def find_cuobjdump() -> Path | None:
    """Return a cuobjdump: of the CUDA toolkit, or the one that Triton's wheel brings."""
    nvcc = find_nvcc()
    places = [shutil.which("cuobjdump"), Path(nvcc).resolve().parent / "cuobjdump" if nvcc else None]
    triton = importlib.util.find_spec("triton")
    folders = [Path(folder) for folder in triton.submodule_search_locations] if triton else []
    folders += sorted(ROOT.glob(".venv/lib/python3*/site-packages/triton"))
    places += [folder / "backends" / "nvidia" / "bin" / "cuobjdump" for folder in folders]
    return next((Path(place) for place in places if place and Path(place).exists()), None)


def find_auditwheel(folder: Path, offline: bool) -> list[str] | None:
    """Return the command of this Python's auditwheel, or of one installed under `folder`; None where there is none."""
    if importlib.util.find_spec("auditwheel") and shutil.which("patchelf"):
        return [sys.executable, "-m", "auditwheel"]
    here = probe(Path(sys.executable))
    if offline or here is None:
        return None
    python = make_environment(here, folder / "auditwheel")
    install(here, python, ["auditwheel", "patchelf"])
    return ["env", f"PATH={python.parent}{os.pathsep}{os.environ['PATH']}", str(python), "-m", "auditwheel"]


def check_size(wheel: Path) -> Finding:
    """The limit is of everything that is downloaded."""
    size = wheel.stat().st_size
    return Finding(f"{size / 1e6:.2f} MB", size <= SIZE_LIMIT)


def check_tag(wheel: Path, auditwheel: Sequence[str] | None, newest: tuple[int, int] | None) -> Finding:
    """The tag must promise no older glibc than the symbols need, and none newer than `newest`."""
    name = parse_name(wheel)
    tag = ".".join(name.platforms)
    if auditwheel is None:
        return Finding(f"{tag}, not checked: no auditwheel", None)
    promised = [glibc(platform) for platform in name.platforms]
    if None in promised:
        return Finding(f"{tag} is no manylinux tag", False)
    audit = json.loads(output(*auditwheel, "show", "--json", wheel.resolve()))
    needs = glibc(audit["sym_tag"])
    if needs is None or needs > min(promised):
        return Finding(f"{tag}, but symbols need {audit['sym_tag']}", False)
    if newest is not None and min(promised) > newest:
        return Finding(f"{tag} is newer than {newest[0]}.{newest[1]}", False)
    return Finding(tag)


def check_archs(modules: dict[str, Path], cuobjdump: Path | None) -> Finding:
    """The CUDA module must hold exactly the code that the release promises."""
    if "_cuda" not in modules:
        return Finding("-")
    if cuobjdump is None:
        return Finding("not checked: no cuobjdump", None)
    archs = listed_archs(output(cuobjdump, "--list-elf", "--list-ptx", modules["_cuda"]))
    return Finding(" ".join(archs) or "no device code", archs == RELEASE_ARCHS)


def check_needed(modules: dict[str, Path]) -> Finding:
    """No library of torch, CUDA or Python may be asked for."""
    if shutil.which("readelf") is None:
        return Finding("not checked: no readelf", None)
    needed = {library for path in modules.values() for library in needed_libraries(output("readelf", "-d", path))}
    short = sorted(library.removeprefix("lib").partition(".so")[0] for library in needed if library.startswith("lib"))
    foreign = [library for library in short if library.startswith(FOREIGN)]
    return Finding(f"foreign: {' '.join(foreign)}", False) if foreign else Finding(" ".join(short), bool(short))


def check_install(wheel: Path, interpreter: Interpreter) -> Finding:
    """A clean environment takes the wheel, and its modules load without torch and say the right things."""
    with tempfile.TemporaryDirectory() as folder:
        python = make_environment(interpreter, Path(folder))
        install(interpreter, python, ["--no-index", "--no-deps", wheel.resolve()])
        wrong = wrong_build(parse_name(wheel), json.loads(output(python, "-c", LOAD_MODULES)))
    return Finding("; ".join(wrong), False) if wrong else Finding("ok")


def wrong_build(name: WheelName, said: dict[str, Any]) -> list[str]:
    """Return what in the metadata and the modules' `build_info` does not fit the wheel's name."""
    modules, base = said["modules"], name.version.partition("+")[0]
    if sorted(modules) != name.modules:
        return [f"has the modules {sorted(modules)}"]
    cpu, cuda = modules["_cpu"], modules.get("_cuda")
    claims = {
        f"metadata say {said['version']}": said["version"] == name.version,
        f"_cpu is of {cpu['version']}": cpu["version"] == base,
        "_cpu lacks OpenMP": cpu["openmp"],
        f"_cpu has kernels for {' '.join(cpu['isas'])} only": cpu["isas"] == ["baseline", "v3", "v4"],
    }
    if cuda:
        claims[f"_cuda is of CUDA {cuda['cuda']}"] = cuda["cuda"].startswith("13.")
        claims[f"_cuda says it is for {' '.join(cuda['archs'])}"] = cuda["archs"] == RELEASE_ARCHS
    return [claim for claim, right in claims.items() if not right]


def self_test(wheel: Path, interpreter: Interpreter, torch: str | Interpreter) -> Finding:
    """Run `xaifast info`, Kernel SHAP and an operator's gradient beside a torch.

    Args:
        wheel: What is tested.
        interpreter: Of the wheel's Python version.
        torch: A requirement for pip, or an interpreter whose torch, with its dependencies, is used where it lies.

    Raises:
        RuntimeError: The torch cannot be installed.
    """
    with tempfile.TemporaryDirectory() as folder:
        python = make_environment(interpreter, Path(folder))
        install(interpreter, python, ["--no-index", "--no-deps", wheel.resolve()])
        if isinstance(torch, str):
            install(interpreter, python, [torch, *DEPENDENCIES])
        else:
            packages = output(python, "-c", "import sysconfig; print(sysconfig.get_path('platlib'), end='')")
            (Path(packages) / "torch_elsewhere.pth").write_text(f"{torch.packages}\n")
        try:
            info = json.loads(output(python, "-m", "xaifast", "info", "--json", tolerate=[1]))
            output(python, "-c", USE_OPERATORS)
        except RuntimeError as error:
            return Finding(str(error), False)
        wrong = wrong_info(parse_name(wheel), Path(folder), info)
        return Finding(f"torch {info['torch']['version']} {'; '.join(wrong) or 'ok'}", not wrong)


def wrong_info(name: WheelName, folder: Path, info: dict[str, Any]) -> list[str]:
    """Return what `xaifast info --json`, run in the environment `folder`, says is wrong."""
    if not Path(info["location"]).is_relative_to(folder.resolve()):
        return [f"ran the xaifast of {info['location']}"]
    wrong = [f"{module} not loaded" for module in name.modules if info["native"][module]["state"] != "loaded"]
    wrong += [f"{check['name']} failed" for check in info["self_test"] if not check["ok"]]
    return wrong if wrong or info["ok"] else [f"{what} {why}" for what, why in info["problems"].items()]


def check_self_test(wheel: Path, interpreter: Interpreter, asked: Sequence[str], offline: bool) -> Finding:
    """The self-test beside each torch asked for, or beside one that costs no large download."""
    if not asked:
        if interpreter.torch:
            return self_test(wheel, interpreter, interpreter)
        try:  # only wheels for the CPU have this version
            return self_test(wheel, interpreter, f"{TESTED_TORCH}+cpu") if not offline else Finding("no torch", None)
        except RuntimeError:
            return Finding("not run: no torch, see --torch", None)
    findings = []
    for torch in asked:
        donor = probe(Path(torch)) if Path(torch).is_file() else None
        if donor and donor.version != interpreter.version:
            findings.append(Finding(f"{torch} is Python {donor.version}", None))
            continue
        try:
            findings.append(self_test(wheel, interpreter, donor or torch))
        except RuntimeError as error:
            findings.append(Finding(str(error), False))
    verdicts = [finding.ok for finding in findings]
    return Finding(
        ", ".join(f.text for f in findings), False if False in verdicts else None if None in verdicts else True
    )


@dataclass(frozen=True)
class Settings:
    """How wheels are checked: the command line's options and what this machine has."""

    torches: Sequence[str] = ()
    newest_glibc: tuple[int, int] | None = None
    offline: bool = False
    auditwheel: Sequence[str] | None = None
    cuobjdump: Path | None = None


def check(wheel: Path, interpreters: dict[str, Interpreter], settings: Settings) -> list[Finding]:
    """Return the row of a wheel, a finding for each of COLUMNS."""
    row = [Finding(wheel.name), check_size(wheel)]
    with tempfile.TemporaryDirectory() as folder:
        zipfile.ZipFile(wheel).extractall(folder)
        modules = {path.name.partition(".")[0]: path for path in Path(folder, "xaifast").glob("*.so")}
        row.append(attempt(check_tag, wheel, settings.auditwheel, settings.newest_glibc))
        row.append(attempt(check_archs, modules, settings.cuobjdump))
        row.append(attempt(check_needed, modules))
    interpreter = interpreters.get(parse_name(wheel).python)
    if interpreter is None:
        return [*row, *[Finding(f"not checked: no Python {parse_name(wheel).python}", None)] * 2]
    row.append(attempt(check_install, wheel, interpreter))
    row.append(attempt(check_self_test, wheel, interpreter, settings.torches, settings.offline))
    return row


def attempt(function: Callable[..., Finding], *arguments: Any) -> Finding:
    """Turn a command that fails inside a check into its finding."""
    try:
        return function(*arguments)
    except RuntimeError as error:
        return Finding(str(error), False)


def as_table(rows: Sequence[Sequence[Finding]]) -> str:
    """Lay rows out in columns; what failed is named in full below."""
    cells = [COLUMNS, *(["FAILED" if finding.ok is False else finding.text for finding in row] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(COLUMNS))]
    lines = ["  ".join(f"{text:{width}}" for text, width in zip(line, widths, strict=True)).rstrip() for line in cells]
    for row in rows:
        for column, finding in zip(COLUMNS, row, strict=True):
            if finding.ok is False:
                lines.append(f"FAILED {row[0].text}, {column}: {finding.text}")
    return "\n".join(lines)


def passed(rows: Sequence[Sequence[Finding]], strict: bool = False) -> bool:
    """Whether nothing failed; what was not checked failed only if `strict`."""
    return not any(finding.ok is False or (strict and finding.ok is None) for row in rows for finding in row)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that building and checking share."""
    parser.add_argument(
        "--torch",
        nargs="+",
        default=[],
        metavar="SPEC_OR_PYTHON",
        help="run the self-test beside each of these: a requirement such as torch==2.10.0, installed for the purpose, "
        "or the path of a Python whose torch is used; default: the interpreter's own torch, or a wheel for the CPU",
    )
    parser.add_argument("--offline", action="store_true", help="use what is installed, download nothing")


def main() -> int:
    """Print the table; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("wheels", nargs="+", type=Path, metavar="WHEEL")
    parser.add_argument("--manylinux", metavar="2.28", help="the newest glibc that a tag may ask for")
    parser.add_argument("--strict", action="store_true", help="fail where something could not be checked")
    add_options(parser)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        settings = Settings(
            args.torch,
            tuple(int(part) for part in args.manylinux.split(".")) if args.manylinux else None,
            args.offline,
            find_auditwheel(Path(folder), args.offline),
            find_cuobjdump(),
        )
        interpreters = find_interpreters()
        rows = [check(wheel, interpreters, settings) for wheel in args.wheels]
    print(as_table(rows))
    return 0 if passed(rows, args.strict) else 1


if __name__ == "__main__":
    sys.exit(main())
