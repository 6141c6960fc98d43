"""Insertion and deletion curves: does the model's score follow the order an attribution gives?"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..coalitions import Coalitions
from ..evaluate import Evaluator
from ..noise import check_seed
from ..removal import Removal, Replace, TokenDrop, TokenSelect, resolve_removal
from ..removal.ranked import Ranked, RankPoints
from ..scores import check_one_score, resolve_score
from ..stream import shared_progress
from ._baselines import resolve_baseline, same_baseline
from ._checks import one_tensor
from ._features import Features, resolve_features
from .curve_conventions import Convention, resolve_convention, resolve_steps, rounded_counts
from .curve_result import Curves

_CALLER = "xaifast.insertion_deletion"


def insertion_deletion(
    forward: Callable,
    inputs: Tensor,
    attributions: Tensor,
    *,
    target: int | str | Tensor | None = "predicted",
    steps: int | None = None,
    feature_mask: Tensor | None = None,
    removal: object = None,
    additional_forward_args: object = None,
    deletion_baseline: object = None,
    insertion_baseline: object = None,
    order: str = "most",
    score: str | Callable[[Tensor], Tensor] = "softmax",
    compat: str | None = None,
    batch_size: int | str = "auto",
    seed: int = 0,
    show_progress: bool = False,
    nan: str = "raise",
    first_index: int = 0,
    autocast: torch.dtype | None = None,
    cuda_graph: bool = False,
    allow_training_mode: bool = False,
) -> Curves:
    """Insertion and deletion curves of a batch and their areas, in one streamed evaluation.

    With P features in the order of an attribution and k_s = floor(s P / S + 1/2), s = 0..S,
    deletion[s] = score(x with its first k_s features replaced) and insertion[s] = score(baseline with the first k_s
    features of x shown), at fractions k_s / P; areas are trapezoids over these. Elements are selected, never blended.
    The order is total: descending attribution, ties by ascending flat index; ``order="least"`` is its exact reverse, so
    with one baseline it gives the same curves read backwards.

    Args:
        forward: ``forward(x) -> [b]`` or ``[b, K]``, or an object with ``.logits``; ``x`` has b rows.
        inputs: ``[B, ...]``, one tensor.
        attributions: ``[B, H, W]``, ``[B, 1, H, W]`` or ``[B, C, H, W]`` (summed over C) for images ``[B, C, H, W]``: a
            feature is a pixel with all its channels. The inputs' shape for other inputs: a feature is an element. With
            a feature mask ``[B, M]``, or a map, averaged over each player: a feature is a player.
        target: int, LongTensor ``[B]``, ``"predicted"`` (of the clean input), or None for a model with one output.
        steps: S, 1..P; None for 50, or P where that is less.
        feature_mask: Player ids, see `xaifast.grid_mask`; also one an input (superpixels), where an input is stepped
            through the players that occur in it, k_s = floor(s P_b / S + 1/2).
        removal: None (replace by the baselines), ``"blur"`` or a callable (both baselines), or
            ``xaifast.removal.TokenSelect()`` or ``TokenDrop()`` with a patch-aligned feature mask. TokenDrop takes no
            baselines but the defaults, which it does not use: both curves drop tokens.
        additional_forward_args: Passed on after the inputs; tensors with leading B go with their input.
        deletion_baseline: Number, tensor ``[...]`` or ``[B, ...]``, callable ``inputs -> [B, ...]``, ``"zero"``,
            ``"blur"`` (Gaussian, 11 taps, width 5), ``"mean"`` (of each image and channel), ``"noise"`` (N(0, 1), by
            seed and data-set index), ``"black"`` (smallest value of each input). None: 0.
        insertion_baseline: The same. None: ``"blur"`` for floating images, else 0.
        order: ``"most"`` (MoRF), ``"least"`` (LeRF) or ``"random"`` (a permutation an input, by seed and data-set
            index).
        score: ``"softmax"`` (in float32 at least), ``"logit"``, ``"accuracy"`` (1 where the target is the argmax: means
            are accuracy curves), or a callable on outputs ``[rows, K]`` giving ``[rows, K]`` or ``[rows]``.
        compat: Take points, ties, areas and default baselines and steps of another tool (docs/curves.md), with
            k = ceil(P / S) features a step:

            - ``"rise"``: ``[B, ceil(P / k) + 1]`` points, areas as if all steps were even, blur and 0; default k one
              row of the image.
            - ``"torchcam"``: the same points, areas over true fractions, 0 and 0; default S 20.
            - ``"xplique"``: ``[B, S + 1]`` points at trunc(s P / S), even areas, 0 and 0; default S 10.
            - ``"quantus"``: PixelFlipping. Features are channel values, P = C H W, deletion ``[B, ceil(P / k)]``
              without the unperturbed point, area with steps of width one, no insertion; ``"black"``; default k 1.
        batch_size: Model rows a call, or ``"auto"``.
        seed: Of random orders and noise, 0..2**63-1. No global random state is read or changed.
        show_progress: Draw a progress bar with rate and time left.
        nan: ``"raise"``, or ``"last"``: features with NaN come after all others (under ``compat`` where the tool has
            them). A map of NaNs only is an error always.
        first_index: Data-set index of the first input, so that batches of a data set differ in random orders and noise.
        autocast: dtype for ``torch.autocast`` around the model.
        cuda_graph: Capture the model in a CUDA graph for the chunk shape.
        allow_training_mode: Allow active dropout and batch statistics.

    Returns:
        `Curves` in the inputs' floating dtype, at least float32.

    Raises:
        TypeError, ValueError: what must hold, what was given, what to do; before the model runs where the inputs show
            it, else in the first chunk.

    Cost: 2 S + 1 model rows an input (2 S with one baseline): the clean input is both curves' end. TokenSelect with two
    baselines needs one more. A sort of P scores an input; memory of one chunk beside the scores of all points. Results
    depend on neither chunk size nor neighbours (as far as the model's own rows do not).

    Source: Petsiuk, Das and Saenko, "RISE", BMVC 2018, section 4.2 (both curves); Samek et al., "Evaluating the
    visualization of what a deep neural network has learned", TNNLS 2017 (MoRF, LeRF).

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 2)).eval()
        >>> x = torch.rand(3, 1, 2, 2)
        >>> curves = insertion_deletion(model, x, x * model[1].weight[0].view(1, 2, 2), target=0, steps=2)
        >>> curves.fractions.tolist(), curves.deletion.shape
        ([0.0, 0.5, 1.0], torch.Size([3, 3]))
    """
    x = one_tensor(inputs, _CALLER)
    convention = resolve_convention(compat, _CALLER)
    score_fn = resolve_score(score, _CALLER)
    if order not in ("most", "least", "random"):
        raise ValueError(f'{_CALLER}: order must be "most", "least" or "random", got {order!r}')
    check_seed(seed, first_index, _CALLER)
    removal = resolve_removal(removal, _CALLER)
    features = resolve_features(attributions, x, feature_mask, _CALLER, nan=nan, channels=convention.channels)
    counts, fractions = _points(features, convention, steps, x.shape[-1])
    ranks = features.ranks(order, compat=compat, seed=seed, first_index=first_index)
    insertion, deletion = _resolve_baselines(
        removal, convention, x, insertion_baseline, deletion_baseline, seed=seed, first_index=first_index
    )
    common = dict(
        forward=forward,
        inputs=(x,),
        score=score_fn,
        additional_forward_args=additional_forward_args,
        batch_size=batch_size,
        autocast=autocast,
        cuda_graph=cuda_graph,
        allow_training_mode=allow_training_mode,
        caller=_CALLER,
    )
    # The clean input ends the insertion and starts the deletion; one baseline starts the one and ends the other.
    one_baseline = insertion is not None and same_baseline(insertion, deletion)
    inserted = counts[..., int(one_baseline) : -1] if insertion is not None else counts[..., :0]
    deleted = counts[..., 1:] if convention.has_start else counts
    if isinstance(removal, TokenSelect | TokenDrop):
        runs = _token_runs(removal, features, ranks, inserted, deleted, insertion, deletion, one_baseline)
    else:
        runs = [_pixel_run(features, ranks, counts, inserted, deleted, insertion, deletion)]
    values, evaluators = _evaluate(runs, common, target, show_progress)

    full, n_inserted = evaluators[0].full, inserted.shape[-1]
    inner, ends = values[:, :n_inserted], values[:, n_inserted:]
    start = ends[:, -1:] if one_baseline else ends[:, :0]
    shown = None if insertion is None else torch.cat((start, inner, full), 1)
    left = torch.cat((full, ends), 1) if convention.has_start else ends
    dtype = torch.promote_types(x.dtype, torch.float32) if x.is_floating_point() else torch.float32
    fractions = fractions.to(x.device)
    return Curves(
        fractions=fractions.to(dtype),
        insertion=None if shown is None else shown.to(dtype),
        deletion=left.to(dtype),
        insertion_auc=None if shown is None else convention.area(shown, fractions).to(dtype),
        deletion_auc=convention.area(left, fractions).to(dtype),
        n_evaluations=values.shape[1] + len(evaluators),
        targets=evaluators[0].targets,
        order=order,
        compat=compat,
        one_baseline=one_baseline,
    )


def _points(features: Features, convention: Convention, steps: int | None, width: int) -> tuple[Tensor, Tensor]:
    """Counts on the CPU and float64 fractions: ``[N]``, or ``[B, N]`` where inputs differ in their players."""
    n_present = features.n_present
    steps = resolve_steps(steps, features.n_features, convention.steps(features.n_features, width), _CALLER)
    if bool((n_present == n_present[0]).all()):
        n = int(n_present[0])
        counts = convention.counts(n, min(steps, n) if convention.name else steps)
        return counts, counts.double() / n
    if convention.name is not None:
        raise ValueError(
            f'{_CALLER}: compat="{convention.name}" needs as many players in every input, got '
            f"{int(n_present.min())} to {int(n_present.max())}; leave compat out"
        )
    counts = rounded_counts(n_present, steps)
    return counts, counts.double() / n_present[:, None]


def _resolve_baselines(
    removal: Removal,
    convention: Convention,
    x: Tensor,
    insertion: object,
    deletion: object,
    *,
    seed: int,
    first_index: int,
) -> tuple[float | Tensor | None, float | Tensor]:
    """Both baselines, resolved; insertion None where the convention has none. 0 for dropped tokens."""
    if isinstance(removal, TokenDrop):
        if not (_is_default(insertion, "blur", 0) and _is_default(deletion, 0)):
            raise ValueError(
                f"{_CALLER}: removal=TokenDrop() drops tokens and takes no baselines; leave insertion_baseline and "
                "deletion_baseline out, or use TokenSelect()"
            )
        return 0.0, 0.0
    if isinstance(removal, Replace) and removal.substrate is not None:
        if insertion is not None or deletion is not None:
            raise ValueError(
                f"{_CALLER}: insertion_baseline and deletion_baseline must be left out when removal makes both"
            )
        insertion = deletion = removal.substrate
    elif not isinstance(removal, Replace | TokenSelect):
        raise TypeError(
            f'{_CALLER}: removal must be None, "blur", a callable, TokenSelect() or TokenDrop(), got '
            f"{type(removal).__name__}"
        )
    default_insertion, default_deletion = convention.baselines
    if default_insertion == "blur" and not (x.dim() == 4 and x.is_floating_point()):
        default_insertion = 0.0
    insertion = default_insertion if insertion is None else insertion
    deletion = default_deletion if deletion is None else deletion
    random = dict(seed=seed, first_index=first_index)
    made = resolve_baseline(deletion, x, "deletion_baseline", _CALLER, **random)
    if convention.baselines[0] is None:
        return None, made
    if insertion is deletion:
        return made, made
    other = resolve_baseline(insertion, x, "insertion_baseline", _CALLER, **random)
    return (made if same_baseline(other, made) else other), made


def _is_default(baseline: object, *defaults: object) -> bool:
    return baseline is None or (isinstance(baseline, str | int | float) and baseline in defaults)


_Run = tuple[dict[str, object], object]  # what an evaluator needs beside the common, and its perturbations


def _pixel_run(
    features: Features,
    ranks: Tensor,
    counts: Tensor,
    inserted: Tensor,
    deleted: Tensor,
    insertion: float | Tensor | None,
    deletion: float | Tensor,
) -> _Run:
    """Both curves as points of nested sets."""
    n = features.n_features
    if counts.dim() == 2:
        # Points are the same for all inputs: the place of a feature becomes the step at which it is perturbed.
        steps = torch.arange(counts.shape[1], device="cpu")
        ranks = torch.searchsorted(counts[:, 1:].contiguous().to(ranks.device), ranks.long(), right=True).int()
        inserted, deleted, n = steps[-1 - inserted.shape[1] : -1], steps[1:], int(steps[-1])
    removal = Ranked(features.as_map(ranks), features.mask, deletion if insertion is None else insertion, deletion)
    return {"removal": removal}, RankPoints.of(inserted, deleted, n)


def _token_runs(
    removal: TokenSelect | TokenDrop,
    features: Features,
    ranks: Tensor,
    inserted: Tensor,
    deleted: Tensor,
    insertion: float | Tensor | None,
    deletion: float | Tensor,
    one_baseline: bool,
) -> list[_Run]:
    """Curves as coalitions of patches: in one run where both curves remove alike, else one a baseline."""
    if features.players is None:
        raise ValueError(
            f"{_CALLER}: feature_mask must be given with TokenDrop/TokenSelect; use xaifast.grid_mask((H, W), patch) "
            "with the model's patch"
        )
    ranks = ranks.cpu()[:, None]  # [B, 1, M]
    shown = ranks < inserted.unsqueeze(-1)  # [B, N, M]
    kept = ranks >= deleted.unsqueeze(-1)
    baselines = [insertion, deletion]
    present = [shown, kept]
    if one_baseline:
        baselines, present = [deletion], [torch.cat((shown, kept), 1)]
    return [
        ({"removal": removal, "players": features.players, "baselines": base}, Coalitions.from_present(rows))
        for base, rows in zip(baselines, present, strict=True)
    ]


def _evaluate(runs: list[_Run], common: dict, target: object, show_progress: bool) -> tuple[Tensor, list[Evaluator]]:
    """Values ``[B, N]`` of all runs, one bar over them."""
    evaluators: list[Evaluator] = []
    for settings, _ in runs:
        evaluators.append(Evaluator(**common, **settings, target=target, show_progress=show_progress))
        check_one_score(evaluators[0])
        target = evaluators[0].targets
    total = sum(perturbations.code.shape[-2] for _, perturbations in runs) * evaluators[0].n_inputs
    with shared_progress(total, show_progress=show_progress, description="insertion_deletion", unit="evaluation"):
        values = [
            evaluator(perturbations)[..., 0] for evaluator, (_, perturbations) in zip(evaluators, runs, strict=True)
        ]
    return torch.cat(values, 1), evaluators
