"""Ranks of features: in which order a curve perturbs them."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from xaifast.ops import _registry
from xaifast.ops._registry import tracing
from xaifast.reference import ranking as reference

Order = Literal["most", "least", "random"]
Compat = Literal["rise", "torchcam", "xplique", "quantus"]
ORDERS: tuple[str, ...] = ("most", "least", "random")
COMPATS: tuple[str, ...] = ("rise", "torchcam", "xplique", "quantus")
_FORMATS = {  # item size, bits of infinity (0: integers)
    torch.float16: (2, 0x7C00), torch.bfloat16: (2, 0x7F80), torch.float32: (4, 0x7F800000),
    torch.float64: (8, 0x7FF0000000000000), torch.int16: (2, 0), torch.int32: (4, 0), torch.int64: (8, 0),
}  # fmt: skip
_WIDENED = (torch.bool, torch.uint8, torch.int8)  # to int16


def rank_features(
    values: Tensor,  # [B, *feat]
    *,
    order: Order = "most",
    nan: Literal["raise", "last"] = "raise",
    compat: Compat | None = None,
    seed: int = 0,
    first_index: int = 0,
) -> Tensor:
    """Place of every feature in the order of perturbation, 0 = first: int32, of the shape of `values`.

    The order is total: descending value, ties by ascending flat index (row-major over feat), -0.0 equal to 0.0.
    rank[b, i] = #{j : values[b, j] > values[b, i]} + #{j < i : values[b, j] = values[b, i]}.

    Args:
        values: ``[B, M]`` or ``[B, *feat]``; bool, integer or floating.
        order: ``"most"``; ``"least"``, the exact reverse: rank_least = M - 1 - rank_most; or ``"random"``, a
            permutation a row drawn by Philox4x32-10 from `seed` and the row's data-set index ``first_index + b``, so
            that it depends on neither batch, chunk nor device. Random orders use nothing of `values` but the shape.
        nan: ``"raise"``, or ``"last"``: NaNs come after all numbers and tie with each other; ``"least"`` reverses that
            too, so that they come first. Compiled code, which cannot look at values, puts them last. Of no effect
            where `compat` says where NaNs go.
        compat: ties and NaNs as another tool has them where its sort is stable. ``"rise"``, ``"xplique"``:
            ``np.flip(np.argsort(a, kind="stable"))``, ties by descending index, NaNs first; ``"quantus"``: stable
            ``np.argsort(-a)``, ties by ascending index, NaNs last; ``"torchcam"``: ``torch.argsort(a,
            descending=True, stable=True)``, ties by ascending index, NaNs first. The tools themselves call unstable
            sorts, whose ties fall as it happens; here they are fixed.
        seed, first_index: of random orders, 0 to 2^63 - 1.

    Raises:
        TypeError: values are no tensor or of a dtype that has no order here.
        ValueError: fewer than two dimensions, 2^31 features or more, an unknown name, a number out of range, or NaN
            (the first input that has one is named).

    Not differentiable. Deterministic, equal on every device. Cost on the CPU: a radix sort, O(B M) time and 16 M bytes
    a thread, twice that for types of 64 bits; on a GPU torch's sort. Random orders are drawn on the CPU.

    Source: the order of insertion and deletion in Petsiuk, Das, Saenko, "RISE", BMVC 2018, section 4.2, made total.

    Example:
        >>> rank_features(torch.tensor([[0.1, 0.7, 0.1, 0.5]])).tolist()
        [[2, 0, 3, 1]]
    """
    _check(values, order, nan, compat)
    flat = values.detach().flatten(1)
    if order == "random":
        for name, value in (("seed", seed), ("first_index", first_index)):
            if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 1 << 63:
                raise ValueError(
                    f"xaifast.rank_features: {name} must be an integer between 0 and 2^63 - 1, got {value!r}"
                )
        ranks = torch.ops.xaifast.random_ranks(seed, first_index, *flat.shape, device=values.device)
        return ranks.view(values.shape)
    if nan == "raise" and compat is None and values.is_floating_point() and not tracing():
        bad = flat.isnan()
        if bad.any():
            b = int(bad.any(1).nonzero()[0])
            raise ValueError(
                f"xaifast.rank_features: values must not be NaN, got {int(bad[b].sum())} in input {b}; "
                'repair them, or rank them behind all numbers by nan="last"'
            )
    return torch.ops.xaifast.rank_features(flat, order, compat).view(values.shape)


def _check(values: Tensor, order: str, nan: str, compat: str | None) -> None:
    if not isinstance(values, Tensor):
        raise TypeError(f"xaifast.rank_features: values must be a tensor [B, *feat], got {type(values).__name__}")
    if values.dtype not in _FORMATS and values.dtype not in _WIDENED:
        raise TypeError(
            f"xaifast.rank_features: values must be bool, int8 to int64, uint8 or float16 to float64, got "
            f"{values.dtype}; convert them"
        )
    if values.dim() < 2 or math.prod(values.shape[1:]) >= 2**31:
        raise ValueError(
            f"xaifast.rank_features: values must be [B, *feat] with fewer than 2^31 features, got "
            f"{list(values.shape)}; add a batch dimension by values[None], or rank groups of features"
        )
    for name, value, known in (
        ("order", order, ORDERS), ("nan", nan, ("raise", "last")), ("compat", compat, (None, *COMPATS)),
    ):  # fmt: skip
        if value not in known:
            raise ValueError(
                f"xaifast.rank_features: {name} must be one of {', '.join(map(repr, known))}, got {value!r}"
            )


def _rank_reference(values: Tensor, order: str, compat: str | None) -> Tensor:
    return reference.rank_features(values, order, compat)


def _rank_cpu(values: Tensor, order: str, compat: str | None) -> Tensor:
    native = _registry.native_cpu("rank_features")
    if native is None:
        return reference.rank_features(values, order, compat)
    values = (values.to(torch.int16) if values.dtype in _WIDENED else values).contiguous()
    itemsize, infinity = _FORMATS[values.dtype]
    ranks = values.new_empty(values.shape, dtype=torch.int32)
    n_rows, n_features = values.shape
    ties = {"torchcam": 1, "rise": 2, "xplique": 2}.get(compat, 0)
    native.rank_features(
        ranks.data_ptr(), values.data_ptr(), n_rows, n_features, itemsize, infinity, ties, order == "least",
        torch.get_num_threads(),
    )  # fmt: skip
    return ranks


def _random(seed: int, first_index: int, n_rows: int, n_features: int, *, device: torch.device | None = None) -> Tensor:
    native = _registry.native_cpu("random_ranks")
    if native is None:
        words = reference.random_words(seed, first_index, n_rows, n_features)
    else:
        words = torch.empty((n_rows, -(-n_features // 16) * 16), dtype=torch.int64, device="cpu")
        for row, index in zip(words, range(first_index, first_index + n_rows), strict=True):
            counter, key = reference.random_stream(seed, index)
            native.philox_words(row.data_ptr(), words.shape[1] // 2, counter, key)
    ranks = torch.ops.xaifast.rank_features(words[:, :n_features], "most", None)
    return ranks.to(device or torch.get_default_device())


_registry.register(
    "rank_features(Tensor values, str order, str? compat) -> Tensor",
    {"CPU": _rank_cpu, "CompositeExplicitAutograd": _rank_reference, "FuncTorchBatched": _rank_reference},
    lambda values, order, compat: values.new_empty(values.shape, dtype=torch.int32),
)
_registry.register(
    "random_ranks(int seed, int first_index, SymInt n_rows, SymInt n_features, *, Device? device=None) -> Tensor",
    {"CompositeExplicitAutograd": _random},
    lambda seed, first_index, n_rows, n_features, *, device=None: torch.empty(
        (n_rows, n_features), dtype=torch.int32, device=device
    ),
)
