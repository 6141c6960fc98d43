"""RISE: how much a pixel's being shown goes with the score, over random smooth masks."""

from __future__ import annotations

from collections.abc import Callable
from numbers import Integral, Real

import torch
from torch import Tensor

from ..evaluate import Evaluator, as_inputs
from ..removal import Replace, resolve_removal
from ..removal.smooth_masks import Blend, MaskLaw, SmoothMasks
from ..scores import resolve_score
from ..stream import shared_progress

_CALLER = "xaifast.rise"
_BLOCK = 256  # masks held at a time


def rise(
    forward: Callable,
    inputs: Tensor,
    *,
    target: int | str | Tensor | None = "predicted",
    n_masks: int = 4000,
    cells: int | tuple[int, int] = 7,
    p: float = 0.5,
    seed: int = 0,
    score: str | Callable[[Tensor], Tensor] = "softmax",
    normalise: str = "expected",
    baselines: object = 0.0,
    removal: object = None,
    additional_forward_args: object = None,
    batch_size: int | str = "auto",
    show_progress: bool = False,
    autocast: torch.dtype | None = None,
    cuda_graph: bool = False,
    allow_training_mode: bool = False,
) -> Tensor:
    """Randomised input sampling: the mean of random masks, each weighted by the score of the masked image.

    ``S[b, i, j] = sum over masks n of score(m_n x[b] + (1 - m_n) baseline) m_n[i, j] / (N p)``. Masks are random grids,
    enlarged bilinearly and cut out at a random place (`xaifast.removal.smooth_masks.MaskLaw` says exactly how); mask n
    depends on the seed and n alone, is the same for all inputs, and is made again from its random numbers in every
    call. Masks never enter the sum as images: scores are summed by grid cell and place, in float64, and the sums are
    enlarged once.

    Args:
        forward: ``forward(x) -> [b, K]`` or ``[b]``, or an object with ``.logits``; ``x`` has b rows.
        inputs: Floating images ``[B, C, H, W]``.
        target: int, LongTensor ``[B]``, ``"predicted"``, or None for all K outputs (one evaluation serves all).
        n_masks: N.
        cells: Grid cells along height and width, at most as many as pixels.
        p: Probability that a cell is shown, between 0 and 1.
        seed: 0..2**63-1. No global random state is read or changed.
        score: ``"softmax"`` of the outputs, ``"logit"``, the outputs themselves, ``"accuracy"``, 1 where the target is
            their largest, or a callable ``[b, K] -> [b, K]`` or ``[b]``.
        normalise: ``"expected"``, division by N p as in the paper, or ``"observed"``, division by the sum of the masks
            at each pixel: the mean score of the masks that show it. (``RISEBatch`` of the authors' code divides by
            nothing; ``"expected"`` times N p.)
        baselines: What is shown where the mask is 0: a number, a tensor ``[...]`` or ``[B, ...]``, or
            ``xaifast.Background(rows)``.
        removal: None (``baselines``), ``"blur"``, or a callable ``inputs -> baseline of the same shape``.
        additional_forward_args: Passed on after the inputs; tensors with leading B go with their input.
        batch_size: Model rows a call, or ``"auto"``.
        show_progress: Draw one progress bar with rate and time left.
        autocast: dtype for ``torch.autocast`` around the model.
        cuda_graph: Capture the model in a CUDA graph for the chunk shape.
        allow_training_mode: Allow active dropout and batch statistics.

    Returns:
        ``[B, H, W]``, or ``[B, H, W, K]`` where all K outputs were asked for, in the inputs' dtype, at least float32.
        Not divided by anything else, and not centred: a constant score gives its own value, on average.

    Raises:
        TypeError, ValueError: what must hold, what was given, what to do; before the model runs where the inputs show
            it, else in the first chunk.

    Cost: ``n_masks`` model rows an input; memory of 256 masks and of the sums, ``8 cells^2 c^2`` bytes an input and
    output with ``c = ceil(H / cells)``, whatever n_masks.

    Source: Petsiuk, Das and Saenko, "RISE: randomized input sampling for explanation of black-box models", BMVC 2018,
    section 3. The authors' code enlarges with mirrored borders; here the outermost half cell is constant.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 3)).eval()
        >>> rise(model, torch.rand(2, 1, 8, 8), n_masks=100, cells=4).shape
        torch.Size([2, 8, 8])
    """
    (images,) = given = as_inputs(inputs, _CALLER)[:1]
    _check_images(inputs)
    law = _law(images, n_masks, cells, p, seed)
    if normalise not in ("expected", "observed"):
        raise ValueError(f'{_CALLER}: normalise must be "expected" or "observed", got {normalise!r}')
    removal = resolve_removal(removal, _CALLER)
    if not isinstance(removal, Replace):
        raise ValueError(
            f'{_CALLER}: removal must be None, "blur" or a callable, for masks fade pixels, got '
            f"{type(removal).__name__}"
        )
    ones = torch.ones(1, *law.size, dtype=images.dtype, device=images.device)
    evaluator = Evaluator(
        forward,
        given,
        baselines=baselines,
        target=target,
        removal=Blend(removal, ones),
        score=resolve_score(score, _CALLER),
        additional_forward_args=additional_forward_args,
        batch_size=batch_size,
        autocast=autocast,
        cuda_graph=cuda_graph,
        allow_training_mode=allow_training_mode,
        caller=_CALLER,
    )
    n_inputs = len(images)
    scored, shown = (_Sums(law, n, k, images.device) for n, k in ((n_inputs, evaluator.full.shape[1]), (1, 1)))
    dtype = torch.promote_types(images.dtype, torch.float32)
    with shared_progress(n_inputs * n_masks, show_progress=show_progress, description="rise", unit="evaluation"):
        for first in range(0, n_masks, _BLOCK):
            grids, places = (drawn.to(images.device) for drawn in law.draw(first, min(_BLOCK, n_masks - first)))
            masks = law.enlarge(grids.to(dtype), places).to(images.dtype)
            scored.add(evaluator(SmoothMasks.of(masks, first)), grids, places)
            shown.add(torch.ones(1, len(grids), 1, dtype=torch.float64, device=images.device), grids, places)
    maps = scored.enlarged()
    if normalise == "expected":
        maps = maps / (n_masks * p)
    else:
        weight = shown.enlarged()
        maps = torch.where(weight > 0, maps / weight, 0)  # a pixel that no mask shows
    return (maps if evaluator.has_output_axis else maps[..., 0]).to(dtype)


class _Sums:
    """Sums of weighted masks, kept by grid cell and place: ``sum_n w_n m_n`` is linear in the grids."""

    def __init__(self, law: MaskLaw, n_inputs: int, n_outputs: int, device: torch.device) -> None:
        self.law = law
        shape = (n_inputs, law.cell[0] * law.cell[1], n_outputs, law.cells[0] * law.cells[1])
        self.sums = torch.zeros(shape, dtype=torch.float64, device=device)

    def add(self, weights: Tensor, grids: Tensor, places: Tensor) -> None:
        """Weights ``[B, n, K]`` of n masks; one input at a time, in the order of the masks."""
        place = (places[:, 0] * self.law.cell[1] + places[:, 1],)
        cells = grids.flatten(1).double()[:, None]  # [n, 1, cells]
        for sums, weight in zip(self.sums, weights, strict=True):
            sums.index_put_(place, weight[:, :, None] * cells, accumulate=True)

    def enlarged(self) -> Tensor:
        """The sums as images, ``[B, H, W, K]`` float64."""
        rows, columns = (self.law.enlargement(axis).to(self.sums.device) for axis in (0, 1))  # [c, size, g]
        maps = []
        for sums in self.sums:
            grids = sums.view(*self.law.cell, -1, *self.law.cells)  # [c, c', K, g, g']
            wide = torch.einsum("yxkab,xwb->ykaw", grids, columns)
            maps.append(torch.einsum("ykaw,yha->hwk", wide, rows))
        return torch.stack(maps)


def _check_images(inputs: object) -> None:
    if not isinstance(inputs, Tensor) or inputs.dim() != 4 or not inputs.is_floating_point():
        given = f"{inputs.dtype} {list(inputs.shape)}" if isinstance(inputs, Tensor) else type(inputs).__name__
        raise ValueError(
            f"{_CALLER}: inputs must be one tensor of floating images [B, C, H, W], got {given}; convert it"
        )


def _law(images: Tensor, n_masks: object, cells: object, p: object, seed: object) -> MaskLaw:
    size = tuple(images.shape[2:])
    if not isinstance(n_masks, Integral) or n_masks < 1:
        raise ValueError(f"{_CALLER}: n_masks must be a positive int, got {n_masks!r}")
    pair = (cells, cells) if isinstance(cells, Integral) else cells
    whole = isinstance(pair, tuple | list) and len(pair) == 2 and all(isinstance(n, Integral) for n in pair)
    if not whole or not all(1 <= n <= most for n, most in zip(pair, size, strict=True)):
        raise ValueError(
            f"{_CALLER}: cells must be a positive int or (rows, columns), at most the image's size {size}, got "
            f"{cells!r}"
        )
    if not isinstance(p, Real) or not 0 < p < 1:
        raise ValueError(f"{_CALLER}: p must lie between 0 and 1, got {p!r}")
    if not isinstance(seed, Integral) or not 0 <= seed < 2**63:
        raise ValueError(f"{_CALLER}: seed must be an int in 0..2**63-1, got {seed!r}")
    return MaskLaw(size, tuple(int(n) for n in pair), float(p), int(seed))
