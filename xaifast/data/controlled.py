"""Data whose signal is known: real digits on a larger canvas, real and made tables. Deterministic by seed.

What stands behind the digits is drawn by seed and data-set index, so that input b is the same in every selection.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..noise import CONTROLLED, check_seed, normal_units, uniform_units
from .base import require

BACKGROUNDS = ("zero", "normalised", "noise", "textured")
_WHOLE = 1 << 62  # numbers of a data set as a whole, beside those of its inputs
_WAVES = 3


class Controlled(NamedTuple):
    """Inputs with labels and the features that carry the signal.

    Attributes:
        inputs: float32 ``[N, 1, S, S]`` or ``[N, M]``.
        labels: int64 ``[N]``.
        signal: bool of the inputs' shape, or ``[M]`` where all inputs share it; None where it is not known.
    """

    inputs: Tensor
    labels: Tensor
    signal: Tensor | None


def digits(
    background: str = "zero",
    *,
    size: int = 28,
    scale: int = 2,
    jitter: int = 0,
    signal: str = "ink",
    seed: int = 0,
) -> Controlled:
    """Scikit-learn's 1797 handwritten digits, 8 x 8, enlarged and placed on a square canvas.

    ========== ========================================================================================================
    zero       ink in 0..1 on 0: maps that multiply by the input are silent there by construction
    normalised the same, (x - mean) / std over all pixels of the set: the background is one number below 0
    noise      uniform in 0..0.5 wherever there is no ink
    textured   a sum of three plane waves in 0..0.5 wherever there is no ink, another one for each input
    ========== ========================================================================================================

    Args:
        background: See above.
        size: S, side of the canvas in pixels.
        scale: Side of a pixel of the digit on the canvas.
        jitter: The digit is centred, then moved by whole pixels of up to this in each direction.
        signal: ``"ink"``: pixels with ink; ``"box"``: the whole of the enlarged digit, as missing ink tells digits
            apart as well.
        seed: Of places and backgrounds, 0..2^63-1.

    Returns:
        `Controlled`: inputs ``[1797, 1, S, S]``, labels 0..9, signal of the inputs' shape. Ink is the same, bit for
        bit, for every background but ``"normalised"``.

    Raises:
        ValueError: an unknown name, a digit that does not fit on the canvas.
        ImportError: scikit-learn is not installed.

    Source: the digits are those of ``sklearn.datasets.load_digits`` (UCI); the four backgrounds follow the variants of
    MNIST that XtrAIn's family of papers uses (arXiv 2606.10877, 2605.15328), whose exact making is unknown.

    Example:
        >>> inputs, labels, signal = digits("noise")
        >>> inputs.shape, bool((inputs[~signal] < 0.5).all()), round(float(signal.float().mean()), 2)
        (torch.Size([1797, 1, 28, 28]), True, 0.17)
    """
    caller = "xaifast.data.controlled.digits"
    if background not in BACKGROUNDS or signal not in ("ink", "box"):
        raise ValueError(
            f'{caller}: background must be one of {BACKGROUNDS} and signal "ink" or "box", got {background!r} and '
            f"{signal!r}"
        )
    for name, value, least in (("size", size, 1), ("scale", scale, 1), ("jitter", jitter, 0)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{caller}: {name} must be an int of at least {least}, got {value!r}")
    check_seed(seed, 0, caller)
    margin = size - 8 * scale
    if margin // 2 < jitter:
        raise ValueError(
            f"{caller}: a digit of {8 * scale} pixels moved by {jitter} must fit on the canvas, got size={size}; "
            "enlarge it or lower scale or jitter"
        )
    images, labels = require("sklearn.datasets", "data", caller).load_digits(return_X_y=True)
    ink = torch.from_numpy(images / 16).reshape(-1, 8, 8).repeat_interleave(scale, 1).repeat_interleave(scale, 2)
    n = len(ink)
    # An input's numbers: two for its place, those of its waves, and then its noise.
    count = 2 + 3 * _WAVES * (background in ("noise", "textured")) + size * size * (background == "noise")
    drawn = uniform_units(0, n, 1, count, domain=CONTROLLED, seed=seed, first_index=0)
    place, waves, noise = drawn.tensor_split((2, 2 + 3 * _WAVES), 1)
    moves = (place * (2 * jitter + 1)).long() - jitter + margin // 2  # [N, 2]
    canvas, box = torch.zeros(n, size, size, dtype=torch.float64), torch.zeros(n, size, size, dtype=torch.bool)
    rows, columns = (moves[:, axis, None] + torch.arange(8 * scale) for axis in (0, 1))
    where = (torch.arange(n)[:, None, None], rows[:, :, None], columns[:, None, :])
    canvas[where], box[where] = ink, True
    has_ink = canvas > 0
    if background == "normalised":
        canvas = (canvas - canvas.mean()) / canvas.std(correction=0)
    elif background != "zero":
        behind = noise.view(n, size, size) if background == "noise" else _texture(waves, size)
        canvas = torch.where(has_ink, canvas, behind / 2)
    shown = has_ink if signal == "ink" else box
    return Controlled(canvas.float()[:, None], torch.from_numpy(labels).long(), shown[:, None])


def breast_cancer() -> Controlled:
    """Scikit-learn's breast-cancer table: 569 inputs of 30 columns, each of mean 0 and standard deviation 1.

    Labels are 0 (malignant) and 1 (benign); which columns carry the signal is not known.

    Raises:
        ImportError: scikit-learn is not installed.

    Example:
        >>> inputs, labels, signal = breast_cancer()
        >>> inputs.shape, labels.bincount().tolist(), signal
        (torch.Size([569, 30]), [212, 357], None)
    """
    caller = "xaifast.data.controlled.breast_cancer"
    rows, labels = require("sklearn.datasets", "data", caller).load_breast_cancer(return_X_y=True)
    return Controlled(_standardised(torch.from_numpy(rows)), torch.from_numpy(np.asarray(labels)).long(), None)


def made_table(
    n: int = 1000,
    *,
    n_columns: int = 50,
    n_classes: int = 5,
    n_informative: int = 10,
    separation: float = 1.5,
    seed: int = 0,
) -> Controlled:
    """A table whose informative columns are known: x_j = mu[class, j] + N(0, 1), and mu = 0 in the others.

    mu is ``separation`` times N(0, 1), drawn once; then all columns are brought to mean 0 and standard deviation 1, so
    that no column can be told by its size. Input i has class i mod K.

    Args:
        n: Inputs N, at least one a class.
        n_columns: M.
        n_classes: K.
        n_informative: Columns with signal, chosen at random.
        separation: Of the class centres in an informative column, in standard deviations of the noise.
        seed: 0..2^63-1.

    Returns:
        `Controlled`: inputs ``[N, M]``, labels 0..K-1, signal ``[M]``.

    Raises:
        ValueError: numbers that do not fit.

    Source: this package's, of the size of PAM50 (50 genes, 5 subtypes).

    Example:
        >>> inputs, labels, signal = made_table(200)
        >>> inputs.shape, int(signal.sum()), labels[:6].tolist()
        (torch.Size([200, 50]), 10, [0, 1, 2, 3, 4, 0])
    """
    caller = "xaifast.data.controlled.made_table"
    counts = dict(n=n, n_columns=n_columns, n_classes=n_classes, n_informative=n_informative)
    for name, value in counts.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{caller}: {name} must be a positive int, got {value!r}")
    if n_informative > n_columns or n < max(n_classes, 2) or not 0 <= separation < math.inf:
        raise ValueError(
            f"{caller}: n_informative must be at most n_columns, n at least n_classes and 2, separation finite and not "
            f"negative, got {counts} and separation={separation!r}"
        )
    check_seed(seed, 0, caller)
    order = uniform_units(0, 1, 1, n_columns, domain=CONTROLLED, seed=seed, first_index=_WHOLE)[0].argsort(stable=True)
    signal = torch.zeros(n_columns, dtype=torch.bool)
    signal[order[:n_informative]] = True
    centres = normal_units(0, n_classes, 1, n_columns, domain=CONTROLLED, seed=seed, first_index=_WHOLE + 1)
    labels = torch.arange(n) % n_classes
    rows = normal_units(0, n, 1, n_columns, domain=CONTROLLED, seed=seed, first_index=0)
    return Controlled(_standardised(rows + separation * centres[labels] * signal), labels, signal)


def _texture(waves: Tensor, size: int) -> Tensor:
    """Plane waves of two to five periods across the canvas, in 0..1: ``[n, 3 waves]`` to ``[n, size, size]``."""
    angle, periods, phase = waves.view(len(waves), 3, _WAVES).unbind(1)
    turn = 2 * math.pi * angle
    frequency = 2 * math.pi * (2 + 3 * periods) / size
    place = torch.arange(size, dtype=torch.float64)
    along_y = (frequency * turn.sin())[..., None] * place  # [n, waves, size]
    along_x = (frequency * turn.cos())[..., None] * place
    total = along_y[..., :, None] + along_x[..., None, :] + 2 * math.pi * phase[..., None, None]
    return total.sin().add(1).mean(1) / 2


def _standardised(rows: Tensor) -> Tensor:
    return ((rows - rows.mean(0)) / rows.std(0, correction=0)).float()
