"""Perturbed batches: the rows of insertion and deletion curves.

`plan_perturbation` prepares inputs, baselines and ranks once, `PerturbPlan.rows` writes the rows of any chunk with one
operator call, and `perturb_by_rank` does both.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from xaifast.ops import _registry
from xaifast.ops._registry import tracing
from xaifast.ops.perturb_rows import perturb_rows, perturb_rows_out
from xaifast.ops.plan import _plan, broadcasts

__all__ = ["PerturbPlan", "perturb_by_rank", "plan_perturbation"]

_PIECE_BYTES = 16  # shorter entries of odd sizes (the channels of a pixel) cost more to copy than their ranks to repeat


@dataclass(frozen=True)
class PerturbPlan:
    """Inputs, baselines and ranks in the physical order of the rows to be written; made by `plan_perturbation`.

    Element e of a row belongs to entry (e // unit) % P of the rank map; F = rep * P * unit.
    """

    x: Tensor  # [B, F], normalised and cast
    insertion: Tensor  # [1, F] or [B, F], normalised and cast
    deletion: Tensor  # the same
    rank: Tensor  # int32 [1, P] or [B, P]; -1 = never perturbed
    rep: int
    unit: int
    shape: torch.Size  # *feat: the logical shape of one row
    memory_format: torch.memory_format
    n_features: int  # M: counts run from 0 to M

    @property
    def n_inputs(self) -> int:
        """B."""
        return self.x.shape[0]

    def points(
        self, insertion_counts: Sequence[int] | Tensor = (), deletion_counts: Sequence[int] | Tensor = ()
    ) -> Tensor:
        """Points of curves, those of insertion first: int64 [N, 2] of (count, 0 insertion | 1 deletion).

        Raises:
            TypeError: counts that are no integers.
            ValueError: counts outside 0..M; compiled code does not look into tensors.
        """
        counts = [
            _counts(given, name, self.n_features, self.x.device)
            for name, given in (("insertion_counts", insertion_counts), ("deletion_counts", deletion_counts))
        ]
        kinds = [torch.full_like(given, kind) for kind, given in enumerate(counts)]
        return torch.stack((torch.cat(counts), torch.cat(kinds)), 1)

    def rows(self, points: Tensor, start: int = 0, stop: int | None = None, out: Tensor | None = None) -> Tensor:
        """Write the rows of the units start..stop: [stop - start, *feat].

        Unit u is point u % N of input u // N. One operator call and no host synchronisation.

        Args:
            points: int64 [N, 2] of (count, 0 insertion | 1 deletion), on the inputs' device.
            start, stop: range of units; stop None means B * N.
            out: buffer for the rows, of the plan's dtype and memory format; not differentiable.

        Raises:
            ValueError: a range outside 0..B*N, or an unfitting `out`.
        """
        if stop is None:
            stop = self.x.shape[0] * points.shape[0]
        args = (self.x, self.insertion, self.deletion, self.rank, self.rep, self.unit, points, start, stop)
        if out is None:
            flat = perturb_rows(*args)
            if self.memory_format is torch.channels_last:
                channels, height, width = self.shape
                return flat.view(stop - start, height, width, channels).permute(0, 3, 1, 2)
            return flat.view(stop - start, *self.shape)
        perturb_rows_out(*args, self._physical(out, stop - start))
        return out

    def _physical(self, out: Tensor, n_rows: int) -> Tensor:
        if (
            out.shape != (n_rows, *self.shape)
            or out.dtype != self.x.dtype
            or out.device != self.x.device
            or not out.is_contiguous(memory_format=self.memory_format)
        ):
            raise ValueError(
                f"xaifast.PerturbPlan.rows: out must be {self.x.dtype} {[n_rows, *self.shape]} on {self.x.device} in "
                f"{self.memory_format}, got {out.dtype} {list(out.shape)} on {out.device}, strides {list(out.stride())}"
            )
        if torch.is_grad_enabled() and any(t.requires_grad for t in (self.x, self.insertion, self.deletion)):
            raise ValueError(
                "xaifast.PerturbPlan.rows: out must be None where inputs or baselines require grad (a buffer has no "
                "gradient); call it without out, or under torch.no_grad()"
            )
        if self.memory_format is torch.channels_last:
            out = out.permute(0, 2, 3, 1)
        return out.view(n_rows, self.x.shape[1])


def plan_perturbation(
    inputs: Tensor,
    ranks: Tensor,
    *,
    insertion_baseline: float | Tensor = 0.0,
    deletion_baseline: float | Tensor = 0.0,
    feature_mask: Tensor | None = None,
    mean: float | Sequence[float] | Tensor | None = None,
    std: float | Sequence[float] | Tensor | None = None,
    dtype: torch.dtype | None = None,
    memory_format: torch.memory_format = torch.contiguous_format,
) -> PerturbPlan:
    """Prepare inputs, baselines and ranks for writing perturbed rows; arguments and errors as in `perturb_by_rank`.

    Cost: one pass over inputs, baselines and ranks; host synchronisations only where a feature mask lies on a GPU.
    """
    _check(inputs, ranks, feature_mask)
    options = (mean, std, dtype, memory_format)
    if feature_mask is None:
        ranks = ranks.reshape(ranks.shape[0], *(1,) * (inputs.dim() - ranks.dim()), *ranks.shape[1:])
        plan = _plan(inputs, ranks, insertion_baseline, None, *options, read=False)
        rank, n_features = plan.index, ranks.shape[1:].numel()
    else:
        plan = _plan(inputs, feature_mask, insertion_baseline, None, *options, read=not tracing())
        n_features = ranks.shape[1]
        if plan.n_players > n_features:
            raise ValueError(
                f"xaifast.plan_perturbation: ranks must be [B, M] with a rank for each of the {plan.n_players} players "
                f"of the feature mask, got {list(ranks.shape)}"
            )
        players = plan.index.long().expand(inputs.shape[0], plan.index.shape[-1])
        rank = ranks.to(torch.int32).gather(1, players.clamp(min=0)).masked_fill(players < 0, -1)
    insertion = deletion = plan.baseline
    if deletion_baseline is not insertion_baseline:
        one_player = torch.zeros((), dtype=torch.int32, device=inputs.device)
        deletion = _plan(inputs, one_player, deletion_baseline, None, *options, read=False).baseline
    insertion, deletion = (t.flatten(0, -2) for t in (insertion, deletion))
    rank, unit = torch.atleast_2d(rank), plan.unit
    entry_bytes = unit * plan.x.element_size()
    if entry_bytes < _PIECE_BYTES and entry_bytes & (entry_bytes - 1):
        rank, unit = rank.repeat_interleave(unit, 1), 1
    return PerturbPlan(plan.x, insertion, deletion, rank, plan.rep, unit, plan.shape, memory_format, n_features)


def perturb_by_rank(
    inputs: Tensor,  # [B, *feat]
    ranks: Tensor,  # int [B, *feat'], or [B, M] with a feature mask
    *,
    insertion_counts: Sequence[int] | Tensor | None = None,
    deletion_counts: Sequence[int] | Tensor | None = None,
    insertion_baseline: float | Tensor = 0.0,
    deletion_baseline: float | Tensor = 0.0,
    feature_mask: Tensor | None = None,
    mean: float | Sequence[float] | Tensor | None = None,
    std: float | Sequence[float] | Tensor | None = None,
    dtype: torch.dtype | None = None,
    memory_format: torch.memory_format = torch.contiguous_format,
) -> Tensor:
    """Inputs with their first k features inserted into a baseline, or deleted: [B, N_ins + N_del, *feat].

    Insertion of k features: where(rank < k, inputs, insertion_baseline). Deletion: where(rank < k, deletion_baseline,
    inputs). Elements are selected, never blended, so that nothing behind a removed feature (NaN and Inf included) can
    leak; normalisation and cast are applied once, to inputs and baselines, as in `mask_inputs`.

    Args:
        inputs: any real dtype.
        ranks: integer place of every feature, 0 = perturbed first, as `rank_features` gives them: one row an input,
            the rest broadcastable to one input (for images ``[B, H, W]`` or ``[B, 1, H, W]`` move all channels of a
            pixel together); with a feature mask ``[B, M]``, a rank a player.
        insertion_counts, deletion_counts: integers 0..M, M the number of ranks of an input; at least one of both.
        insertion_baseline, deletion_baseline: number, tensor broadcastable to one input, or of the inputs' rank with
            first dimension B or 1; in the units of `inputs` (before normalisation).
        feature_mask: integer player ids as in `mask_inputs`; elements of player -1 always show the input.
        mean, std, dtype, memory_format: as in `mask_inputs`.

    Raises:
        TypeError: ranks or counts that are no integers, masks or baselines of a wrong dtype.
        ValueError: shapes that do not fit, counts outside 0..M, no counts, a baseline that an integer dtype cannot
            hold.

    Differentiable with respect to inputs and baselines; deterministic; cost: one write of the result.
    Source: the curves of Petsiuk, Das, Saenko, "RISE", BMVC 2018, section 4.2; MoRF and LeRF of Samek et al.,
    "Evaluating the visualization of what a deep neural network has learned", TNNLS 2017.

    Example:
        >>> x, ranks = torch.tensor([[5.0, 6.0, 7.0]]), torch.tensor([[2, 0, 1]])
        >>> perturb_by_rank(x, ranks, insertion_counts=[0, 1], deletion_counts=[1]).tolist()
        [[[0.0, 0.0, 0.0], [0.0, 6.0, 0.0], [5.0, 0.0, 7.0]]]
    """
    if insertion_counts is None and deletion_counts is None:
        raise ValueError("xaifast.perturb_by_rank: insertion_counts or deletion_counts must be given; got neither")
    plan = plan_perturbation(
        inputs, ranks, insertion_baseline=insertion_baseline, deletion_baseline=deletion_baseline,
        feature_mask=feature_mask, mean=mean, std=std, dtype=dtype, memory_format=memory_format,
    )  # fmt: skip
    none: tuple[int, ...] = ()
    points = plan.points(
        none if insertion_counts is None else insertion_counts, none if deletion_counts is None else deletion_counts
    )
    return plan.rows(points).unflatten(0, (inputs.shape[0], points.shape[0]))


def _check(inputs: Tensor, ranks: Tensor, feature_mask: Tensor | None) -> None:
    if not isinstance(inputs, Tensor) or inputs.dim() < 2:
        given = list(inputs.shape) if isinstance(inputs, Tensor) else type(inputs).__name__
        raise TypeError(f"xaifast.plan_perturbation: inputs must be a tensor [B, *feat], got {given}")
    if not isinstance(ranks, Tensor) or ranks.is_floating_point() or ranks.is_complex() or ranks.dtype == torch.bool:
        given = ranks.dtype if isinstance(ranks, Tensor) else type(ranks).__name__
        raise TypeError(
            f"xaifast.plan_perturbation: ranks must be an integer tensor, got {given}; rank values by "
            "xaifast.ops.rank_features"
        )
    n_inputs, feat = inputs.shape[0], inputs.shape[1:]
    shape = f"[{n_inputs}, *feat] with feat broadcastable to one input {list(feat)}"
    fits = 2 <= ranks.dim() <= inputs.dim() and broadcasts(ranks.shape[1:], feat)
    if feature_mask is not None:
        shape, fits = f"[{n_inputs}, M] beside a feature mask", ranks.dim() == 2
    if not fits or ranks.shape[0] != n_inputs or ranks.device != inputs.device:
        raise ValueError(
            f"xaifast.plan_perturbation: ranks must be {shape}, on {inputs.device}; got {list(ranks.shape)} on "
            f"{ranks.device}"
        )


def _counts(given: Sequence[int] | Tensor, name: str, n_features: int, device: torch.device) -> Tensor:
    """Counts as int64 [N] on the device."""
    if isinstance(given, Tensor):
        integral = not (given.is_floating_point() or given.is_complex() or given.dtype == torch.bool)
        if not integral or given.dim() != 1:
            raise TypeError(
                f"xaifast.perturb_by_rank: {name} must be integers [N], got {given.dtype} {list(given.shape)}"
            )
        values = [] if tracing() or given.numel() == 0 else torch.stack(torch.aminmax(given)).tolist()
    else:
        try:
            values = [operator.index(k) for k in given]
        except TypeError:
            raise TypeError(f"xaifast.perturb_by_rank: {name} must be integers, got {given!r}") from None
        given = torch.tensor(values, dtype=torch.int64, device=device)
    for k in values:
        if not 0 <= k <= n_features:
            raise ValueError(
                f"xaifast.perturb_by_rank: {name} must lie between 0 and the {n_features} features, got {k}"
            )
    return given.to(device, torch.int64)


def _perturb_by_rank_op(
    inputs: Tensor, ranks: Tensor, insertion_counts: list[int], deletion_counts: list[int], insertion_baseline: Tensor,
    deletion_baseline: Tensor,
) -> Tensor:  # fmt: skip
    return perturb_by_rank(
        inputs, ranks, insertion_counts=insertion_counts, deletion_counts=deletion_counts,
        insertion_baseline=insertion_baseline, deletion_baseline=deletion_baseline,
    )  # fmt: skip


_registry.register(
    "perturb_by_rank(Tensor inputs, Tensor ranks, SymInt[] insertion_counts, SymInt[] deletion_counts, "
    "Tensor insertion_baseline, Tensor deletion_baseline) -> Tensor",
    {"CompositeImplicitAutograd": _perturb_by_rank_op},
)
