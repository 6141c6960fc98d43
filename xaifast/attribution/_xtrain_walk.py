"""One walk over the checkpoints of a training run, adding up what each step's updates of the players did."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise

import torch
from torch import Tensor, nn

from ..players import Players
from ..stream import Stream
from .occlude import Occluder
from .occlude.chain_end import ChainEnd
from .occlude.layer_end import LayerEnd

State = dict[str, Tensor]


@dataclass(frozen=True)
class Rule:
    """What is added up; see `xaifast.xtrain`. ``gate`` is None where no step is left out."""

    direction: str
    context: str
    gate: str | None
    mode: str
    include_rest: bool
    per_step: bool


@dataclass(frozen=True)
class _Way:
    """To a neighbouring checkpoint: its state, and what a class had in the update (None: all of it counts)."""

    state: State
    part: Tensor | None


@dataclass(frozen=True)
class Batch:
    """Some inputs, ready to be occluded.

    Attributes:
        occluder: With the players that occur in them.
        columns: Numbers of these; None for all.
        n_players: M.
        plain: Whether the network is run in float64 for every row, instead of propagating differences.
    """

    occluder: Occluder
    columns: Tensor | None
    n_players: int
    plain: bool

    def at(self, state: State) -> ChainEnd | LayerEnd:
        """Base activations at a checkpoint."""
        if not self.plain:
            return self.occluder.at(state)
        state = {name: value.to(self.occluder.inputs.device) for name, value in state.items()}
        return self.occluder.run_at(state, "float64")

    def spread(self, changes: Tensor) -> Tensor:
        """``[b, M]`` in float64; players that do not occur have 0."""
        if self.columns is None:
            return changes.double()
        wide = changes.new_zeros(len(changes), self.n_players, dtype=torch.float64)
        return wide.index_copy(1, self.columns, changes.double())


class Batches:
    """The inputs, given to a model in slices, with what belongs to them.

    Args:
        model: The network.
        x: ``[B, ...]``.
        players: Of all inputs.
        args: Passed on after the inputs; tensors with leading B go with their input.
        plain: As of `Batch`.
        options: Of `Occluder`.
    """

    def __init__(
        self, model: nn.Module, x: Tensor, players: Players, args: object, *, plain: bool = False, **options: object
    ) -> None:
        self._model, self._x, self._players, self._plain, self._options = model, x, players, plain, options
        self._args = () if args is None else args if isinstance(args, tuple) else (args,)
        self._made: dict[tuple[int, int], Batch] = {}

    def __call__(self, start: int, stop: int) -> Batch:
        """Of the inputs ``start..stop``; made once."""
        if (start, stop) not in self._made:
            part, columns = self._of(slice(start, stop)), None
            mask, n_players = part._players.masks[0], part._players.n_players
            if part._players.per_input[0]:
                columns, mask = mask.unique(return_inverse=True)
                columns = None if len(columns) == n_players else columns
            args = part._args or None
            occluder = Occluder(self._model, part._x, feature_mask=mask, additional_forward_args=args, **self._options)
            self._made[start, stop] = Batch(occluder, columns, n_players, self._plain)
        return self._made[start, stop]

    def take(self, order: Tensor, *, plain: bool = False) -> Batches:
        """Some inputs, in an order."""
        part = self._of(order)
        part._plain = plain
        return part

    def logits(self, state: State, rows: int) -> Tensor:
        """``[B, K]`` at a checkpoint, so many rows at once."""
        starts = range(0, len(self._x), rows)
        return torch.cat([self(start, min(start + rows, len(self._x))).at(state).logits for start in starts])

    def _of(self, which: slice | Tensor) -> Batches:
        batch, players = len(self._x), self._players
        masks = tuple(m[which] if own else m for m, own in zip(players.masks, players.per_input, strict=True))
        args = tuple(a[which] if isinstance(a, Tensor) and a.dim() and len(a) == batch else a for a in self._args)
        return Batches(self._model, self._x[which], replace(players, masks=masks), args, **self._options)


def neighbourhoods(states: Iterable[State]) -> Iterator[tuple[State | None, State, State | None]]:
    """Every state between the one before and the one after it; each is taken once."""
    before, here = None, None
    for after in states:
        if here is not None:
            yield before, here, after
        before, here = here, after
    if here is not None:
        yield before, here, None


class Walk:
    """Sums over the steps for a batch of inputs, in float64.

    A checkpoint serves the step that ends and the step that begins there from the same base activations, in chunks of
    inputs; between checkpoints only ``[B, M]`` numbers are kept.

    Args:
        batches: The inputs, in the order of ``targets``.
        targets: LongTensor ``[B]``; where updates are split by class, inputs of a class are neighbours.
        n_columns: Players, and one more for the rest.
        n_steps: S.
        rule: What is added up.
        parts: For ``gate="class_update"``, parts ``[K, *shape]`` of the update of a step, by class.
        dtype: Of ``per_step``.
        stream: Chunks of inputs; entered by the caller.
    """

    def __init__(
        self,
        batches: Batches,
        targets: Tensor,
        n_columns: int,
        n_steps: int,
        rule: Rule,
        parts: Callable[[int], Tensor] | None,
        dtype: torch.dtype,
        stream: Stream,
    ) -> None:
        self._batches, self._targets, self._rule, self._stream = batches, targets, rule, stream
        self._parts, self._split = parts, {}  # of the steps on both sides of a checkpoint
        batch, wide = len(targets), dict(dtype=torch.float64, device=targets.device)
        self.values = torch.zeros(batch, n_columns, **wide)
        self.logits = torch.zeros(n_steps + 1, batch, **wide)
        self.gates = torch.ones(n_steps, batch, dtype=torch.bool, device=targets.device)
        self.per_step = None
        if rule.per_step:
            self.per_step = torch.zeros(n_steps, batch, n_columns, dtype=dtype, device=targets.device)
        self._departure = torch.zeros(batch, n_columns, **wide)  # the half of a step known before its end is
        self._certified = torch.zeros(2, dtype=torch.float64)
        self._groups = [(0, batch, None)]
        if parts is not None:
            classes, sizes = targets.unique_consecutive(return_counts=True)
            edges = [0, *accumulate(sizes.tolist())]
            self._groups = [(a, b, c) for (a, b), c in zip(pairwise(edges), classes.tolist(), strict=True)]

    @property
    def clamped(self) -> bool:
        """Whether negative changes were left out."""
        return self._rule.gate == "step_feature"

    @property
    def certified(self) -> float | None:
        """Share of the rows that took the linear shortcut."""
        share, rows = self._certified.tolist()
        return share / rows if rows else None

    def visit(self, t: int, before: State | None, here: State, after: State | None) -> None:
        """Checkpoint t: ends step t - 1 and begins step t."""
        sides = [(before, t - 1, -1), (after, t, 1)]
        if self._parts is not None:
            steps = [step for state, step, _ in sides if state is not None]
            self._split = {step: self._split[step] if step in self._split else self._parts(step) for step in steps}
        for first, last, label in self._groups:
            back, ahead = (
                None if state is None else _Way(state, self._part(step, sign, label)) for state, step, sign in sides
            )

            def chunk(start: int, stop: int, first: int = first, back=back, ahead=ahead) -> None:
                self._chunk(t, slice(first + start, first + stop), here, back, ahead)

            self._stream.run(last - first, chunk)

    def _part(self, step: int, sign: int, label: int | None) -> Tensor | None:
        """What a class had in a step, toward the neighbour; None for the whole update."""
        if label is None:
            return None
        parts = self._split[step]
        return sign * parts[label].double() if label < len(parts) else torch.zeros_like(parts[0]).double()

    def _chunk(self, t: int, rows: slice, here: State, back: _Way | None, ahead: _Way | None) -> None:
        direction, context, gate = self._rule.direction, self._rule.context, self._rule.gate
        target, batch = self._targets[rows], self._batches(rows.start, rows.stop)
        end = batch.at(here)
        logit = _pick(end.logits, target)
        arrival = departure = added = None
        if ahead is not None and direction != "forward":
            departure = self._toward(ahead, context == "new", batch, end, here, target)
        if back is not None:
            if direction != "reverse":
                arrival = -self._toward(back, context == "old", batch, end, here, target)
            if direction == "symmetric":
                change = (self._departure[rows] + arrival) / 2
            else:
                change = self._departure[rows] if arrival is None else arrival
            opened = torch.full_like(target, back.part is None or bool(back.part.any()), dtype=torch.bool)
            if gate in ("step", "step_feature"):
                opened = logit > self.logits[t - 1, rows]
            added = change.clamp(min=0) if gate == "step_feature" else change
            added = torch.where(opened[:, None], added, 0)
        # all is computed before anything is written: a chunk that ran out of memory is run again in halves
        if added is not None:
            self.values[rows] += added
            self.gates[t - 1, rows] = opened
            if self.per_step is not None:
                self.per_step[t - 1, rows] = change
        self.logits[t, rows] = logit
        if departure is not None:
            self._departure[rows] = departure

    def _toward(
        self, way: _Way, foreign: bool, batch: Batch, end: ChainEnd | LayerEnd, here: State, target: Tensor
    ) -> Tensor:
        """What moving one player toward a neighbour adds to the target, float64 ``[b, M (+ 1)]``.

        ``foreign``: biases and later layers are those of the neighbour.
        """
        occluder, mixed = batch.occluder, None
        if foreign or self._rule.include_rest:
            mixed = batch.at({**way.state, occluder.weight_name: here[occluder.weight_name]})
        update = occluder.delta(here, way.state) if way.part is None else way.part
        base = mixed if foreign else end
        if self._rule.mode == "linear":
            moved = base.linear(update, target)
        else:
            moved = base.apply(update, target)
            if base.certified_share is not None:
                self._certified += len(target) * torch.tensor([base.certified_share, 1.0])
        moved = batch.spread(moved)
        if self._rule.include_rest:
            rest = _pick(mixed.logits, target) - _pick(end.logits, target)
            moved = torch.cat((moved, rest[:, None]), 1)
        return moved


def _pick(logits: Tensor, target: Tensor) -> Tensor:
    return logits.gather(1, target[:, None])[:, 0].double()


def walk(states: Iterable[State], walks: Sequence[Walk]) -> None:
    """Take several walks together, reading every checkpoint once."""
    for t, (before, here, after) in enumerate(neighbourhoods(states)):
        for one in walks:
            one.visit(t, before, here, after)
