"""The Triton kernel of `torch.ops.xaifast.select_rows`. Not yet measured on a GPU.

It runs on bytes (tensors are viewed as integers of the same size), so every dtype takes one of four variants and NaN
payloads survive.
"""

from __future__ import annotations

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

_VIEWS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_UNITS = (16, 4, 1)  # coalitions per program: the first of these that still gives _PROGRAMS_WANTED programs
_PROGRAMS_WANTED = 4096  # about 30 per multiprocessor of a large GPU

if triton is not None:

    @triton.jit(
        do_not_specialize=["first_group", "n_groups", "groups_per_input", "n_coalitions", "halves", "start", "stop"],
        do_not_specialize_on_alignment=["period", "unit"],
    )
    def select_rows_kernel(
        x,  # [B, F]
        bits,  # [N, 2 W] or [B, N, 2 W], halves of the words (little endian)
        index,  # [P] or [B, P]
        baseline,  # [R, F] or [B, R, F]
        out,  # [stop - start, R, F]
        n_elements,  # F
        row_elements,  # R * F
        period,  # P
        unit,
        halves,  # 2 W
        n_coalitions,  # N
        first_group,  # groups of UNITS coalitions, counted from the first coalition of the first input
        n_groups,  # that hold units of the range
        groups_per_input,
        start,
        stop,
        BITS_PER_INPUT: tl.constexpr,
        INDEX_PER_INPUT: tl.constexpr,
        BASELINE_PER_INPUT: tl.constexpr,
        BACKGROUND: tl.constexpr,  # R > 1
        REPEATED: tl.constexpr,  # F > P * unit
        ONE_WORD: tl.constexpr,  # W == 1: two scalar loads instead of a gather
        UNITS: tl.constexpr,  # coalitions per program
        BLOCK: tl.constexpr,
    ):
        """One program: BLOCK elements of the R * F of a unit, for UNITS coalitions of one input.

        The elements of x and of the baseline and the player ids stay in registers over the coalitions; per coalition
        a program reads the words of its players (from cache) and writes BLOCK elements. Neighbouring programs share
        the tile.
        """
        pid = tl.program_id(0).to(tl.int64)
        i_group = first_group + pid % n_groups
        i_input = i_group // groups_per_input
        i_tile = pid // n_groups

        o_row = (i_tile * BLOCK).to(tl.int32) + tl.arange(0, BLOCK)  # [BLOCK], position in R * F
        m_row = o_row < row_elements
        o_element = o_row % n_elements if BACKGROUND else o_row
        o_entry = o_element // unit
        if REPEATED:
            o_entry = o_entry % period

        p_index = index + i_input * period if INDEX_PER_INPUT else index
        p_baseline = baseline + i_input * row_elements if BASELINE_PER_INPUT else baseline
        b_player = tl.load(p_index + o_entry, mask=m_row, other=-1)  # [BLOCK]
        b_x = tl.load(x + i_input * n_elements + o_element, mask=m_row)
        b_baseline = tl.load(p_baseline + o_row, mask=m_row)

        m_always = b_player < 0
        o_half = b_player >> 5
        m_known = (b_player >= 0) & (o_half < halves)  # a player beyond the words is absent, never a stray read
        b_shift = b_player & 31

        first_unit = i_input * n_coalitions
        for k in range(UNITS):
            i_coalition = i_group % groups_per_input * UNITS + k
            i_unit = first_unit + i_coalition
            m_unit = (i_coalition < n_coalitions) & (i_unit >= start) & (i_unit < stop)
            m_store = o_row < tl.where(m_unit, row_elements, 0)  # Triton 3.9 interprets no scalar mask of a block
            p_bits = bits + (i_unit if BITS_PER_INPUT else i_coalition) * halves
            if ONE_WORD:
                b_low = tl.load(p_bits, mask=m_unit, other=0)
                b_high = tl.load(p_bits + 1, mask=m_unit, other=0)
                b_half = tl.where(o_half == 0, b_low, b_high)
            else:
                b_half = tl.load(p_bits + o_half, mask=m_known & m_store, other=0)
            m_present = m_always | (m_known & (((b_half >> b_shift) & 1) != 0))
            tl.store(out + (i_unit - start) * row_elements + o_row, tl.where(m_present, b_x, b_baseline), mask=m_store)


def block_of(row_elements: int, itemsize: int) -> int:
    """Elements of a tile: up to 32 bytes and 16 elements for each of 128 threads, less for short rows."""
    return min(2048, 4096 // itemsize, max(32, triton.next_power_of_2(row_elements)))


def select_rows(
    x: torch.Tensor,
    bits: torch.Tensor,
    index: torch.Tensor,
    baseline: torch.Tensor,
    rep: int,
    unit: int,
    start: int,
    stop: int,
    out: torch.Tensor,
) -> None:
    """Launch on the current stream; arguments as `torch.ops.xaifast.select_rows`, contiguous, and the output last."""
    if out.numel() == 0:
        return
    n_elements, n_background, n_coalitions = x.shape[1], baseline.shape[-2], bits.shape[-2]
    row_elements, period = n_background * n_elements, index.shape[-1]
    if row_elements >= 2**31 - 4096:
        raise ValueError(
            f"xaifast.select_rows: a unit must have fewer than 2^31 elements, got {n_background} background rows of "
            f"{n_elements}; use fewer background rows"
        )
    view = _VIEWS[x.element_size()]
    block = block_of(row_elements, x.element_size())
    tiles = triton.cdiv(row_elements, block)
    units = next((u for u in _UNITS[:-1] if (stop - start) * tiles >= u * _PROGRAMS_WANTED), _UNITS[-1])
    groups_per_input = triton.cdiv(n_coalitions, units)
    first_group, last_group = (
        u // n_coalitions * groups_per_input + u % n_coalitions // units for u in (start, stop - 1)
    )
    n_groups = last_group + 1 - first_group
    with torch.cuda.device_of(x):
        select_rows_kernel[(tiles * n_groups,)](
            x.view(view),
            bits.view(torch.int32),
            index,
            baseline.view(view),
            out.view(view),
            n_elements,
            row_elements,
            period,
            unit,
            2 * bits.shape[-1],
            n_coalitions,
            first_group,
            n_groups,
            groups_per_input,
            start,
            stop,
            BITS_PER_INPUT=bits.dim() == 3,
            INDEX_PER_INPUT=index.dim() == 2,
            BASELINE_PER_INPUT=baseline.dim() == 3,
            BACKGROUND=n_background > 1,
            REPEATED=rep > 1,
            ONE_WORD=bits.shape[-1] == 1,
            UNITS=units,
            BLOCK=block,
            num_warps=4,
        )


def variants() -> list[Variant]:
    """Return the variants that cover every constexpr branch, item size and address width."""
    pointers = {"bits": "*i32", "index": "*i32"}
    sizes = ("n_elements", "row_elements", "period", "unit", "halves", "n_coalitions")
    scalars = dict.fromkeys((*sizes, "first_group", "n_groups", "groups_per_input", "start", "stop"), "i32")
    flags = ("BITS_PER_INPUT", "INDEX_PER_INPUT", "BASELINE_PER_INPUT", "BACKGROUND", "REPEATED", "ONE_WORD")

    def variant(
        name: str, itemsize: int, on: str, fixed: dict[str, int], aligned: bool = True, units: int = 16
    ) -> Variant:
        data = dict.fromkeys(("x", "baseline", "out"), f"*i{8 * itemsize}")
        types = {**data, **pointers, **scalars}
        constexprs = {flag: flag in on.split() for flag in flags}
        constexprs |= {"UNITS": units, "BLOCK": block_of(1 << 20, itemsize), **fixed}
        signature = {key: "constexpr" if key in constexprs else types[key] for key in select_rows_kernel.arg_names}
        divisible = (*data, *pointers, *(("n_elements", "row_elements") if aligned else ()))
        return Variant(
            f"select_rows[{name}]", select_rows_kernel, signature, constexprs, divisible, 128 if aligned else 0
        )

    return [
        variant("image 4B", 4, "REPEATED ONE_WORD", {"unit": 1}),
        variant("image 2B, many players", 2, "REPEATED", {"unit": 1}),
        variant("tokens 2B, one unit", 2, "", {}, units=1),
        variant("tokens 4B, all per input", 4, "BITS_PER_INPUT INDEX_PER_INPUT BASELINE_PER_INPUT", {}),
        variant("table 4B, odd width", 4, "BACKGROUND ONE_WORD", {"unit": 1}, aligned=False),
        variant("table 8B, per input", 8, "BACKGROUND BITS_PER_INPUT BASELINE_PER_INPUT", {"unit": 1}),
        variant("bytes", 1, "REPEATED ONE_WORD", {}),
    ]
