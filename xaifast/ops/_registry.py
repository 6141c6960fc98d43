"""One operator library, one way to register an operator, one rule for choosing its backend."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable, Mapping
from types import ModuleType

import torch
import torch._C._functorch as functorch
from torch import Tensor

from xaifast import _native

BACKENDS = ("auto", "native", "triton", "reference")

_log = logging.getLogger("xaifast")
_library = torch.library.Library("xaifast", "DEF")
implementations: dict[str, Mapping[str, Callable]] = {}  # of each operator, by dispatch key


def register(schema: str, impls: Mapping[str, Callable], fake: Callable | None = None) -> torch._ops.OpOverload:
    """Define `torch.ops.xaifast.<name>` and return its default overload.

    `impls` maps dispatch keys ("CPU", "CUDA", "CompositeExplicitAutograd", "CompositeImplicitAutograd", ...) to
    functions; `fake` gives shapes and dtypes without data: needed unless the operator is CompositeImplicitAutograd.
    """
    name = schema.partition("(")[0]
    _library.define(schema)
    implementations[name] = impls
    for key, function in impls.items():
        _library.impl(name, function, key)
    if fake is not None:
        torch.library.register_fake(f"xaifast::{name}", fake, lib=_library)
    return getattr(torch.ops.xaifast, name).default


def backend() -> str:
    """Return the backend asked for by XAIFAST_BACKEND: "auto" (default), "native", "triton" or "reference"."""
    name = os.environ.get("XAIFAST_BACKEND") or "auto"
    if name not in BACKENDS:
        raise ValueError(f"XAIFAST_BACKEND must be one of {', '.join(BACKENDS)}, got '{name}'")
    return name


@functools.cache
def refuse(op: str, wanted: str, reason: str) -> None:
    """Log, once per distinct reason, that `op` does not run on the backend `wanted` and the reference serves."""
    _log.warning("xaifast.%s: the %s backend is not used: %s; the reference serves", op, wanted, reason)


def native_cpu(op: str) -> ModuleType | None:
    """Return the module of CPU kernels if `op` shall use it; None (logged once if unexpected) for the reference."""
    return _native_module(op, _native.cpu, "_cpu")


def native_cuda(op: str) -> ModuleType | None:
    """Return the module of CUDA kernels if `op` shall use it; None (logged once if unexpected) for the reference."""
    return _native_module(op, _native.cuda, "_cuda")


def _native_module(op: str, load: Callable[[], ModuleType | None], name: str) -> ModuleType | None:
    wanted = backend()
    if wanted == "reference":
        return None
    if wanted == "triton":
        refuse(op, "triton", "it has no Triton kernel for this device")
        return None
    module = load()
    if module is None:
        refuse(op, "native", _native.why_missing()[name])
    return module


def tracing() -> bool:
    """Whether data must not be read: code is being compiled or traced, or a torch.func transform is active."""
    return (
        torch.compiler.is_compiling()
        or functorch.peek_interpreter_stack() is not None
        or torch._C._len_torch_dispatch_stack() > 0
    )


def undisturbed(*tensors: Tensor) -> bool:
    """Whether a CPU kernel may read these tensors without the dispatcher: nothing is differentiated, traced,
    transformed or overridden, and memory holds the values."""
    if tracing() or torch._C._get_tracing_state() is not None or torch._C._len_torch_function_stack() > 0:
        return False
    for t in tensors:
        if type(t) is not Tensor or not t.is_cpu or t.is_neg() or t._is_zerotensor():
            return False
    return not (torch.is_grad_enabled() and torch._C._any_requires_grad(*tensors))
