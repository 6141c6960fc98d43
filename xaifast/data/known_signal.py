"""The made data sets of `xaifast.data.controlled` as a data source that knows its signal."""

from __future__ import annotations

from torch import Tensor

from .arrays import Arrays
from .controlled import Controlled, digits, made_table

_SCALES = {
    "digits-zero": "ink in 0..1 on 0",
    "digits-normalised": "(x - mean) / std over all pixels",
    "digits-noise": "ink in 0..1 on uniform noise in 0..0.5",
    "digits-textured": "ink in 0..1 on plane waves in 0..0.5",
    "table": "columns of mean 0 and standard deviation 1",
}


class KnownSignal(Arrays):
    """``controlled:NAME``: digits on one of four backgrounds, float32 ``[1, 28, 28]``, or a table of 50 columns.

    Args:
        spec: As given by the user.
        name: ``digits-`` and a background, or ``table``.

    Attributes:
        signal: bool ``[N, *shape]``, where an input carries its signal.
        scale: What the inputs' numbers are, for people.

    Raises:
        ValueError: an unknown name.
    """

    signal: Tensor
    scale: str

    def __init__(self, spec: str, name: str) -> None:
        if name not in _SCALES:
            raise ValueError(f"xaifast.open_data: controlled: must name one of {', '.join(_SCALES)}, got {name!r}")
        made: Controlled = made_table() if name == "table" else digits(name.removeprefix("digits-"))
        self.signal, self.scale = made.signal.expand(made.inputs.shape), _SCALES[name]
        class_names = [str(k) for k in range(int(made.labels.max()) + 1)]
        super().__init__(spec, made.inputs.numpy(), made.labels, class_names)
