"""What an attribution says about features: their scores, their order, and which elements of an input they are."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..ops.ranking import rank_features
from ..players import Players, resolve_players


@dataclass(frozen=True)
class Features:
    """Scores of features and the way back to elements; made by `resolve_features`.

    A feature is a player of the feature mask, else a pixel (all channels of it) of images ``[B, C, H, W]``, else an
    element.

    Attributes:
        scores: ``[B, P]``; 0 for players that do not occur in an input.
        players: The feature mask, resolved; None where features are positions.
        shape: Shape of a map of one input, broadcastable to it: ``[1, H, W]`` for pixels, the input's own for elements,
            ``[P]`` for players.
        absent: BoolTensor ``[B, P]`` of players that do not occur in an input; None where there are none.
    """

    scores: Tensor
    players: Players | None
    shape: torch.Size
    absent: Tensor | None

    @property
    def n_features(self) -> int:
        """P, numbered features."""
        return self.scores.shape[1]

    @property
    def mask(self) -> Tensor | None:
        """The feature mask, broadcastable to one input, or ``[B, ...]`` of the inputs' rank; None for positions."""
        return None if self.players is None else self.players.masks[0]

    @property
    def n_present(self) -> Tensor:
        """LongTensor ``[B]`` on the CPU: features that occur in each input."""
        if self.absent is None:
            return torch.full((self.scores.shape[0],), self.n_features, device="cpu")
        return (~self.absent).sum(1).cpu()

    def ranks(self, order: str = "most", *, compat: str | None = None, seed: int = 0, first_index: int = 0) -> Tensor:
        """Place of every feature in the order of perturbation, int32 ``[B, P]``; see `xaifast.ops.rank_features`.

        Players that do not occur in an input come after all that do, in every order: they are never a step.
        """
        ranks = rank_features(self.scores, order=order, nan="last", compat=compat, seed=seed, first_index=first_index)
        if self.absent is None:
            return ranks
        return rank_features(-(ranks + self.n_features * self.absent))

    def as_map(self, values: Tensor) -> Tensor:
        """Values ``[B, P]`` of positions as ``[B, *shape]``; those of players stay ``[B, P]``, beside their mask."""
        return values.view(values.shape[0], *self.shape)


def resolve_features(
    attributions: object,
    inputs: Tensor,  # [B, *feat]
    feature_mask: Tensor | None,
    caller: str,
    *,
    nan: str = "raise",
    channels: bool = False,
) -> Features:
    """Check attributions against inputs and mask; make feature scores of them.

    ``[B, H, W]``, ``[B, 1, H, W]`` and ``[B, C, H, W]`` (summed over C) are maps of images ``[B, C, H, W]``; of other
    inputs a map has the inputs' shape. With a feature mask, ``[B, M]`` scores its players, and a map is averaged over
    each player in float64, exactly where it is constant there: a patch map enlarged to pixels gives the patches' scores
    again. Players that do not occur in an input score 0, whatever is given for them.

    Args:
        attributions: Any real dtype, on the inputs' device.
        inputs: One tensor.
        feature_mask: As `resolve_players` takes it.
        caller: Prefix of messages.
        nan: ``"raise"``, or ``"last"``, which leaves NaNs to the order; a map of NaNs only is refused always.
        channels: Every channel value of an image is a feature, a map counts for all channels (Quantus).

    Raises:
        TypeError: attributions are no dense real tensor.
        ValueError: shapes or devices that do not fit, NaN.
    """
    if nan not in ("raise", "last"):
        raise ValueError(f'{caller}: nan must be "raise" or "last", got {nan!r}')
    if not isinstance(attributions, Tensor) or attributions.layout != torch.strided or attributions.is_complex():
        given = attributions.dtype if isinstance(attributions, Tensor) else type(attributions).__name__
        raise TypeError(f"{caller}: attributions must be a dense real tensor, got {given}; use torch.as_tensor")
    if attributions.device != inputs.device:
        raise ValueError(
            f"{caller}: attributions must be on the inputs' device {inputs.device}, got {attributions.device}; "
            "move them with .to()"
        )
    values, batch = attributions.detach(), inputs.shape[0]
    if channels and feature_mask is not None:
        raise ValueError(f"{caller}: feature_mask must be None where every channel value is a feature; leave it out")
    players = None if feature_mask is None else resolve_players(feature_mask, (inputs,), caller)
    absent = None if players is None or players.absent is None else players.absent.to(values.device)
    if players is None:
        maps = _as_map(values, inputs, None, caller, summed=not channels)
        shape = inputs.shape[1:] if channels else maps.shape[1:]
        scores = maps.expand(batch, *shape).flatten(1)
    else:
        shape = torch.Size((players.n_players,))
        scores = values
        if values.shape != (batch, players.n_players):
            mask, per_input = players.masks[0], players.per_input[0]
            ids = mask if per_input else mask[None]
            ids = ids.reshape(ids.shape[0], *(1,) * (inputs.dim() - ids.dim()), *ids.shape[1:])
            maps = _as_map(values, inputs, players.n_players, caller, summed=ids.shape[1] == 1)
            scores = _means(maps, ids, players.n_players)
        if absent is not None:
            scores = scores.masked_fill(absent, 0)
    _check_nan(scores, absent, nan, caller)
    return Features(scores, players, shape, absent)


def _as_map(values: Tensor, inputs: Tensor, n_players: int | None, caller: str, *, summed: bool) -> Tensor:
    """Attributions as ``[B, *feat]``, or ``[B, 1, H, W]`` of images where one value stands for all channels."""
    if inputs.dim() == 4:
        batch, channels, height, width = inputs.shape
        if values.shape == (batch, height, width):
            return values.unsqueeze(1)
        if values.shape == (batch, 1, height, width):
            return values
        if values.shape == inputs.shape:
            if not summed:
                return values
            return values.sum(1, keepdim=True, dtype=torch.float64 if values.is_floating_point() else torch.int64)
        wanted = f"[{batch}, {height}, {width}], [{batch}, 1, {height}, {width}] or {list(inputs.shape)}"
    else:
        if values.shape == inputs.shape:
            return values
        wanted = f"of the inputs' shape {list(inputs.shape)}"
    players = "" if n_players is None else f", or [{inputs.shape[0]}, {n_players}] (a score a player)"
    raise ValueError(
        f"{caller}: attributions must be {wanted}{players}, got {list(values.shape)}; resize the map to the inputs, or "
        "give the scores of players with their feature_mask"
    )


def _means(maps: Tensor, ids: Tensor, n_players: int) -> Tensor:
    """Mean of maps ``[B, *]`` over each player of ids ``[B|1, *]``: float64 ``[B, M]``, 0 for players without any."""
    maps, ids = torch.broadcast_tensors(maps.double(), ids)
    maps, ids = maps.flatten(1), ids.flatten(1)
    zeros = maps.new_zeros(maps.shape[0], n_players)
    sums = zeros.scatter_add(1, ids, maps)
    sizes = zeros.scatter_add(1, ids, torch.ones_like(maps))
    low = zeros.scatter_reduce(1, ids, maps, "amin", include_self=False)
    high = zeros.scatter_reduce(1, ids, maps, "amax", include_self=False)
    # A sum of n equal numbers divided by n may miss them by a bit, and would part players that tie.
    return torch.where(low == high, low, sums / sizes.clamp_min(1))


def _check_nan(scores: Tensor, absent: Tensor | None, nan: str, caller: str) -> None:
    if not scores.is_floating_point():
        return
    undefined = scores.isnan()  # [B, P]
    if not bool(undefined.any()):
        return
    counts = undefined.sum(1)
    present = scores.shape[1] if absent is None else (~absent).sum(1)
    nothing = counts == present
    if bool(nothing.any()):
        raise ValueError(
            f"{caller}: attributions must hold numbers, got only NaN for input {int(nothing.nonzero()[0])}; leave that "
            "input out"
        )
    if nan == "raise":
        b = int(counts.nonzero()[0])
        raise ValueError(
            f"{caller}: attributions must not be NaN, got {int(counts[b])} NaN of {scores.shape[1]} features of input "
            f'{b}; repair them, or rank them behind all numbers by nan="last"'
        )
