"""The operators on inputs of real size: bytes or FLOPs counted, a ceiling, and everyone who computes the same.

A case knows nothing of how it is timed: `bench_operators.py` does it on the CPU, `bench_operators_cuda.py` on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from xaifast import _native
from xaifast.attribution import _adjusted
from xaifast.ops import blend_inputs, pack_coalitions, plan_selection, sample_coalitions, unpack_coalitions
from xaifast.ops.plan import SelectPlan
from xaifast.ops.tokens import compact_rows, compact_rows_out
from xaifast.reference import coalitions as reference_coalitions
from xaifast.reference import masking as reference
from xaifast.reference import tokens as reference_tokens

Call = Callable[[], object]


@dataclass
class Case:
    """One operator on one input.

    Attributes:
        name: Sizes, for the table.
        operator: What it is called.
        providers: Name to a call that does all the work; "xaifast" first, then "reference".
        n_bytes: Read and written, each once.
        flop: Of a compute-bound one.
        ceiling: What no implementation beats by much, as a call, and what it is.
        scale: The case's work in units of the ceiling's.
        out: The buffer that is written, where providers are given one.
    """

    name: str
    operator: str
    providers: dict[str, Call]
    ceiling: Call
    ceiling_name: str
    n_bytes: int = 0
    flop: float = 0.0
    scale: float = 1.0
    out: Tensor | None = None


def _memory_bound(
    name: str, operator: str, ours: Call, by_torch: Callable, arguments: tuple, written: Tensor, read: list[Tensor]
) -> Case:
    """A case whose ceiling is a memcpy of the bytes it writes (which also reads as many; `fill` does not); of half of
    all bytes where it reads more than it writes."""
    moved = sum(t.nbytes for t in (written, *read))
    source = torch.zeros(max(written.nbytes, moved // 2), dtype=torch.uint8, device=written.device)
    target, filled = torch.zeros_like(source), torch.zeros_like(written)
    compiled = torch.compile(by_torch, fullgraph=True)
    providers = {
        "xaifast": ours,
        "reference": lambda: by_torch(*arguments),
        "torch.compile": lambda: compiled(*arguments),
        "fill": lambda: filled.fill_(1),
    }
    return Case(name, operator, providers, lambda: target.copy_(source), "memcpy", moved)


def _select(name: str, plan: SelectPlan, bits: Tensor) -> Case:
    """All units of a plan into a given buffer."""
    units = plan.n_inputs * bits.shape[-2]
    arguments = (plan.x, bits, plan.index, plan.baseline, plan.rep, plan.unit, 0, units)
    out = plan.rows(bits)
    flat = out.view(units, plan.n_background, -1)

    def by_torch(flat: Tensor, *arguments: object) -> Tensor:
        return flat.copy_(reference.select_rows(*arguments))

    case = _memory_bound(
        f"{name}, {bits.shape[-2]} coalitions", "select_rows", lambda: plan.rows(bits, 0, units, out=out).view_as(flat),
        by_torch, (flat, *arguments), out, [plan.x, plan.baseline, bits, plan.index],
    )  # fmt: skip
    case.out = out
    return case


def patches(side: int, patch: int) -> Tensor:
    """Player ids of a square image's patches."""
    place = torch.arange(side) // patch
    return place[:, None] * -(-side // patch) + place


def select_image(dtype: torch.dtype, device: str, *, per_pixel: bool = False) -> Case:
    """Pixel replacement, the engine's operator."""
    n = 64 if device == "cpu" else 2048
    x, short = torch.randn(1, 3, 224, 224, device=device), str(dtype).removeprefix("torch.")
    if per_pixel:
        bits = torch.randint(-(2**63), 2**63 - 1, (n, 784), device=device)
        plan = plan_selection(x, torch.arange(224 * 224).reshape(224, 224), dtype=dtype)
        return _select(f"image 3x224x224 {short}, a player a pixel", plan, bits)
    bits = sample_coalitions(49, n, device=device)[0]
    return _select(f"image 3x224x224 {short}, 49 patches", plan_selection(x, patches(224, 32), dtype=dtype), bits)


def select_tokens(device: str) -> Case:
    """Token replacement."""
    x = torch.randn(8, 197, 768, dtype=torch.bfloat16, device=device)
    plan = plan_selection(x, torch.arange(197)[:, None] - 1, torch.zeros(197, 768, device=device))
    return _select(
        "tokens 8x197x768 bfloat16", plan, sample_coalitions(196, 16 if device == "cpu" else 512, device=device)[0]
    )


def select_table(device: str) -> Case:
    """A table's rows before each row of a background."""
    plan = plan_selection(torch.randn(1, 30, device=device), background=torch.randn(100, 30, device=device))
    n = 2048 if device == "cpu" else 65536
    return _select("table 30 float32, 100 background rows", plan, sample_coalitions(30, n, device=device)[0])


def compact(device: str) -> Case:
    """Half of 196 patches and the class token kept, into a given buffer; `allocating` makes a new one."""
    n, length = 64 if device == "cpu" else 2048, 99
    x = torch.randn(1, 197, 768, dtype=torch.bfloat16, device=device)
    index = torch.arange(-1, 196, dtype=torch.int32, device=device)
    bits = pack_coalitions(torch.rand(n, 196).argsort(1) < 98).to(device)
    arguments = (x, bits, index, length, 0, n)
    out = compact_rows(*arguments)

    def ours() -> Tensor:
        compact_rows_out(*arguments, out)
        return out

    def by_torch(out: Tensor, *arguments: object) -> Tensor:
        return out.copy_(reference_tokens.compact_rows(*arguments))

    case = _memory_bound(
        f"tokens 197x768 bfloat16, 99 kept, {n} coalitions", "compact_rows", ours, by_torch, (out, *arguments), out,
        [x, bits, index],
    )  # fmt: skip
    case.providers["allocating"] = lambda: compact_rows(*arguments)
    case.out = out
    return case


def blend(device: str) -> Case:
    """Soft masks, allocated: made of torch's own operations, so its reference is the same formula written plainly."""
    n = 32 if device == "cpu" else 1024
    x, masks, players = torch.randn(1, 3, 224, 224, device=device), torch.rand(n, 49, device=device), patches(224, 32)
    arguments = (x, masks, players.to(device))
    return _memory_bound(
        f"image 3x224x224 float32, 49 patches, {n} masks", "blend_inputs", lambda: blend_inputs(*arguments),
        reference.blend_inputs, arguments, blend_inputs(*arguments), [x, masks],
    )  # fmt: skip


def pack(device: str) -> Case:
    """Booleans to words, allocated; `kernel alone` writes to memory that is there."""
    present = torch.rand(65536, 196, device=device) < 0.5
    bits = pack_coalitions(present)
    case = _memory_bound(
        "65536 coalitions of 196 players", "pack_coalitions", lambda: pack_coalitions(present),
        reference_coalitions.pack_coalitions, (present,), bits, [present],
    )  # fmt: skip
    if device == "cpu" and (native := _native.cpu()) is not None:
        case.providers["kernel alone"] = lambda: native.pack_bits(bits.data_ptr(), present.data_ptr(), *present.shape)
    return case


def unpack(device: str) -> Case:
    """Words to booleans, allocated; `kernel alone` writes to memory that is there."""
    bits = torch.randint(-(2**63), 2**63 - 1, (65536, 4), device=device)
    present = unpack_coalitions(bits, 196)
    case = _memory_bound(
        "65536 coalitions of 196 players", "unpack_coalitions", lambda: unpack_coalitions(bits, 196),
        reference_coalitions.unpack_coalitions, (bits, 196), present, [bits],
    )  # fmt: skip
    if device == "cpu" and (native := _native.cpu()) is not None:
        case.providers["kernel alone"] = lambda: native.unpack_bits(present.data_ptr(), bits.data_ptr(), *present.shape)
    return case


def sample() -> Case:
    """The default design. Ceiling: NumPy's Philox making a 64-bit word for each player chosen, which is what the design
    takes; `words alone` are the package's own generator making as many."""
    n_players, n = 196, 4000  # on the host, wherever the result goes
    bits, weights = sample_coalitions(n_players, n)
    n_words = int(unpack_coalitions(bits[2::2], n_players).sum())
    generator, native = np.random.Philox(0), _native.cpu()
    providers = {
        "xaifast": lambda: sample_coalitions(n_players, n),
        "reference": lambda: reference_coalitions.sample_coalitions(n_players, n, "leverage", 0, 0),
    }
    if native is not None:
        n_calls = -(-n_words // 16) * 8
        words = torch.empty(2 * n_calls, dtype=torch.int64)
        providers["words alone"] = lambda: native.philox_words(words.data_ptr(), n_calls, (0, 0, 0, 0), (0, 0))
    return Case(
        f"{n_players} players, {n} coalitions", "sample_coalitions", providers,
        lambda: generator.random_raw(n_words, output=False), "random words", bits.nbytes + weights.nbytes,
    )  # fmt: skip


def regression() -> Case:
    """`adjusted`'s regressions, 4 outputs. Ceiling: a float64 matrix product; FLOPs are V's and Cholesky's."""
    generator = torch.Generator().manual_seed(0)
    n_outputs, size, n_players, n_sizes = 4, 248, 49, 24
    new = dict(generator=generator, dtype=torch.float64)
    columns = torch.cat([torch.randint(0, 2, (size, n_players), **new) * 2 - 1, torch.rand(size, n_sizes, **new)], 1)
    y = torch.randn(n_outputs, size, **new)
    weights = torch.rand(n_outputs, n_players, **new) / n_players
    arguments = (y, weights, torch.full((n_outputs, 1), 0.1, dtype=torch.float64), torch.full_like(y, 0.5), False)
    probes = columns.new_empty(0, size)
    plain = _adjusted.TorchRegressions(columns, n_players, probes)
    kernel = _adjusted.NativeRegressions(columns, n_players, probes, _native.cpu())
    flop = n_outputs * (size**2 * (n_players + n_sizes + 2) + size**3 / 3)  # V is symmetric: half of 2 n^2 (M + Q)
    left = torch.randn(512, 512, dtype=torch.float64)
    product = torch.empty_like(left)
    return Case(
        f"{n_outputs} outputs, {size} pairs, {n_players} players",
        "cubic_regression",
        {"xaifast": lambda: kernel(*arguments).alpha, "reference": lambda: plain(*arguments).alpha},
        lambda: torch.mm(left, left, out=product),
        "dgemm",
        flop=flop,
        scale=flop / (2 * 512**3),
    )


CASES: dict[str, Callable[[str], Case]] = {
    "select-image-float32": lambda device: select_image(torch.float32, device),
    "select-image-bfloat16": lambda device: select_image(torch.bfloat16, device),
    "select-pixels-float32": lambda device: select_image(torch.float32, device, per_pixel=True),
    "select-tokens": select_tokens,
    "select-table": select_table,
    "compact-tokens": compact,
    "blend-image": blend,
    "pack": pack,
    "unpack": unpack,
}
ON_THE_HOST: dict[str, Callable[[], Case]] = {"sample": sample, "regression": regression}
PROVIDERS = ("xaifast", "allocating", "kernel alone", "words alone", "reference", "torch.compile", "fill")


def check(case: Case) -> None:
    """Raise unless the package computes what the reference computes, on the very data that are measured."""
    values = []
    for name in ("xaifast", "reference"):
        if case.out is not None:
            case.out.fill_(torch.nan)
        returned = case.providers[name]()
        values.append([torch.as_tensor(v).clone() for v in (returned if isinstance(returned, tuple) else (returned,))])
    for ours, plain in zip(*values, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-6, atol=1e-6)
