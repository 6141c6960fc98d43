"""Operators, registered as ``torch.ops.xaifast.*``: one family a file."""

from .coalitions import design_size, pack_coalitions, sample_coalitions, unpack_coalitions
from .masking import blend_inputs, mask_inputs
from .plan import SelectPlan, plan_selection
from .tokens import compact_tokens, select_tokens

__all__ = [
    "SelectPlan",
    "blend_inputs",
    "compact_tokens",
    "design_size",
    "mask_inputs",
    "pack_coalitions",
    "plan_selection",
    "sample_coalitions",
    "select_tokens",
    "unpack_coalitions",
]
