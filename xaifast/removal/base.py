"""What a removal is: three verbs the engine calls, so that no kind of removal is a special case there."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..coalitions import Coalitions, Perturbations
from ..players import Players


@dataclass(frozen=True)
class Background:
    """A background distribution: the value of a coalition is the mean over these rows.

    Attributes:
        rows: ``[R, ...]`` with the shape of one input after the first axis, or a tuple of such for tuple inputs.

    Example:
        >>> Background(torch.zeros(100, 30)).rows.shape
        torch.Size([100, 30])
    """

    rows: Tensor | tuple[Tensor, ...]


@dataclass(frozen=True)
class Group:
    """Perturbations that are evaluated together: their rows have one shape.

    Attributes:
        prepared: What makes and runs the rows, narrowed to ``inputs``.
        inputs: Which inputs.
        members: LongTensor of perturbation numbers on the CPU, or None for all.
    """

    prepared: Prepared
    inputs: slice
    members: Tensor | None


class Prepared(ABC):
    """A removal bound to a call's inputs: everything that is done once is done.

    Attributes:
        n_background: R, model rows a perturbation.
        row_bytes: Bytes of one model row, for the automatic chunk size.
        chunk_scale: How many times more rows than of the full input make an equally large chunk.
    """

    n_background: int = 1
    row_bytes: int
    chunk_scale: float = 1.0

    @abstractmethod
    def empty(self, n_rows: int) -> tuple[Tensor, ...]:
        """Buffers for ``n_rows`` model rows, contents undefined; none where `rows` allocates."""

    @abstractmethod
    def rows(self, code: Tensor, start: int, stop: int, out: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The model rows of units ``[start, stop)`` of the linear (input, perturbation) space.

        Args:
            code: int64 ``[N, W]`` or ``[B, N, W]`` on the inputs' device, of `Perturbations`; unit u is input
                ``u // N``, perturbation ``u % N``.
            start: First unit.
            stop: One past the last unit.
            out: Buffers of `empty` with ``(stop - start) * R`` rows, to be filled and returned.
        """

    @abstractmethod
    def run(self, forward: Callable, rows: tuple[Tensor, ...], args: tuple) -> object:
        """Call the model on rows."""

    def groups(self, perturbations: Perturbations) -> list[Group]:
        """Split perturbations into groups of one row shape."""
        return [Group(self, slice(None), None)]

    def background_slice(self, start: int, stop: int) -> Prepared:
        """The same with background rows ``[start, stop)`` only."""
        raise NotImplementedError(f"{type(self).__name__} has no background")  # n_background is 1: never split

    def session(self) -> AbstractContextManager:
        """Held while rows run; restores the model on exit, also after an error."""
        return nullcontext()


class Removal(ABC):
    """What an absent player looks like; see `replace.Replace`, `tokens.TokenDrop` and `tokens.TokenSelect`.

    A method whose perturbations are no sets of players brings a removal that reads their code, and takes no players.

    Attributes:
        design: The paired design of `xaifast.ops.sample_coalitions` that suits it.
    """

    design: ClassVar[str] = "leverage"

    @abstractmethod
    def prepare(
        self,
        forward: Callable,
        inputs: tuple[Tensor, ...],
        players: Players | None,
        baselines: object,
        args: tuple,
        caller: str,
    ) -> Prepared:
        """Do once what does not depend on the perturbation.

        Args:
            forward: The model.
            inputs: Tuple of ``[B, ...]``.
            players: Their feature masks.
            baselines: As the user gave them.
            args: Additional forward arguments as the user gave them.
            caller: Prefix of error messages, for example ``"xaifast.kernel_shap"``.
        """

    def clean(self, players: Players | None) -> Perturbations:
        """The one perturbation that leaves inputs as they are."""
        return Coalitions.from_present(torch.ones(1, players.n_players, dtype=torch.bool, device="cpu"))
