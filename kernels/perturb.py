"""The Triton kernel of `torch.ops.xaifast.perturb_rows`. Not yet measured on a GPU.

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
_POINTS = (16, 4, 1)  # points per program: the first of these that still gives _PROGRAMS_WANTED programs
_PROGRAMS_WANTED = 4096  # about 30 per multiprocessor of a large GPU

if triton is not None:

    @triton.jit(
        do_not_specialize=["first_group", "n_groups", "groups_per_input", "n_points", "start", "stop"],
        do_not_specialize_on_alignment=["period", "unit"],
    )
    def perturb_rows_kernel(
        x,  # [B, F]
        insertion,  # [1, F] or [B, F]
        deletion,  # [1, F] or [B, F]
        rank,  # [1, P] or [B, P]
        points,  # [N, 2]: count, and 0 for insertion or else deletion
        out,  # [stop - start, F]
        n_elements,  # F
        period,  # P
        unit,
        n_points,  # N
        first_group,  # groups of POINTS points, counted from the first point of the first input
        n_groups,  # that hold units of the range
        groups_per_input,
        start,
        stop,
        INSERTION_PER_INPUT: tl.constexpr,
        DELETION_PER_INPUT: tl.constexpr,
        RANK_PER_INPUT: tl.constexpr,
        REPEATED: tl.constexpr,  # F > P * unit
        POINTS: tl.constexpr,  # points per program
        BLOCK: tl.constexpr,
    ):
        """One program: BLOCK elements of a row, for POINTS points of one input.

        The elements of x and of both baselines and the ranks stay in registers over the points; per point a program
        reads two numbers and writes BLOCK elements. Neighbouring programs share the tile.
        """
        pid = tl.program_id(0).to(tl.int64)
        i_group = first_group + pid % n_groups
        i_input = i_group // groups_per_input
        i_tile = pid // n_groups

        o_element = (i_tile * BLOCK).to(tl.int32) + tl.arange(0, BLOCK)  # [BLOCK]
        m_element = o_element < n_elements
        o_entry = o_element // unit
        if REPEATED:
            o_entry = o_entry % period

        p_rank = rank + i_input * period if RANK_PER_INPUT else rank
        p_insertion = insertion + i_input * n_elements if INSERTION_PER_INPUT else insertion
        p_deletion = deletion + i_input * n_elements if DELETION_PER_INPUT else deletion
        b_rank = tl.load(p_rank + o_entry, mask=m_element, other=-1)  # [BLOCK]
        b_x = tl.load(x + i_input * n_elements + o_element, mask=m_element)
        b_insertion = tl.load(p_insertion + o_element, mask=m_element)
        b_deletion = tl.load(p_deletion + o_element, mask=m_element)
        m_never = b_rank < 0

        for k in range(POINTS):
            i_point = i_group % groups_per_input * POINTS + k
            i_unit = i_input * n_points + i_point
            m_unit = (i_point < n_points) & (i_unit >= start) & (i_unit < stop)
            m_store = o_element < tl.where(m_unit, n_elements, 0)  # Triton 3.9 interprets no scalar mask of a block
            count = tl.load(points + 2 * i_point, mask=m_unit, other=0)
            deletes = tl.load(points + 2 * i_point + 1, mask=m_unit, other=0) != 0
            last = (tl.minimum(tl.maximum(count, 0), 0x80000000) - 1).to(tl.int32)  # 64 bits would take more registers
            m_shown = m_never | ((b_rank <= last) != deletes)
            b_out = tl.where(m_shown, b_x, tl.where(deletes, b_deletion, b_insertion))
            tl.store(out + (i_unit - start) * n_elements + o_element, b_out, mask=m_store)


def block_of(n_elements: int, itemsize: int) -> int:
    """Elements of a tile: up to 32 bytes and 16 elements for each of 128 threads, less for short rows."""
    return min(2048, 4096 // itemsize, max(32, triton.next_power_of_2(n_elements)))


def perturb_rows(
    x: torch.Tensor,
    insertion: torch.Tensor,
    deletion: torch.Tensor,
    rank: torch.Tensor,
    rep: int,
    unit: int,
    points: torch.Tensor,
    start: int,
    stop: int,
    out: torch.Tensor,
) -> None:
    """Launch on the current stream; arguments as `torch.ops.xaifast.perturb_rows`, contiguous, and the output last."""
    if out.numel() == 0:
        return
    n_elements, n_points = x.shape[1], points.shape[0]
    if n_elements >= 2**31 - 4096:
        raise ValueError(f"xaifast.perturb_rows: a row must have fewer than 2^31 elements, got {n_elements}")
    view = _VIEWS[x.element_size()]
    block = block_of(n_elements, x.element_size())
    tiles = triton.cdiv(n_elements, block)
    group = next((g for g in _POINTS[:-1] if (stop - start) * tiles >= g * _PROGRAMS_WANTED), _POINTS[-1])
    groups_per_input = triton.cdiv(n_points, group)
    first_group, last_group = (u // n_points * groups_per_input + u % n_points // group for u in (start, stop - 1))
    n_groups = last_group + 1 - first_group
    with torch.cuda.device_of(x):
        perturb_rows_kernel[(tiles * n_groups,)](
            x.view(view),
            insertion.view(view),
            deletion.view(view),
            rank,
            points,
            out.view(view),
            n_elements,
            rank.shape[1],
            unit,
            n_points,
            first_group,
            n_groups,
            groups_per_input,
            start,
            stop,
            INSERTION_PER_INPUT=insertion.shape[0] > 1,
            DELETION_PER_INPUT=deletion.shape[0] > 1,
            RANK_PER_INPUT=rank.shape[0] > 1,
            REPEATED=rep > 1,
            POINTS=group,
            BLOCK=block,
            num_warps=4,
        )


def variants() -> list[Variant]:
    """Return the variants that cover every constexpr branch, item size and address width."""
    pointers = {"rank": "*i32", "points": "*i64"}
    sizes = ("n_elements", "period", "unit", "n_points", "first_group", "n_groups", "groups_per_input", "start", "stop")
    flags = ("INSERTION_PER_INPUT", "DELETION_PER_INPUT", "RANK_PER_INPUT", "REPEATED")

    def variant(
        name: str, itemsize: int, on: str, fixed: dict[str, int], aligned: bool = True, points: int = 16
    ) -> Variant:
        data = dict.fromkeys(("x", "insertion", "deletion", "out"), f"*i{8 * itemsize}")
        types = {**data, **pointers, **dict.fromkeys(sizes, "i32")}
        constexprs = {flag: flag in on.split() for flag in flags}
        constexprs |= {"POINTS": points, "BLOCK": block_of(1 << 20, itemsize), **fixed}
        signature = {key: "constexpr" if key in constexprs else types[key] for key in perturb_rows_kernel.arg_names}
        divisible = (*data, *pointers, *(("n_elements",) if aligned else ()))
        return Variant(
            f"perturb_rows[{name}]", perturb_rows_kernel, signature, constexprs, divisible, 128 if aligned else 0
        )

    return [
        variant("image 4B", 4, "RANK_PER_INPUT INSERTION_PER_INPUT REPEATED", {"unit": 1}),
        variant("image 2B", 2, "RANK_PER_INPUT INSERTION_PER_INPUT REPEATED", {"unit": 1}),
        variant("elements 2B, one point", 2, "RANK_PER_INPUT DELETION_PER_INPUT", {"unit": 1}, points=1),
        variant("patches 4B, one rank", 4, "REPEATED", {}),
        variant("table 4B, odd width", 4, "RANK_PER_INPUT", {"unit": 1}, aligned=False),
        variant("image 8B", 8, "RANK_PER_INPUT INSERTION_PER_INPUT DELETION_PER_INPUT REPEATED", {"unit": 1}),
        variant("bytes", 1, "RANK_PER_INPUT REPEATED", {}),
    ]
