"""Checks on a model's mode: an explanation of a model that is still random explains the noise."""

from __future__ import annotations

import functools
from collections.abc import Iterator

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.modules.instancenorm import _InstanceNorm


def find_modules(forward: object) -> Iterator[nn.Module]:
    """The ``nn.Module`` objects behind a callable: itself, a bound method's, a partial's or a closure's."""
    if isinstance(forward, nn.Module):
        yield forward
    elif isinstance(forward, functools.partial):
        yield from find_modules(forward.func)
    else:
        owner = getattr(forward, "__self__", None)
        if isinstance(owner, nn.Module):
            yield owner
        for cell in getattr(forward, "__closure__", None) or ():
            try:
                content = cell.cell_contents
            except ValueError:  # an empty cell
                continue
            if isinstance(content, nn.Module):
                yield content


def _is_random(module: nn.Module) -> bool:
    if not module.training:
        return False
    if isinstance(module, _DropoutNd):
        return module.p > 0
    if isinstance(module, _BatchNorm | _InstanceNorm):
        return True
    if isinstance(module, nn.MultiheadAttention | nn.RNNBase):
        return module.dropout > 0
    return False


def check_deterministic(forward: object, caller: str) -> None:
    """Refuse a model whose dropout or batch statistics are active.

    Sees modules that ``forward`` is, is bound to, or closes over.

    Raises:
        ValueError: names the first active module and the two ways out.
    """
    for model in find_modules(forward):
        for path, module in model.named_modules():
            if _is_random(module):
                where = path or "the model itself"
                raise ValueError(
                    f"{caller}: the model must not be random during an explanation, but {type(module).__name__} "
                    f"({where}) is in training mode; call model.eval(), or pass allow_training_mode=True if that is "
                    "meant"
                )
