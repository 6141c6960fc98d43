"""Triton kernels and their launchers, installed as `xaifast.kernels`. Importable without a GPU and without triton."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Variant:
    """One specialisation of a kernel as a launch would make it, for ahead-of-time compilation
    (tools/triton_resources.py)."""

    name: str
    kernel: Any
    signature: dict[str, str]  # parameter -> Triton type, "constexpr" for compile-time values
    constexprs: dict[str, Any]
    divisible: tuple[str, ...]  # parameters known to be multiples of 16: what vectorised access needs
    store_bits: int  # width of the widest global store the variant must have
    num_warps: int = 4
    registers: int = 128  # that a thread may use


def variants() -> list[Variant]:
    """Return the compile-time variants of every kernel; needs triton."""
    from xaifast.kernels import occlude, perturb, select

    return select.variants() + perturb.variants() + occlude.variants()
