"""What the drop-ins for Captum share: arguments as the engine takes them, answers of several numbers, methods."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ._captum_forward import BatchRows, Call, InputRows


def as_tensors(value: object, name: str, caller: str) -> tuple[Tensor, ...]:
    """A tensor or a tuple of tensors as a tuple."""
    given = value if isinstance(value, tuple) else (value,)
    for part in given:
        if not isinstance(part, Tensor):
            raise AssertionError(f"{caller}: {name} must be a tensor or a tuple of tensors, got {type(part).__name__}")
    return given


def as_inputs(inputs: object, caller: str) -> tuple[Tensor, ...]:
    """Inputs with a batch axis, at least one of them with elements."""
    given = as_tensors(inputs, "inputs", caller)
    if not all(x.dim() for x in given) or not any(x.numel() for x in given):
        raise ValueError(
            f"{caller}: inputs must have a batch axis and hold at least one element, got shapes "
            f"{[tuple(x.shape) for x in given]}"
        )
    return given


def as_baselines(baselines: object, inputs: tuple[Tensor, ...], caller: str) -> tuple[Tensor | float, ...]:
    """One baseline an input."""
    if baselines is None:
        return tuple(False if x.dtype == torch.bool else 0 for x in inputs)
    given = baselines if isinstance(baselines, tuple) else (baselines,)
    for part in given:
        if not isinstance(part, Tensor | int | float):
            raise AssertionError(f"{caller}: baselines must be tensors or numbers, got {type(part).__name__}")
    if len(given) != len(inputs):
        raise ValueError(f"{caller}: baselines must hold one entry an input ({len(inputs)}), got {len(given)}")
    return given


def promoted(inputs: tuple[Tensor, ...], baselines: tuple[Tensor | float, ...]) -> tuple[Tensor, ...]:
    """Inputs in the dtype that a mixture with their baseline has."""
    return tuple(x.to(torch.result_type(x, baseline)) for x, baseline in zip(inputs, baselines, strict=True))


def as_masks(feature_mask: object, inputs: tuple[Tensor, ...], caller: str) -> tuple[Tensor, ...] | None:
    """Feature masks, their ids, of any values, counted from 0 without gaps; None where every element is a feature."""
    if feature_mask is None:
        return None
    masks = as_tensors(feature_mask, "feature_mask", caller)
    if len(masks) != len(inputs):
        raise ValueError(f"{caller}: feature_mask must hold one mask an input ({len(inputs)}), got {len(masks)}")
    sizes, shapes = [mask.numel() for mask in masks], [mask.shape for mask in masks]
    _, ids = torch.cat([mask.to(inputs[0].device).flatten() for mask in masks]).unique(return_inverse=True)
    return tuple(part.reshape(shape) for part, shape in zip(ids.split(sizes), shapes, strict=True))


def check_per_eval(perturbations_per_eval: object, caller: str) -> None:
    """A positive int, as Captum asserts."""
    if not isinstance(perturbations_per_eval, int) or perturbations_per_eval < 1:
        raise AssertionError(
            f"{caller}: perturbations_per_eval must be an int of at least 1, got {perturbations_per_eval!r}"
        )


class OutputRows(InputRows):
    """Every input has values of its own: rows to ``[r, K]``."""

    def __call__(self, *rows: Tensor) -> Tensor:
        """As `InputRows`, with outputs of any shape ``[r, ...]``."""
        rows, owner = (rows, None) if self.owner is None else (rows[:-1], rows[-1])
        n_rows = len(rows[0])
        rows = [row.squeeze(1) if x.dim() == 1 else row for row, x in zip(rows, self.call.whole, strict=True)]
        outputs = self.call(rows, owner)
        if outputs.dim() == 0 or len(outputs) != n_rows:
            raise AssertionError(
                f"{self.call.caller}: forward_func must answer {n_rows} rows with as many outputs, as it does for the "
                f"inputs, got shape {tuple(outputs.shape)}"
            )
        return outputs.reshape(n_rows, -1)


class OutputBatch(BatchRows):
    """The whole batch has the values: one masked batch to ``[1, K]``."""

    def __call__(self, *rows: Tensor) -> Tensor:
        """As `BatchRows`, with outputs of any shape."""
        return self.call([row.squeeze(0) for row in rows]).reshape(1, -1)


@dataclass(frozen=True)
class Answer:
    """What a forward function answers to the inputs.

    Attributes:
        rows: It, as the engine calls it.
        shape: Of the answer.
        dtype: Of the answer.
    """

    rows: OutputRows | OutputBatch
    shape: torch.Size
    dtype: torch.dtype

    @property
    def whole_batch(self) -> bool:
        """Whether the answer is to the batch, not to each input."""
        return isinstance(self.rows, OutputBatch)

    def batch_size(self, perturbations_per_eval: int) -> int | str:
        """Rows a call of the engine: what was asked for, and for 1 what suits."""
        if self.whole_batch:
            return 1
        return perturbations_per_eval if perturbations_per_eval > 1 else "auto"


def find_answer(call: Call, perturbations_per_eval: int) -> Answer:
    """Call the model on the inputs; on a single one twice over, unless more perturbations a call were asked for.

    Raises:
        AssertionError: several perturbations a call for an answer that is not one an input.
    """
    with torch.inference_mode():
        clean = call(call.whole)
        each = clean.dim() > 0 and len(clean) == call.n_inputs
        if each and call.n_inputs == 1 and perturbations_per_eval == 1:
            owner = torch.zeros(2, dtype=torch.int64, device=call.whole[0].device)
            try:
                twice = call([x.expand(2, *x.shape[1:]).clone() for x in call.whole], owner)
                each = twice.dim() > 0 and len(twice) == 2
            except Exception:  # a function of one row only; any other error comes again with a row alone
                each = False
    if not each and perturbations_per_eval > 1:
        raise AssertionError(
            f"{call.caller}: perturbations_per_eval must be 1 where forward_func does not return one output an input, "
            f"got {perturbations_per_eval} and an output of shape {tuple(clean.shape)} for {call.n_inputs} inputs"
        )
    return Answer(OutputRows(call) if each else OutputBatch(call), clean.shape, clean.dtype)


class Attribution:
    """What Captum's perturbation methods have in common.

    Attributes:
        forward_func: ``forward_func(*inputs, *additional_forward_args)``: numbers a row, ``[b]`` or ``[b, ...]``, or
            numbers for the whole batch.
    """

    _name: str

    def __init__(self, forward_func: Callable) -> None:
        if not callable(forward_func):
            raise TypeError(f"{self._caller()}: forward_func must be callable, got {type(forward_func).__name__}")
        self.forward_func = forward_func

    @classmethod
    def _caller(cls) -> str:
        return f"xaifast.compat.captum.{cls.__name__}"

    def attribute_future(self, *args: object, **kwargs: object) -> None:
        """Not implemented."""
        raise NotImplementedError(f"{self._caller()}: attribute_future is not implemented; call attribute")

    def has_convergence_delta(self) -> bool:
        """False, as in Captum."""
        return False

    @property
    def multiplies_by_inputs(self) -> bool:
        """True, as in Captum."""
        return True

    @classmethod
    def get_name(cls) -> str:
        """The method's name in words."""
        return cls._name
