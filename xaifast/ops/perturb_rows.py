"""The operator `torch.ops.xaifast.perturb_rows`: rows of insertion and deletion curves, written in one pass.

`xaifast.ops.perturb` prepares its arguments.
"""

from __future__ import annotations

import torch

from xaifast.ops import _registry
from xaifast.ops._autograd import register_differentiable
from xaifast.ops.select import describe, sum_rows
from xaifast.reference import perturb as reference


def _check(x, insertion, deletion, rank, rep, unit, points, start, stop) -> None:
    """Refuse arguments with which a kernel would read or write out of bounds."""
    if not (
        x.dim() == insertion.dim() == deletion.dim() == rank.dim() == points.dim() == 2
        and insertion.dtype == deletion.dtype == x.dtype
        and rank.dtype == torch.int32
        and points.dtype == torch.int64
        and x.shape[1] == insertion.shape[1] == deletion.shape[1] == rep * rank.shape[1] * unit
        and points.shape[1] == 2
        and all(t.shape[0] in (1, x.shape[0]) for t in (insertion, deletion, rank))
        and all(t.device == x.device for t in (insertion, deletion, rank, points))
        and 0 <= start <= stop <= x.shape[0] * points.shape[0]
    ):
        raise ValueError(
            "xaifast.perturb_rows: must be given x [B, F], insertion and deletion [1, F] or [B, F] of x's dtype, int32 "
            "rank [1, P] or [B, P], int64 points [N, 2], all on one device, F = rep * P * unit and 0 <= start <= stop "
            f"<= B * N; got x {describe(x)}, insertion {describe(insertion)}, deletion {describe(deletion)}, rank "
            f"{describe(rank)}, rep {rep}, unit {unit}, points {describe(points)}, units {start}..{stop}; build the "
            "arguments with xaifast.ops.plan_perturbation"
        )


def _check_out(out, x, start, stop) -> None:
    shape = (stop - start, x.shape[1])
    if out.shape != shape or out.dtype != x.dtype or out.device != x.device or not out.is_contiguous():
        raise ValueError(
            f"xaifast.perturb_rows: out must be contiguous, {x.dtype} {list(shape)} on {x.device}; got {describe(out)} "
            f"with strides {list(out.stride())}"
        )


def _write_cpu(x, insertion, deletion, rank, rep, unit, points, start, stop, out) -> None:
    native = _registry.native_cpu("perturb_rows")
    if native is None or x.is_complex():
        out.copy_(reference.perturb_rows(x, insertion, deletion, rank, rep, unit, points, start, stop))
        return
    x, insertion, deletion, rank, points = (t.contiguous() for t in (x, insertion, deletion, rank, points))
    native.perturb_rows(
        out.data_ptr(),
        x.data_ptr(),
        insertion.data_ptr(),
        deletion.data_ptr(),
        rank.data_ptr(),
        points.data_ptr(),
        x.element_size(),
        x.shape[0],
        points.shape[0],
        rep,
        rank.shape[1],
        unit,
        insertion.shape[0] > 1,
        deletion.shape[0] > 1,
        rank.shape[0] > 1,
        start,
        stop,
        torch.get_num_threads(),
    )


def _write_cuda(x, insertion, deletion, rank, rep, unit, points, start, stop, out) -> None:
    launch = _launcher()
    if launch is None or x.is_complex():
        out.copy_(reference.perturb_rows(x, insertion, deletion, rank, rep, unit, points, start, stop))
        return
    x, insertion, deletion, rank, points = (t.contiguous() for t in (x, insertion, deletion, rank, points))
    launch(x, insertion, deletion, rank, rep, unit, points, start, stop, out)


def _launcher():
    """Return the Triton launcher, or None (logged once if unexpected) for the reference."""
    wanted = _registry.backend()
    if wanted == "reference":
        return None
    if wanted == "native":
        _registry.refuse("perturb_rows", "native", "its GPU kernel is written in Triton")
        return None
    from xaifast.kernels import perturb

    if perturb.why_missing is not None:
        _registry.refuse("perturb_rows", "triton", perturb.why_missing)
        return None
    return perturb.perturb_rows


def _allocating(write):
    def impl(x, insertion, deletion, rank, rep, unit, points, start, stop):
        _check(x, insertion, deletion, rank, rep, unit, points, start, stop)
        out = x.new_empty(stop - start, x.shape[1])
        write(x, insertion, deletion, rank, rep, unit, points, start, stop, out)
        return out

    return impl


def _filling(write):
    def impl(x, insertion, deletion, rank, rep, unit, points, start, stop, out):
        _check(x, insertion, deletion, rank, rep, unit, points, start, stop)
        _check_out(out, x, start, stop)
        write(x, insertion, deletion, rank, rep, unit, points, start, stop, out)

    return impl


def _setup_context(ctx, args) -> None:
    x, insertion, deletion, rank, ctx.rep, ctx.unit, points, ctx.start, ctx.stop = args
    ctx.save_for_backward(rank, points)
    ctx.n_inputs = [t.shape[0] for t in (x, insertion, deletion)]


def _backward(ctx, grad):
    """Sum the gradients of the units of each input: where shown for x, elsewhere for the baseline of their kind."""
    rank, points = ctx.saved_tensors
    units = torch.arange(ctx.start, ctx.stop, device=grad.device)
    inputs, deletes = units // max(points.shape[0], 1), points[units % max(points.shape[0], 1), 1] != 0
    shown = reference.shown_entries(rank, points, ctx.start, ctx.stop)[:, None, :, None]
    deletes = deletes[:, None, None, None]
    parts = (shown, ~shown & ~deletes, ~shown & deletes)
    n_units, n_elements = grad.shape
    grad = grad.reshape(n_units, ctx.rep, rank.shape[1], ctx.unit)

    def summed(part, n_inputs):
        rows = torch.where(part, grad, 0).reshape(n_units, n_elements)
        return sum_rows(rows, inputs if n_inputs > 1 else inputs * 0, n_inputs)

    needed = ctx.needs_input_grad[1:4]
    grads = (summed(p, n) if need else None for p, n, need in zip(parts, ctx.n_inputs, needed, strict=True))
    return (*grads, None, None, None, None, None, None)


_ARGUMENTS = (
    "Tensor x, Tensor insertion, Tensor deletion, Tensor rank, SymInt rep, SymInt unit, Tensor points, SymInt start, "
    "SymInt stop"
)
perturb_rows = _registry.register(
    f"perturb_rows({_ARGUMENTS}) -> Tensor",
    {"CPU": _allocating(_write_cpu), "CUDA": _allocating(_write_cuda)},
    _allocating(lambda *args: None),
)
perturb_rows_out = _registry.register(
    f"perturb_rows_out({_ARGUMENTS}, Tensor(a!) out) -> ()",
    {"CPU": _filling(_write_cpu), "CUDA": _filling(_write_cuda)},
    _filling(lambda *args: None),
)
register_differentiable("perturb_rows", reference.perturb_rows, _setup_context, _backward)
