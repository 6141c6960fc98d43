"""Players of a flattened input, as the operator wants them."""

from __future__ import annotations

import torch
from torch import Tensor

from ...ops.occlude import group_elements
from ...players import Players


class Groups:
    """Ids of a batch's elements and lists of each player's elements.

    Attributes:
        n_players: M.
        ids: int64 ``[1, N]`` or ``[B, N]``.
    """

    def __init__(self, players: Players, x: Tensor) -> None:
        mask, per_input = players.masks[0], players.per_input[0]
        self.n_players = players.n_players
        self.ids = mask.expand(x.shape if per_input else x.shape[1:]).reshape(len(x) if per_input else 1, -1)
        own = torch.arange(self.ids.shape[1], device=x.device)
        self._lists = None
        if per_input or not torch.equal(self.ids[0], own):
            _, order, offsets = group_elements(self.ids, x.flatten(1), self.n_players)
            self._lists = order, offsets

    def lists(self, part: slice) -> tuple[Tensor | None, Tensor | None]:
        """Elements sorted by player and where each begins, for some samples; None where each element is a player."""
        if self._lists is None:
            return None, None
        return self._lists if len(self.ids) == 1 else tuple(t[part] for t in self._lists)

    def of(self, samples: Tensor) -> Tensor:
        """Ids of the elements of these samples, ``[1 | R, N]``."""
        return self.ids if len(self.ids) == 1 else self.ids[samples]

    def sum(self, values: Tensor, part: slice) -> Tensor:
        """Add the elements of each player: ``[b, N, K]`` to ``[b, M, K]``."""
        if self._lists is None:
            return values
        out = values.new_zeros(values.shape[0], self.n_players, values.shape[2])
        if len(self.ids) == 1:
            return out.index_add_(1, self.ids[0], values)
        return out.scatter_add_(1, self.ids[part][:, :, None].expand_as(values), values)
