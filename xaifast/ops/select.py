"""The operator `torch.ops.xaifast.select_rows`: rows of a masked batch, written in one pass.

`mask_inputs`, `select_tokens` and the evaluation engine are all this operator; `xaifast.ops.masking` prepares its
arguments.
"""

from __future__ import annotations

import torch

from xaifast.ops import _registry
from xaifast.ops._autograd import register_differentiable
from xaifast.reference import masking as reference


def _check(x, bits, index, baseline, rep, unit, start, stop) -> None:
    """Refuse arguments with which a kernel would read or write out of bounds."""
    of_bits, of_index, of_baseline = bits.shape, index.shape, baseline.shape
    if not (
        x.dim() == 2
        and len(of_bits) in (2, 3)
        and len(of_index) in (1, 2)
        and len(of_baseline) in (2, 3)
        and baseline.dtype == x.dtype
        and bits.dtype == torch.int64
        and index.dtype == torch.int32
        and x.shape[1] == of_baseline[-1] == rep * of_index[-1] * unit
        and (len(of_bits) == 2 or of_bits[0] == x.shape[0])
        and (len(of_index) == 1 or of_index[0] == x.shape[0])
        and (len(of_baseline) == 2 or of_baseline[0] == x.shape[0])
        and x.device == bits.device == index.device == baseline.device
        and 0 <= start <= stop <= x.shape[0] * of_bits[-2]
    ):
        raise ValueError(
            "xaifast.select_rows: must be given x [B, F], int64 bits [N, W] or [B, N, W], int32 index [P] or [B, P], "
            "baseline [R, F] or [B, R, F] of x's dtype, all on one device, F = rep * P * unit and 0 <= start <= "
            f"stop <= B * N; got x {describe(x)}, bits {describe(bits)}, index {describe(index)}, baseline "
            f"{describe(baseline)}, rep {rep}, unit {unit}, units {start}..{stop}; build the arguments with "
            "xaifast.ops.plan_selection"
        )


def describe(t) -> str:
    """Dtype, shape and device of a tensor, for messages."""
    return f"{t.dtype} {list(t.shape)} on {t.device}"


def _check_out(out, x, baseline, start, stop) -> None:
    shape = (stop - start, baseline.shape[-2], x.shape[1])
    if out.shape != shape or out.dtype != x.dtype or out.device != x.device or not out.is_contiguous():
        raise ValueError(
            f"xaifast.select_rows: out must be contiguous, {x.dtype} {list(shape)} on {x.device}; got {describe(out)} "
            f"with strides {list(out.stride())}"
        )


def _write_cpu(x, bits, index, baseline, rep, unit, start, stop, out) -> None:
    native = _registry.native_cpu("select_rows")
    if native is None or x.is_complex():
        out.copy_(reference.select_rows(x, bits, index, baseline, rep, unit, start, stop))
        return
    x, bits, index, baseline = x.contiguous(), bits.contiguous(), index.contiguous(), baseline.contiguous()
    native.select_rows(
        out.data_ptr(),
        x.data_ptr(),
        baseline.data_ptr(),
        bits.data_ptr(),
        index.data_ptr(),
        x.element_size(),
        x.shape[0],
        bits.shape[-2],
        baseline.shape[-2],
        rep,
        index.shape[-1],
        unit,
        bits.shape[-1],
        bits.dim() == 3,
        index.dim() == 2,
        baseline.dim() == 3,
        start,
        stop,
        torch.get_num_threads(),
    )


def _write_cuda(x, bits, index, baseline, rep, unit, start, stop, out) -> None:
    launch = _launcher()
    if launch is None or x.is_complex():
        out.copy_(reference.select_rows(x, bits, index, baseline, rep, unit, start, stop))
        return
    x, bits, index, baseline = x.contiguous(), bits.contiguous(), index.contiguous(), baseline.contiguous()
    launch(x, bits, index, baseline, rep, unit, start, stop, out)


def _launcher():
    """Return the Triton launcher, or None (logged once if unexpected) for the reference."""
    wanted = _registry.backend()
    if wanted == "reference":
        return None
    if wanted == "native":
        _registry.refuse("select_rows", "native", "its GPU kernel is written in Triton")
        return None
    from xaifast.kernels import select

    if select.why_missing is not None:
        _registry.refuse("select_rows", "triton", select.why_missing)
        return None
    return select.select_rows


def _allocating(write):
    def impl(x, bits, index, baseline, rep, unit, start, stop):
        _check(x, bits, index, baseline, rep, unit, start, stop)
        out = x.new_empty(stop - start, baseline.shape[-2], x.shape[1])
        write(x, bits, index, baseline, rep, unit, start, stop, out)
        return out

    return impl


def _filling(write):
    def impl(x, bits, index, baseline, rep, unit, start, stop, out):
        _check(x, bits, index, baseline, rep, unit, start, stop)
        _check_out(out, x, baseline, start, stop)
        write(x, bits, index, baseline, rep, unit, start, stop, out)

    return impl


def _setup_context(ctx, args) -> None:
    x, bits, index, baseline, ctx.rep, ctx.unit, ctx.start, ctx.stop = args
    ctx.save_for_backward(bits, index)
    ctx.n_inputs, ctx.baseline_per_input = x.shape[0], baseline.dim() == 3


def sum_rows(rows, target, n_targets: int):
    """Sum rows [U, ...] into their targets: [n_targets, ...], accumulated in float32 at least."""
    precise = rows.to(torch.promote_types(rows.dtype, torch.float32))
    return precise.new_zeros(n_targets, *rows.shape[1:]).index_add(0, target, precise).to(rows.dtype)


def _backward(ctx, grad):
    """Sum the gradients of the units of each input: where present for x, where absent for the baseline."""
    bits, index = ctx.saved_tensors
    n_units, n_background, n_elements = grad.shape
    inputs = torch.arange(ctx.start, ctx.stop, device=grad.device) // bits.shape[-2]
    present = reference.present_entries(bits, index, ctx.start, ctx.stop).reshape(n_units, 1, 1, index.shape[-1], 1)
    grad = grad.reshape(n_units, n_background, ctx.rep, index.shape[-1], ctx.unit)
    grad_x = grad_baseline = None
    if ctx.needs_input_grad[1]:
        kept = torch.where(present, grad, 0).sum(1).reshape(n_units, n_elements)
        grad_x = sum_rows(kept, inputs, ctx.n_inputs)
    if ctx.needs_input_grad[4]:
        dropped = torch.where(present, 0, grad).reshape(n_units, n_background, n_elements)
        grad_baseline = sum_rows(dropped, inputs, ctx.n_inputs) if ctx.baseline_per_input else dropped.sum(0)
    return grad_x, None, None, grad_baseline, None, None, None, None


_ARGUMENTS = "Tensor x, Tensor bits, Tensor index, Tensor baseline, SymInt rep, SymInt unit, SymInt start, SymInt stop"
select_rows_cpu = _allocating(_write_cpu)
select_rows = _registry.register(
    f"select_rows({_ARGUMENTS}) -> Tensor",
    {"CPU": select_rows_cpu, "CUDA": _allocating(_write_cuda)},
    _allocating(lambda *args: None),
)
select_rows_out = _registry.register(
    f"select_rows_out({_ARGUMENTS}, Tensor(a!) out) -> ()",
    {"CPU": _filling(_write_cpu), "CUDA": _filling(_write_cuda)},
    _filling(lambda *args: None),
)
register_differentiable("select_rows", reference.select_rows, _setup_context, _backward)
