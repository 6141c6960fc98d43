"""Masked batches: inputs with the absent players of coalitions replaced by a baseline.

`plan_selection` prepares inputs once, `SelectPlan.rows` writes the rows of any chunk with one operator call,
`mask_inputs` does both, and `blend_inputs` is the soft, differentiable form.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from xaifast.ops import _registry
from xaifast.ops.coalitions import pack_coalitions
from xaifast.ops.plan import SelectPlan, plan_selection

__all__ = ["SelectPlan", "blend_inputs", "mask_inputs", "plan_selection"]


def mask_inputs(
    inputs: Tensor,  # [B, *feat]
    coalitions: Tensor,  # int64 [N, W] or [B, N, W]; bool [N, M] or [B, N, M]
    feature_mask: Tensor | None = None,
    baselines: float | Tensor = 0.0,
    *,
    background: Tensor | None = None,  # [R, *feat]
    mean: float | Sequence[float] | Tensor | None = None,
    std: float | Sequence[float] | Tensor | None = None,
    dtype: torch.dtype | None = None,
    memory_format: torch.memory_format = torch.contiguous_format,
    out: Tensor | None = None,
) -> Tensor:
    """Copies of every input with the absent players of each coalition replaced.

    out[b, n] = where(present[b, n], inputs[b], baseline[b]): [B, N, *feat], or [B, N, R, *feat] with a background.
    Elements are selected, never blended, so that nothing behind an absent player (NaN and Inf included) can leak.
    Selection commutes with elementwise maps: normalisation, (v - mean) / std over dimension 1, and the cast are applied
    once, to inputs and baseline, and rows are then selected as bytes. These are exactly the bytes of masking first, at
    half the memory traffic or less.

    Args:
        inputs: any real dtype.
        coalitions: packed words or bool; with a leading B for coalitions of each input.
        feature_mask: integer player ids broadcastable to one input, -1 = always present. With the inputs' rank, its
            first dimension is B or 1. None: every element is its own player.
        baselines: number, tensor broadcastable to one input, or of the inputs' rank with first dimension B or 1; in
            the units of `inputs` (before normalisation).
        background: rows that stand in for absent players; every coalition yields R rows. Excludes `baselines`.
        mean, std: number or one value per channel (dimension 1), in the inputs' dtype, float32 for integer inputs.
        dtype: dtype of the result. Default: that of the (normalised) inputs.
        memory_format: layout of a row; `torch.channels_last` needs inputs [B, C, H, W].
        out: buffer of the result's shape, dtype and layout; not differentiable.

    Raises:
        TypeError: inputs, masks or coalitions of a wrong dtype.
        ValueError: shapes that do not fit, ids below -1 or beyond the coalitions' players (compiled code, which cannot
            look at ids, takes the former as always present, the latter as absent), a baseline that an integer dtype
            cannot hold, a wrong `out`.

    Differentiable with respect to inputs and baselines; deterministic; cost: one write of the result.
    Source: Covert, Lundberg, Lee, "Explaining by removing", JMLR 2021 (feature removal).
    """
    plan = plan_selection(
        inputs,
        feature_mask,
        baselines,
        background=background,
        mean=mean,
        std=std,
        dtype=dtype,
        memory_format=memory_format,
    )
    bits = packed_coalitions("mask_inputs", coalitions, plan.n_players, inputs.shape[0], inputs.device)
    leading = (inputs.shape[0], bits.shape[-2]) + ((plan.n_background,) if background is not None else ())
    if out is None:
        return plan.all_rows(bits, leading)
    if out.shape != leading + plan.shape:
        raise ValueError(f"xaifast.mask_inputs: out must have shape {[*leading, *plan.shape]}, got {list(out.shape)}")
    try:
        rows = out.view(-1, *plan.shape) if out.numel() else out.flatten(0, len(leading) - 1)
    except RuntimeError:
        raise ValueError(
            f"xaifast.mask_inputs: out must be contiguous over inputs and coalitions, got strides {list(out.stride())}"
        ) from None
    plan.rows(bits, out=rows)
    return out


def blend_inputs(
    inputs: Tensor,  # [B, *feat]
    masks: Tensor,  # [N, M] or [B, N, M]
    feature_mask: Tensor | None = None,
    baselines: float | Tensor = 0.0,
) -> Tensor:
    """Soft masking, baseline + m * (x - baseline) with a weight m per player: [B, N, *feat].

    Args:
        inputs: [B, *feat], floating.
        masks: floating weights of the players, [N, M] or [B, N, M]; 1 keeps the input, 0 gives the baseline.
        feature_mask, baselines: as in `mask_inputs`; entries of -1 keep the input.

    Unlike `mask_inputs` this blends: NaN or Inf in the input or the baseline shows at every weight. Made of torch
    operations: differentiable (also twice) with respect to inputs, masks and baselines.

    Raises:
        TypeError: inputs or masks that are not floating.
        ValueError: as `mask_inputs`, or masks with fewer players than the feature mask.
    """
    if not inputs.is_floating_point() or not masks.is_floating_point():
        raise TypeError(
            f"xaifast.blend_inputs: inputs and masks must be floating, got {inputs.dtype} and {masks.dtype}; convert"
        )
    plan = plan_selection(inputs, feature_mask, baselines)
    n_inputs, period = inputs.shape[0], plan.index.shape[-1]
    if masks.dim() not in (2, 3) or (masks.dim() == 3 and masks.shape[0] != n_inputs):
        raise ValueError(f"xaifast.blend_inputs: masks must be [N, M] or [{n_inputs}, N, M], got {list(masks.shape)}")
    if masks.shape[-1] < plan.n_players:
        raise ValueError(
            f"xaifast.blend_inputs: masks must have a weight for each of the {plan.n_players} players of the feature "
            f"mask, got {list(masks.shape)}"
        )
    n_masks, n_players = masks.shape[-2:]
    masks = torch.nn.functional.pad(
        masks.to(inputs.dtype), (0, 1), value=1.0
    )  # a last player of weight 1 stands for -1
    known = torch.where(plan.index < 0, n_players, plan.index).long()
    if known.dim() == 1:
        weights = masks.index_select(-1, known)  # [N, P] or [B, N, P]
    else:
        masks = masks.expand(n_inputs, n_masks, masks.shape[-1])
        weights = masks.gather(-1, known[:, None].expand(n_inputs, n_masks, period))
    weights = weights.reshape(-1, n_masks, 1, period, 1)
    x = plan.x.reshape(n_inputs, 1, plan.rep, period, plan.unit)
    baseline = plan.baseline.reshape(-1, 1, plan.rep, period, plan.unit)
    return torch.lerp(baseline, x, weights).reshape(n_inputs, n_masks, *plan.shape)


def packed_coalitions(caller: str, coalitions: Tensor, n_players: int, n_inputs: int, device: torch.device) -> Tensor:
    """Check coalitions and return them as int64 words [N, W] or [B, N, W] on `device`."""
    if coalitions.dim() not in (2, 3) or (coalitions.dim() == 3 and coalitions.shape[0] != n_inputs):
        raise ValueError(
            f"xaifast.{caller}: coalitions must be [N, W] int64 words or [N, M] bool, with a leading {n_inputs} for "
            f"coalitions of each input; got {list(coalitions.shape)}"
        )
    if coalitions.dtype not in (torch.bool, torch.int64):
        raise TypeError(
            f"xaifast.{caller}: coalitions must be packed int64 words or bool, got {coalitions.dtype}; compare "
            "soft masks with a threshold or use xaifast.ops.blend_inputs"
        )
    columns = coalitions.shape[-1] * (1 if coalitions.dtype == torch.bool else 64)
    if columns < n_players:
        raise ValueError(
            f"xaifast.{caller}: coalitions must have a column (bool) or bit (words) for each of the {n_players} "
            f"players, got {coalitions.dtype} {list(coalitions.shape)}"
        )
    if coalitions.dtype == torch.bool:
        coalitions = pack_coalitions(coalitions)
    return coalitions.to(device)


def _mask_inputs_op(inputs: Tensor, coalitions: Tensor, feature_mask: Tensor, baselines: Tensor) -> Tensor:
    return mask_inputs(inputs, coalitions, feature_mask, baselines)


_registry.register(
    "mask_inputs(Tensor inputs, Tensor coalitions, Tensor feature_mask, Tensor baselines) -> Tensor",
    {"CompositeImplicitAutograd": _mask_inputs_op},
)
