"""Counter-based numbers: their laws, and that nothing but seed, index, domain and sample decides them."""

from __future__ import annotations

import math

import pytest
import torch

from xaifast import noise
from xaifast.reference.coalitions import philox4x32

STREAM = dict(domain=noise.INFIDELITY, seed=(3 << 40) + 7, first_index=(5 << 33) + 1)


def test_words_are_philoxs():
    uniform = noise.uniform_units(2, 4, 3, 5, **STREAM)  # sample 2 of input 0, sample 0 of input 1
    for row, (b, n) in zip(uniform.tolist(), ((0, 2), (1, 0)), strict=True):
        index = STREAM["first_index"] + b
        words = []
        for call in range(n * 3, n * 3 + 3):
            counter = (call, 0, index & 0xFFFFFFFF, index >> 32 ^ noise.INFIDELITY << 24)
            w = philox4x32(counter, (STREAM["seed"] & 0xFFFFFFFF, STREAM["seed"] >> 32))
            words += [w[0] | w[1] << 32, w[2] | w[3] << 32]
        assert row == [(word >> 11) * 2.0**-53 for word in words[:5]]


def test_normals_are_box_and_mullers():
    uniform, normal = (make(0, 2, 1, 6, **STREAM) for make in (noise.uniform_units, noise.normal_units))
    for u, z in zip(uniform.tolist(), normal.tolist(), strict=True):
        for i in (0, 2, 4):
            radius = math.sqrt(-2 * math.log(u[i] + 2.0**-53))
            angle = 2 * math.pi * u[i + 1]
            assert z[i : i + 2] == pytest.approx([radius * math.cos(angle), radius * math.sin(angle)], rel=1e-12)


@pytest.mark.parametrize("make", [noise.uniform_units, noise.normal_units])
@pytest.mark.parametrize("size", [1, 2, 7, 40])
def test_units_do_not_depend_on_chunks_or_backend(make, size, monkeypatch):
    whole = make(0, 12, 4, size, **STREAM)
    assert whole.shape == (12, size) and whole.unique(dim=0).shape[0] == 12
    for start, stop in ((0, 1), (3, 5), (7, 12)):
        assert torch.equal(make(start, stop, 4, size, **STREAM), whole[start:stop])
    later = make(0, 4, 4, size, **{**STREAM, "first_index": STREAM["first_index"] + 2})
    assert torch.equal(later, whole[8:])
    monkeypatch.setenv("XAIFAST_BACKEND", "reference")
    assert torch.equal(make(0, 12, 4, size, **STREAM), whole)
    for other in (dict(domain=noise.IMPUTATION), dict(seed=1), dict(first_index=9)):
        assert not torch.equal(make(0, 12, 4, size, **{**STREAM, **other}), whole)


def test_laws():
    """Within four standard errors of a million numbers."""
    uniform, normal = (make(0, 200, 10, 5001, **STREAM).flatten() for make in (noise.uniform_units, noise.normal_units))
    assert 0 <= float(uniform.min()) < 1e-5 and 1 - 1e-5 < float(uniform.max()) < 1
    assert abs(float(uniform.mean()) - 0.5) < 1.2e-3 and abs(float(uniform.var()) - 1 / 12) < 3e-4
    assert abs(float(normal.mean())) < 4e-3 and abs(float(normal.var()) - 1) < 6e-3
    assert abs(float((normal**4).mean()) - 3) < 0.04
    assert abs(float((normal[:-1] * normal[1:]).mean())) < 4e-3
