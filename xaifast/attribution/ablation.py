"""Feature ablation: what a model's output loses when one feature group is removed."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..coalitions import Coalitions
from ..evaluate import Evaluator, as_inputs
from ..players import resolve_players
from ..removal import Replace, resolve_removal
from ..removal.windows import Grid
from .occlusion import as_given, slide

_CALLER = "xaifast.feature_ablation"


def feature_ablation(
    forward: Callable,
    inputs: Tensor | tuple[Tensor, ...],
    *,
    baselines: object = 0.0,
    target: int | str | Tensor | None = None,
    feature_mask: Tensor | tuple[Tensor, ...] | None = None,
    removal: object = None,
    additional_forward_args: object = None,
    batch_size: int | str = "auto",
    show_progress: bool = False,
    autocast: torch.dtype | None = None,
    cuda_graph: bool = False,
    allow_training_mode: bool = False,
) -> Tensor | tuple[Tensor, ...]:
    """Leave-one-out importance of feature groups.

    ``attribution[b, e] = f(x[b]) - f(x[b] without player(e))``: every element shows its player's value.

    Args:
        forward: ``forward(x) -> [b]`` or ``[b, K]``, or an object with ``.logits``; ``x`` has b rows.
        inputs: Tensor ``[B, ...]`` or tuple of tensors with common B.
        baselines: What removed elements show: a number, a tensor ``[...]`` or ``[B, ...]``, a tuple of these, or
            ``xaifast.Background(rows)``, whose rows multiply the model evaluations by R.
        target: int, LongTensor ``[B]``, ``"predicted"``, or None for all K outputs.
        feature_mask: Player ids, see `xaifast.grid_mask`; None makes every element a player, in any number.
        removal: None (replace by ``baselines``), ``"blur"``, a callable ``inputs -> baseline of the same shape``,
            ``xaifast.removal.TokenDrop()`` or ``TokenSelect()``.
        additional_forward_args: Passed on after the inputs; tensors with leading B go with their input.
        batch_size: Model rows a call, or ``"auto"``.
        show_progress: Draw a progress bar with rate and time left.
        autocast: dtype for ``torch.autocast`` around the model.
        cuda_graph: Capture the model in a CUDA graph for the chunk shape.
        allow_training_mode: Allow active dropout and batch statistics.

    Returns:
        Tensor of the inputs' shape, a K axis appended where all K outputs were asked for; a tuple for a tuple. In the
        inputs' floating dtype, at least float32. Players that do not occur in an input have no element there.

    Raises:
        TypeError, ValueError: what must hold, what was given, what to do; before the model runs where the inputs show
            it, else in the first chunk.

    Cost: a model row a player.

    Source: Zeiler and Fergus, ECCV 2014 (by occlusion); Covert, Lundberg and Lee, "Explaining by removing", JMLR 2021,
    section 6 (removal of single features).

    Example:
        >>> model = torch.nn.Linear(4, 2, bias=False).eval()
        >>> shown = feature_ablation(model, torch.ones(1, 4), target=1, feature_mask=torch.tensor([0, 0, 1, 1]))
        >>> torch.allclose(shown[0, 0], model.weight[1, :2].sum(), atol=1e-6)
        True
    """
    given = as_inputs(inputs, _CALLER)
    engine = dict(
        baselines=baselines,
        target=target,
        additional_forward_args=additional_forward_args,
        batch_size=batch_size,
        show_progress=show_progress,
        autocast=autocast,
        cuda_graph=cuda_graph,
        allow_training_mode=allow_training_mode,
    )
    maps, evaluator = ablate(forward, given, feature_mask, removal, engine, _CALLER)
    return as_given(maps, inputs, evaluator)


def ablate(
    forward: Callable,
    inputs: tuple[Tensor, ...],
    feature_mask: Tensor | tuple[Tensor, ...] | None,
    removal: object,
    engine: dict,
    caller: str,
) -> tuple[tuple[Tensor, ...], Evaluator]:
    """Maps of each input tensor, float64 ``[B, ..., K]``; ``engine`` holds arguments of `Evaluator`."""
    removal = resolve_removal(removal, caller)
    if feature_mask is None and isinstance(removal, Replace):
        elements = tuple(Grid(tuple(x.shape[1:]), (1,) * (x.dim() - 1), (1,) * (x.dim() - 1)) for x in inputs)
        return slide(forward, inputs, elements, removal, engine, caller)
    players = resolve_players(feature_mask, inputs, caller)
    evaluator = Evaluator(forward, inputs, players=players, removal=removal, caller=caller, **engine)
    one_absent = ~torch.eye(players.n_players, dtype=torch.bool, device="cpu")
    drops = evaluator.full[:, None] - evaluator(Coalitions.from_present(one_absent))  # [B, M, K]
    return players.expand(drops, inputs), evaluator
