"""Random numbers of inputs of a data set: counter-based, so that they depend on neither batch, chunk nor device.

Every use has a domain of its own, and numbers its samples: sample n of input b is a function of (seed, data-set index,
domain, n) alone. Numbers are made on the CPU.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from .ops import _registry
from .reference.coalitions import philox4x32

# Beside those of designs and orders, which are below 16.
IMPUTATION, INFIDELITY, SENSITIVITY, BASELINE, CONTROLLED, MASKS = 16, 17, 18, 19, 20, 32

_M32 = 0xFFFFFFFF
_CALLS = 8  # the native generator makes multiples of it


def uniform_units(
    start: int, stop: int, n_samples: int, size: int, *, domain: int, seed: int, first_index: int
) -> Tensor:
    """Uniform multiples of 2^-53 in [0, 1), float64 ``[stop - start, size]``.

    Args:
        start, stop: Units; unit u is sample ``u % n_samples`` of input ``u // n_samples``.
        n_samples: Samples an input.
        size: Numbers a sample.
        domain: Of this module's constants.
        seed: 0 to 2^63 - 1.
        first_index: Data-set index of input 0.
    """
    words = _unit_words(start, stop, n_samples, size, domain, seed, first_index)
    return torch.from_numpy(_unit_interval(words)[:, :size])


def normal_units(
    start: int, stop: int, n_samples: int, size: int, *, domain: int, seed: int, first_index: int
) -> Tensor:
    """N(0, 1) by the transform of Box and Muller; arguments and shape as of `uniform_units`."""
    words = _unit_words(start, stop, n_samples, size, domain, seed, first_index)
    radius = np.sqrt(-2.0 * np.log(_unit_interval(words[:, ::2]) + 2.0**-53))
    angle = 2.0 * math.pi * _unit_interval(words[:, 1::2])
    pairs = np.stack((radius * np.cos(angle), radius * np.sin(angle)), -1)  # [units, words / 2, 2]
    return torch.from_numpy(pairs.reshape(len(words), -1)[:, :size])


def check_seed(seed: object, first_index: object, caller: str) -> None:
    """Both are integers from 0 to 2^63 - 1."""
    for name, value in (("seed", seed), ("first_index", first_index)):
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 1 << 63:
            raise ValueError(f"{caller}: {name} must be an integer between 0 and 2^63 - 1, got {value!r}")


def _unit_interval(words: np.ndarray) -> np.ndarray:
    return (words >> np.uint64(11)) * 2.0**-53


def _unit_words(
    start: int, stop: int, n_samples: int, size: int, domain: int, seed: int, first_index: int
) -> np.ndarray:
    """Random uint64 ``[stop - start, size rounded up to even]``; the samples of an input follow each other."""
    calls = -(-size // 2)
    runs = _runs(start, stop, n_samples)
    made = [_words(seed, first_index + b, domain, n * calls, count * calls) for b, n, count in runs]
    return np.concatenate(made).reshape(stop - start, 2 * calls)


def _runs(start: int, stop: int, n_samples: int) -> Iterator[tuple[int, int, int]]:
    """Units as (input, first sample, number of samples)."""
    while start < stop:
        b, n = divmod(start, n_samples)
        count = min(n_samples - n, stop - start)
        yield b, n, count
        start += count


def _words(seed: int, index: int, domain: int, first_call: int, n_calls: int) -> np.ndarray:
    """Two random words a call of Philox4x32-10, uint64 ``[2 n_calls]``."""
    first_call &= _M32
    tail = (0, index & _M32, index >> 32 ^ domain << 24)
    key = (seed & _M32, seed >> 32)
    native = _registry.native_cpu("noise")
    if native is not None:
        words = np.empty(2 * -(-n_calls // _CALLS) * _CALLS, dtype=np.uint64)
        native.philox_words(words.ctypes.data, len(words) // 2, (first_call, *tail), key)
        return words[: 2 * n_calls]
    calls = np.arange(first_call, first_call + n_calls, dtype=np.uint64) & np.uint64(_M32)
    w0, w1, w2, w3 = philox4x32((calls, *(np.full_like(calls, c) for c in tail)), key)
    return np.stack((w0 | w1 << np.uint64(32), w2 | w3 << np.uint64(32)), 1).reshape(-1)
