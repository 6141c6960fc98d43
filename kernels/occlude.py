"""The Triton kernel of `torch.ops.xaifast.occlude_linear` for one and two hidden layers. Not yet measured on a GPU.

The operand of the first product, what an activation makes of x * column, is made in registers; the second activation
and the outputs follow in the same program. A row reads its update, its base and the weights, and writes its outputs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from xaifast.kernels import Variant

try:
    import triton
    import triton.language as tl
except ImportError as error:
    triton = None
    why_missing = f"triton cannot be imported ({error}); install the package triton"
else:
    why_missing = None

_STEPS = {"identity": 0, "relu": 1, "leaky_relu": 2, "sigmoid": 3, "tanh": 4, "silu": 5}
_INPUTS = {"full": "tf32x3", "tf32": "tf32", "bf16": "ieee"}  # what a product makes of float32 operands
_WIDEST = {"full": 128, "tf32": 256, "bf16": 256}  # outputs of a product that one program owns without spilling
_WARPS = 8
_BLOCK_K = 16

if triton is not None:

    @triton.jit
    def _step(z, d, slope, STEP: tl.constexpr):
        """phi(z) - phi(z - d); see xaifast.reference.occlude."""
        if STEP == 1 or STEP == 2:
            r = tl.minimum(d, z) - tl.minimum(z, 0.0)
            if STEP == 2:
                r = (1 - slope) * r + slope * d
        elif STEP >= 3:
            scale = 2.0 if STEP == 4 else 1.0
            u = -tl.abs(scale * d)
            t = 1 + u * (1 / 7)
            t = 1 + u * (1 / 6) * t
            t = 1 + u * (1 / 5) * t
            t = 1 + u * (1 / 4) * t
            t = 1 + u * (1 / 3) * t
            t = 1 + u * (1 / 2) * t
            rise = tl.where(u > -0.3, u * t, tl.exp(u) - 1)
            after = tl.sigmoid(scale * (z - d))
            falling = tl.sigmoid(scale * (d - z))
            r = scale * rise * tl.where(d > 0, -tl.sigmoid(scale * z) * falling, tl.sigmoid(-scale * z) * after)
            if STEP == 5:
                r = z * r + d * after
        else:
            r = d
        return r

    @triton.jit(do_not_specialize=["n_rows", "slope_1", "slope_2"])
    def occlude_linear_kernel(
        x,  # [B, N]
        columns,  # [N, H]
        rows,  # [R]: b * N + i
        base_1,  # [B, H]
        base_2,  # [B, H2]
        weight_1,  # [H2, H], or [K, H] for one hidden layer
        weight_2,  # [K, H2]
        readout,  # [B, H2], or [B, H] for one hidden layer
        out,  # [R, K]
        n_rows,  # R
        n_elements,  # N
        width_1,  # H
        width_2,  # H2, or K for one hidden layer
        n_outputs,  # K
        slope_1,
        slope_2,
        STEP_1: tl.constexpr,
        STEP_2: tl.constexpr,  # -1 for one hidden layer
        READOUT: tl.constexpr,  # one output a sample
        BF16: tl.constexpr,
        INPUTS: tl.constexpr,
        BLOCK_R: tl.constexpr,
        BLOCK_K: tl.constexpr,
        BLOCK_N: tl.constexpr,  # >= width_2
        BLOCK_O: tl.constexpr,  # >= n_outputs
    ):
        """One program: BLOCK_R rows through all layers."""
        o_row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
        m_row = o_row < n_rows
        i_row = tl.load(rows + o_row, mask=m_row, other=0)
        i_sample = i_row // n_elements
        b_x = tl.load(x + i_row, mask=m_row, other=0.0)
        p_column = columns + (i_row - i_sample * n_elements) * width_1
        p_base = base_1 + i_sample * width_1
        o_n = tl.arange(0, BLOCK_N)
        m_n = o_n < width_2
        b_acc = tl.zeros((BLOCK_R, BLOCK_N), dtype=tl.float32)
        b_sum = tl.zeros((BLOCK_R,), dtype=tl.float32)

        for k in range(0, width_1, BLOCK_K):
            o_k = k + tl.arange(0, BLOCK_K)
            m_k = o_k < width_1
            m_tile = m_row[:, None] & m_k[None, :]
            b_d = b_x[:, None] * tl.load(p_column[:, None] + o_k[None, :], mask=m_tile, other=0.0)
            b_z = tl.load(p_base[:, None] + o_k[None, :], mask=m_tile, other=0.0)
            b_h = _step(b_z, b_d, slope_1, STEP_1)
            if STEP_2 < 0 and READOUT:
                p_read = readout + i_sample[:, None] * width_1 + o_k[None, :]
                b_sum += tl.sum(b_h * tl.load(p_read, mask=m_tile, other=0.0), axis=1)
            else:
                p_w = weight_1 + o_n[None, :] * width_1 + o_k[:, None]
                b_w = tl.load(p_w, mask=m_k[:, None] & m_n[None, :], other=0.0)  # [BLOCK_K, BLOCK_N]
                if BF16:
                    b_acc = tl.dot(b_h.to(tl.bfloat16), b_w.to(tl.bfloat16), b_acc)
                else:
                    b_acc = tl.dot(b_h, b_w, b_acc, input_precision=INPUTS)

        if STEP_2 >= 0:
            m_tile = m_row[:, None] & m_n[None, :]
            b_z = tl.load(base_2 + i_sample[:, None] * width_2 + o_n[None, :], mask=m_tile, other=0.0)
            b_h = _step(b_z, b_acc, slope_2, STEP_2)
            if READOUT:
                p_read = readout + i_sample[:, None] * width_2 + o_n[None, :]
                b_sum = tl.sum(b_h * tl.load(p_read, mask=m_tile, other=0.0), axis=1)
            else:
                o_o = tl.arange(0, BLOCK_O)
                m_o = o_o < n_outputs
                p_w = weight_2 + o_o[None, :] * width_2 + o_n[:, None]
                b_w = tl.load(p_w, mask=m_n[:, None] & m_o[None, :], other=0.0)  # [BLOCK_N, BLOCK_O]
                if BF16:
                    b_out = tl.dot(b_h.to(tl.bfloat16), b_w.to(tl.bfloat16))
                else:
                    b_out = tl.dot(b_h, b_w, input_precision=INPUTS)
                p_out = out + o_row[:, None] * n_outputs + o_o[None, :]
                tl.store(p_out, b_out, mask=m_row[:, None] & m_o[None, :])
        elif not READOUT:
            p_out = out + o_row[:, None] * n_outputs + o_n[None, :]
            tl.store(p_out, b_acc, mask=m_row[:, None] & m_n[None, :])
        if READOUT:
            tl.store(out + o_row, b_sum, mask=m_row)


def serves(
    x: torch.Tensor,
    base: Sequence[torch.Tensor],
    weights: Sequence[torch.Tensor],
    activations: Sequence[str],
    order: torch.Tensor | None,
    readout: torch.Tensor | None,
    precision: str,
) -> bool:
    """Whether the kernel computes this: float32, single elements, one or two hidden layers no wider than it can own."""
    return (
        x.dtype == torch.float32
        and order is None
        and len(base) <= 2
        and len(weights) + (readout is not None) == len(base)
        and all(weight.shape[0] <= _WIDEST[precision] for weight in weights)
        and all(name.partition(":")[0] in _STEPS for name in activations)
    )


def _block(n: int) -> int:
    return max(16, triton.next_power_of_2(n))  # a tensor core's smallest side


def _block_r(precision: str) -> int:
    return 32 if precision == "full" else 64  # a float32 product takes three of tf32, and their registers


def occlude_linear(
    x: torch.Tensor,
    columns: torch.Tensor,
    rows: torch.Tensor,
    base: Sequence[torch.Tensor],
    weights: Sequence[torch.Tensor],
    activations: Sequence[str],
    readout: torch.Tensor | None,
    precision: str,
) -> torch.Tensor:
    """Launch on the current stream; arguments as `torch.ops.xaifast.occlude_linear` where `serves` says so: [R, K]."""
    hidden = len(base)
    n_outputs = 1 if readout is not None else weights[-1].shape[0]
    out = x.new_empty(rows.shape[0], n_outputs)
    if out.numel() == 0:
        return out
    x, columns, rows = x.contiguous(), columns.contiguous(), rows.contiguous()
    base, weights = [z.contiguous() for z in base], [weight.contiguous() for weight in weights]
    kinds = [name.partition(":") for name in activations]
    slopes = [float(parameter or 0) for _, _, parameter in kinds]
    width_2 = weights[0].shape[0] if weights else 1
    block_n, block_r = _block(width_2), _block_r(precision)
    with torch.cuda.device_of(x):
        occlude_linear_kernel[(triton.cdiv(rows.shape[0], block_r),)](
            x,
            columns,
            rows,
            base[0],
            base[-1],
            weights[0] if weights else columns,
            weights[-1] if weights else columns,
            columns if readout is None else readout.contiguous(),
            out,
            rows.shape[0],
            x.shape[1],
            columns.shape[1],
            width_2,
            n_outputs,
            slopes[0],
            slopes[-1],
            STEP_1=_STEPS[kinds[0][0]],
            STEP_2=_STEPS[kinds[1][0]] if hidden == 2 else -1,
            READOUT=readout is not None,
            BF16=precision == "bf16",
            INPUTS=_INPUTS[precision],
            BLOCK_R=block_r,
            BLOCK_K=_BLOCK_K,
            BLOCK_N=block_n,
            BLOCK_O=_block(n_outputs),
            num_warps=_WARPS,
        )
    return out


def variants() -> list[Variant]:
    """Return variants that cover every branch and both ends of the sizes."""
    pointers = dict.fromkeys(("x", "columns", "base_1", "base_2", "weight_1", "weight_2", "readout", "out"), "*fp32")
    types = {**pointers, "rows": "*i64", "slope_1": "fp32", "slope_2": "fp32"}
    types |= dict.fromkeys(("n_rows", "n_elements", "width_1", "width_2", "n_outputs"), "i32")

    def variant(name: str, step_1: str, step_2: str | None, precision: str, width_2: int, readout: bool) -> Variant:
        constexprs = {
            "STEP_1": _STEPS[step_1],
            "STEP_2": -1 if step_2 is None else _STEPS[step_2],
            "READOUT": readout,
            "BF16": precision == "bf16",
            "INPUTS": _INPUTS[precision],
            "BLOCK_R": _block_r(precision),
            "BLOCK_K": _BLOCK_K,
            "BLOCK_N": _block(width_2),
            "BLOCK_O": 16,
        }
        signature = {key: "constexpr" if key in constexprs else types[key] for key in occlude_linear_kernel.arg_names}
        divisible = (*pointers, "rows", "width_1", "width_2")
        return Variant(
            f"occlude_linear[{name}]", occlude_linear_kernel, signature, constexprs, divisible, 0, _WARPS, 255
        )

    return [
        variant("two layers, tf32", "relu", "relu", "tf32", 128, False),
        variant("two layers, bf16", "relu", "leaky_relu", "bf16", 256, False),
        variant("two layers, full", "tanh", "silu", "full", 64, False),
        variant("two layers, wide, full", "relu", "relu", "full", 128, False),
        variant("two layers, one output", "relu", "relu", "tf32", 128, True),
        variant("one layer, tf32", "relu", None, "tf32", 16, False),
        variant("one layer, one output", "sigmoid", None, "full", 16, True),
    ]
