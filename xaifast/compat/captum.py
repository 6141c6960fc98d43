"""Captum's perturbation methods, with their arguments and the shapes of their results, on xaifast's engine.

Only the import changes: ``from xaifast.compat.captum import KernelShap``, ``FeatureAblation``, ``Occlusion`` or
``ShapleyValueSampling``. Captum itself is not needed. What differs is listed in docs/captum.md. The interfaces are
those of Captum 0.9, https://captum.ai/api
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from numbers import Integral

import torch
from torch import Tensor

from ..attribution.kernel_shap import kernel_shap
from ..attribution.small_budgets import is_small
from ..players import resolve_players
from ._captum_ablation import FeatureAblation, Occlusion
from ._captum_forward import CALLER, BatchRows, Call, InputRows, find_unit
from ._captum_inputs import Attribution, as_baselines, as_inputs, as_tensors, promoted
from ._captum_sampling import ShapleyValueSampling

__all__ = ["FeatureAblation", "KernelShap", "Occlusion", "ShapleyValueSampling"]

_FEWEST = 4  # coalitions an estimate needs: full, empty and one pair


class KernelShap(Attribution):
    """Kernel SHAP as ``captum.attr.KernelShap`` offers it.

    Attributes:
        forward_func: ``forward_func(*inputs, *additional_forward_args)``: a number a row (``[b]``, ``[b, 1]``, or
            ``[b, ...]`` with a target), or one number for the whole batch, as a tensor, a NumPy array or a number.

    Example:
        >>> model = torch.nn.Linear(4, 2).eval()
        >>> attributions = KernelShap(model).attribute(torch.ones(3, 4), target=1)
        >>> torch.allclose(attributions, model.weight[1].expand(3, 4), atol=1e-5)
        True
    """

    _name = "Kernel Shap"

    def attribute(
        self,
        inputs: Tensor | tuple[Tensor, ...],
        baselines: object = None,
        target: object = None,
        additional_forward_args: object = None,
        feature_mask: Tensor | tuple[Tensor, ...] | None = None,
        n_samples: int = 25,
        perturbations_per_eval: int = 1,
        return_input_shape: bool = True,
        show_progress: bool = False,
    ) -> Tensor | tuple[Tensor, ...]:
        """Shapley values of the features, of all inputs of a batch at once.

        Args:
            inputs: Tensor ``[B, ...]`` or tuple of tensors with common B.
            baselines: What removed features show: a number, a tensor broadcastable to the input (leading B or 1), a
                tuple of these; None is zero. Rows have the dtype that input and baseline promote to.
            target: int or one-element tensor; a list of ints or LongTensor ``[B]``, one an input; for outputs of more
                dimensions a tuple of all indices after the batch axis, or a list of such tuples.
            additional_forward_args: One argument or a tuple; tensors and lists of length B go with their input.
            feature_mask: Feature ids, tensors broadcastable to the inputs (leading B or 1); an id means one feature in
                all tensors. None makes every element a feature.
            n_samples: Coalitions an input, the full and the empty one included; below 4 the values are an even split.
            perturbations_per_eval: Largest number of rows a call; 1 leaves the number to xaifast.
            return_input_shape: Whether every element shows its feature's value, or values are returned by feature.
            show_progress: Draw a progress bar.

        Returns:
            float32 on the inputs' device. Like ``inputs``; or, without ``return_input_shape``, ``[B, M]`` with M the
            largest id plus one and 0 for ids that do not occur. B is 1 where forward_func returns one number for the
            whole batch.

        Raises:
            AssertionError: a kind of argument, a target or a number of outputs that Captum asserts against.
            IndexError, RuntimeError: a target out of range.
            TypeError, ValueError: as `xaifast.kernel_shap`.

        The design's seed is drawn from torch's global generator, as Captum's samples are: ``torch.manual_seed`` makes a
        result repeatable, and every call gives another estimate.
        """
        _check_counts(n_samples, perturbations_per_eval)
        given = as_inputs(inputs, CALLER)
        baselines = as_baselines(baselines, given, CALLER)
        features = _Features.of(feature_mask, given)
        call = Call(self.forward_func, promoted(given, baselines), additional_forward_args, target)
        unit = find_unit(call, perturbations_per_eval)
        rows = BatchRows(call) if unit == "batch" else InputRows(call)
        masks = rows.lift(features.masks)
        engine = dict(
            baselines=rows.lift(baselines),
            additional_forward_args=rows.owner,
            batch_size=1 if unit else int(perturbations_per_eval) if perturbations_per_eval > 1 else "auto",
            estimator=_estimator(len(features.ids), n_samples),
            seed=int(torch.randint(2**63 - 1, (), device="cpu")),
            show_progress=show_progress,
            allow_training_mode=True,
        )
        if n_samples < _FEWEST:
            values = _even_split(rows, masks, engine)
        else:
            values = kernel_shap(rows, rows.inputs, feature_mask=masks, n_samples=n_samples, **engine).values
        if unit == "row":
            warnings.warn(
                f"{CALLER}: forward_func must answer two rows with two numbers to be called on many rows at once; it "
                "did not and was called row by row; keep the batch axis of its output",
                UserWarning,
                stacklevel=2,
            )
        values = features.place(values)  # [B, M]
        if not return_input_shape:
            return values
        maps = features.spread(values, given)
        return maps if isinstance(inputs, tuple) else maps[0]

    @property
    def multiplies_by_inputs(self) -> bool:
        """False, as in Captum."""
        return False


@dataclass(frozen=True)
class _Features:
    """Feature masks with ids counted from 0 without gaps.

    Attributes:
        masks: int64, one a tensor of the inputs.
        ids: int64 ``[M']`` on the inputs' device: the user's id of each, counted from the smallest.
        n_ids: M, the largest of them plus one.
    """

    masks: tuple[Tensor, ...]
    ids: Tensor
    n_ids: int

    @classmethod
    def of(cls, feature_mask: Tensor | tuple[Tensor, ...] | None, inputs: tuple[Tensor, ...]) -> _Features:
        """Check and renumber the user's masks; warns where ids do not start at 0."""
        device = inputs[0].device
        if feature_mask is None:
            sizes = [x.shape[1:].numel() for x in inputs]
            ids = torch.arange(sum(sizes), device=device)
            parts = zip(ids.split(sizes), inputs, strict=True)
            return cls(tuple(part.reshape(1, *x.shape[1:]) for part, x in parts), ids, len(ids))
        masks = as_tensors(feature_mask, "feature_mask", CALLER)
        if len(masks) != len(inputs):
            raise ValueError(f"{CALLER}: feature_mask must hold one mask an input ({len(inputs)}), got {len(masks)}")
        for mask in masks:
            if mask.dtype.is_floating_point or mask.dtype.is_complex or mask.dtype == torch.bool:
                raise TypeError(f"{CALLER}: feature_mask must hold integer ids, got dtype {mask.dtype}; use .long()")
        masks = tuple(mask.to(device, torch.int64) for mask in masks)
        given = torch.cat([mask.flatten() for mask in masks])
        if not given.numel():
            raise ValueError(f"{CALLER}: feature_mask must hold at least one id, got an empty mask")
        low, high = given.aminmax()
        if low != 0:
            warnings.warn(
                f"{CALLER}: feature_mask should hold ids from 0, but the smallest is {int(low)}; it is subtracted",
                UserWarning,
                stacklevel=3,
            )
        occurs = torch.zeros(int(high - low) + 1, dtype=torch.bool, device=device)
        occurs[given - low] = True
        renumbered = occurs.cumsum(0) - 1
        return cls(tuple(renumbered[mask - low] for mask in masks), occurs.nonzero().squeeze(1), len(occurs))

    def place(self, values: Tensor) -> Tensor:
        """Values ``[B, M']`` as float32 ``[B, M]``, 0 for ids that do not occur."""
        placed = torch.zeros(len(values), self.n_ids, dtype=torch.float32, device=values.device)
        placed[:, self.ids] = values.float()
        return placed

    def spread(self, values: Tensor, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Values ``[B, M]`` in the shape of the inputs, or of the first where the batch has one value."""
        maps = []
        for mask, x in zip(self.masks, inputs, strict=True):
            x = x[: len(values)]
            mask = mask[: len(values)] if mask.dim() == x.dim() else mask
            maps.append(values.gather(1, self.ids[mask].expand(x.shape).reshape(len(x), -1)).reshape(x.shape))
        return tuple(maps)


def _check_counts(n_samples: object, perturbations_per_eval: object) -> None:
    for name, count in (("n_samples", n_samples), ("perturbations_per_eval", perturbations_per_eval)):
        if not isinstance(count, Integral):
            raise TypeError(f"{CALLER}: {name} must be an int, got {type(count).__name__}")
    if n_samples < 1:
        raise ValueError(f"{CALLER}: n_samples must be at least 1, and {_FEWEST} for an estimate, got {n_samples}")


def _estimator(n_players: int, n_samples: int) -> str:
    """From ``2 M`` samples on sums over pairs are to be exact: below 1.2 pairs a player one permutation sees to it."""
    if is_small(n_players, n_samples):
        return "small"
    return "permutation" if n_samples // 2 - 1 < 1.2 * n_players and n_samples < 2**n_players else "auto"


def _even_split(rows: InputRows | BatchRows, masks: tuple[Tensor, ...], engine: dict) -> Tensor:
    """Values ``[B, M']`` where the budget holds no estimate: the total in equal parts, 0 for absent players."""
    players = resolve_players(masks, rows.inputs, CALLER)
    if players.n_players > 1:
        warnings.warn(
            f"{CALLER}: n_samples must be at least {_FEWEST} for an estimate (full, empty and one pair of coalitions); "
            f"the values are an even split; use at least {3 * players.n_players}",
            UserWarning,
            stacklevel=3,
        )
    one = tuple(torch.zeros_like(mask) for mask in masks)
    total = kernel_shap(rows, rows.inputs, feature_mask=one, n_samples=2, **engine).values  # [B, 1]
    shares = torch.ones(len(total), players.n_players, dtype=total.dtype, device=total.device)
    if players.absent is not None:
        shares[players.absent.to(total.device)] = 0
    return total * shares / shares.sum(1, keepdim=True)
