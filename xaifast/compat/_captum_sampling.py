"""Captum's ShapleyValueSampling, with its arguments and the shapes of its results, on xaifast's engine."""

from __future__ import annotations

from numbers import Integral

import torch
from torch import Tensor

from ..attribution.kernel_shap import kernel_shap
from ._captum_forward import Call
from ._captum_inputs import Attribution, as_baselines, as_inputs, as_masks, check_per_eval, find_answer, promoted


class ShapleyValueSampling(Attribution):
    """Shapley values from permutations as ``captum.attr.ShapleyValueSampling`` offers them.

    Example:
        >>> model = torch.nn.Linear(4, 2).eval()
        >>> attributions = ShapleyValueSampling(model).attribute(torch.ones(3, 4), target=1, n_samples=2)
        >>> torch.allclose(attributions, model.weight[1].expand(3, 4), atol=1e-5)
        True
    """

    _name = "Shapley Value Sampling"

    def attribute(
        self,
        inputs: Tensor | tuple[Tensor, ...],
        baselines: object = None,
        target: object = None,
        additional_forward_args: object = None,
        feature_mask: Tensor | tuple[Tensor, ...] | None = None,
        n_samples: int = 25,
        perturbations_per_eval: int = 1,
        show_progress: bool = False,
    ) -> Tensor | tuple[Tensor, ...]:
        """Mean change of the output when a feature joins those before it in a permutation.

        Permutations come in pairs of one and its reverse, which makes sums over pairs of features exact; so an odd
        ``n_samples`` is rounded up. Where all coalitions are fewer, all are evaluated and the values are exact.

        Args:
            inputs: Tensor ``[B, ...]`` or tuple of tensors with common B.
            baselines: What absent features show: a number, a tensor broadcastable to the input, a tuple of these; None
                is zero.
            target: As of ``KernelShap``; None keeps all outputs.
            additional_forward_args: One argument or a tuple; tensors and lists of length B go with their input.
            feature_mask: Feature ids of any values, one mask an input; None makes every element a feature.
            n_samples: Permutations.
            perturbations_per_eval: Largest number of rows a call; 1 leaves the number to xaifast.
            show_progress: Draw a progress bar.

        Returns:
            float32 ``[*outputs, ...]``: the shape of the outputs, ``[B]``, ``[B, K]`` or ``[1]`` for one number for the
            whole batch, then that of the inputs after the first axis.

        Raises:
            AssertionError: a kind of argument or a target that Captum asserts against.
            IndexError, RuntimeError: a target out of range.
            TypeError, ValueError: as `xaifast.kernel_shap`.

        The seed is drawn from torch's global generator.
        """
        caller = self._caller()
        check_per_eval(perturbations_per_eval, caller)
        if not isinstance(n_samples, Integral) or n_samples < 1:
            raise ValueError(f"{caller}: n_samples must be an int of at least 1, got {n_samples!r}")
        given = as_inputs(inputs, caller)
        baselines = as_baselines(baselines, given, caller)
        masks = as_masks(feature_mask, given, caller)
        masks = _elements(given) if masks is None else masks
        call = Call(self.forward_func, promoted(given, baselines), additional_forward_args, target, caller)
        answer = find_answer(call, perturbations_per_eval)
        n_players = 1 + max(int(mask.max()) for mask in masks if mask.numel())
        result = kernel_shap(
            answer.rows,
            answer.rows.inputs,
            feature_mask=answer.rows.lift(masks),
            baselines=answer.rows.lift(baselines),
            additional_forward_args=answer.rows.owner,
            n_samples=2 + 2 * (n_players - 1) * ((int(n_samples) + 1) // 2),
            estimator="permutation",
            batch_size=answer.batch_size(perturbations_per_eval),
            seed=int(torch.randint(2**63 - 1, (), device="cpu")),
            show_progress=show_progress,
            allow_training_mode=True,
        )
        values = result.values.float()  # [B or 1, M, K]
        maps = []
        for x, mask in zip(given, masks, strict=True):
            spread = _spread(values, mask, x, answer.whole_batch, caller)  # [B or 1, K, ...]
            shape = answer.shape if answer.shape else (1,)
            maps.append(spread.reshape(*shape, *x.shape[1:]).contiguous())
        return tuple(maps) if isinstance(inputs, tuple) else maps[0]


def _elements(inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    sizes = [x.shape[1:].numel() for x in inputs]
    parts = torch.arange(sum(sizes), device=inputs[0].device).split(sizes)
    return tuple(part.reshape(1, *x.shape[1:]) for part, x in zip(parts, inputs, strict=True))


def _spread(values: Tensor, mask: Tensor, x: Tensor, whole_batch: bool, caller: str) -> Tensor:
    """Values ``[n, M, K]`` of features at the elements of an input: ``[n, K, ...]``."""
    mask = mask if mask.dim() == x.dim() else mask[None]
    if whole_batch and len(mask) > 1:
        raise AssertionError(
            f"{caller}: feature_mask must be the same for all inputs where forward_func returns numbers for the whole "
            f"batch, got {len(mask)} masks"
        )
    n, _, n_outputs = values.shape
    ids = mask.expand(n, *x.shape[1:]).reshape(n, -1, 1).expand(-1, -1, n_outputs)
    return values.gather(1, ids).mT.reshape(n, n_outputs, *x.shape[1:])
