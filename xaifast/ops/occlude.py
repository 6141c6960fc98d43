"""`occlude_linear`: what a network's outputs lose when one input feature's first-layer update is undone.

The operator `torch.ops.xaifast.occlude_linear` works on rows, pairs of a sample and a player, in tiles that stay in the
caches; `occlude_linear` is its public face for all players of all samples.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch._C._functorch as functorch
from torch import Tensor

from xaifast.ops import _registry
from xaifast.ops.select import describe
from xaifast.reference import occlude as reference

PRECISIONS = ("full", "tf32", "bf16")
_TILE_BYTES = {"cpu": 2**23, "cuda": 2**28}
_NATIVE_STEPS = {"identity": 0, "relu": 1, "leaky_relu": 2, "sigmoid": 3, "tanh": 4, "silu": 5}
_NAMES = (*_NATIVE_STEPS, "elu", "gelu", "gelu_tanh")


def occlude_linear(
    x: Tensor,
    delta: Tensor,
    base: Sequence[Tensor],
    weights: Sequence[Tensor],
    *,
    activations: str | Sequence[str] = "relu",
    groups: Tensor | None = None,
    precision: str = "full",
) -> Tensor:
    """Drop of a multilayer perceptron's outputs when a player's update of the first layer is undone, for all players.

    ``out[b, m] = g(z_1[b]) - g(z_1[b] - d[b, m])``, ``d[b, m] = sum of x[b, i] delta[:, i] over the elements i of m``,
    where g is the network behind the first layer. Differences are propagated, never subtracted at the end:
    ``d_{l+1} = W_{l+1} (phi(z_l) - phi(z_l - d_l))``, so the error is relative to the result (float32: about 1e-7 where
    the base comes from float64; operands rounded to tf32: 5e-4, bf16: 5e-3). For what applying an update at the old
    state adds, pass ``-delta`` and negate.

    Args:
        x: ``[B, N]``, float32 or float64. Players whose elements are all 0 are skipped and get exactly 0.
        delta: ``[H, N]``, the update of the first layer's weight.
        base: Pre-activations ``z_1 [B, H], z_2 [B, H2], ..``, one for each activation.
        weights: ``W_2 [H2, H], ..`` of the later layers, as many as there are activations or one fewer.
        activations: Name for all layers or for each: identity, relu, leaky_relu:SLOPE, elu:ALPHA, tanh, sigmoid, silu,
            gelu or gelu_tanh.
        groups: int64 player ids ``[N]`` or ``[B, N]``; None: each element is a player.
        precision: "full", or "tf32" or "bf16" operands with float32 sums (on the CPU emulated, for checking).

    Returns:
        ``[B, M, K]`` in x's dtype, K the rows of the last weight.

    Raises:
        TypeError, ValueError: shapes, dtypes, devices or names do not fit.

    Differentiable, by the reference. Cost: ``2 B M (H + H H2 + ..)`` flops beside tiles of 8 MiB (256 MiB on a GPU).

    Source: XtrAIn (arXiv 2606.10877); the rank-one and delta form is derived, since the paper has N passes instead.

    Example:
        >>> x, delta, z = torch.tensor([[2.0, 0.0]]), torch.tensor([[0.5, 9.0]]), torch.tensor([[0.25]])
        >>> occlude_linear(x, delta, [z], [torch.tensor([[4.0]])])[0]
        tensor([[1.],
                [0.]])
    """
    if not isinstance(x, Tensor) or not isinstance(delta, Tensor) or x.dim() != 2 or delta.dim() != 2:
        raise ValueError("xaifast.occlude_linear: x must be a tensor [B, N] and delta a tensor [H, N]")
    n_players, order, offsets = x.shape[1], None, None
    if groups is not None:
        n_players, order, offsets = group_elements(groups, x)
    names = [activations] * len(base) if isinstance(activations, str) else list(activations)
    rows = nonzero_rows(x, n_players, order, offsets)
    arguments = (delta.t(), rows, n_players, list(base), list(weights), names, order, offsets, None, precision)
    changed = torch.ops.xaifast.occlude_linear(x, *arguments)  # [R, K]
    out = changed.new_zeros(x.shape[0] * n_players, changed.shape[1])
    return out.index_copy(0, rows, changed).view(x.shape[0], n_players, -1)


def group_elements(groups: Tensor, x: Tensor, n_players: int | None = None) -> tuple[int, Tensor, Tensor]:
    """Number of players, elements sorted by player ``[1 | B, N]`` and where each player begins ``[1 | B, M + 1]``."""
    ids = groups if groups.dim() == 2 else groups[None]
    if ids.dtype != torch.int64 or ids.dim() != 2 or ids.shape[1] != x.shape[1] or ids.shape[0] not in (1, x.shape[0]):
        raise ValueError(
            f"xaifast.occlude_linear: groups must be int64 [N] or [B, N] for x {describe(x)}, got {describe(groups)}"
        )
    if ids.numel() and int(ids.min()) < 0:
        raise ValueError("xaifast.occlude_linear: groups must hold ids 0..M-1, got a negative one")
    n_players = int(ids.max()) + 1 if n_players is None else n_players
    sizes = torch.zeros(ids.shape[0], n_players + 1, dtype=torch.int64, device=ids.device)
    sizes.scatter_add_(1, ids + 1, torch.ones_like(ids))
    return n_players, ids.argsort(dim=1, stable=True), sizes.cumsum(1)


def nonzero_rows(x: Tensor, n_players: int, order: Tensor | None, offsets: Tensor | None) -> Tensor:
    """Rows ``b * n_players + m`` of the players that have an element other than 0, ascending."""
    moving = x != 0
    if order is not None:
        counts = moving.gather(1, order.expand(x.shape[0], -1)).cumsum(1)
        counts = torch.nn.functional.pad(counts, (1, 0))
        moving = counts.gather(1, offsets.expand(x.shape[0], -1)).diff(dim=1) > 0
    return moving.flatten().nonzero()[:, 0]


def check_activation(name: str) -> None:
    """Refuse an activation that has no stable difference here."""
    kind, _, parameter = name.partition(":")
    if kind not in _NAMES or (kind in ("leaky_relu", "elu")) != bool(parameter):
        raise ValueError(
            f"xaifast.occlude_linear: activations must be among {', '.join(_NAMES)} (leaky_relu:SLOPE, elu:ALPHA with "
            f"their parameter), got {name!r}"
        )


def _check(x, columns, rows, n_players, base, weights, activations, order, offsets, readout, precision) -> None:
    """Refuse arguments with which a kernel would read or write out of bounds."""
    for name in activations:
        check_activation(name)
    if precision not in PRECISIONS:
        raise ValueError(f"xaifast.occlude_linear: precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
    floats = [x, columns, *base, *weights, *([] if readout is None else [readout])]
    indices = [rows, *(t for t in (order, offsets) if t is not None)]
    ok = all(t.dim() == 2 and t.dtype == x.dtype for t in floats) and all(t.dtype == torch.int64 for t in indices)
    ok = ok and x.dtype in (torch.float32, torch.float64) and all(t.device == x.device for t in floats + indices)
    ok = ok and rows.dim() == 1 and n_players > 0 and len(base) == len(activations) > 0
    ok = ok and len(activations) - len(weights) in ((0, 1) if readout is None else (1,))
    ok = ok and (order is None) == (offsets is None)
    if ok:
        widths = [columns.shape[1], *(w.shape[0] for w in weights)]
        ok = x.shape[1] == columns.shape[0] and all(z.shape[0] == x.shape[0] for z in base)
        ok = ok and [z.shape[1] for z in base] == widths[: len(base)]
        ok = ok and [w.shape[1] for w in weights] == widths[: len(weights)]
        ok = ok and (readout is None or list(readout.shape) == [x.shape[0], widths[-1]])
        if order is None:
            ok = ok and n_players == x.shape[1]
        else:
            lead = order.shape[0]
            ok = ok and lead in (1, x.shape[0]) and list(order.shape) == [lead, x.shape[1]]
            ok = ok and list(offsets.shape) == [lead, n_players + 1]
    if not ok:
        raise ValueError(
            "xaifast.occlude_linear: must be given x [B, N], columns [N, H], int64 rows [R], base [B, H], [B, H2], .., "
            "weights [H2, H], .., a name for each base, float32 or float64 alike, on one device; got "
            f"x {describe(x)}, columns {describe(columns)}, rows {describe(rows)}, {n_players} players, base "
            f"{[describe(z) for z in base]}, weights {[describe(w) for w in weights]}, activations {activations}, "
            f"readout {None if readout is None else describe(readout)}"
        )


class NativeSteps:
    """Tiles written by the CPU kernels."""

    def __init__(self, native, x, columns, rows, n_players, base, activations, order, offsets) -> None:
        self._native, self._names, self._base = native, activations, base
        self._x, self._columns, self._rows, self._n_players = x.contiguous(), columns.contiguous(), rows, n_players
        self._order = None if order is None else (order.contiguous(), offsets.contiguous())
        self._planes = [_planes(name, z).contiguous() for name, z in zip(activations, base, strict=True)]

    def arguments(self, layer: int, start: int, stop: int) -> tuple:
        """The arguments of a kernel that say which rows it serves, from which base."""
        order, offsets = self._order or (None, None)
        return (
            self._x.data_ptr(),
            self._columns.data_ptr(),
            self._planes[layer].data_ptr(),
            self._rows.data_ptr(),
            0 if order is None else order.data_ptr(),
            0 if offsets is None else offsets.data_ptr(),
            self._x.shape[1],
            self._n_players,
            self._planes[layer].shape[2],
            start,
            stop,
            order is not None and order.shape[0] > 1,
            self._x.dtype == torch.float64,
            torch.get_num_threads(),
        )

    def __call__(self, layer: int, tile: Tensor, start: int, stop: int) -> None:
        """Make ``tile [stop - start, H_layer]`` the change behind an activation; layer 0 makes it from nothing."""
        kind, _, parameter = self._names[layer].partition(":")
        step, first = _NATIVE_STEPS.get(kind), layer == 0
        if first or step:
            slope = float(parameter) if step == 2 else 0.0
            self._native.occlude_step(tile.data_ptr(), first, step or 0, slope, *self.arguments(layer, start, stop))
        if step is None:
            z = self._base[layer][self._rows[start:stop] // self._n_players]
            tile.copy_(reference.activation_step(self._names[layer], z, tile))


class _TorchSteps:
    """The same by the reference."""

    def __init__(self, x, columns, rows, n_players, base, activations, order, offsets) -> None:
        self._players = (n_players, order, offsets)
        self._x, self._columns, self._rows, self._base, self._names = x, columns, rows, base, activations

    def __call__(self, layer: int, tile: Tensor, start: int, stop: int) -> None:
        rows = self._rows[start:stop]
        if layer == 0:
            tile.copy_(reference.player_changes(self._x, self._columns, rows, *self._players))
        tile.copy_(reference.activation_step(self._names[layer], self._base[layer][rows // self._players[0]], tile))


def _planes(name: str, z: Tensor) -> Tensor:
    """What a kernel must know of the base, ``[B, planes, H]``."""
    if name not in ("sigmoid", "tanh", "silu"):
        return z[:, None]
    u = z.double() * (2 if name == "tanh" else 1)
    return torch.stack((z.double(), u.sigmoid(), (-u).sigmoid()), 1).to(z.dtype)


def _by_tiles(steps, x, rows, n_players, base, weights, readout, precision) -> Tensor:
    """Row after row through the layers, as many at once as their tiles of all layers have room."""
    widths = [z.shape[1] for z in base]
    height = max(1, min(rows.shape[0], max(64, _TILE_BYTES[x.device.type] // (x.element_size() * sum(widths)))))
    tiles = [x.new_empty(height, width) for width in widths]
    out = x.new_empty(rows.shape[0], _n_outputs(base, weights, readout))
    operands = [reference.round_operand(w, precision).t() for w in weights]
    for start in range(0, rows.shape[0], height):
        stop = min(rows.shape[0], start + height)
        for layer, tile in enumerate(tiles):
            d = tile[: stop - start]
            if layer > 0:
                torch.mm(tiles[layer - 1][: stop - start], operands[layer - 1], out=d)
            steps(layer, d, start, stop)
            if precision != "full" and layer < len(weights):
                d.copy_(reference.round_operand(d, precision))
        if readout is not None:
            torch.sum(d.mul_(readout[rows[start:stop] // n_players]), 1, keepdim=True, out=out[start:stop])
        elif len(weights) == len(tiles):
            torch.mm(d, operands[-1], out=out[start:stop])
        else:
            out[start:stop] = d
    return out


def _n_outputs(base, weights, readout) -> int:
    if readout is not None:
        return 1
    return (weights[-1].shape[0]) if len(weights) == len(base) else base[-1].shape[1]


def _run_cpu(x, columns, rows, n_players, base, weights, activations, order, offsets, readout, precision) -> Tensor:
    _check(x, columns, rows, n_players, base, weights, activations, order, offsets, readout, precision)
    native = _registry.native_cpu("occlude_linear")
    rows = rows.contiguous()
    arguments = (x, columns, rows, n_players, base, activations, order, offsets)
    steps = _TorchSteps(*arguments) if native is None else NativeSteps(native, *arguments)
    return _by_tiles(steps, x, rows, n_players, base, weights, readout, precision)


def _run_cuda(x, columns, rows, n_players, base, weights, activations, order, offsets, readout, precision) -> Tensor:
    _check(x, columns, rows, n_players, base, weights, activations, order, offsets, readout, precision)
    launch = _launcher()
    if launch is not None and launch.serves(x, base, weights, activations, order, readout, precision):
        return launch.occlude_linear(x, columns, rows, base, weights, activations, readout, precision)
    steps = _TorchSteps(x, columns, rows, n_players, base, activations, order, offsets)
    return _by_tiles(steps, x, rows, n_players, base, weights, readout, precision)


def _launcher():
    """Return the module with the Triton launcher, or None (logged once if unexpected) for the reference."""
    wanted = _registry.backend()
    if wanted == "reference":
        return None
    if wanted == "native":
        _registry.refuse("occlude_linear", "native", "its GPU kernel is written in Triton")
        return None
    from xaifast.kernels import occlude

    if occlude.why_missing is not None:
        _registry.refuse("occlude_linear", "triton", occlude.why_missing)
        return None
    return occlude


def _fake(x, columns, rows, n_players, base, weights, activations, order, offsets, readout, precision) -> Tensor:
    _check(x, columns, rows, n_players, base, weights, activations, order, offsets, readout, precision)
    return x.new_empty(rows.shape[0], _n_outputs(base, weights, readout))


def _differentiable(keyset, *args) -> Tensor:
    """The reference, where a gradient or a transform asks for aten operations; else the kernels."""
    tensors = [t for arg in args for t in (arg if isinstance(arg, list | tuple) else (arg,)) if isinstance(t, Tensor)]
    if functorch.peek_interpreter_stack() is not None or (
        torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    ):
        return reference.occlude_linear(*args)
    with torch._C._AutoDispatchBelowAutograd():
        return _operator.redispatch(keyset & torch._C._after_autograd_keyset, *args)


_operator = _registry.register(
    "occlude_linear(Tensor x, Tensor columns, Tensor rows, SymInt n_players, Tensor[] base, Tensor[] weights, "
    "str[] activations, Tensor? order, Tensor? offsets, Tensor? readout, str precision) -> Tensor",
    {"CPU": _run_cpu, "CUDA": _run_cuda},
    _fake,
)
_registry._library.impl("occlude_linear", _differentiable, "Autograd", with_keyset=True)
_registry._library.impl("occlude_linear", reference.occlude_linear, "FuncTorchBatched")
