"""What the metrics ask of their inputs."""

from __future__ import annotations

import torch
from torch import Tensor

from ..evaluate import as_inputs

_DTYPES = (
    torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64,
    torch.float16, torch.bfloat16, torch.float32, torch.float64,
)  # fmt: skip


def one_tensor(inputs: object, caller: str) -> Tensor:
    """The one input tensor ``[B, ...]`` of a metric over feature maps."""
    given = as_inputs(inputs, caller)
    if len(given) != 1:
        raise ValueError(
            f"{caller}: inputs must be one tensor, got {len(given)}; pass the others as additional_forward_args"
        )
    return given[0]


def check_maps(caller: str, shape: str, **maps: Tensor) -> None:
    """Named maps are dense real tensors of one non-empty shape with the axes of `shape` ("B, M"), on one device."""
    rank = shape.count(",") + 1
    (first_name, first), *_ = maps.items()
    for name, values in maps.items():
        if not isinstance(values, Tensor):
            raise TypeError(f"{caller}: {name} must be a tensor [{shape}], got {type(values).__name__}")
        if values.layout != torch.strided or values.dtype not in _DTYPES:
            raise TypeError(
                f"{caller}: {name} must be a dense real tensor (bool, int8 to int64, uint8, float16 to float64), got "
                f"{values.layout} of {values.dtype}; convert it"
            )
        if values.dim() != rank:
            raise ValueError(
                f"{caller}: {name} must have shape [{shape}], got {list(values.shape)}; "
                "unsqueeze(0) adds an axis of one, flatten(1) or xaifast.metrics.to_patches makes maps [B, M]"
            )
        if values.shape != first.shape:
            raise ValueError(
                f"{caller}: {first_name} and {name} must have one shape, got {list(first.shape)} and "
                f"{list(values.shape)}"
            )
        if values.device != first.device:
            raise ValueError(
                f"{caller}: {first_name} and {name} must be on one device, got {first.device} and {values.device}; "
                "move one with .to()"
            )
        if values.numel() == 0:
            raise ValueError(f"{caller}: {name} must not be empty, got shape {list(values.shape)}; skip empty batches")


def check_finite(caller: str, name: str, values: Tensor, kept: Tensor | None = None, advice: str = "") -> None:
    """Values are finite, where `kept`; one synchronisation for floating tensors."""
    if not values.is_floating_point():
        return
    bad = ~values.isfinite()
    if kept is not None:
        bad &= kept
    if bool(bad.any()):
        index = bad.nonzero()[0].tolist()
        raise ValueError(
            f"{caller}: {name} must be finite, got {values[tuple(index)].item()} at {index}; "
            + (advice or "mend the attribution, or leave that input out")
        )


def result_dtype(*maps: Tensor) -> torch.dtype:
    """The floating dtype of the maps together, at least float32."""
    dtype = torch.float32
    for values in maps:
        if values.is_floating_point():
            dtype = torch.promote_types(dtype, values.dtype)
    return dtype
