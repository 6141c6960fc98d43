"""Kernel SHAP: Shapley values of a model's outputs from sampled coalitions."""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable
from numbers import Integral

import torch
from torch import Tensor

from ..coalitions import Coalitions
from ..evaluate import Evaluator, as_inputs
from ..ops.coalitions import unpack_coalitions
from ..players import Players, resolve_players
from ..removal import resolve_removal
from .shapley_result import ShapleyResult
from .shapley_solvers import Adjusted, PairedDesign, Wls, choose_estimator, solve_exact, solve_permutation
from .small_budgets import SmallBudget, is_small, small_design

_CALLER = "xaifast.kernel_shap"
_ESTIMATORS = ("auto", "wls", "adjusted", "permutation", "exact", "small")
_LINKS: dict[str, Callable[[Tensor], Tensor]] = {"identity": lambda values: values, "logit": torch.logit}


def kernel_shap(
    forward: Callable,
    inputs: Tensor | tuple[Tensor, ...],
    *,
    baselines: object = 0.0,
    target: int | str | Tensor | None = None,
    feature_mask: Tensor | tuple[Tensor, ...] | None = None,
    n_samples: int = 512,
    estimator: str = "auto",
    link: str | Callable[[Tensor], Tensor] = "identity",
    removal: object = None,
    additional_forward_args: object = None,
    batch_size: int | str = "auto",
    seed: int = 0,
    show_progress: bool = False,
    design: str = "shared",
    block: int = 0,
    tolerance: float | None = None,
    autocast: torch.dtype | None = None,
    cuda_graph: bool = False,
    allow_training_mode: bool = False,
) -> ShapleyResult:
    """Shapley values of feature groups, for a whole batch of inputs at once.

    The value of a coalition is the model's output with all other players removed. Coalitions are sampled in complement
    pairs without replacement, sizes by leverage score, and evaluated for all inputs and outputs together; one
    factorisation serves all inputs. Results depend on the seed alone, not on chunk size or batch neighbours (as far as
    the model's own rows do not).

    Args:
        forward: ``forward(x) -> [b]`` or ``[b, K]``, or an object with ``.logits``; ``x`` has b rows.
        inputs: Tensor ``[B, ...]`` or tuple of tensors with common B.
        baselines: What removed elements show: a number, a tensor ``[...]`` or ``[B, ...]``, a tuple of these, or
            ``xaifast.Background(rows)``, whose rows multiply the model evaluations by R.
        target: int, LongTensor ``[B]``, ``"predicted"``, or None for all K outputs (one evaluation serves all).
        feature_mask: Player ids, see `xaifast.grid_mask`; None makes every element a player.
        n_samples: Coalitions an input, the empty and the full one included; odd numbers are rounded down.
            ``>= 2**M`` enumerates and is exact, whatever the estimator. At least 4; below ``3 M`` expect little from
            ``"wls"``.
        estimator: ``"wls"`` constrained weighted least squares; ``"adjusted"`` the same pairs fitted with third-order
            terms, about half the error of ``"wls"`` at equal evaluations; ``"permutation"`` antithetic permutations,
            best for ranking many null players; ``"exact"``; ``"small"``, with designs of its own for budgets around
            ``2 M`` (`small_budgets`); ``"auto"`` exact where affordable, else ``"adjusted"`` while its solve is cheap
            beside the evaluations, else ``"wls"``: a function of M, n and K alone.
        link: ``"identity"``, ``"logit"`` or an elementwise callable, applied to coalition values (after a background's
            mean).
        removal: None (replace by ``baselines``), ``"blur"``, a callable ``inputs -> baseline of the same shape``,
            ``xaifast.removal.TokenDrop()`` or ``TokenSelect()``.
        additional_forward_args: Passed on after the inputs; tensors with leading B go with their input.
        batch_size: Model rows a call, or ``"auto"``.
        seed: Of the design, 0..2**63-1. No global random state is read or changed.
        show_progress: Draw a progress bar with rate and time left.
        design: ``"shared"``: one design for all inputs (cheapest; errors are correlated between similar inputs), or
            ``"per_input"``: a design for each, for averages over inputs.
        block: Design block: batches of one data set get different designs through different blocks; input b of a
            per-input design uses block + b.
        tolerance: Stop once the relative standard error ``|std_errors| / |values|`` of every input and output is below,
            tested at doubling budgets up to ``n_samples`` ("wls" and "adjusted").
        autocast: dtype for ``torch.autocast`` around the model.
        cuda_graph: Capture the model in a CUDA graph for the chunk shape.
        allow_training_mode: Allow active dropout and batch statistics.

    Returns:
        `ShapleyResult`.

    Raises:
        TypeError, ValueError: what must hold, what was given, what to do; before the model runs where the inputs show
            it, else in the first chunk.

    Cost: ``n_samples * R`` model rows an input; a solve of ``O(n M^2)`` once and ``O(n M)`` an output (``wls``), or
    ``O(n^3 / 24)`` an output (``adjusted``); memory of one chunk beside the values of all coalitions.

    Source: Lundberg and Lee, "A unified approach to interpreting model predictions", NeurIPS 2017 (the kernel); Covert
    and Lee, "Improving KernelSHAP", AISTATS 2021 (pairing, constrained solution); Musco and Witter, "Provably accurate
    Shapley value estimation via leverage score sampling", ICLR 2025 (sizes); ``adjusted`` is derived
    (docs/estimators.md).

    Example:
        >>> model = torch.nn.Linear(4, 2).eval()
        >>> result = kernel_shap(model, torch.ones(3, 4), n_samples=16)
        >>> torch.allclose(result.values[0], model.weight.T, atol=1e-6)
        True
    """
    inputs = as_inputs(inputs, _CALLER)
    link_fn = _resolve_link(link)
    if estimator not in _ESTIMATORS:
        raise ValueError(f"{_CALLER}: estimator must be one of {', '.join(_ESTIMATORS)}, got {estimator!r}")
    if design not in ("shared", "per_input"):
        raise ValueError(f'{_CALLER}: design must be "shared" or "per_input", got {design!r}')
    if tolerance is not None and not (isinstance(tolerance, int | float) and tolerance > 0):
        raise ValueError(f"{_CALLER}: tolerance must be positive, got {tolerance!r}")
    players = resolve_players(feature_mask, inputs, _CALLER)
    check_budget(players.n_players, n_samples, estimator)
    n_samples = int(n_samples)
    removal = resolve_removal(removal, _CALLER)
    draw = functools.partial(Coalitions.sample, design="chain" if estimator == "permutation" else removal.design)
    if estimator == "small" and n_samples < 2**players.n_players:
        draw = small_design
    if design == "shared":
        coalitions = draw(players.n_players, n_samples, seed=seed, block=block)
    else:
        coalitions = Coalitions.stack(
            [draw(players.n_players, n_samples, seed=seed, block=block + b) for b in range(inputs[0].shape[0])]
        )

    evaluator = Evaluator(
        forward,
        inputs,
        players=players,
        baselines=baselines,
        target=target,
        removal=removal,
        additional_forward_args=additional_forward_args,
        batch_size=batch_size,
        autocast=autocast,
        cuda_graph=cuda_graph,
        allow_training_mode=allow_training_mode,
        show_progress=show_progress,
        caller=_CALLER,
    )
    n_outputs = evaluator.full.shape[1]
    if n_samples >= 2**players.n_players:  # every design then holds all coalitions
        estimator = "exact"
    elif estimator == "auto":
        estimator = choose_estimator(players.n_players, n_samples, n_outputs)
    job = _Job(evaluator, coalitions, players, link_fn, estimator)
    if tolerance is not None and estimator in ("wls", "adjusted"):
        values, errors, linked = job.until(tolerance, seed)
    else:
        linked = job.evaluate(slice(None))
        values, errors = job.solve(coalitions, linked)

    dtype = functools.reduce(torch.promote_types, (x.dtype for x in inputs), torch.float32)
    full, base = linked[:, 0], linked[:, 1]
    if not evaluator.has_output_axis:
        values, errors, full, base = values[..., 0], errors[..., 0], full[..., 0], base[..., 0]
    return ShapleyResult(
        values=values.to(dtype),
        base_values=base.to(dtype),
        full_values=full.to(dtype),
        std_errors=errors.to(dtype),
        n_evaluations=linked.shape[1] * evaluator.n_background,
        estimator=estimator,
        targets=evaluator.targets,
        predicted=evaluator.predicted,
        _players=players,
        _inputs=tuple(x.detach() for x in inputs),
    )


class _Job:
    """Evaluate and solve one call."""

    def __init__(
        self, evaluator: Evaluator, coalitions: Coalitions, players: Players, link: Callable, estimator: str
    ) -> None:
        self.evaluator, self.coalitions, self.players = evaluator, coalitions, players
        self.link, self.estimator = link, estimator

    def rows(self, which: slice | Tensor) -> Coalitions:
        """Some of the design's coalitions."""
        design = self.coalitions
        return Coalitions(design.bits[..., which, :], design.weights[..., which], design.n_players)

    def evaluate(self, which: slice | Tensor) -> Tensor:
        """Values ``[B, n, K]`` of coalitions in link space; row 0, the full coalition, is known already."""
        rest = self.rows(which)
        rest = Coalitions(rest.bits[..., 1:, :], rest.weights[..., 1:], rest.n_players)
        raw = torch.cat((self.evaluator.full.unsqueeze(1), self.evaluator(rest)), dim=1)
        return self.to_link_space(raw)

    def to_link_space(self, raw: Tensor) -> Tensor:
        """Apply the link and check that it is defined there."""
        linked = self.link(raw)
        if not isinstance(linked, Tensor) or linked.shape != raw.shape:
            raise ValueError(f"{_CALLER}: link must map values elementwise to a tensor of the same shape")
        if not bool(torch.isfinite(linked).all()):
            b, c, k = (~torch.isfinite(linked)).nonzero()[0].tolist()
            raise ValueError(
                f"{_CALLER}: link must be finite on the model's values, but it maps {raw[b, c, k].item()} (input {b}, "
                f'coalition {c}) to {linked[b, c, k].item()}; "logit" needs probabilities strictly between 0 and 1'
            )
        return linked.double()

    def solve(self, coalitions: Coalitions, values: Tensor) -> tuple[Tensor, Tensor]:
        """Shapley values and standard errors ``[B, M, K]`` float64; no input's bits depend on the others."""
        batch, _, n_outputs = values.shape
        phi = values.new_zeros(batch, coalitions.n_players, n_outputs)
        errors = torch.zeros_like(phi)
        same: dict[object, list[int]] = {}  # inputs that share a solver; one solver at a time is kept
        for b in range(batch):
            absent = None if self.players.absent is None else self.players.absent[b].numpy().tobytes()
            same.setdefault(b if coalitions.bits.dim() == 3 else absent, []).append(b)
        for members in same.values():
            bits, weights = coalitions.bits, coalitions.weights
            if bits.dim() == 3:
                bits, weights = bits[members[0]], weights[members[0]]
            absent = None if self.players.absent is None else self.players.absent[members[0]]
            if absent is not None and not bool(absent.any()):
                absent = None
            solve = self.solver(bits, weights, absent)
            absent = torch.zeros(coalitions.n_players, dtype=torch.bool, device="cpu") if absent is None else absent
            kept = (~absent).nonzero().squeeze(1).to(values.device)
            rows = torch.tensor(members, device=values.device)
            if self.estimator in ("adjusted", "small"):  # they keep outputs apart, so all inputs are one call
                columns = values[rows].transpose(0, 1).flatten(1)  # [n, inputs * K]
                solved = [part.unflatten(1, (len(members), -1)).transpose(0, 1) for part in solve(columns)]
            else:  # an output's last bits may depend on the others of a call, so each input has a call of its own
                solved = [torch.stack(part) for part in zip(*(solve(values[b]) for b in members), strict=True)]
            phi[rows[:, None], kept], errors[rows[:, None], kept] = solved
        return phi, errors

    def solver(self, bits: Tensor, weights: Tensor, absent: Tensor | None) -> Callable:
        """``values [n, K] -> (values [M', K], std_errors [M', K])`` over the players that occur in the input."""
        n_players, device = self.coalitions.n_players, self.evaluator.device
        if n_players == 1:
            return lambda values: ((values[0] - values[1])[None], torch.zeros_like(values[:1]))
        if self.estimator == "exact":

            def exact(values: Tensor) -> tuple[Tensor, Tensor]:
                phi = solve_exact(bits.to(device), values, n_players)
                phi = phi if absent is None else phi[(~absent).to(device)]
                return phi, torch.zeros_like(phi)

            return exact
        output_eps = _epsilon(self.evaluator.output_dtype)
        if self.estimator == "small":
            present = unpack_coalitions(bits, n_players).to(device)
            absent = None if absent is None else absent.to(device)
            return SmallBudget(present, weights.to(device), output_eps, absent)
        paired = PairedDesign.from_bits(bits.to(device), weights.to(device), n_players)
        if self.estimator == "permutation":

            def permutation(values: Tensor) -> tuple[Tensor, Tensor]:
                phi, errors = solve_permutation(paired.present, values[2::2], values[3::2], values[0], values[1])
                if absent is None:
                    return phi, errors
                kept = (~absent).to(device)
                phi, errors = phi[kept], errors[kept]
                # A short chain gives absent players a share of their block's step.
                return phi + (values[0] - values[1] - phi.sum(0)) / len(phi), errors

            return permutation
        rows = slice(None)
        if absent is not None:
            # Summed over absent players the kernel is that of the others. Pairs left with nobody and everybody say
            # nothing new.
            present = paired.present[:, (~absent).to(device)]
            rows = present.any(1) & ~present.all(1)
            paired = PairedDesign(present[rows], paired.weights[rows])
        if self.estimator == "adjusted":
            solve = Adjusted(paired, output_eps)
        else:
            solve = Wls(paired)
        return lambda values: solve(((values[2::2] - values[3::2]) / 2)[rows], values[0] - values[1])

    def until(self, tolerance: float, seed: int) -> tuple[Tensor, Tensor, Tensor]:
        """Evaluate random parts of the design, doubling, until the standard errors are small enough.

        A random part of a design without replacement is one itself, with the same weights up to a factor.
        """
        n_pairs = (self.coalitions.n_coalitions - 2) // 2
        generator = torch.Generator().manual_seed(seed % 2**63)
        order = torch.randperm(n_pairs, generator=generator, device="cpu")
        done = 0
        target = max(math.ceil(1.5 * self.coalitions.n_players), n_pairs // 8)
        ends = torch.tensor([0, 1], device="cpu")
        linked = self.evaluate(ends)
        while True:
            goal = min(target, n_pairs)
            pairs = order[done:goal]
            rows = (2 + 2 * pairs[:, None] + ends).flatten()
            linked = torch.cat((linked, self.to_link_space(self.evaluator(self.rows(rows)))), dim=1)
            used = torch.cat((ends, (2 + 2 * order[:goal, None] + ends).flatten()))
            values, errors = self.solve(self.rows(used), linked)
            relative = errors.norm(dim=1) / values.norm(dim=1).clamp_min(torch.finfo(torch.float64).tiny)
            if goal == n_pairs or bool((relative <= tolerance).all()):
                return values, errors, linked
            done, target = goal, 2 * goal


def _epsilon(dtype: torch.dtype | None) -> float:
    return torch.finfo(dtype).eps if dtype is not None and dtype.is_floating_point else torch.finfo(torch.float64).eps


def _resolve_link(link: object) -> Callable[[Tensor], Tensor]:
    if callable(link):
        return link
    if link not in _LINKS:
        raise ValueError(f'{_CALLER}: link must be "identity", "logit" or a callable, got {link!r}')
    return _LINKS[link]


def check_budget(n_players: int, n_samples: int, estimator: str) -> None:
    """Refuse budgets that no estimator, or not this one, can use; warn about those that say little."""
    if not isinstance(n_samples, Integral) or isinstance(n_samples, bool):
        raise TypeError(f"{_CALLER}: n_samples must be an int, got {type(n_samples).__name__}")
    least = 2 if n_players == 1 else 4
    if n_samples < least:
        raise ValueError(
            f"{_CALLER}: n_samples must be at least {least} for {n_players} players (full, empty and one pair), got "
            f"{n_samples}"
        )
    if estimator == "exact" and n_samples < 2**n_players:
        raise ValueError(
            f'{_CALLER}: estimator="exact" needs n_samples >= 2**M = 2**{n_players}, got {n_samples}; raise it, merge '
            "players with feature_mask, or use another estimator"
        )
    if estimator == "small" and not (n_samples >= 2**n_players or is_small(n_players, n_samples)):
        raise ValueError(
            f'{_CALLER}: estimator="small" is for fewer than {max(80, 2 * n_players + 2)} samples with {n_players} '
            f'players, got {n_samples}; use "auto"'
        )
    if n_samples < n_players:
        warnings.warn(
            f"{_CALLER}: n_samples={n_samples} is below the number of players ({n_players}): the values are mostly an "
            f"even split; use at least {3 * n_players}, or fewer players",
            UserWarning,
            stacklevel=3,
        )
