"""What an absent player looks like."""

from __future__ import annotations

from .base import Background, Group, Prepared, Removal
from .imputed import linear_impute
from .replace import Replace, gaussian_blur
from .tokens import TokenDrop, TokenSelect

__all__ = [
    "Background",
    "Group",
    "Prepared",
    "Removal",
    "Replace",
    "TokenDrop",
    "TokenSelect",
    "gaussian_blur",
    "linear_impute",
    "resolve_removal",
]


def resolve_removal(removal: object, caller: str) -> Removal:
    """The removal a user's argument means: None, ``"blur"``, a callable making the baseline, or a `Removal`.

    Raises:
        TypeError, ValueError: anything else.
    """
    if removal is None:
        return Replace()
    if isinstance(removal, Removal):
        return removal
    if isinstance(removal, str) and removal == "blur":
        return Replace(gaussian_blur)
    if isinstance(removal, type) and issubclass(removal, Removal):
        raise TypeError(f"{caller}: removal must be an instance, got the class; write {removal.__name__}()")
    if callable(removal):
        return Replace(removal)
    raise ValueError(
        f'{caller}: removal must be None, "blur", a callable, TokenDrop() or TokenSelect(), got {removal!r}'
    )
