"""Operators, registered as ``torch.ops.xaifast.*``: one family a file."""

from .coalitions import design_size, pack_coalitions, sample_coalitions, unpack_coalitions
from .masking import blend_inputs, mask_inputs
from .occlude import occlude_linear
from .perturb import PerturbPlan, perturb_by_rank, plan_perturbation
from .plan import SelectPlan, plan_selection
from .quantiles import quantile_masks
from .ranking import rank_features
from .tokens import compact_tokens, select_tokens

__all__ = [
    "PerturbPlan",
    "SelectPlan",
    "blend_inputs",
    "compact_tokens",
    "design_size",
    "mask_inputs",
    "occlude_linear",
    "pack_coalitions",
    "perturb_by_rank",
    "plan_perturbation",
    "plan_selection",
    "quantile_masks",
    "rank_features",
    "sample_coalitions",
    "select_tokens",
    "unpack_coalitions",
]
