"""Devices, data and comparison shared by the tests of masking and of tokens."""

import pytest
import torch

DEVICES = ["cpu", *([pytest.param("cuda", marks=pytest.mark.gpu)] if torch.cuda.is_available() else [])]
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool)


def random(shape, dtype=torch.float32, device="cpu", seed=0):
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 50
    return (values > 0 if dtype == torch.bool else values.abs() if dtype == torch.uint8 else values).to(device, dtype)


def design(n_players, n_pairs=3, device="cpu", seed=0):
    """Full and empty coalition, then random pairs of complements: bool [2 + 2 * n_pairs, M]."""
    first = torch.rand(n_pairs, n_players, generator=torch.Generator().manual_seed(seed)) > 0.5
    pairs = torch.stack((first, ~first), 1).reshape(-1, n_players)
    ends = torch.tensor([[True], [False]]).expand(2, n_players)
    return torch.cat((ends, pairs)).to(device)


def raw(t):
    return t.contiguous().view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[t.element_size()])


def assert_bytes(actual, expected):
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    assert torch.equal(raw(actual), raw(expected))
