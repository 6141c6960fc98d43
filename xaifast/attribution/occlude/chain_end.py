"""A chain at one state, with the base activations of a batch: occluded rows by delta propagation."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ...ops.occlude import nonzero_rows
from .certified import Certifier, is_piecewise, jacobians
from .chain import Chain, forward
from .groups import Groups

_BLOCK_ELEMENTS = 2**22  # of row lists and of linear changes at once


class ChainEnd:
    """What `Occluder.at` returns for a chain; see `xaifast.attribution.occlude.Occluder`.

    Args:
        chain: The network.
        state: Parameters and buffers.
        x: ``[B, N]`` in float64.
        groups: Players of the elements.
        precision: "float32", "float64", "tf32" or "bf16".
        certified: Whether rows in which no unit changes sign may take the linear way.
    """

    def __init__(
        self, chain: Chain, state: Mapping[str, Tensor], x: Tensor, groups: Groups, precision: str, certified: bool
    ) -> None:
        folded = chain.fold(state)
        self._dtype = torch.float64 if precision == "float64" else torch.float32
        self._precision = precision if precision in ("tf32", "bf16") else "full"
        self._groups, self._scale = groups, folded.first_scale
        self._base64, self.logits = forward(folded, x)
        self._ends_linear = folded.stages[-1].activation is None and len(folded.stages) > 1
        names = [stage.activation or "identity" for stage in folded.stages]
        self._names = names[:-1] if self._ends_linear else names
        self._base64 = self._base64[: len(self._names)]
        self._weights64 = [stage.weight for stage in folded.stages[1:]]
        self._x = (x * folded.scale + folded.shift).to(self._dtype)
        self._base = [z.to(self._dtype) for z in self._base64]
        self._weights = [weight.to(self._dtype) for weight in self._weights64]
        self._certifier = None
        if certified and all(map(is_piecewise, self._names)):
            self._certifier = Certifier(self._base64, self._weights64, self._names, self._dtype)
        self.certified_share: float | None = None

    def undo(self, delta: Tensor, target: Tensor | None = None) -> Tensor:
        """``f(x; here) - f(x; here, a player's update undone)`` for all players: ``[B, M(, K)]``."""
        return self._changes(self._x, delta, target)

    def apply(self, delta: Tensor, target: Tensor | None = None) -> Tensor:
        """``f(x; here, a player's update applied) - f(x; here)``: ``[B, M(, K)]``."""
        return self._changes(-self._x, delta, target).neg_()

    def linear(self, delta: Tensor, target: Tensor | None = None) -> Tensor:
        """The same to first order, ``sum of x_i J delta_i`` over a player's elements: ``[B, M(, K)]``."""
        columns, jacobian = self._columns(delta), self._jacobian(target)
        per_sample = max(jacobian.shape[1] * self._x.shape[1], 1)
        parts = [self._linear_rows(self._x[part], columns, jacobian[part], part) for part in self._blocks(per_sample)]
        return self._shaped(torch.cat(parts), target)

    def _columns(self, delta: Tensor) -> Tensor:
        """The update of the folded first layer, transposed: ``[N, H]``."""
        scale = self._scale[:, None] if isinstance(self._scale, Tensor) else self._scale
        return (delta.to(self._x.device, torch.float64) * scale).t().to(self._dtype).contiguous()

    def _jacobian(self, target: Tensor | None) -> Tensor:
        last, weights = None, self._weights64
        if target is not None and self._ends_linear:
            last, weights = weights[-1][target], weights[:-1]
        return jacobians(self._base64, weights, self._names, last).to(self._dtype)

    def _shaped(self, changes: Tensor, target: Tensor | None) -> Tensor:
        """``[B, M, 1]`` of the target, or ``[B, M, K]`` with the target still to take."""
        if target is None:
            return changes
        if changes.shape[2] > 1:
            changes = changes.gather(2, target[:, None, None].expand(-1, changes.shape[1], 1))
        return changes[:, :, 0].contiguous()

    def _blocks(self, per_sample: int) -> list[slice]:
        step, batch = max(1, _BLOCK_ELEMENTS // per_sample), self._x.shape[0]
        return [slice(start, min(start + step, batch)) for start in range(0, batch, step)]

    def _linear_rows(self, x: Tensor, columns: Tensor, jacobian: Tensor, part: slice) -> Tensor:
        """``[b, M, K]`` from one product for all samples."""
        n_outputs = jacobian.shape[1]
        product = jacobian.reshape(-1, columns.shape[1]) @ columns.t()  # [b K, N]
        each = product.view(len(x), n_outputs, -1).transpose(1, 2) * x[:, :, None]  # [b, N, K]
        return self._groups.sum(each, part)

    def _changes(self, x: Tensor, delta: Tensor, target: Tensor | None) -> Tensor:
        columns, n_players = self._columns(delta), self._groups.n_players
        readout, weights = None, self._weights
        if target is not None and self._ends_linear:
            readout, weights = weights[-1][target], weights[:-1]
        n_outputs = 1 if readout is not None else self.logits.shape[1]
        jacobian = self._jacobian(target) if self._pays(n_outputs) else None
        out = x.new_empty(len(x), n_players, n_outputs)
        total = easy = 0
        for part in self._blocks(max(n_players, n_outputs * x.shape[1])):
            order, offsets = self._groups.lists(part)
            rows = nonzero_rows(x[part], n_players, order, offsets)
            total += len(rows)
            if jacobian is not None:
                flags = self._certifier(x[part], columns, rows, n_players, order, offsets, part.start)
                n_flags = int(flags.sum())
            if jacobian is not None and n_flags * self._later_cost > x[part].numel() * jacobian[0].numel():
                out[part] = self._linear_rows(x[part], columns, jacobian[part], part)
                rows, easy = rows[~flags], easy + n_flags
            elif len(rows) < out[part].shape[0] * n_players:
                out[part] = 0
            changed = torch.ops.xaifast.occlude_linear(
                x[part],
                columns,
                rows,
                n_players,
                [z[part] for z in self._base],
                weights,
                self._names,
                order,
                offsets,
                None if readout is None else readout[part],
                self._precision,
            )
            flat = out[part].view(-1, n_outputs)
            if len(rows) == len(flat):
                flat.copy_(changed)
            else:
                flat[rows] = changed
        self.certified_share = None if self._certifier is None else easy / max(total, 1)
        return self._shaped(out, target)

    @property
    def _later_cost(self) -> int:
        """Multiplications behind the first layer, a row."""
        return sum(weight.numel() for weight in self._weights)

    def _pays(self, n_outputs: int) -> bool:
        """Whether a certified row can be cheaper than an ordinary one."""
        return self._certifier is not None and 2 * n_outputs * self._base[0].shape[1] < self._later_cost
