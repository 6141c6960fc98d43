"""What a checkpoint stores of a state, and states from what checkpoints store.

A tensor that is equal to that of the last checkpoint is not stored. Others are stored as they are, key
``"state/NAME"``, because an exact difference of float32 numbers takes no less room than the number itself; or, where
that is asked for, as a difference in bfloat16 to the *replayed* tensor, key ``"delta/NAME"``. So what rounding lost in
one difference is part of the next, and errors do not add up.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

import torch
from torch import Tensor

from .layout import Layout, State

_ROUNDED = (torch.float32, torch.float64)


def encode(
    layout: Layout, state: State, last: State, start: State | None, tolerance: float
) -> tuple[State, State, list[float]]:
    """What to store of a state.

    Args:
        layout: Of the state.
        state: As the model has it.
        last: Of the last checkpoint, as it will be replayed.
        start: Of the first checkpoint; None stores nothing in bfloat16.
        tolerance: A parameter p is stored in bfloat16 where ||replayed p - p|| <= tolerance ||p - start of p||.

    Returns:
        Tensors by key, the replayed state, and ||replayed p - last p|| of every parameter in the layout's order.
    """
    stored, replayed, changes = {}, {}, []
    for entry in layout.stored:
        name = entry.name
        value, before = state[name], last[name]
        if entry.parameter and value.is_floating_point():
            change = _difference(value, before)
            size = _norm(change)
            if start is not None and value.dtype in _ROUNDED and size > 0:
                delta = change.to(torch.bfloat16)
                rounded = before + delta.to(value.dtype)
                if _norm(rounded - value) <= tolerance * _norm(value - start[name]):
                    stored[f"delta/{name}"], replayed[name] = delta, rounded
                    changes.append(_norm(rounded - before))
                    continue
            changes.append(size)
            same = size == 0 and torch.equal(value, before)
        else:
            same = torch.equal(value, before)
            if entry.parameter:
                changes.append(_norm(value - before))
        replayed[name] = before if same else value
        if not same:
            stored[f"state/{name}"] = value
    return stored, replayed, changes


def replay(
    state: State, at: int, to: int, keys: Callable[[int], Collection[str]], read: Callable[[int], State]
) -> State:
    """The state of checkpoint ``to`` from that of ``at`` (none: -1, an empty state), reading what lies between.

    Files that later ones make unnecessary are not read, and every other one once.
    """
    whole: dict[str, int] = {}  # the last checkpoint up to `to` that stores a tensor as it is
    names = {key.partition("/")[2] for key in keys(0) if key.startswith("state/")}
    for t in range(to, at, -1):
        for name in names - whole.keys():
            if f"state/{name}" in keys(t):
                whole[name] = t
        if len(whole) == len(names):
            break
    state = dict(state)
    for t in range(at + 1, to + 1):
        needed = [key for key in keys(t) if _needed(key, t, whole)]
        if not needed:
            continue
        tensors = read(t)
        for key in needed:
            kind, _, name = key.partition("/")
            value = tensors[key]
            state[name] = value if kind == "state" else state[name] + value.to(state[name].dtype)
    return state


def distance(one: State, other: State | None = None) -> float:
    """Frobenius norm over all floating tensors of a difference, or of a state."""
    squares = 0.0
    for name, value in one.items():
        if value.is_floating_point():
            size = _norm(value if other is None else _difference(value, other[name]))
            squares += size * size
    return squares**0.5


def _needed(key: str, t: int, whole: dict[str, int]) -> bool:
    kind, _, name = key.partition("/")
    return (kind == "state" and whole.get(name) == t) or (kind == "delta" and t > whole.get(name, -1))


def _difference(value: Tensor, before: Tensor) -> Tensor:
    """In float32 at least: differences of halves overflow, and lose digits."""
    return value - before if value.dtype in _ROUNDED else value.float() - before.float()


def _norm(value: Tensor) -> float:
    return float(torch.linalg.vector_norm(value, dtype=torch.float64 if not value.is_complex() else None))
