"""Players: which elements of an input move together (feature masks)."""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Integral

import torch
from torch import Tensor

from .ops.plan import broadcasts

MAX_PLAYERS = 4096


def grid_mask(size: tuple[int, int], patch: int | tuple[int, int]) -> Tensor:
    """Feature mask of a regular grid of patches, ids row-major.

    Patches at the right and bottom border are smaller where ``patch`` does not divide the size.

    Args:
        size: Image height and width in pixels.
        patch: Patch side in pixels, or (height, width).

    Returns:
        LongTensor ``[H, W]`` with ids ``0..M-1``.

    Example:
        >>> grid_mask((2, 4), 2)
        tensor([[0, 0, 1, 1],
                [0, 0, 1, 1]])
    """
    height, width = size
    patch_h, patch_w = (patch, patch) if isinstance(patch, Integral) else patch
    if min(height, width, patch_h, patch_w) < 1:
        raise ValueError(
            f"xaifast.grid_mask: sizes must be at least 1, got size {(height, width)} and patch {(patch_h, patch_w)}; "
            "pass (H, W) in pixels and a positive patch side"
        )
    columns = -(-width // patch_w)
    rows_id = torch.arange(height) // patch_h  # [H]
    cols_id = torch.arange(width) // patch_w  # [W]
    return rows_id[:, None] * columns + cols_id[None, :]


@dataclass(frozen=True)
class Players:
    """Feature masks of a tuple of inputs, checked and ready to use.

    Attributes:
        masks: One int64 tensor an input, broadcastable to one input, or ``[B, ...]`` where ``per_input``.
        per_input: Whether each mask has a leading batch axis.
        n_players: M, the largest id over all masks plus one.
        absent: BoolTensor ``[B, M]`` on the CPU of players that do not occur in an input, or None when there are none.
    """

    masks: tuple[Tensor, ...]
    per_input: tuple[bool, ...]
    n_players: int
    absent: Tensor | None

    def expand(self, values: Tensor, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Spread values ``[B, M]`` or ``[B, M, K]`` over the elements of the inputs they belong to."""
        maps = []
        for x, mask, per_input in zip(inputs, self.masks, self.per_input, strict=True):
            batch = x.shape[0]
            ids = mask.expand(x.shape if per_input else x.shape[1:]).reshape(batch if per_input else 1, -1)  # [B|1, F]
            ids = ids.expand(batch, -1)
            if values.dim() == 3:
                ids = ids.unsqueeze(-1).expand(-1, -1, values.shape[2])
            maps.append(values.gather(1, ids).reshape(*x.shape, *values.shape[2:]))
        return tuple(maps)


def _check_mask(mask: object, x: Tensor, where: str, caller: str) -> bool:
    """Check one feature mask against its input; return whether it has a leading batch axis."""
    if not isinstance(mask, Tensor):
        raise TypeError(f"{caller}: {where} must be a LongTensor of player ids, got {type(mask).__name__}")
    if mask.dtype.is_floating_point or mask.dtype.is_complex or mask.dtype == torch.bool:
        raise TypeError(f"{caller}: {where} must hold integer player ids, got dtype {mask.dtype}; use .long()")
    per_input = mask.dim() == x.dim()
    shape = x.shape if per_input else x.shape[1:]
    if not broadcasts(mask.shape, shape):
        raise ValueError(
            f"{caller}: {where} must be broadcastable to one input of shape {tuple(x.shape[1:])} (or to the batch "
            f"{tuple(x.shape)}), got {tuple(mask.shape)}"
        )
    return per_input


def resolve_players(
    feature_mask: Tensor | tuple[Tensor, ...] | None,
    inputs: tuple[Tensor, ...],
    caller: str,
) -> Players:
    """Check feature masks against the inputs and count the players.

    ``None`` makes every element a player of its own, numbered through all inputs. Costs one pass over the masks and,
    for masks on a GPU, one synchronisation.

    Raises:
        TypeError: a mask is no integer tensor, or masks and inputs differ in kind.
        ValueError: shapes do not broadcast; ids are negative or leave a gap; more than 4096 players.
    """
    if feature_mask is None:
        masks, offset = [], 0
        for x in inputs:
            n_elements = x[0].numel()
            masks.append(torch.arange(offset, offset + n_elements, device=x.device).reshape(x.shape[1:]))
            offset += n_elements
        if offset == 0:
            raise ValueError(f"{caller}: inputs must hold at least one element, got none")
        _check_count(offset, caller)
        return Players(tuple(masks), (False,) * len(inputs), offset, None)

    given = feature_mask if isinstance(feature_mask, tuple) else (feature_mask,)
    if len(given) != len(inputs):
        raise ValueError(f"{caller}: feature_mask must hold one mask an input ({len(inputs)}), got {len(given)}")
    per_input, masks = [], []
    for i, (mask, x) in enumerate(zip(given, inputs, strict=True)):
        where = "feature_mask" if len(inputs) == 1 else f"feature_mask[{i}]"
        batched = _check_mask(mask, x, where, caller)
        per_input.append(batched and mask.shape[0] > 1)
        mask = mask.to(device=x.device, dtype=torch.int64)
        masks.append(mask[0] if batched and mask.shape[0] == 1 else mask)

    ids = [mask.reshape(mask.shape[0] if b else 1, -1).cpu() for mask, b in zip(masks, per_input, strict=True)]
    if any(part.numel() == 0 for part in ids):
        raise ValueError(f"{caller}: feature_mask must hold at least one id, got an empty mask")
    lowest = min(int(part.min()) for part in ids)
    if lowest < 0:
        raise ValueError(f"{caller}: feature_mask must hold ids 0..M-1, got {lowest}; renumber from 0")
    n_players = 1 + max(int(part.max()) for part in ids)
    _check_count(n_players, caller)

    batch = inputs[0].shape[0] if any(per_input) else 1
    present = torch.zeros(batch, n_players, dtype=torch.bool, device="cpu")
    for part in ids:
        present.scatter_(1, part.expand(batch, -1), True)
    seen = present.any(0)
    if not bool(seen.all()):
        gap = int((~seen).nonzero()[0])
        raise ValueError(
            f"{caller}: feature_mask must use every id 0..M-1, but id {gap} of 0..{n_players - 1} occurs nowhere; "
            "renumber with torch.unique(mask, return_inverse=True)"
        )
    absent = None if bool(present.all()) else (~present).expand(inputs[0].shape[0], -1)
    return Players(tuple(masks), tuple(per_input), n_players, absent)


def _check_count(n_players: int, caller: str) -> None:
    if n_players > MAX_PLAYERS:
        raise ValueError(
            f"{caller}: at most {MAX_PLAYERS} players are supported, got {n_players}; "
            "group elements with feature_mask=xaifast.grid_mask((H, W), patch) or a segmentation"
        )
