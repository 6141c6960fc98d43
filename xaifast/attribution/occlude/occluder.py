"""A network and a batch, ready to say what an update of the first layer did, player by player."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ...evaluate import as_inputs
from ...model_state import check_deterministic
from ...players import resolve_players
from .chain import find_chain
from .chain_end import ChainEnd
from .first_layer import FirstLayer, find_first_layer
from .groups import Groups
from .layer_end import LayerEnd

PRECISIONS = ("float32", "float64", "tf32", "bf16")


class Occluder:
    """Evaluates occluded updates of a network's first layer for a batch.

    ``at(state)`` computes the base activations of one checkpoint once; what it returns has

    - ``logits``: ``[B, K]`` in float64, of the clean inputs;
    - ``undo(delta, target=None)``: ``f(x; here) - f(x; here, a player's update undone)``, ``[B, M]`` with a target
      ``[B]``, else ``[B, M, K]``: the forward rows of the step that ends here;
    - ``apply(delta, target=None)``: ``f(x; here, a player's update applied) - f(x; here)``, bit for bit
      ``-undo(-delta)``: the reverse rows of the step that begins here;
    - ``linear(delta, target=None)``: both to first order;
    - ``certified_share``: of the last undo or apply, the share of rows that no unit's sign depends on; None where it
      makes no sense.

    Args:
        model: In evaluation mode; its own weights are not read.
        inputs: ``[B, ...]``, or token ids ``[B, T]``.
        feature_mask: Player ids; None: each element is a player.
        first_layer: Path of the first layer, where it is not found.
        precision: "float32" (base activations of chains in float64), "float64", "tf32" or "bf16" (chains alone); None:
            float64 where the model or the inputs are, else float32.
        certified: Whether chains of piecewise linear activations may take the linear way where it is exact.
        additional_forward_args: Passed on after the inputs.
        batch_size: Rows a model call, for networks that are no chain.
        allow_training_mode: Skip the check for active dropout and batch statistics.
        caller: Prefix of messages.

    Raises:
        TypeError, ValueError: what must hold, what was given, what to do.
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: Tensor,
        *,
        feature_mask: Tensor | None = None,
        first_layer: str | None = None,
        precision: str | None = None,
        certified: bool = True,
        additional_forward_args: object = None,
        batch_size: int | str = "auto",
        allow_training_mode: bool = False,
        caller: str = "xaifast.occlude_update",
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"{caller}: model must be an nn.Module, got {type(model).__name__}")
        if not isinstance(inputs, Tensor):
            raise TypeError(f"{caller}: inputs must be one tensor [B, ...], got {type(inputs).__name__}")
        if precision is None:
            wide = torch.float64 in (inputs.dtype, *(p.dtype for p in model.parameters()))
            precision = "float64" if wide else "float32"
        if precision not in PRECISIONS:
            raise ValueError(f"{caller}: precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
        if batch_size != "auto" and (isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1):
            raise ValueError(f'{caller}: batch_size must be "auto" or a positive int, got {batch_size!r}')
        (x,) = as_inputs(inputs.detach(), caller)
        if not bool(x.isfinite().all()):
            where = tuple((~x.isfinite()).nonzero()[0].tolist())
            raise ValueError(f"{caller}: inputs must be finite, got {x[where].item()} at {where}; clean or replace it")
        self.caller, self.model, self.inputs, self.precision = caller, model, x, precision
        self.players = resolve_players(feature_mask, (x,), caller)
        self.n_players = self.players.n_players
        if not allow_training_mode:
            check_deterministic(model, caller)
        self._groups, self._certified, self._batch_size = Groups(self.players, x), certified, batch_size
        args = additional_forward_args
        self._args = () if args is None else args if isinstance(args, tuple) else (args,)
        self._shapes = {key: t.shape for key, t in model.state_dict().items()}
        self._chain = None if self._args or allow_training_mode else find_chain(model, x)
        if self._chain is not None and first_layer not in (None, self._chain.first, f"{self._chain.first}.weight"):
            self._chain = None
        if self._chain is not None:
            first_layer = self._chain.first
        elif precision in ("tf32", "bf16"):
            raise ValueError(
                f'{caller}: precision="{precision}" needs a chain of Linear layers and elementwise activations, whose '
                'differences are propagated; use "float32" or "float64" for this model'
            )
        floats = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
        one = [a[:1] if isinstance(a, Tensor) and a.dim() and len(a) == len(x) else a for a in self._args]
        one = [a.to(floats) if isinstance(a, Tensor) and a.is_floating_point() else a for a in (x[:1], *one)]
        self._layer: FirstLayer = find_first_layer(model, one, first_layer, caller)
        self.weight_name = self._layer.weight_name
        if self.weight_name not in self._shapes:
            raise ValueError(
                f"{caller}: the first layer {self._layer.path} must have a plain parameter weight, but the state dict "
                f"has no {self.weight_name}; remove its parametrization"
            )

    def at(self, state: Mapping[str, Tensor]) -> ChainEnd | LayerEnd:
        """Base activations at a checkpoint."""
        self.check(state, "state")
        state = {key: t.to(self.inputs.device) for key, t in state.items()}
        if self._chain is not None:
            x = self.inputs.flatten(1).double()
            return ChainEnd(self._chain, state, x, self._groups, self.precision, self._certified)
        return self.run_at(state, self.precision)

    def run_at(self, state: Mapping[str, Tensor], precision: str) -> LayerEnd:
        """The same by running the network on rows of its first layer, chain or not."""
        options = (self._groups, precision, self._batch_size, self.caller)
        return LayerEnd(self.model, self._layer, state, self.inputs, self._args, *options)

    def delta(self, old: Mapping[str, Tensor], new: Mapping[str, Tensor]) -> Tensor:
        """Update of the first layer's weight from old to new, in float64."""
        return new[self.weight_name].double() - old[self.weight_name].double()

    def check(self, state: Mapping[str, Tensor], name: str) -> None:
        """Refuse a state of another architecture, or one that is not finite.

        Raises:
            ValueError: names the first tensor that does not fit.
        """
        for key in self._shapes.keys() | state.keys():
            if key not in state or key not in self._shapes:
                what = "lacks" if key not in state else "has"
                raise ValueError(
                    f"{self.caller}: {name} must be a state dict of the model, but it {what} {key!r}; "
                    "pass model.state_dict() of the same architecture"
                )
        for key, shape in self._shapes.items():
            t = state[key]
            if t.shape != shape:
                raise ValueError(
                    f"{self.caller}: {name}[{key!r}] must have shape {tuple(shape)}, got {tuple(t.shape)}; "
                    "pass model.state_dict() of the same architecture"
                )
            if t.is_floating_point() and not bool(t.isfinite().all()):
                raise ValueError(
                    f"{self.caller}: weights must be finite, but {name}[{key!r}] is not; did training diverge?"
                )


def resolve_target(target: int | str | Tensor | None, logits: Tensor, caller: str) -> Tensor | None:
    """A target as LongTensor ``[B]``, "predicted" from these logits ``[B, K]``; None stays None.

    Raises:
        TypeError, ValueError: it is of another kind or shape, or out of range.
    """
    batch, n_outputs = logits.shape
    if target is None:
        return None
    if isinstance(target, str):
        if target != "predicted":
            raise ValueError(f'{caller}: target must be an int, LongTensor [B], "predicted" or None, got {target!r}')
        return logits.argmax(1)
    given = torch.as_tensor(target, device=logits.device)
    if given.is_floating_point() or given.dtype == torch.bool or given.dim() > 1 or given.numel() not in (1, batch):
        raise ValueError(
            f'{caller}: target must be an int, LongTensor [{batch}], "predicted" or None, got {given.dtype} '
            f"{tuple(given.shape)}"
        )
    if bool((given < 0).any()) or bool((given >= n_outputs).any()):
        raise ValueError(f"{caller}: target must be in 0..{n_outputs - 1}, got {target}; there are {n_outputs} outputs")
    return given.long().expand(batch).contiguous()
