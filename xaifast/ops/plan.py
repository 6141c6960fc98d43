"""Preparing inputs for masked batches: one pass over the inputs here, then one operator call for each chunk of rows."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from xaifast.ops._registry import tracing, undisturbed
from xaifast.ops.select import select_rows, select_rows_cpu, select_rows_out

_FEW = 4096  # elements of a row up to which what depends on its shape alone is made once


@dataclass(frozen=True)
class SelectPlan:
    """Inputs, baseline and player map in the physical order of the rows to be written; made by `plan_selection`.

    Element e of a row belongs to entry (e // unit) % P of the player map; F = rep * P * unit.
    """

    x: Tensor  # [B, F], normalised and cast
    baseline: Tensor  # [R, F] or [B, R, F], normalised and cast
    index: Tensor  # int32 [P] or [B, P]: player ids, -1 = always present
    rep: int
    unit: int
    shape: torch.Size  # *feat: the logical shape of one row
    memory_format: torch.memory_format
    n_players: int  # largest id + 1; 0 where it was not read (compiled or transformed code)

    @property
    def n_inputs(self) -> int:
        """B."""
        return self.x.shape[0]

    @property
    def n_background(self) -> int:
        """R: rows written per unit."""
        return self.baseline.shape[-2]

    def rows(self, bits: Tensor, start: int = 0, stop: int | None = None, out: Tensor | None = None) -> Tensor:
        """Write the rows of the units start..stop: [(stop - start) * R, *feat].

        Unit u is coalition u % N of input u // N; its R rows (one per background row) are adjacent. One operator call
        and no host synchronisation.

        Args:
            bits: packed coalitions, int64 [N, W], or [B, N, W] for coalitions of each input.
            start, stop: range of units; stop None means B * N.
            out: buffer for the rows, of the plan's dtype and memory format; not differentiable.

        Raises:
            ValueError: bits that cannot hold the plan's players, a range outside 0..B*N, or an unfitting `out`.
        """
        if stop is None:
            stop = self.x.shape[0] * bits.shape[-2]
        if bits.shape[-1] * 64 < self.n_players:
            raise ValueError(
                f"xaifast.SelectPlan.rows: bits must hold the {self.n_players} players of the feature mask, got "
                f"{bits.shape[-1]} words of 64 players; pack coalitions over all players"
            )
        if out is None:
            return self._logical(self._select(bits, start, stop), ((stop - start) * self.n_background,))
        flat = self._physical(out, start, stop)
        select_rows_out(self.x, bits, self.index, self.baseline, self.rep, self.unit, start, stop, flat)
        return out

    def all_rows(self, bits: Tensor, leading: tuple[int, ...]) -> Tensor:
        """The rows of all units, in the shape ``[*leading, *feat]``; `bits` hold the players."""
        return self._logical(self._select(bits, 0, self.x.shape[0] * bits.shape[-2]), leading)

    def _select(self, bits: Tensor, start: int, stop: int) -> Tensor:
        x, index, baseline = self.x, self.index, self.baseline
        # The dispatcher costs as much as the rest of a small call; a profile shall show the operator.
        direct = undisturbed(x, bits, index, baseline) and not torch.autograd._profiler_enabled()
        return (select_rows_cpu if direct else select_rows)(x, bits, index, baseline, self.rep, self.unit, start, stop)

    def _logical(self, flat: Tensor, leading: tuple[int, ...]) -> Tensor:
        if self.memory_format is torch.channels_last:
            channels, height, width = self.shape
            return flat.view(*leading, height, width, channels).movedim(-1, -3)
        return flat.view(*leading, *self.shape)

    def _physical(self, out: Tensor, start: int, stop: int) -> Tensor:
        n_rows = (stop - start) * self.n_background
        if (
            out.shape != (n_rows, *self.shape)
            or out.dtype != self.x.dtype
            or out.device != self.x.device
            or not out.is_contiguous(memory_format=self.memory_format)
        ):
            raise ValueError(
                f"xaifast.SelectPlan.rows: out must be {self.x.dtype} {[n_rows, *self.shape]} on {self.x.device} in "
                f"{self.memory_format}, got {out.dtype} {list(out.shape)} on {out.device}, strides {list(out.stride())}"
            )
        if torch.is_grad_enabled() and (self.x.requires_grad or self.baseline.requires_grad):
            raise ValueError(
                "xaifast.SelectPlan.rows: out must be None where inputs or baselines require grad (a buffer has no "
                "gradient); call it without out, or under torch.no_grad()"
            )
        if self.memory_format is torch.channels_last:
            out = out.permute(0, 2, 3, 1)
        return out.view(stop - start, self.n_background, self.x.shape[1])


def plan_selection(
    inputs: Tensor,
    feature_mask: Tensor | None = None,
    baselines: float | Tensor = 0.0,
    *,
    background: Tensor | None = None,
    mean: float | Sequence[float] | Tensor | None = None,
    std: float | Sequence[float] | Tensor | None = None,
    dtype: torch.dtype | None = None,
    memory_format: torch.memory_format = torch.contiguous_format,
) -> SelectPlan:
    """Prepare inputs, baseline and player map for writing masked rows; arguments and errors as in `mask_inputs`.

    Cost: one pass over the inputs; host synchronisations only where the feature mask lies on a GPU.
    """
    return _plan(inputs, feature_mask, baselines, background, mean, std, dtype, memory_format, not tracing())


def _plan(inputs, feature_mask, baselines, background, mean, std, dtype, memory_format, read: bool) -> SelectPlan:
    """Body of `plan_selection`; `read` says whether the player map's data may be looked at."""
    if not isinstance(inputs, Tensor):
        raise TypeError(f"xaifast.plan_selection: inputs must be a tensor [B, *feat], got {type(inputs).__name__}")
    if inputs.dim() < 1 or inputs.is_complex():
        raise TypeError(
            f"xaifast.plan_selection: inputs must be real [B, *feat], got {inputs.dtype} {list(inputs.shape)}"
        )
    if memory_format not in (torch.contiguous_format, torch.channels_last):
        raise ValueError(
            "xaifast.plan_selection: memory_format must be torch.contiguous_format or torch.channels_last, got "
            f"{memory_format}"
        )
    last = memory_format is torch.channels_last
    if last and inputs.dim() != 4:
        raise ValueError(
            f"xaifast.plan_selection: channels_last must be given inputs [B, C, H, W], got {list(inputs.shape)}; "
            "use torch.contiguous_format"
        )
    shape = inputs.shape[1:]
    if (
        read and feature_mask is None and background is None and mean is None and std is None and inputs.is_cpu
        and isinstance(baselines, float) and shape.numel() <= _FEW
    ):  # fmt: skip
        x = _flat(inputs if dtype is None else inputs.to(dtype), last)
        made = _plan_of_shape(shape, inputs.dtype, baselines, math.copysign(1.0, baselines), dtype, memory_format)
        return SelectPlan(x, made.baseline, made.index, 1, 1, shape, memory_format, made.n_players)
    return _prepare(inputs, feature_mask, baselines, background, mean, std, dtype, memory_format, read)


@functools.lru_cache(16)
def _plan_of_shape(shape, input_dtype, value, sign, dtype, memory_format) -> SelectPlan:
    """The plan of any one input, for its baseline and player map, which nothing writes to. Zeros differ by `sign`."""
    with torch.inference_mode(False):
        inputs = torch.empty((1, *shape), dtype=input_dtype, device="cpu")
        return _prepare(inputs, None, value, None, None, None, dtype, memory_format, True)


def _prepare(inputs, feature_mask, baselines, background, mean, std, dtype, memory_format, read: bool) -> SelectPlan:
    shape, last = inputs.shape[1:], memory_format is torch.channels_last
    rows = _baseline_rows(inputs, baselines, background)
    x, rows = _flat(_normalised(inputs, mean, std, dtype), last), _flat(_normalised(rows, mean, std, dtype), last)
    if background is None and rows.shape[0] != 1:
        rows = rows[:, None]  # [B, 1, F]
    index, rep, unit = _player_index(inputs, feature_mask, last, read)
    n_players = shape.numel() if feature_mask is None else 0
    if read and feature_mask is not None:
        n_players = count_players("plan_selection", feature_mask)
    return SelectPlan(x, rows, index.to(inputs.device), rep, unit, shape, memory_format, n_players)


def count_players(caller: str, index: Tensor) -> int:
    """Largest id + 1 of a player map; ValueError for ids below -1."""
    if index.numel() == 0:
        return 0
    low, high = torch.stack(torch.aminmax(index)).tolist()
    if low < -1:
        raise ValueError(
            f"xaifast.{caller}: player ids must start at 0, with -1 for elements that are always present; got {low}"
        )
    return high + 1


def _baseline_rows(inputs: Tensor, baselines: float | Tensor, background: Tensor | None) -> Tensor:
    """Baseline in the inputs' dtype: [R, *feat] of a background, [B, *feat] of each input, else [1, *feat]."""
    shape = inputs.shape[1:]
    if background is not None:
        if isinstance(baselines, Tensor) or baselines != 0:
            raise ValueError("xaifast.plan_selection: baselines must be left out where a background is given; got both")
        if not isinstance(background, Tensor) or background.dim() != inputs.dim() or background.shape[1:] != shape:
            given = list(background.shape) if isinstance(background, Tensor) else type(background).__name__
            raise ValueError(f"xaifast.plan_selection: background must be a tensor [R, {_sizes(shape)}], got {given}")
        if background.shape[0] == 0:
            raise ValueError("xaifast.plan_selection: background must have at least one row, got none")
        return _as_inputs(background, inputs, "background")
    if not isinstance(baselines, Tensor):
        if not inputs.is_floating_point() and not _representable(baselines, inputs.dtype):
            raise ValueError(
                f"xaifast.plan_selection: baselines must be a value of the inputs' {inputs.dtype}, got {baselines}; "
                "convert the inputs to a floating dtype or choose another baseline"
            )
        return torch.full((1, *shape), baselines, dtype=inputs.dtype, device=inputs.device)
    rows = baselines if baselines.dim() == inputs.dim() else baselines[None]
    fits = rows.dim() <= inputs.dim() and rows.shape[0] in (1, inputs.shape[0])
    if not fits or not broadcasts(rows.shape[1:], shape):
        raise ValueError(
            f"xaifast.plan_selection: baselines must be a number, a tensor [{_sizes(shape)}] or a tensor "
            f"[{inputs.shape[0]}, {_sizes(shape)}], got {list(baselines.shape)}"
        )
    rows = rows.reshape(rows.shape[0], *(1,) * (inputs.dim() - rows.dim()), *rows.shape[1:])
    return _as_inputs(rows, inputs, "baselines").expand(rows.shape[0], *shape)


def _as_inputs(rows: Tensor, inputs: Tensor, name: str) -> Tensor:
    if rows.dtype != inputs.dtype and not inputs.is_floating_point():
        raise TypeError(
            f"xaifast.plan_selection: {name} must have the dtype of integer inputs, got {rows.dtype} for "
            f"{inputs.dtype}; convert one"
        )
    return rows.to(inputs)


def _representable(value: float, dtype: torch.dtype) -> bool:
    if dtype == torch.bool:
        return value in (0, 1)
    return math.isfinite(value) and value == int(value) and torch.iinfo(dtype).min <= value <= torch.iinfo(dtype).max


def broadcasts(given: Sequence[int], shape: Sequence[int]) -> bool:
    """Whether a tensor of one shape expands to another (``torch.broadcast_shapes`` imports SymPy, 0.3 s)."""
    return len(given) <= len(shape) and all(g in (1, s) for g, s in zip(reversed(given), reversed(shape), strict=False))


def _sizes(shape: Sequence[int]) -> str:
    return ", ".join(str(int(s)) for s in shape)


def _normalised(t: Tensor, mean, std, dtype: torch.dtype | None) -> Tensor:
    """(t - mean) / std over dimension 1, then the cast."""
    if mean is not None:
        t = t - _per_channel(mean, t, "mean")
    if std is not None:
        t = t / _per_channel(std, t, "std")
    return t if dtype is None else t.to(dtype)


def _flat(t: Tensor, last: bool) -> Tensor:
    """Rows in their physical order, ``[B, F]``."""
    if last:
        t = t.permute(0, 2, 3, 1)
    if t.dim() != 2:
        t = t.reshape(t.shape[0], t.shape[1:].numel())
    return t.contiguous()


def _per_channel(value: float | Sequence[float] | Tensor, t: Tensor, name: str) -> Tensor:
    value = torch.as_tensor(value, device=t.device).to(t.dtype if t.is_floating_point() else torch.float32)
    if value.numel() == 1:
        return value.reshape(())
    if t.dim() < 2 or value.shape != t.shape[1:2]:
        raise ValueError(
            f"xaifast.plan_selection: {name} must be a number or one value per channel (dimension 1 of the inputs "
            f"[B, {_sizes(t.shape[1:])}]), got {list(value.shape)}"
        )
    return value.reshape(-1, *(1,) * (t.dim() - 2))


def _player_index(inputs: Tensor, feature_mask: Tensor | None, last: bool, read: bool) -> tuple[Tensor, int, int]:
    """Player map as (index int32 [P] or [B, P], rep, unit): dimensions along which it does not vary are factored
    out."""
    shape = list(inputs.shape[1:])
    if feature_mask is None:
        index = torch.arange(math.prod(shape), dtype=torch.int32, device="cpu")
        return (index.reshape(shape).permute(1, 2, 0).reshape(-1) if last else index), 1, 1
    if feature_mask.is_floating_point() or feature_mask.is_complex() or feature_mask.dtype == torch.bool:
        raise TypeError(
            f"xaifast.plan_selection: feature_mask must hold integer player ids, got {feature_mask.dtype}; convert it "
            "with .long()"
        )
    players = feature_mask if feature_mask.dim() == inputs.dim() else feature_mask[None]
    fits = players.dim() <= inputs.dim() and players.shape[0] in (1, inputs.shape[0])
    if not fits or not broadcasts(players.shape[1:], shape):
        raise ValueError(
            f"xaifast.plan_selection: feature_mask must be broadcastable to one input [{_sizes(shape)}], or have the "
            f"inputs' rank with first dimension 1 or {inputs.shape[0]}; got {list(feature_mask.shape)}"
        )
    players = players.reshape(players.shape[0], *(1,) * (inputs.dim() - players.dim()), *players.shape[1:])
    if last:
        players, shape = players.permute(0, 2, 3, 1), [*shape[1:], shape[0]]
    for d in range(players.dim()):
        if players.shape[d] > 1 and not _varies(players, d, read):
            players = players.narrow(d, 0, 1)
    first, end = 0, len(shape)
    while end and players.shape[end] == 1:
        end -= 1
    while first < end and players.shape[first + 1] == 1:
        first += 1
    players = players.expand(
        players.shape[0], *players.shape[1 : first + 1], *shape[first:end], *players.shape[end + 1 :]
    )
    index = players.reshape(players.shape[0], math.prod(shape[first:end])).to(torch.int32)
    run = _run_length(index) if read else 1
    index = index[:, ::run].contiguous()
    return (index[0] if index.shape[0] == 1 else index), math.prod(shape[:first]), run * math.prod(shape[end:])


def _run_length(index: Tensor) -> int:
    """Largest number of neighbours ``[B, P]`` falls into aligned groups of, each of one player."""
    if index.shape[1] == 0:
        return 1
    starts = (index[:, 1:] != index[:, :-1]).any(0).nonzero().squeeze(1) + 1
    if 2 * len(starts) >= index.shape[1]:  # shorter than two on average
        return 1
    return math.gcd(index.shape[1], *starts.tolist())


def _varies(players: Tensor, dim: int, read: bool) -> bool:
    if players.stride(dim) == 0:
        return False
    return not (read and bool((players == players.narrow(dim, 0, 1)).all()))
