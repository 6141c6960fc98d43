"""Perturbation of all of an input by samples: noise, squares, or a user's function."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Real

import torch
from torch import Tensor

from ..noise import INFIDELITY, normal_units, uniform_units
from ..players import Players
from .base import Background, Prepared, Removal
from .replace import _layout, resolve_baselines

Perturbation = Callable[..., tuple[object, object]]
Tensors = tuple[Tensor, ...]


@dataclass(frozen=True)
class Samples:
    """Samples, the same number for every input.

    Attributes:
        code: int64 ``[N, 1]``, 0..N-1; ``[1, 0]`` is the input as it is.
    """

    code: Tensor

    def describe(self, index: int, n: int) -> str:
        """Which sample."""
        return f"perturbation {n}"


@dataclass(frozen=True)
class Sampler:
    """Makes the perturbations of units: unit u is sample ``u % n_samples`` of input ``u // n_samples``.

    Attributes:
        kind: ``"gaussian"``, ``"noisy_baseline"``, ``"square"`` or a user's function.
        baselines: Of each input, expanded to its shape.
        n_samples: Samples an input.
        std: Standard deviation of noise.
        side: Of squares, pixels.
        seed: Of the random numbers.
        first_index: Data-set index of input 0.
        caller: Prefix of messages.
    """

    kind: str | Perturbation
    baselines: Tensors
    n_samples: int
    std: float
    side: int
    seed: int
    first_index: int
    caller: str

    def __call__(self, start: int, stop: int, owner: Tensor, rows: Tensors) -> tuple[Tensors, Tensors]:
        """Perturbations I and perturbed inputs x - I of rows x, ``[stop - start, ...]`` each; rows are of ``owner``."""
        if callable(self.kind):
            return self._user(rows)
        if self.kind == "square":
            base, inside = self.baselines[0][owner], self._squares(start, stop, rows[0])
            return (torch.where(inside, _minus(rows[0], base), 0),), (torch.where(inside, base, rows[0]),)
        noise = self._noise(start, stop, rows)
        if self.kind == "gaussian":
            shown = tuple(x - change for x, change in zip(rows, noise, strict=True))
        else:
            shown = tuple(b[owner] + change for b, change in zip(self.baselines, noise, strict=True))
        return tuple(_minus(x, y) for x, y in zip(rows, shown, strict=True)), shown

    def _noise(self, start: int, stop: int, rows: Tensors) -> Tensors:
        sizes = [x[0].numel() for x in rows]
        drawn = self.std * normal_units(start, stop, self.n_samples, sum(sizes), **self._stream)
        return tuple(part.reshape(x.shape).to(x) for part, x in zip(drawn.split(sizes, 1), rows, strict=True))

    def _squares(self, start: int, stop: int, rows: Tensor) -> Tensor:
        """Squares wholly inside the image, every place equally likely: bool ``[U, 1, H, W]``."""
        uniform = uniform_units(start, stop, self.n_samples, 2, **self._stream).to(rows.device)
        inside = torch.ones((), dtype=torch.bool, device=rows.device)
        for dim, u in ((2, uniform[:, 0]), (3, uniform[:, 1])):
            first = (u * (rows.shape[dim] - self.side + 1)).long().view(-1, 1, 1, 1)
            shape = [-1 if d == dim else 1 for d in range(4)]
            place = torch.arange(rows.shape[dim], device=rows.device).view(shape)
            inside = inside & (place >= first) & (place < first + self.side)
        return inside

    def _user(self, rows: Tensors) -> tuple[Tensors, Tensors]:
        with torch.inference_mode(False), torch.no_grad():  # a perturbation may follow gradients
            rows = tuple(x.clone() for x in rows)
            made = self.kind(rows if len(rows) > 1 else rows[0])
        if not isinstance(made, tuple) or len(made) != 2:
            raise ValueError(
                f"{self.caller}: perturb must return the pair (perturbation, perturbed inputs), got "
                f"{type(made).__name__}"
            )
        pair = tuple(part if isinstance(part, tuple) else (part,) for part in made)
        for part in pair:
            shapes = [tuple(t.shape) if isinstance(t, Tensor) else type(t).__name__ for t in part]
            if shapes != [tuple(x.shape) for x in rows]:
                raise ValueError(
                    f"{self.caller}: perturb must return tensors of the shapes it was given "
                    f"{[tuple(x.shape) for x in rows]}, got {shapes}"
                )
        return pair

    @property
    def _stream(self) -> dict[str, int]:
        return {"domain": INFIDELITY, "seed": self.seed, "first_index": self.first_index}


def make_sampler(
    kind: object,
    inputs: Tensors,
    baselines: object,
    n_samples: int,
    *,
    std: float,
    side: int | None,
    seed: int,
    first_index: int,
    caller: str,
) -> Sampler:
    """Check what a user asks for.

    Raises:
        TypeError, ValueError: a kind, width, side or baseline that does not fit the inputs.
    """
    if not callable(kind) and kind not in ("gaussian", "noisy_baseline", "square"):
        raise ValueError(
            f'{caller}: perturb must be "gaussian", "noisy_baseline", "square" or a callable, got {kind!r}'
        )
    if isinstance(std, bool) or not isinstance(std, Real) or not 0 < std < math.inf:
        raise ValueError(f"{caller}: std must be a positive number, got {std!r}")
    if kind == "square":
        if len(inputs) != 1 or inputs[0].dim() != 4:
            shapes = [tuple(x.shape) for x in inputs]
            raise ValueError(f'{caller}: perturb="square" needs one tensor of images [B, C, H, W], got {shapes}')
        shorter = min(inputs[0].shape[2:])
        side = max(1, shorter // 8) if side is None else side
        if isinstance(side, bool) or not isinstance(side, int) or not 1 <= side <= shorter:
            raise ValueError(f"{caller}: side must be an int from 1 to {shorter} (the shorter side), got {side!r}")
    if isinstance(baselines, Background):
        raise ValueError(f"{caller}: baselines must be a number, a tensor or a tuple of these, got a Background")
    resolved, _ = resolve_baselines(baselines, inputs, caller)
    expanded = tuple(
        torch.as_tensor(b, dtype=x.dtype, device=x.device).expand(x.shape)
        for b, x in zip(resolved, inputs, strict=True)
    )
    return Sampler(kind, expanded, n_samples, float(std), side or 0, seed, first_index, caller)


@dataclass(frozen=True)
class PreparedPerturbed(Prepared):
    """Inputs with what perturbs them; the dot products of weights and perturbations come up on the way."""

    inputs: Tensors
    weights: Tensors
    sampler: Sampler
    dots: Tensor

    @property
    def row_bytes(self) -> int:
        """Bytes of a row over all inputs."""
        return sum(x[0].numel() * x.element_size() for x in self.inputs)

    def empty(self, n_rows: int) -> Tensors:
        """Row buffers in each input's memory layout."""
        return tuple(
            torch.empty((n_rows, *x.shape[1:]), dtype=x.dtype, device=x.device, memory_format=_layout(x))
            for x in self.inputs
        )

    def rows(self, code: Tensor, start: int, stop: int, out: Tensors) -> Tensors:
        """Perturbed rows; the dot products of their perturbations go to `dots`."""
        owner = torch.arange(start, stop, device=self.dots.device) // len(code)
        rows = tuple(x[owner] for x in self.inputs)
        if code.shape[1] > 0:
            changes, rows = self.sampler(start, stop, owner, rows)
            products = (w[owner].double() * change for w, change in zip(self.weights, changes, strict=True))
            self.dots[start:stop] = sum_rows(torch.cat([product.flatten(1) for product in products], 1))
        for buffer, row in zip(out, rows, strict=True):
            buffer.copy_(row)
        return out

    def run(self, forward: Callable, rows: Tensors, args: tuple) -> object:
        """The model on the perturbed inputs."""
        return forward(*rows, *args)


@dataclass(frozen=True)
class Perturbed(Removal):
    """All of an input is perturbed, sample by sample; perturbations are `Samples`.

    Attributes:
        sampler: What makes the perturbations.
        weights: Of each element, in the inputs' shapes.
        dots: float64 ``[B N]``: takes the dot products of weights and perturbations.
    """

    sampler: Sampler
    weights: Tensors
    dots: Tensor

    def prepare(
        self,
        forward: Callable,
        inputs: Tensors,
        players: Players | None,
        baselines: object,
        args: tuple,
        caller: str,
    ) -> PreparedPerturbed:
        """Nothing but the parts together."""
        return PreparedPerturbed(tuple(x.detach() for x in inputs), self.weights, self.sampler, self.dots)

    def clean(self, players: Players | None) -> Samples:
        """No sample."""
        return Samples(torch.zeros(1, 0, dtype=torch.int64, device="cpu"))


def _minus(x: Tensor, shown: Tensor) -> Tensor:
    """What took x to the row shown, float64: the row is rounded to the inputs' dtype, the perturbation with it."""
    return x.double() - shown.double()


def sum_rows(x: Tensor) -> Tensor:
    """Sums of rows ``[U, F]``; a row's bits depend neither on the others nor on the number of threads.

    A long row alone would be shared between threads, hence the parts.
    """
    return torch.stack([part.sum(1) for part in x.split(16384, 1)], 1).sum(1)
