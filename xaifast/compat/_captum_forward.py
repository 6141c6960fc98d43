"""A forward function written for Captum as the engine calls it: masked rows in, one number a row out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from numbers import Integral

import torch
from torch import Tensor

CALLER = "xaifast.compat.captum.KernelShap"


class Call:
    """The user's forward function with its additional arguments and target.

    Attributes:
        tensors: Inputs as the function takes them.
        whole: Those of them that have elements; the others are handed on as they are.
        per_input: Whether an argument or the target has an entry an input.

    Raises:
        AssertionError: a target that Captum does not know.
    """

    def __init__(
        self, forward: Callable, tensors: tuple[Tensor, ...], args: object, target: object, caller: str = CALLER
    ) -> None:
        self.forward, self.tensors, self.caller = forward, tensors, caller
        self.whole = tuple(x for x in tensors if x.numel())
        self.n_inputs = len(tensors[0])
        self.args = () if args is None else args if isinstance(args, tuple) else (args,)
        self.target = _as_target(target, tensors[0].device, caller)
        self.per_input = isinstance(self.target, Tensor) or any(map(self._follows, self.args))

    def __call__(self, rows: Sequence[Tensor], owner: Tensor | None = None) -> Tensor:
        """Selected outputs, of any shape.

        Args:
            rows: ``[r, ...]`` in place of each tensor of ``whole``.
            owner: int64 ``[r]``, the input each row was made of; None where the rows are the batch itself.
        """
        waiting = iter(rows)
        tensors = [next(waiting) if x.numel() else x[:1].expand(len(rows[0]), *x.shape[1:]) for x in self.tensors]
        args, target = self.args, self.target
        if owner is not None:
            args = tuple(_of_owner(arg, owner) if self._follows(arg) else arg for arg in args)
            target = _of_owner(target, owner) if isinstance(target, Tensor) else target
        output = self.forward(*tensors, *args)
        output = getattr(output, "logits", output)
        if not (isinstance(output, int | float) or hasattr(output, "__array__")):  # tensors and NumPy's have it
            raise TypeError(
                f"{self.caller}: forward_func must return a tensor, an array or a number, got {type(output).__name__}; "
                "wrap it in a function that picks its output"
            )
        dtype = torch.float64 if isinstance(output, float) else None
        output = _select(torch.as_tensor(output, dtype=dtype, device=tensors[0].device), target, self.caller)
        return output.float() if output.dtype == torch.bool else output

    def _follows(self, arg: object) -> bool:
        """Whether an argument has an entry an input; a list of one may as well be a setting."""
        if isinstance(arg, Tensor):
            return arg.dim() > 0 and len(arg) == self.n_inputs
        return isinstance(arg, list) and len(arg) == self.n_inputs > 1


class InputRows:
    """Where every input has a value of its own.

    Attributes:
        inputs: What the engine masks, ``[B, ...]`` with at least two axes.
        owner: int64 ``[B]``, which the engine repeats with the rows; None where rows need not know their input.

    Raises:
        AssertionError: targets are not one an input.
    """

    def __init__(self, call: Call) -> None:
        self.call = call
        self.inputs = self.lift(call.tensors)
        self.owner = torch.arange(call.n_inputs, device=self.inputs[0].device) if call.per_input else None
        if isinstance(call.target, Tensor) and len(call.target) != call.n_inputs:
            raise AssertionError(
                f"{call.caller}: target must hold one entry an input ({call.n_inputs}), got {len(call.target)}"
            )

    def lift(self, values: tuple) -> tuple:
        """Masks, baselines or inputs as the engine takes them: where an input is ``[B]``, with an axis more."""
        pairs = ((value, x) for value, x in zip(values, self.call.tensors, strict=True) if x.numel())
        return tuple(v.unsqueeze(-1) if x.dim() == 1 and isinstance(v, Tensor) else v for v, x in pairs)

    def __call__(self, *rows: Tensor) -> Tensor:
        """Rows of each input tensor, then their owners where they have some, to ``[r]``."""
        rows, owner = (rows, None) if self.owner is None else (rows[:-1], rows[-1])
        n_rows = len(rows[0])
        rows = [row.squeeze(1) if x.dim() == 1 else row for row, x in zip(rows, self.call.whole, strict=True)]
        outputs = self.call(rows, owner)
        if outputs.numel() != n_rows:
            raise AssertionError(
                f"{CALLER}: forward_func must return one number a row, got {outputs.numel()} for {n_rows} rows; pass a "
                "target, or perturbations_per_eval=1 if it returns one number for all of them"
            )
        return outputs.flatten()


class BatchRows:
    """Where the whole batch has one value: it is a single input ``[1, B, ...]``, evaluated a row a call."""

    owner = None

    def __init__(self, call: Call) -> None:
        self.call = call
        self.inputs = tuple(x.unsqueeze(0) for x in call.whole)

    def lift(self, values: tuple) -> tuple:
        """Masks or baselines as the engine takes them: with an axis less than its inputs they are of one input."""
        return tuple(value for value, x in zip(values, self.call.tensors, strict=True) if x.numel())

    def __call__(self, *rows: Tensor) -> Tensor:
        """One masked batch ``[1, B, ...]`` of each input tensor to ``[1]``."""
        output = self.call([row.squeeze(0) for row in rows])
        if output.numel() != 1:
            raise AssertionError(
                f"{CALLER}: forward_func must return one number for a masked batch as it does for the inputs, got "
                f"{output.numel()}"
            )
        return output.flatten()


def find_unit(call: Call, perturbations_per_eval: int) -> str | None:
    """What must be evaluated alone: the whole ``"batch"``, each ``"row"``, or nothing (None).

    Calls the model on the inputs; on a single one twice over, unless more perturbations a call were asked for.

    Raises:
        AssertionError: neither one output nor one an input, or one with several perturbations a call.
    """
    if call.n_inputs == 1:
        if perturbations_per_eval > 1:
            return None
        owner = torch.zeros(2, dtype=torch.int64, device=call.whole[0].device)
        try:
            with torch.inference_mode():
                n_outputs = call([x.expand(2, *x.shape[1:]).clone() for x in call.whole], owner).numel()
        except Exception:  # a function of one row only; any other error comes again with a row alone
            return "row"
        return None if n_outputs == 2 else "row"
    with torch.inference_mode():
        n_outputs = call(call.whole).numel()
    if n_outputs == call.n_inputs:
        return None
    if n_outputs != 1:
        raise AssertionError(
            f"{CALLER}: forward_func must return one number an input or one for the batch, got {n_outputs} for "
            f"{call.n_inputs} inputs; pass a target"
        )
    if perturbations_per_eval != 1:
        raise AssertionError(
            f"{CALLER}: perturbations_per_eval must be 1 where forward_func returns one number for the whole batch, "
            f"got {perturbations_per_eval}"
        )
    return "batch"


def _as_target(target: object, device: torch.device, caller: str) -> tuple | Tensor | None:
    """A tuple of indices for all rows; int64 ``[B]``, or ``[B, D]`` from tuples, for each; or None."""
    if target is None or isinstance(target, tuple):
        return target
    if isinstance(target, Integral):
        return (int(target),)
    if isinstance(target, list) and target and all(isinstance(entry, Integral | tuple) for entry in target):
        return torch.tensor(target, device=device)
    if isinstance(target, Tensor) and not target.dtype.is_floating_point:
        if target.numel() == 1:
            return (int(target),)
        if target.dim() == 1:
            return target.to(device, torch.int64)
    raise AssertionError(
        f"{caller}: target must be an int, a tuple of ints, a list of these with one an input, a LongTensor [B] or "
        f"None, got {target!r}"
    )


def _select(output: Tensor, target: tuple | Tensor | None, caller: str) -> Tensor:
    """Outputs ``[r, ...]`` at the target's indices; errors of the indexing itself are torch's."""
    if target is None:
        return output
    shape = tuple(output.shape)
    if isinstance(target, tuple):
        if len(target) >= output.dim():
            kind = AssertionError if output.dim() else IndexError
            raise kind(
                f"{caller}: target must have at most one index for each output axis after the batch, got {target} for "
                f"outputs {shape}"
            )
        return output[(slice(None), *target)]
    if output.dim() == 0 or len(target) != len(output) or (target.dim() == 1 and output.dim() != 2):
        kind = AssertionError if output.dim() else IndexError
        raise kind(
            f"{caller}: targets of each input must be as many as there are outputs, and tuples where outputs have more "
            f"than two axes, got {len(target)} for outputs {shape}"
        )
    if target.dim() == 1:
        return output.gather(1, target.unsqueeze(1)).squeeze(1)
    return output[(torch.arange(len(output), device=output.device), *target.unbind(1))]


def _of_owner(value: Tensor | list, owner: Tensor) -> Tensor | list:
    """The entry of each row's input."""
    if isinstance(value, list):
        return [value[i] for i in owner.tolist()]
    return value.index_select(0, owner.to(value.device))
