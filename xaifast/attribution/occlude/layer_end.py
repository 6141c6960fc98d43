"""Any network at one state: its rest is run on the occluded rows of the first layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ...stream import Stream, auto_rows
from .first_layer import FirstLayer, Run, check_places
from .groups import Groups


class LayerEnd:
    """What `Occluder.at` returns for networks that are no chain; see `xaifast.attribution.occlude.Occluder`.

    Outputs are subtracted in float64, so an error is relative to the outputs, not to their difference: with
    precision="float32" about 1e-6 of the outputs.

    Args:
        model, layer: The network and its first layer.
        state: Parameters and buffers.
        x: ``[B, ...]`` as the model takes it.
        args: Passed on after x; tensors with leading B go with their input.
        groups: Players of the elements.
        precision: "float32" or "float64".
        batch_size: Rows a model call, or "auto".
        caller: Prefix of messages.
    """

    certified_share = None

    def __init__(
        self,
        model: nn.Module,
        layer: FirstLayer,
        state: Mapping[str, Tensor],
        x: Tensor,
        args: Sequence[object],
        groups: Groups,
        precision: str,
        batch_size: int | str,
        caller: str,
    ) -> None:
        self._dtype = torch.float64 if precision == "float64" else torch.float32
        self._x, self._args, self._groups, self._layer = self._cast(x), tuple(map(self._cast, args)), groups, layer
        self._run = Run(model, layer, {key: self._cast(t) for key, t in state.items()}, caller)
        with torch.no_grad():
            self._u, self._z, logits = self._run.clean([self._x, *self._args])
            check_places(self._run, self._u, self._x, self._args)
        self.logits = logits.double()
        flat = x.dim() == 2
        rows = auto_rows(4 * max(self._z[0].numel(), x[0].numel()), x.device, flat=flat)
        self._rows = rows if batch_size == "auto" else batch_size

    def _cast(self, t: object) -> object:
        return t.to(self._dtype) if isinstance(t, Tensor) and t.is_floating_point() else t

    def undo(self, delta: Tensor, target: Tensor | None = None) -> Tensor:
        """``f(x; here) - f(x; here, a player's update undone)`` for all players: ``[B, M(, K)]``."""
        return self.rows(delta, target, self.moving(delta))

    def apply(self, delta: Tensor, target: Tensor | None = None) -> Tensor:
        """``f(x; here, a player's update applied) - f(x; here)``: ``[B, M(, K)]``."""
        return self.undo(-delta, target).neg_()

    def moving(self, delta: Tensor) -> Tensor:
        """Numbers ``b M + m`` of the players with an element that the update moves."""
        if isinstance(self._layer.module, nn.Embedding):
            moved = (delta != 0).any(1).to(self._u.device)[self._u]
        else:
            moved = self._u != 0
        moved = moved.reshape(len(self._x), -1, 1).double()
        return self._groups.sum(moved, slice(0, len(self._x))).flatten().nonzero()[:, 0]

    def rows(self, delta: Tensor, target: Tensor | None, rows: Tensor) -> Tensor:
        """What undoing the update takes from the outputs, at rows ``b M + m``; 0 elsewhere."""
        n_players, batch = self._groups.n_players, len(self._x)
        delta = delta.to(self._x.device, torch.float64)
        n_outputs = 1 if target is not None else self.logits.shape[1]
        out = self.logits.new_zeros(batch * n_players, n_outputs)
        u = self._u.double() if self._u.is_floating_point() else self._u

        def step(start: int, stop: int) -> None:
            some = rows[start:stop]
            sample, player = some // n_players, some % n_players
            mask = (self._groups.of(sample) == player[:, None]).reshape(-1, *u.shape[1:])
            z = self._z[sample].double() - self._layer.change(u[sample], mask, delta)
            args = [a[sample] if isinstance(a, Tensor) and a.dim() and len(a) == batch else a for a in self._args]
            changed = self._run.behind(z.to(self._z.dtype), [self._x[sample], *args]).double()
            clean = self.logits[sample]
            if target is not None:
                chosen = target[sample][:, None]
                clean, changed = clean.gather(1, chosen), changed.gather(1, chosen)
            out[some] = clean - changed

        with torch.no_grad(), Stream(len(rows), self._rows, show_progress=False, description="") as stream:
            stream.run(len(rows), step)
        out = out.view(batch, n_players, n_outputs).to(self._dtype)
        return out if target is None else out[:, :, 0].contiguous()

    def linear(self, delta: Tensor, target: Tensor | None = None) -> Tensor:
        """First order, by the gradient of the outputs by the first layer's: ``[B, M(, K)]``."""
        delta, batch = delta.to(self._x.device, self._dtype), len(self._x)
        with torch.enable_grad():
            z = self._z.detach().requires_grad_()
            logits = self._run.behind(z, [self._x, *self._args])
            if target is not None:
                logits = logits.gather(1, target[:, None])
            columns = logits.sum(0)
            gradients = [torch.autograd.grad(column, z, retain_graph=True)[0] for column in columns]
        each = torch.stack([self._layer.spread(self._u, delta, g).reshape(batch, -1) for g in gradients], 2)
        out = self._groups.sum(each.detach(), slice(0, batch))
        return out if target is None else out[:, :, 0].contiguous()
