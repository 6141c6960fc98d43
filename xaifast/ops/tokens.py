"""Token removal for transformers: absent tokens replaced (`select_tokens`) or left out of the sequence
(`compact_tokens`).

The CUDA kernel of `compact_tokens` is compiled for every target but has not been run or measured on a GPU yet.
"""

from __future__ import annotations

import torch
from torch import Tensor

from xaifast.ops import _registry
from xaifast.ops._autograd import register_differentiable
from xaifast.ops.masking import mask_inputs, packed_coalitions
from xaifast.ops.plan import count_players, tracing
from xaifast.ops.select import describe, sum_rows
from xaifast.reference import tokens as reference
from xaifast.reference.masking import present_entries


def select_tokens(
    tokens: Tensor,  # [B, T, D]
    coalitions: Tensor,  # int64 [N, W] or [B, N, W]; bool [N, M] or [B, N, M]
    token_players: Tensor,  # [T] or [B, T]
    baseline_tokens: Tensor,  # [T, D] or [B, T, D]
) -> Tensor:
    """Replace the tokens of absent players by baseline tokens: [B, N, T, D].

    out[b, n, t] = tokens[b, t] where the player of token t is in coalition n, else baseline_tokens[t]; bytes are
    selected. token_players holds integer ids, -1 = always present (class and register tokens). Dtypes, errors,
    gradients and cost as in `mask_inputs`, whose kernel this is; `plan_selection(tokens, token_players[..., None],
    baseline_tokens)` is its prepare-once form.
    """
    _check_tokens("select_tokens", tokens, token_players)
    return mask_inputs(tokens, coalitions, token_players.unsqueeze(-1), baseline_tokens)


def compact_tokens(
    tokens: Tensor,  # [B, T, D]
    coalitions: Tensor,  # int64 [N, W] or [B, N, W]; bool [N, M] or [B, N, M]
    token_players: Tensor,  # [T] or [B, T]
    length: int,
) -> Tensor:
    """Keep only the tokens of present players, in order, padded with zeros to `length`: [B, N, length, D].

    Args:
        tokens: any real dtype.
        coalitions: packed words or bool, as in `mask_inputs`.
        token_players: integer ids of the tokens' players, -1 = always present.
        length: tokens per row of the result; at least the largest number of present tokens.

    Raises:
        TypeError: token players or coalitions of a wrong dtype.
        ValueError: wrong shapes, or a coalition with more than `length` present tokens (named). On CUDA and in
            `torch.func` transforms the data cannot be looked at without waiting: there such a row is NaN (-1 in
            integers).

    Differentiable with respect to tokens; deterministic; cost: one write of the result.
    `torch.ops.xaifast.compact_rows` is the form for ranges of units (coalition u % N of input u // N), and
    `compact_rows_out` writes them into a given buffer that shares no memory with the arguments; not differentiable.
    """
    _check_tokens("compact_tokens", tokens, token_players)
    if length < 0:
        raise ValueError(f"xaifast.compact_tokens: length must not be negative, got {length}")
    n_inputs = tokens.shape[0]
    n_players = 0 if tracing() else count_players("compact_tokens", token_players)
    bits = packed_coalitions("compact_tokens", coalitions, n_players, n_inputs, tokens.device)
    index = token_players.to(tokens.device, torch.int32)
    stop = n_inputs * bits.shape[-2]
    return compact_rows(tokens, bits, index, length, 0, stop).unflatten(0, (n_inputs, bits.shape[-2]))


def _check_tokens(caller: str, tokens: Tensor, token_players: Tensor) -> None:
    if tokens.dim() != 3:
        raise ValueError(f"xaifast.{caller}: tokens must be [B, T, D], got {list(tokens.shape)}")
    if token_players.shape not in ((tokens.shape[1],), tuple(tokens.shape[:2])):
        raise ValueError(
            f"xaifast.{caller}: token_players must be [{tokens.shape[1]}] or [{tokens.shape[0]}, {tokens.shape[1]}], "
            f"got {list(token_players.shape)}"
        )
    if token_players.is_floating_point() or token_players.dtype == torch.bool:
        raise TypeError(f"xaifast.{caller}: token_players must hold integer ids, got {token_players.dtype}")


def _check(x, bits, index, length, start, stop) -> None:
    """Refuse arguments with which a kernel would read or write out of bounds."""
    if not (
        x.dim() == 3
        and bits.dim() in (2, 3)
        and bits.dtype == torch.int64
        and index.dim() in (1, 2)
        and index.dtype == torch.int32
        and index.shape[-1] == x.shape[1]
        and (bits.dim() == 2 or bits.shape[0] == x.shape[0])
        and (index.dim() == 1 or index.shape[0] == x.shape[0])
        and x.device == bits.device == index.device
        and length >= 0
        and 0 <= start <= stop <= x.shape[0] * bits.shape[-2]
    ):
        raise ValueError(
            "xaifast.compact_rows: must be given x [B, T, D], int64 bits [N, W] or [B, N, W], int32 index [T] or "
            f"[B, T], all on one device, length >= 0 and 0 <= start <= stop <= B * N; got x {describe(x)}, bits "
            f"{describe(bits)}, index {describe(index)}, length {length}, units {start}..{stop}; "
            "use xaifast.ops.compact_tokens"
        )


def _check_out(out, x, length, start, stop) -> None:
    shape = (stop - start, length, x.shape[2])
    if out.shape != shape or out.dtype != x.dtype or out.device != x.device or not out.is_contiguous():
        raise ValueError(
            f"xaifast.compact_rows_out: out must be contiguous, {x.dtype} {list(shape)} on {x.device}; got "
            f"{describe(out)} with strides {list(out.stride())}"
        )


def _native_arguments(x, bits, index, length, start, stop, out) -> tuple:
    return (
        out.data_ptr(),
        x.data_ptr(),
        bits.data_ptr(),
        index.data_ptr(),
        x.shape[2] * x.element_size(),
        x.shape[0],
        bits.shape[-2],
        x.shape[1],
        length,
        bits.shape[-1],
        bits.dim() == 3,
        index.dim() == 2,
        start,
        stop,
    )


def _write_cpu(x, bits, index, length, start, stop, out) -> None:
    native = _registry.native_cpu("compact_rows")
    if native is None:
        out.copy_(reference.compact_rows(x, bits, index, length, start, stop))
        overflow = bool((present_entries(bits, index, start, stop).sum(1) > length).any())
    else:
        x, bits, index = x.contiguous(), bits.contiguous(), index.contiguous()
        arguments = _native_arguments(x, bits, index, length, start, stop, out)
        overflow = native.compact_rows(*arguments, torch.get_num_threads()) > 0
    if overflow:
        counts = present_entries(bits, index, start, stop).sum(1)
        unit = int((counts > length).nonzero()[0])
        b, n = divmod(start + unit, bits.shape[-2])
        raise ValueError(
            f"xaifast.compact_rows: length must be at least the number of present tokens, got length {length} for "
            f"coalition {n} of input {b}, which keeps {int(counts[unit])} tokens; raise length to {int(counts.max())}"
        )


def _write_cuda(x, bits, index, length, start, stop, out) -> None:
    native = _registry.native_cuda("compact_rows")
    if native is None:
        out.copy_(reference.compact_rows(x, bits, index, length, start, stop))
        return
    x, bits, index = x.contiguous(), bits.contiguous(), index.contiguous()
    device = x.device.index
    stream = torch.cuda.current_stream(device).cuda_stream
    native.compact_rows(*_native_arguments(x, bits, index, length, start, stop, out), device, stream)


def _allocating(write):
    def impl(x, bits, index, length, start, stop):
        _check(x, bits, index, length, start, stop)
        out = x.new_empty(stop - start, length, x.shape[2])
        write(x, bits, index, length, start, stop, out)
        return out

    return impl


def _filling(write):
    def impl(x, bits, index, length, start, stop, out):
        _check(x, bits, index, length, start, stop)
        _check_out(out, x, length, start, stop)
        write(x, bits, index, length, start, stop, out)

    return impl


def _setup_context(ctx, args) -> None:
    x, bits, index, ctx.length, ctx.start, ctx.stop = args
    ctx.save_for_backward(bits, index)
    ctx.x_shape = x.shape


def _backward(ctx, grad):
    """Add every kept token's gradient to the token it came from."""
    bits, index = ctx.saved_tensors
    _, n_tokens, width = ctx.x_shape
    inputs = torch.arange(ctx.start, ctx.stop, device=grad.device) // bits.shape[-2]
    order, counts = reference.kept_tokens(bits, index, ctx.length, ctx.start, ctx.stop)  # [U, length], [U]
    filled = torch.arange(ctx.length, device=grad.device) < counts[:, None]
    source = (inputs[:, None] * n_tokens + order).reshape(-1)
    grad = torch.where(filled[..., None], grad, 0).reshape(-1, width)
    return sum_rows(grad, source, ctx.x_shape[0] * n_tokens).reshape(ctx.x_shape), None, None, None, None, None


_ARGUMENTS = "Tensor x, Tensor bits, Tensor index, SymInt length, SymInt start, SymInt stop"
compact_rows = _registry.register(
    f"compact_rows({_ARGUMENTS}) -> Tensor",
    {"CPU": _allocating(_write_cpu), "CUDA": _allocating(_write_cuda)},
    _allocating(lambda *args: None),
)
compact_rows_out = _registry.register(
    f"compact_rows_out({_ARGUMENTS}, Tensor(a!) out) -> ()",
    {"CPU": _filling(_write_cpu), "CUDA": _filling(_write_cuda)},
    _filling(lambda *args: None),
)
register_differentiable("compact_rows", reference.compact_rows, _setup_context, _backward)

_registry.register(
    "select_tokens(Tensor tokens, Tensor coalitions, Tensor token_players, Tensor baseline_tokens) -> Tensor",
    {"CompositeImplicitAutograd": select_tokens},
)
_registry.register(
    "compact_tokens(Tensor tokens, Tensor coalitions, Tensor token_players, SymInt length) -> Tensor",
    {"CompositeImplicitAutograd": compact_tokens},
)
