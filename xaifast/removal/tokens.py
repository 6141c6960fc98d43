"""Removal inside a vision transformer: patches are removed as tokens, and no image is ever made."""

from __future__ import annotations

import contextlib
import math
from abc import abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..coalitions import Coalitions
from ..ops.plan import SelectPlan, plan_selection
from ..ops.tokens import compact_rows_out
from ..players import Players
from .base import Group, Prepared, Removal
from .replace import empty_rows, resolve_baselines, slice_background

# Embedding modules known to map [B, C, H, W] to [B, prefix + patches, D], patches row-major, positions added, and to be
# followed by layers that treat tokens alike. Others are named by the `embeddings` argument.
_KNOWN = {
    ("transformers", "ViTEmbeddings"),
    ("transformers", "DeiTEmbeddings"),
    ("transformers", "CLIPVisionEmbeddings"),
    ("xaifast", "PatchEmbeddings"),
}
_EMBED_ROWS = 64


class _Embedded(Exception):
    """Ends a forward pass once the embedding is known."""


class _Embedding:
    """The embedding module of a model: reads its output, or stands in for it."""

    def __init__(self, module: nn.Module, caller: str) -> None:
        self.module, self._caller = module, caller
        self.tokens: Tensor | None = None
        self.grid: tuple[int, int] = (0, 0)  # patches the projection made, down and across
        convolutions = (m for m in module.modules() if isinstance(m, nn.Conv2d))
        self.projection = next((conv for conv in convolutions if conv.kernel_size == conv.stride), None)
        if self.projection is None:
            raise ValueError(
                f"{caller}: the embedding {type(module).__name__} must hold a Conv2d whose stride is its kernel (the "
                "patch projection), found none; use removal=None"
            )

    def compute(self, forward: Callable, images: Tensor, args: tuple) -> Tensor:
        """Tokens ``[B, T, D]`` the model makes of images, whatever it does to them first."""
        captured = []

        def stop(module: nn.Module, inputs: tuple, output: Tensor) -> None:
            captured.append(output)
            raise _Embedded

        def measure(module: nn.Module, inputs: tuple, output: Tensor) -> None:
            self.grid = tuple(output.shape[-2:])

        parts = []
        # First of the module's hooks: the others see the tokens once, when they are replaced.
        stopped = self.module.register_forward_hook(stop, prepend=True)
        with torch.no_grad(), stopped, self.projection.register_forward_hook(measure):
            for start in range(0, images.shape[0], _EMBED_ROWS):
                part = images[start : start + _EMBED_ROWS].clone()  # the model may write to it
                with contextlib.suppress(_Embedded):
                    forward(part, *(_take(arg, images.shape[0], start, part.shape[0]) for arg in args))
                tokens = captured.pop() if captured else None
                if not isinstance(tokens, Tensor) or tokens.dim() != 3:
                    shown = list(tokens.shape) if isinstance(tokens, Tensor) else type(tokens).__name__
                    raise ValueError(
                        f"{self._caller}: the embedding {type(self.module).__name__} must be run by forward and return "
                        f"tokens [B, T, D], got {shown}; name another module or use removal=None"
                    )
                parts.append(tokens)
        return torch.cat(parts)

    @contextlib.contextmanager
    def replaced(self) -> Iterator[None]:
        """Make the module return `tokens` instead of embedding its input."""
        own = vars(self.module).get("forward")  # wrapping libraries put one there
        self.module.forward = lambda *args, **kwargs: self.tokens
        try:
            yield
        finally:
            del self.module.forward
            if own is not None:
                self.module.forward = own
            self.tokens = None


def _take(arg: object, batch: int, start: int, length: int) -> object:
    if isinstance(arg, Tensor) and arg.dim() > 0 and arg.shape[0] == batch:
        return arg[start : start + length]
    return arg


def find_embedding(forward: object, name: str | None, caller: str) -> nn.Module:
    """The patch embedding inside a model, by name or by its known class.

    Raises:
        TypeError: ``forward`` is no ``nn.Module``.
        ValueError: the name does not exist, or not exactly one known embedding was found.
    """
    if not isinstance(forward, nn.Module):
        raise TypeError(
            f"{caller}: removal=TokenDrop/TokenSelect needs forward to be an nn.Module that holds the vision "
            f"transformer, got {type(forward).__name__}; wrap the function in a module"
        )
    modules = dict(forward.named_modules())
    if name is not None:
        if name not in modules:
            raise ValueError(f"{caller}: embeddings must name a submodule of forward, got {name!r}")
        return modules[name]
    found = [
        path
        for path, module in modules.items()
        if any((kind.__module__.split(".")[0], kind.__name__) in _KNOWN for kind in type(module).__mro__)
    ]
    if len(found) != 1:
        known = sorted({kind for _, kind in _KNOWN})
        raise ValueError(
            f"{caller}: forward must contain exactly one supported patch embedding ({', '.join(known)}), found "
            f"{found or 'none'}; name the module whose output is [B, tokens, D] with "
            "TokenDrop(embeddings='path.to.module') or use removal=None"
        )
    return modules[found[0]]


def patch_players(embedding: _Embedding, players: Players, image: Tensor, n_tokens: int, caller: str) -> Tensor:
    """Player of each token, int64 ``[T]`` or ``[B, T]``, -1 for tokens that stand for no patch.

    Raises:
        ValueError: the mask is not constant within patches, or the tokens do not match the patch grid.
    """
    channels, height, width = image.shape
    grid, (patch_h, patch_w) = embedding.grid, embedding.projection.kernel_size
    if (grid[0] * patch_h, grid[1] * patch_w) != (height, width):
        raise ValueError(
            f"{caller}: images must be whole patches of the model and reach it unresized, got {height} x {width} "
            f"pixels for {grid[0]} x {grid[1]} patches of {patch_h} x {patch_w}; resize before, or use removal=None"
        )
    prefix = n_tokens - grid[0] * grid[1]
    if prefix < 0:
        raise ValueError(
            f"{caller}: the embedding makes {n_tokens} tokens of {grid[0] * grid[1]} patches; a token a patch is needed"
        )
    mask = players.masks[0]
    per_input = players.per_input[0]
    full = mask.expand(-1, channels, height, width) if per_input else mask.expand(1, channels, height, width)
    tiles = full.reshape(full.shape[0], channels, grid[0], patch_h, grid[1], patch_w)
    tiles = tiles.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)  # [B|1, patches, elements of a patch]
    ids = tiles[..., 0]
    if not bool((tiles == ids[..., None]).all()):
        raise ValueError(
            f"{caller}: feature_mask must be constant within the model's patches of {patch_h} x {patch_w} pixels for "
            f"TokenDrop/TokenSelect; use xaifast.grid_mask({(height, width)}, {patch_h}) or removal=None"
        )
    ids = torch.nn.functional.pad(ids, (prefix, 0), value=-1)  # [B|1, T]
    return ids if per_input else ids[0]


@dataclass(frozen=True)
class _PreparedTokens(Prepared):
    embedding: _Embedding
    image: Tensor  # [1, C, H, W], stands for the batch in the model's input checks

    @property
    def row_bytes(self) -> int:
        """Bytes of an image row: what the model's chunk size goes by."""
        return self.image[0].numel() * self.image.element_size()

    def run(self, forward: Callable, rows: tuple[Tensor, ...], args: tuple) -> object:
        """The model on replaced tokens."""
        self.embedding.tokens = rows[0]
        return forward(self.image.expand(rows[0].shape[0], -1, -1, -1), *args)

    def session(self) -> contextlib.AbstractContextManager:
        """The embedding module stands in for itself."""
        return self.embedding.replaced()


@dataclass(frozen=True)
class PreparedSelect(_PreparedTokens):
    """Token rows selected between the embeddings of input and baseline."""

    plan: SelectPlan

    @property
    def n_background(self) -> int:
        """R of the background, 1 without one."""
        return self.plan.n_background

    def empty(self, n_rows: int) -> tuple[Tensor, ...]:
        """A token buffer ``[rows, T, D]``."""
        return (empty_rows(self.plan, n_rows),)

    def rows(self, code: Tensor, start: int, stop: int, out: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """One kernel."""
        return (self.plan.rows(code, start, stop, out=out[0]),)

    def background_slice(self, start: int, stop: int) -> PreparedSelect:
        """Only background rows ``[start, stop)``."""
        return replace(self, plan=slice_background(self.plan, start, stop))


class _Memory:
    """One buffer for rows of any length, which grows: new memory costs more than writing to it."""

    def __init__(self) -> None:
        self._flat: Tensor | None = None

    def rows(self, like: Tensor, *shape: int) -> Tensor:
        size = math.prod(shape)
        if self._flat is None or self._flat.numel() < size:
            self._flat = None  # freed before another is made
            with torch.inference_mode(False):
                self._flat = torch.empty(size, dtype=like.dtype, device=like.device)
        return self._flat[:size].view(shape)


@dataclass(frozen=True)
class PreparedDrop(_PreparedTokens):
    """Token rows with the absent tokens left out; every group holds coalitions of one token count."""

    tokens: Tensor  # [B, T, D]
    token_players: Tensor  # int32 [T] or [B, T]
    tokens_of: Tensor  # float64 [M] or [B, M] on the CPU: how many tokens a player has
    n_prefix: int
    length: int = field(default=0)
    memory: _Memory = field(default_factory=_Memory, repr=False, compare=False)  # of all groups

    @property
    def chunk_scale(self) -> float:
        """Shorter rows come in larger chunks."""
        return self.tokens.shape[1] / max(self.length, 1)

    def groups(self, coalitions: Coalitions) -> list[Group]:
        """Dense batches: coalitions with the same number of tokens, over all inputs where the counts agree."""
        counts = torch.matmul(coalitions.present.double(), self.tokens_of.unsqueeze(-1)).squeeze(-1)
        counts = counts.long().reshape(-1, counts.shape[-1]) + self.n_prefix  # [B|1, N]
        if bool((counts == counts[:1]).all()):
            return self._groups_of(self, slice(None), counts[0])
        made = []
        for b in range(counts.shape[0]):
            one = slice(b, b + 1)
            players = self.token_players if self.token_players.dim() == 1 else self.token_players[one]
            made += self._groups_of(replace(self, tokens=self.tokens[one], token_players=players), one, counts[b])
        return made

    @staticmethod
    def _groups_of(prepared: PreparedDrop, inputs: slice, counts: Tensor) -> list[Group]:
        return [
            Group(replace(prepared, length=length), inputs, (counts == length).nonzero().squeeze(1))
            for length in counts.unique().tolist()
        ]

    def empty(self, n_rows: int) -> tuple[Tensor, ...]:
        """None: groups differ in the length of their rows and share one memory."""
        return ()

    def rows(self, code: Tensor, start: int, stop: int, out: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """One kernel; valid until the next call."""
        rows = self.memory.rows(self.tokens, stop - start, self.length, self.tokens.shape[2])
        compact_rows_out(self.tokens, code, self.token_players, self.length, start, stop, rows)
        return (rows,)


@dataclass(frozen=True)
class _TokenRemoval(Removal):
    """Shared by TokenDrop and TokenSelect.

    Attributes:
        embeddings: Path of the module inside ``forward`` whose output is ``[B, prefix + patches, D]`` with positions
            added and patches row-major; None finds those of Hugging Face ViT, DeiT and CLIP vision encoders and of
            `xaifast.models.VisionTransformer`.
    """

    embeddings: str | None = None

    def _embed(
        self, forward: Callable, inputs: tuple[Tensor, ...], players: Players, args: tuple, caller: str
    ) -> tuple[_Embedding, Tensor, Tensor]:
        if len(inputs) != 1 or inputs[0].dim() != 4:
            raise ValueError(
                f"{caller}: TokenDrop/TokenSelect need one image tensor [B, C, H, W], got "
                f"{[tuple(x.shape) for x in inputs]}"
            )
        embedding = _Embedding(find_embedding(forward, self.embeddings, caller), caller)
        tokens = embedding.compute(forward, inputs[0].detach(), args)
        return embedding, tokens, patch_players(embedding, players, inputs[0][0], tokens.shape[1], caller)

    @abstractmethod
    def prepare(
        self,
        forward: Callable,
        inputs: tuple[Tensor, ...],
        players: Players,
        baselines: object,
        args: tuple,
        caller: str,
    ) -> Prepared:
        """Embed once."""


@dataclass(frozen=True)
class TokenSelect(_TokenRemoval):
    """Absent patches show the baseline's tokens: equal to pixel replacement, without making images.

    The patch embedding acts on each patch alone, so the embedding of a masked image is, token by token, that of the
    input or that of the baseline; equal in exact arithmetic, within 1e-5 in float32. Saves the masking of pixels and
    the patch projection of every row. Masks must be patch-aligned.

    Example:
        >>> from xaifast.models import VisionTransformer
        >>> model = VisionTransformer(8, 4, 3, channels=1, dim=8, depth=1, heads=1).eval()
        >>> mask = xaifast.grid_mask((8, 8), 4)
        >>> xaifast.kernel_shap(model, torch.rand(2, 1, 8, 8), feature_mask=mask, removal=TokenSelect()).values.shape
        torch.Size([2, 4, 3])
    """

    def prepare(
        self,
        forward: Callable,
        inputs: tuple[Tensor, ...],
        players: Players,
        baselines: object,
        args: tuple,
        caller: str,
    ) -> PreparedSelect:
        """Embed the inputs and the baselines once."""
        embedding, tokens, token_players = self._embed(forward, inputs, players, args, caller)
        images = inputs[0]
        resolved, background = resolve_baselines(baselines, inputs, caller)
        if background is not None:
            shown = background[0]
        else:
            filled = torch.as_tensor(resolved[0], dtype=images.dtype, device=images.device)
            per_input = filled.dim() == images.dim() and filled.shape[0] > 1
            shown = filled.expand(images.shape if per_input else (1, *images.shape[1:]))
        base = embedding.compute(forward, shown, args if shown.shape[0] == images.shape[0] else _first(args, images))
        index = token_players.unsqueeze(-1)  # one id a token, the same over its D elements
        if background is not None:
            plan = plan_selection(tokens, index, background=base)
        else:
            plan = plan_selection(tokens, index, base if base.shape[0] > 1 else base[0])
        return PreparedSelect(embedding=embedding, image=images[:1].detach().clone(), plan=plan)


def _first(args: tuple, images: Tensor) -> tuple:
    """Additional arguments of the first input, for embedding baselines that belong to no input."""
    return tuple(_take(arg, images.shape[0], 0, 1) for arg in args)


@dataclass(frozen=True)
class TokenDrop(_TokenRemoval):
    """Absent patches never enter the encoder: their tokens are left out.

    Equal to masking the absent tokens in every attention layer, in exact arithmetic; within 1e-5 in float32. Costs the
    share of tokens present, about half over a leverage design. The removed state is "no token", so ``baselines`` has no
    meaning here and must be left at its default. Masks must be patch-aligned, and the encoder must not tie tokens to
    their place after the embedding (no windows, no relative positions).

    Example:
        >>> from xaifast.models import VisionTransformer
        >>> model = VisionTransformer(8, 4, 3, channels=1, dim=8, depth=1, heads=1).eval()
        >>> mask = xaifast.grid_mask((8, 8), 4)
        >>> xaifast.kernel_shap(model, torch.rand(2, 1, 8, 8), feature_mask=mask, removal=TokenDrop()).values.shape
        torch.Size([2, 4, 3])
    """

    design: ClassVar[str] = "grouped"  # a batch holds rows of one token count: fewer sizes make larger batches

    def prepare(
        self,
        forward: Callable,
        inputs: tuple[Tensor, ...],
        players: Players,
        baselines: object,
        args: tuple,
        caller: str,
    ) -> PreparedDrop:
        """Embed the inputs once."""
        if not (isinstance(baselines, int | float) and baselines == 0):
            raise ValueError(
                f"{caller}: removal=TokenDrop() drops absent patches and takes no baselines, got "
                f"{type(baselines).__name__}; leave baselines out, or use TokenSelect()"
            )
        embedding, tokens, token_players = self._embed(forward, inputs, players, args, caller)
        n_prefix = int((token_players.reshape(-1, token_players.shape[-1])[0] < 0).sum())
        if n_prefix == 0:
            raise ValueError(
                f"{caller}: TokenDrop needs a token that always stays (a class token), the embedding has none; "
                "use TokenSelect()"
            )
        ids = token_players[..., n_prefix:].cpu()
        tokens_of = torch.zeros(*ids.shape[:-1], players.n_players, dtype=torch.float64, device="cpu")
        tokens_of.scatter_add_(-1, ids, torch.ones_like(ids, dtype=torch.float64))
        return PreparedDrop(
            embedding=embedding,
            image=inputs[0][:1].detach().clone(),
            tokens=tokens.contiguous(),
            token_players=token_players.to(torch.int32).contiguous(),
            tokens_of=tokens_of,
            n_prefix=n_prefix,
        )
