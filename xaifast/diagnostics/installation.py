"""What is installed: versions, compiled modules, GPUs, the backend of every operator, and why anything is missing."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import re
import sys
import warnings
from types import ModuleType
from typing import Any

import torch

import xaifast
from xaifast import _native
from xaifast.ops import _registry

REQUIRED = ("torch", "numpy", "safetensors", "tqdm", "triton")

# Extra: what it is for, and the packages that are looked for.
EXTRAS: dict[str, tuple[str, tuple[str, ...]]] = {
    "hf": ("models and data sets of Hugging Face", ("transformers", "datasets")),
    "data": ("folders of images and tables", ("pillow", "pandas", "pyarrow", "scikit-learn")),
    "segments": ("superpixels", ("scikit-image",)),
    "report": ("figures and reports", ("matplotlib", "jinja2")),
    "compat": ("explanations as shap's objects", ("shap",)),
    "metrics": ("metrics as torchmetrics classes", ("torchmetrics",)),
    "bench": ("benchmarks beside other packages", ("captum",)),
}

# Kernel: where it serves, its kind on the CPU and on a GPU; "torch": no kernel of its own, None: never runs there.
KERNELS: dict[str, tuple[str, str, str | None]] = {
    "sample_coalitions": ("designs", "native", None),
    "select_rows": ("mask_inputs, select_tokens", "native", "triton"),
    "compact_rows": ("compact_tokens", "native", "native"),
    "perturb_rows": ("perturb_by_rank", "native", "triton"),
    "rank_features": ("rank_features", "native", "torch"),
    "occlude_linear": ("occlude_linear", "native", "triton"),
    "cubic_regression": ('estimator="adjusted"', "native", "torch"),
    "blend_inputs": ("soft masks", "torch", "torch"),
}

# docs/environment.md says what they mean.
VARIABLES = (
    "XAIFAST_BACKEND",
    "XAIFAST_CPU_ISA",
    "XAIFAST_CUDA",
    "XAIFAST_CUDA_ARCHS",
    "XAIFAST_CU130",
    "TORCH_CUDA_ARCH_LIST",
    "XAIFAST_WERROR",
    "TRITON_INTERPRET",
)


def collect() -> dict[str, Any]:
    """Describe the installation; imports no optional package.

    Returns:
        A dict of plain values, fit for JSON:

        - ``"xaifast"``, ``"location"``, ``"python"``, ``"executable"``, ``"platform"``: strings;
        - ``"torch"``: ``version``, ``cuda`` (None where torch has no CUDA), ``threads``;
        - ``"packages"``: required packages, ``"extras"``: optional ones by extra; each name -> version or None;
        - ``"native"``: for ``_cpu`` and ``_cuda`` a ``state``, ``"loaded"`` with the module's build information,
          ``"absent"`` or ``"broken"`` with a ``reason``;
        - ``"gpus"``: ``name``, ``capability``, ``memory_gib`` and ``code``, what of ``_cuda`` runs on it or None;
        - ``"operators"``: see `operator_backends`;
        - ``"environment"``: the variables of docs/environment.md that are set;
        - ``"notes"``: what is missing or odd, and what to do; ``"problems"``: what is broken. Name -> words.

    Example:
        >>> collect()["xaifast"] == xaifast.__version__
        True
    """
    native = {"_cpu": _describe("_cpu", _native.cpu()), "_cuda": _describe("_cuda", _native.cuda())}
    info: dict[str, Any] = {
        "xaifast": xaifast.__version__,
        "location": os.path.dirname(xaifast.__file__),
        "python": platform.python_version(),
        "executable": sys.executable,
        "platform": platform.platform(),
        "torch": {"version": torch.__version__, "cuda": torch.version.cuda, "threads": torch.get_num_threads()},
        "packages": {name: _version(name) for name in REQUIRED},
        "extras": {extra: {name: _version(name) for name in names} for extra, (_, names) in EXTRAS.items()},
        "native": native,
        "gpus": _gpus(native["_cuda"].get("archs", [])),
        "operators": {},
        "environment": {name: os.environ[name] for name in VARIABLES if os.environ.get(name)},
    }
    info["notes"] = _notes(info)
    info["problems"] = _problems(native)
    try:
        info["operators"] = operator_backends()
    except ValueError as error:
        info["problems"]["XAIFAST_BACKEND"] = str(error)
    return info


def operator_backends() -> dict[str, dict[str, tuple[str, str | None]]]:
    """Say what serves each kernel: name -> device (``"cpu"`` and, where there is a GPU, ``"cuda"``) -> (backend, why).

    The backend is ``"native"``, ``"triton"``, ``"reference"`` or ``"torch"``; ``why`` says what was refused, None where
    the kernel runs.

    Raises:
        ValueError: XAIFAST_BACKEND is no backend.

    Example:
        >>> operator_backends()["blend_inputs"]["cpu"]
        ('torch', None)
    """
    devices = ["cpu", "cuda"] if count_gpus()[0] else ["cpu"]
    return {
        name: {device: _choice(kind, device) for device, kind in zip(devices, kinds, strict=False) if kind}
        for name, (_, *kinds) in KERNELS.items()
    }


def count_gpus() -> tuple[int, str | None]:
    """Return how many GPUs torch sees, and the reason where it sees none."""
    if torch.version.cuda is None:
        return 0, f"torch {torch.__version__} was built without CUDA; install a CUDA build of torch to use a GPU"
    with warnings.catch_warnings(record=True) as caught:  # where the driver does not fit, torch says so in a warning
        warnings.simplefilter("always")
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count:
        return count, None
    hint = f": {caught[-1].message}" if caught else ""
    return 0, f"torch sees no CUDA device{hint}; look at nvidia-smi and CUDA_VISIBLE_DEVICES"


def covering(capability: tuple[int, int], archs: list[str]) -> str | None:
    """Return which of the architectures a module was built for runs on a GPU of this compute capability, or None.

    Machine code runs within its major version on the same minor or a higher one, PTX on anything newer; "90a" runs
    on 9.0 alone, "100f" within its major version.

    Example:
        >>> covering((8, 6), ["80", "90"]), covering((9, 0), ["80"]), covering((12, 1), ["90+PTX"])
        ('sm_80', None, 'PTX of compute_90')
    """
    ptx = None
    for arch in sorted(archs, key=_number, reverse=True):
        match = re.fullmatch(r"(\d+)(\d)([af]?)(\+PTX)?", arch)
        if match is None:  # a name such as CMake's "native" or "all-major", which says nothing of numbers
            continue
        built, suffix = (int(match[1]), int(match[2])), match[3]
        if suffix == "a":
            fits = built == capability
        else:
            older = built <= capability
            fits = older and (built[0] == capability[0] or bool(match[4] and not suffix))
        if fits and not match[4]:
            return f"sm_{arch}"
        if fits and ptx is None:
            ptx = f"PTX of compute_{arch.removesuffix('+PTX')}"
    return ptx


def _number(arch: str) -> int:
    digits = re.match(r"\d+", arch)
    return int(digits[0]) if digits else 0


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _describe(name: str, module: ModuleType | None) -> dict[str, Any]:
    if module is not None:
        return {"state": "loaded", **module.build_info()}
    absent = importlib.util.find_spec(f"xaifast.{name}") is None
    return {"state": "absent" if absent else "broken", "reason": _native.why_missing()[name]}


def _gpus(archs: list[str]) -> list[dict[str, Any]]:
    gpus = []
    for i in range(count_gpus()[0]):
        properties = torch.cuda.get_device_properties(i)
        gpus.append(
            {
                "name": properties.name,
                "capability": f"{properties.major}.{properties.minor}",
                "memory_gib": round(properties.total_memory / 2**30, 1),
                "code": covering((properties.major, properties.minor), archs),
            }
        )
    return gpus


def _choice(kind: str, device: str) -> tuple[str, str | None]:
    """What serves a kernel of this kind, and why not the kernel: the rule of `xaifast.ops._registry` in words."""
    wanted = _registry.backend()
    if kind not in ("native", "triton"):
        return kind, None
    if wanted == "reference":
        return "reference", "XAIFAST_BACKEND=reference"
    if wanted not in ("auto", kind):
        return "reference", f"XAIFAST_BACKEND={wanted}, but the kernel for this device is {kind}"
    if kind == "triton":
        from xaifast.kernels import select

        missing = select.why_missing
    else:
        missing = _native.why_missing().get("_cpu" if device == "cpu" else "_cuda")
    return (kind, None) if missing is None else ("reference", missing)


def _notes(info: dict[str, Any]) -> dict[str, str]:
    notes = {}
    for name, module in info["native"].items():
        if module["state"] == "absent":
            notes[f"xaifast.{name}"] = f"{module['reason']}; the reference serves meanwhile"
    _, no_gpu = count_gpus()
    if no_gpu is not None:
        notes["GPU"] = no_gpu
    for i, gpu in enumerate(info["gpus"]):
        if gpu["code"] is None and info["native"]["_cuda"]["state"] == "loaded":
            capability = gpu["capability"].replace(".", "")
            notes[f"GPU {i}"] = (
                f"xaifast._cuda has no code for compute capability {gpu['capability']}; build with "
                f"XAIFAST_CUDA_ARCHS={capability}-real, or set XAIFAST_BACKEND=reference"
            )
    if info["packages"]["triton"] is None:
        notes["triton"] = "not installed, needed on GPUs only; torch's CUDA builds bring it, or: pip install triton"
    for extra, versions in info["extras"].items():
        missing = [name for name, version in versions.items() if version is None]
        if missing:
            notes[", ".join(missing)] = f"for {EXTRAS[extra][0]}: pip install 'xaifast[{extra}]'"
    for name in sorted(os.environ):
        if name.startswith("XAIFAST_") and name not in VARIABLES:
            notes[name] = "is set, but xaifast reads no such variable; see docs/environment.md for those it does"
    return notes


def _problems(native: dict[str, dict[str, Any]]) -> dict[str, str]:
    problems = {}
    for name, module in native.items():
        if module["state"] == "broken":
            problems[f"xaifast.{name}"] = f"is there but does not load: {module['reason']}"
    built = native["_cpu"].get("version", xaifast.__version__)
    if built != xaifast.__version__:
        problems["xaifast._cpu"] = (
            f"was built for xaifast {built}, this is {xaifast.__version__}; build again: pip install -e ."
        )
    return problems
