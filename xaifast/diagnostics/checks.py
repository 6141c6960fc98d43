"""The self-test: every operator and the main method on small awkward cases, against the reference or brute force."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from xaifast import _native, ops
from xaifast.attribution import _adjusted, kernel_shap
from xaifast.models import VisionTransformer
from xaifast.ops.coalitions import DESIGNS
from xaifast.players import grid_mask
from xaifast.reference import coalitions as coalitions_reference
from xaifast.reference import masking as masking_reference
from xaifast.reference import tokens as tokens_reference
from xaifast.removal import TokenDrop, TokenSelect

from .installation import count_gpus, operator_backends

_PLAYERS = 67  # more than a word
_HIDDEN = 65  # the player that is in no coalition, and behind whom is NaN


@dataclass(frozen=True)
class Check:
    """One finding of the self-test.

    Attributes:
        name: What was tested, and on which device where there are several.
        ok: False where the result is wrong or the check raised.
        detail: What was found, or why it was skipped.
        seconds: Time it took.
        skipped: Whether the check cannot run here, which is ok.
    """

    name: str
    ok: bool
    detail: str
    seconds: float
    skipped: bool = False


class _Skip(Exception):
    """The check cannot run here."""


def self_test() -> list[Check]:
    """Test the operators as they are used here, on the CPU and on every GPU.

    Operators must equal the reference byte for byte, methods brute force within rounding. Nothing raises: what does is
    a failed check. Global random state is left alone. Takes a fraction of a second on a CPU; the first run on a GPU
    compiles Triton kernels, a few seconds.

    Example:
        >>> [check.name for check in self_test() if not check.ok]
        []
    """
    gpus = [f"cuda:{i}" for i in range(count_gpus()[0])]
    with torch.device("cpu"), torch.random.fork_rng(devices=gpus):
        checks = [_run("sample_coalitions", _sampling)]
        for device in ("cpu", *gpus):
            checks += [
                _run(f"mask_inputs on {device}", _masking, device),
                _run(f"blend_inputs on {device}", _blending, device),
                _run(f"select_tokens on {device}", _selecting, device),
                _run(f"compact_tokens on {device}", _compacting, device),
                _run(f"kernel_shap on {device}", _explaining, device),
                _run(f"TokenDrop on {device}", _dropping, device),
                _run(f"TokenSelect on {device}", _replacing, device),
            ]
        if not gpus:
            checks.append(Check("operators on a GPU", True, "torch sees none", 0.0, skipped=True))
        checks.append(_run("cubic_regression", _regressing))
        checks.append(_run("safetensors", _storing))
    return checks


def _run(name: str, check: Callable[..., str], *args: str) -> Check:
    start = time.perf_counter()
    ok, skipped = True, False
    try:
        detail = check(*args)
    except _Skip as reason:
        detail, skipped = str(reason), True
    except AssertionError as difference:
        detail, ok = str(difference), False
    except Exception as error:  # whatever it is, it is the finding
        detail, ok = f"{type(error).__name__}: {error}", False
    return Check(name, ok, detail, time.perf_counter() - start, skipped)


def _same_bytes(got: Tensor, expected: Tensor, what: str) -> None:
    if got.shape != expected.shape or got.dtype != expected.dtype:
        raise AssertionError(
            f"{what}: {got.dtype} {list(got.shape)}, where the reference has {expected.dtype} {list(expected.shape)}"
        )
    got, expected = (t.cpu().contiguous().view(torch.uint8) for t in (got, expected))
    wrong = int((got != expected).sum())
    if wrong:
        raise AssertionError(f"{what}: {wrong} of {got.numel()} bytes differ from the reference")


def _close(got: Tensor, expected: Tensor, what: str, tolerance: float = 1e-9) -> float:
    """The largest difference, which must not exceed the tolerance (NaN does)."""
    worst = float((got.cpu() - expected.cpu()).abs().max())
    if not worst <= tolerance:
        raise AssertionError(f"{what}: differs by {worst:.1e}, more than {tolerance:.0e}")
    return worst


def _serving(kernel: str, device: str) -> str:
    backend, _ = operator_backends()[kernel][torch.device(device).type]
    isa = f" {_native.cpu().build_info()['isa']}" if backend == "native" and device == "cpu" else ""
    return backend + isa


def _random(seed: int, *shape: int) -> Tensor:
    """Uniform float64 in [0, 1)."""
    return torch.rand(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def _sampling() -> str:
    for n_players, n_samples in ((3, 6), (5, 32), (65, 42)):
        for design in DESIGNS:
            got = ops.sample_coalitions(n_players, n_samples, design, seed=7, block=3)
            n_rows = ops.design_size(n_players, n_samples, design)
            expected = coalitions_reference.sample_coalitions(n_players, n_rows, design, 7, 3)
            for one, other, part in zip(got, expected, ("bits", "weights"), strict=True):
                _same_bytes(one, other, f"{part} of {design}, {n_players} players")
    return f"{_serving('sample_coalitions', 'cpu')}, {len(DESIGNS)} designs as the reference, byte for byte"


def _masking(device: str) -> str:
    shape = (3, 2, 5, 15)  # odd rows of 150 elements
    mask = torch.arange(75).remainder(_PLAYERS).reshape(5, 15)
    mask[0, 3] = -1
    present = _random(1, 7, _PLAYERS) < 0.5
    present[:, _HIDDEN] = False

    def compare(what: str, x: Tensor, present: Tensor, mask: Tensor, base: float | Tensor, **more: Tensor) -> None:
        moved = {key: t.to(device) for key, t in more.items()}
        got = ops.mask_inputs(x.to(device), present.to(device), mask.to(device), base, **moved)
        _same_bytes(got, masking_reference.mask_inputs(x, present, mask, base, **more), what)
        if not bool(got.isfinite().all()):
            raise AssertionError(f"{what}: NaN behind a removed player shows")

    for dtype in (torch.uint8, torch.bfloat16, torch.float32, torch.float64):
        x, base = (200 * _random(2, *shape)).to(dtype), (200 * _random(3, *shape[1:])).to(dtype)
        if dtype.is_floating_point:
            x[:, :, mask == _HIDDEN] = float("nan")
        compare(str(dtype), x, present, mask, base)
    x = x.float()
    compare("background", x, present, mask, 0.0, background=_random(4, 3, *shape[1:]).float())
    each = torch.stack([mask, mask, mask]).unsqueeze(1)
    each[1] = torch.where(mask == _HIDDEN, _HIDDEN, 0)
    compare("own masks and coalitions", x, torch.stack([present, present.roll(1, 0), present]), each, base.float())

    plan = ops.plan_selection(x.to(device), mask.to(device))
    bits = ops.pack_coalitions(present).to(device)
    _same_bytes(plan.rows(bits, 20, 21), plan.rows(bits)[20:], "the last row alone")
    return f"{_serving('select_rows', device)}, 7 cases as the reference, byte for byte"


def _blending(device: str) -> str:
    x, weights = _random(1, 3, 2, 5), _random(2, 4, 3)
    mask = torch.tensor([0, 1, -1, 2, 1])
    got = ops.blend_inputs(x.to(device), weights.to(device), mask.to(device), 0.25)
    worst = _close(got, masking_reference.blend_inputs(x, weights, mask, 0.25), "soft masks", 1e-12)
    return f"{_serving('blend_inputs', device)}, within {worst:.1g} of the reference"


def _token_case() -> tuple[Tensor, Tensor, Tensor]:
    """Tokens [3, 11, 5] with NaN behind the hidden player, coalitions [7, 67] and token players [11]."""
    players = torch.tensor([-1, 0, 0, 66, _HIDDEN, 63, 64, 1, 31, 32, 66])
    present = _random(5, 7, _PLAYERS) < 0.5
    present[:, _HIDDEN] = False
    present[0], present[1] = torch.arange(_PLAYERS) != _HIDDEN, False
    tokens = _random(6, 3, 11, 5).float()
    tokens[:, players == _HIDDEN] = float("nan")
    return tokens, present, players


def _selecting(device: str) -> str:
    tokens, present, players = _token_case()
    base = _random(7, 11, 5).float()
    got = ops.select_tokens(*(t.to(device) for t in (tokens, present, players, base)))
    _same_bytes(got, masking_reference.mask_inputs(tokens, present, players[:, None], base), "tokens")
    return f"{_serving('select_rows', device)}, as the reference, byte for byte"


def _compacting(device: str) -> str:
    tokens, present, players = _token_case()
    for length in (10, 13):  # just enough for the fullest coalition, and padded beyond the tokens there are
        for dtype in (torch.float32, torch.bfloat16):
            got = ops.compact_tokens(tokens.to(device, dtype), present.to(device), players.to(device), length)
            expected = tokens_reference.compact_tokens(tokens.to(dtype), present, players, length)
            _same_bytes(got, expected, f"length {length}, {dtype}")
    return f"{_serving('compact_rows', device)}, 4 cases as the reference, byte for byte"


def _shapley(value: Callable[[tuple[int, ...]], Tensor], n_players: int) -> Tensor:
    """Shapley values [M, ...] of ``value(sorted players)``: marginal contributions over every order of the players."""
    coalitions = itertools.chain.from_iterable(
        itertools.combinations(range(n_players), size) for size in range(n_players + 1)
    )
    values = {members: value(members) for members in coalitions}
    phi = torch.zeros(n_players, *values[()].shape, dtype=torch.float64)
    orders = list(itertools.permutations(range(n_players)))
    for order in orders:
        for i, player in enumerate(order):
            phi[player] += values[tuple(sorted(order[: i + 1]))] - values[tuple(sorted(order[:i]))]
    return phi / len(orders)


def _explaining(device: str) -> str:
    x, slope = 2 * _random(8, 2, 5) - 1, 4 * _random(9, 5, 2) - 2

    def forward(rows: Tensor) -> Tensor:
        """Linear, and an interaction of two features."""
        return rows @ slope.to(rows) + 3 * (rows[:, :1] * rows[:, 2:3])

    def value(members: tuple[int, ...]) -> Tensor:
        return forward(torch.where(torch.isin(torch.arange(5), torch.tensor(members)), x, 0))

    expected = _shapley(value, 5).transpose(0, 1)  # [B, M, K]
    worst = 0.0
    for n_samples, estimator in ((32, "exact"), (24, "wls")):
        result = kernel_shap(forward, x.to(device), n_samples=n_samples, estimator=estimator)
        worst = max(worst, _close(result.values, expected, f"{estimator}, {n_samples} evaluations"))
    return f"within {worst:.1g} of Shapley values by enumeration"


def _small_vit() -> tuple[VisionTransformer, Tensor, Tensor]:
    """A network in evaluation mode, images [2, 1, 8, 8] and their 4 patches as players."""
    torch.manual_seed(0)
    model = VisionTransformer(8, 4, 3, channels=1, dim=8, depth=1, heads=2).double().eval()
    return model, _random(10, 2, 1, 8, 8), grid_mask((8, 8), 4)


def _dropping(device: str) -> str:
    model, images, mask = _small_vit()

    @torch.no_grad()
    def value(members: tuple[int, ...]) -> Tensor:
        tokens = model.embeddings(images)[:, [0, *(1 + player for player in members)]]
        return model.head(model.norm(model.blocks(tokens)[:, 0]))

    expected = _shapley(value, 4).transpose(0, 1)
    model.to(device)
    got = kernel_shap(model, images.to(device), feature_mask=mask, n_samples=16, removal=TokenDrop()).values
    return f"within {_close(got, expected, 'values'):.1g} of the encoder on the tokens that are left"


def _replacing(device: str) -> str:
    model, images, mask = _small_vit()
    model, images = model.to(device), images.to(device)
    got, expected = (
        kernel_shap(model, images, baselines=0.5, feature_mask=mask, n_samples=10, removal=removal).values
        for removal in (TokenSelect(), None)
    )
    return f"within {_close(got, expected, 'values'):.1g} of replacing pixels"


def _regressing() -> str:
    backend, why = operator_backends()["cubic_regression"]["cpu"]
    if backend != "native":
        raise _Skip(f"no native kernel is used: {why}")
    n_outputs, n_rows, n_players = 3, 24, 7
    signs = torch.where(_random(11, n_rows, n_players) < 0.5, -1.0, 1.0).double()
    columns = torch.cat([signs, _random(12, n_rows, 2)], 1)
    weights, sizes = _random(13, n_outputs, n_players) / n_players, _random(14, n_outputs, 1)
    y, diagonal = _random(15, n_outputs, n_rows), 0.1 + _random(16, n_outputs, n_rows)
    probes = torch.empty(0, n_rows, dtype=torch.float64)
    native = _adjusted.NativeRegressions(columns, n_players, probes, _native.cpu())(y, weights, sizes, diagonal, True)
    torch_ = _adjusted.TorchRegressions(columns, n_players, probes)(y, weights, sizes, diagonal, True)
    worst = max(
        _close(getattr(native, part), getattr(torch_, part), part)
        for part in ("alpha", "quadratic", "log_determinant", "inverse_diagonal")
    )
    return f"{_serving('cubic_regression', 'cpu')}, within {worst:.1g} of torch"


def _storing() -> str:
    from safetensors.torch import load, save

    values = _random(17, 3, 5)
    values[1, 2] = float("nan")
    tensors = {"half": values.bfloat16(), "single": values.float(), "double": values, "ids": torch.arange(7)}
    stored = load(save(tensors))
    for name, tensor in tensors.items():
        _same_bytes(stored[name], tensor, name)
    return f"{len(tensors)} tensors read back as written, byte for byte"
