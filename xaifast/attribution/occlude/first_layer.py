"""The first layer of any network, untied: each place has a copy of the weight of its own, with the same update.

A player's correction is what its elements alone make of the update, ``layer(u * 1_m; delta)`` without bias; the rest of
the network runs on rows ``layer(u) - correction``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

SUPPORTED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Embedding)
_BEFORE = (nn.modules.batchnorm._BatchNorm,)  # elementwise in evaluation, checked by a run
_NAMES = "Linear, Conv1d, Conv2d (patch embeddings too), Conv3d or Embedding"


@dataclass(frozen=True)
class FirstLayer:
    """A layer of a model.

    Attributes:
        path: Its name in the model.
        module: The layer.
    """

    path: str
    module: nn.Module

    @property
    def weight_name(self) -> str:
        """Key of its weight in a state dict."""
        return f"{self.path}.weight" if self.path else "weight"

    def change(self, u: Tensor, mask: Tensor, delta: Tensor) -> Tensor:
        """Corrections ``[R, ...]`` of rows with inputs u, of which a row's mask ``[R, ...]`` shows a player."""
        if isinstance(self.module, nn.Embedding):
            return F.embedding(u, delta) * mask[..., None].to(delta.dtype)
        shown = torch.where(mask, u, 0)
        if isinstance(self.module, nn.Linear):
            return F.linear(shown, delta)
        return self.module._conv_forward(shown, delta, None)

    def spread(self, u: Tensor, delta: Tensor, gradient: Tensor) -> Tensor:
        """``sum of gradient * layer(u; delta)``, split over the elements of u: ``[B, ...]``."""
        if isinstance(self.module, nn.Embedding):
            return (F.embedding(u, delta) * gradient).sum(-1)
        with torch.enable_grad():
            leaf = u.detach().requires_grad_()
            out = self.change(leaf, torch.ones_like(u, dtype=torch.bool), delta)
            return u * torch.autograd.grad(out, leaf, gradient)[0]


@contextmanager
def _replaced(module: nn.Module, forward: Callable) -> Iterator[None]:
    """Another forward for one module, on the instance, for a while."""
    own = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if own is not None:
            module.forward = own


@dataclass
class Run:
    """A model run with some state, around its first layer."""

    model: nn.Module
    layer: FirstLayer
    state: Mapping[str, Tensor]
    caller: str

    def clean(self, args: Sequence[object]) -> tuple[Tensor, Tensor, Tensor]:
        """The first layer's input and output, and the model's outputs ``[B, K]``."""
        seen, forward = [], self.layer.module.forward

        def watched(*given: Tensor, **named: Tensor) -> Tensor:
            out = forward(*given, **named)
            seen.append((given[0] if given else next(iter(named.values())), out))
            return out

        with _replaced(self.layer.module, watched):
            logits = self._outputs(args)
        if len(seen) != 1:
            raise ValueError(
                f"{self.caller}: the first layer must be used once in a forward pass, but {self.layer.path} was used "
                f"{len(seen)} times; name another with first_layer="
            )
        return *seen[0], logits

    def behind(self, rows: Tensor, args: Sequence[object]) -> Tensor:
        """Outputs ``[R, K]`` where the first layer gives these rows."""
        with _replaced(self.layer.module, lambda *given, **named: rows):
            return self._outputs(args)

    def _outputs(self, args: Sequence[object]) -> Tensor:
        out = functional_call(self.model, dict(self.state), tuple(args), tie_weights=False)
        out = out if isinstance(out, Tensor) else getattr(out, "logits", None)
        if not isinstance(out, Tensor) or out.dim() not in (1, 2) or len(out) != len(args[0]):
            got = type(out).__name__ if not isinstance(out, Tensor) else tuple(out.shape)
            raise ValueError(
                f"{self.caller}: the model must return [B], [B, K] or an object with such .logits for {len(args[0])} "
                f"inputs, got {got}; wrap it in a module that does"
            )
        return out[:, None] if out.dim() == 1 else out


def find_first_layer(model: nn.Module, args: Sequence[object], named: str | None, caller: str) -> FirstLayer:
    """The first layer with parameters that a forward pass comes to, or the one that is named.

    Raises:
        ValueError: it is of no supported kind, or there is none of that name.
    """
    if named is not None:
        modules = dict(model.named_modules())
        path = named.removesuffix(".weight")
        if not isinstance(modules.get(path), SUPPORTED):
            what = type(modules[path]).__name__ if path in modules else "no module"
            raise ValueError(
                f"{caller}: first_layer must name a {_NAMES} of the model, got {named!r}, "
                f"{what}; see model.named_modules()"
            )
        return FirstLayer(path, modules[path])
    order: list[tuple[str, nn.Module]] = []
    handles = [
        module.register_forward_pre_hook(lambda m, _, path=path: order.append((path, m)))
        for path, module in model.named_modules()
        if any(True for _ in module.parameters(recurse=False))
    ]
    try:
        with torch.no_grad():
            model(*args)
    finally:
        for handle in handles:
            handle.remove()
    leaves = [(path, m) for path, m in order if not any(True for _ in m.children())]
    for path, module in leaves:
        if isinstance(module, SUPPORTED):
            return FirstLayer(path, module)
        if not isinstance(module, _BEFORE):
            break
    found = f"{type(leaves[0][1]).__name__} ({leaves[0][0]})" if leaves else "no layer with parameters"
    raise ValueError(
        f"{caller}: the first layer with parameters must be a {_NAMES}, got {found}; name the layer that reads the "
        "inputs with first_layer=, or wrap the model"
    )


def check_places(run: Run, u: Tensor, x: Tensor, args: Sequence[object]) -> None:
    """Refuse a layer whose input's elements are not those of x, in order.

    They are where they have x's values; else where elements that do not change in x do not change in u either.
    """
    if u.numel() == x.numel() and u.is_floating_point() == x.is_floating_point():
        if torch.equal(u.reshape(len(x), -1).to(x.dtype), x.flatten(1)):
            return
        generator = torch.Generator().manual_seed(0)
        kept = torch.rand(x.shape[1:], generator=generator).to(x.device) < 0.5
        probe = torch.where(kept, x, x + 1 if x.is_floating_point() else 0)
        other = run.clean([probe, *args])[0]
        same = (other == u).reshape(len(x), -1) == kept.flatten()
        if x.is_floating_point() and bool(same.all()):
            return
    raise ValueError(
        f"{run.caller}: the first layer's input must be the model's input element by element, but {run.layer.path} "
        f"reads {tuple(u.shape)} for inputs {tuple(x.shape)}; name another with first_layer=, or pass its input to "
        "a model without what comes before"
    )
