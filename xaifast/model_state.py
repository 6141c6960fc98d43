"""Checks on a model's mode: an explanation of a model that is still random explains the noise."""

from __future__ import annotations

import functools
import types
from collections.abc import Iterator

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.modules.instancenorm import _InstanceNorm


def find_modules(forward: object) -> Iterator[nn.Module]:
    """The ``nn.Module`` objects behind a callable: itself, or what an object has as attributes, what a method, partial,
    decorated function or closure holds, and what a function names among its globals.
    """
    waiting, seen = [forward], set()
    while waiting:
        found = waiting.pop()
        if id(found) in seen:
            continue
        seen.add(id(found))
        if isinstance(found, nn.Module):
            yield found
        elif isinstance(found, functools.partial):
            waiting += (found.func, *found.args, *found.keywords.values())
        elif isinstance(found, types.MethodType):
            waiting += (found.__self__, found.__func__)
        elif isinstance(found, types.FunctionType):
            for cell in found.__closure__ or ():
                try:
                    waiting.append(cell.cell_contents)
                except ValueError:  # an empty cell
                    continue
            named = (found.__globals__.get(name) for name in found.__code__.co_names)
            waiting += (value for value in named if isinstance(value, nn.Module))
        else:
            waiting += (value for value in getattr(found, "__dict__", {}).values() if isinstance(value, nn.Module))


def is_compiled(forward: object) -> bool:
    """Whether ``torch.compile`` made this module or function, or ``Module.compile`` was called on it."""
    marks = ("_orig_mod", "_compiled_call_impl", "_torchdynamo_orig_callable")
    return any(getattr(forward, mark, None) is not None for mark in marks)


def _why_random(module: nn.Module) -> str | None:
    """What makes a module's answer to a row depend on chance or on the other rows; None if nothing does."""
    if isinstance(module, _BatchNorm) and module.running_mean is None:
        return "has no running statistics and uses those of its batch; set track_running_stats=True"
    if isinstance(module, _DropoutNd):
        active = module.p > 0
    elif type(module).__name__ in ("DropPath", "StochasticDepth"):  # of timm, Hugging Face and torchvision
        active = bool(getattr(module, "drop_prob", None) or getattr(module, "p", None))
    elif isinstance(module, nn.MultiheadAttention | nn.RNNBase):
        active = module.dropout > 0
    elif isinstance(module, _InstanceNorm):
        active = module.track_running_stats
    else:
        active = isinstance(module, _BatchNorm)
    return "is in training mode; call model.eval()" if active and module.training else None


def check_deterministic(forward: object, caller: str) -> None:
    """Refuse a model whose dropout or batch statistics are active.

    Sees the modules that `find_modules` finds.

    Raises:
        ValueError: names the first active module and the two ways out.
    """
    for model in find_modules(forward):
        for path, module in model.named_modules():
            why = _why_random(module)
            if why is not None:
                raise ValueError(
                    f"{caller}: the model must not be random during an explanation, but {type(module).__name__} "
                    f"({path or 'the model itself'}) {why}, or pass allow_training_mode=True if that is meant"
                )
