"""Every kind of bad input says what must hold, what was given and what to do."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import xaifast
from xaifast.removal import TokenDrop, TokenSelect

X = torch.ones(2, 6)
IMAGES = torch.ones(2, 1, 8, 8)


def linear(x):
    return x.flatten(1) @ torch.ones(x[0].numel(), 3)


def vit(**kwargs):
    return xaifast.models.VisionTransformer(8, 4, 3, channels=1, dim=8, depth=1, heads=1, **kwargs).eval()


def nan_when_masked(x):
    return torch.where((x == 0).any(1), torch.nan, 1.0)


CASES = {
    "inputs not tensor": (dict(inputs=[1.0]), TypeError, "inputs must be a tensor"),
    "inputs without batch": (dict(inputs=torch.ones(3)), ValueError, "unsqueeze"),
    "empty batch": (dict(inputs=torch.ones(0, 3)), ValueError, "B >= 1"),
    "no features": (dict(inputs=torch.ones(2, 0)), ValueError, "at least one feature"),
    "sparse inputs": (dict(inputs=torch.eye(3).to_sparse()), TypeError, "dense"),
    "complex inputs": (dict(inputs=torch.ones(2, 3, dtype=torch.complex64)), TypeError, "real"),
    "batch sizes differ": (dict(inputs=(torch.ones(2, 3), torch.ones(3, 3))), ValueError, "share batch size"),
    "forward not callable": (dict(forward=3), TypeError, "callable"),
    "mask not tensor": (dict(feature_mask=[0, 1]), TypeError, "LongTensor"),
    "mask float": (dict(feature_mask=torch.zeros(6)), TypeError, "integer"),
    "mask shape": (dict(feature_mask=torch.zeros(5, dtype=torch.long)), ValueError, "broadcastable"),
    "mask negative": (dict(feature_mask=torch.tensor([0, 1, -1, 2, 2, 2])), ValueError, "got -1"),
    "mask gap": (dict(feature_mask=torch.tensor([0, 1, 3, 3, 3, 3])), ValueError, "id 2 .*occurs nowhere"),
    "mask count": (dict(inputs=(X, X), feature_mask=(torch.arange(6),)), ValueError, "one mask an input"),
    "too many players": (dict(inputs=torch.ones(1, 4097)), ValueError, "grid_mask"),
    "n_samples zero": (dict(n_samples=0), ValueError, "at least 4"),
    "n_samples three": (dict(n_samples=3), ValueError, "at least 4"),
    "n_samples float": (dict(n_samples=10.0), TypeError, "int"),
    "exact too small": (dict(n_samples=10, estimator="exact"), ValueError, r"2\*\*6"),
    "estimator unknown": (dict(estimator="ols"), ValueError, "wls"),
    "design unknown": (dict(design="iid"), ValueError, "per_input"),
    "link unknown": (dict(link="probit"), ValueError, "logit"),
    "link not elementwise": (dict(link=lambda v: v.sum()), ValueError, "elementwise"),
    "logit of no probability": (dict(forward=lambda x: x.sum(1), link="logit"), ValueError, "between 0 and 1"),
    "seed negative": (dict(forward=None, seed=-1), ValueError, "seed must be between"),
    "tolerance text": (dict(tolerance="low"), ValueError, "tolerance"),
    "tolerance negative": (dict(tolerance=-1.0), ValueError, "tolerance"),
    "batch size zero": (dict(batch_size=0), ValueError, "batch_size"),
    "batch size text": (dict(batch_size="big"), ValueError, "batch_size"),
    "target out of range": (dict(target=3), ValueError, r"0\.\.2"),
    "target negative": (dict(target=-1), ValueError, r"0\.\.2"),
    "target shape": (dict(target=torch.tensor([0, 1, 2])), ValueError, "shape"),
    "target float": (dict(target=torch.tensor([0.0, 1.0])), ValueError, "LongTensor"),
    "target kind": (dict(target="best"), TypeError, "predicted"),
    "target of scalar model": (dict(forward=lambda x: x.sum(1), target=0), ValueError, "one number an input"),
    "baseline kind": (dict(baselines="zero"), TypeError, "baselines"),
    "baseline shape": (dict(baselines=torch.zeros(5)), ValueError, "baselines"),
    "baseline batch": (dict(baselines=torch.zeros(3, 6)), ValueError, "baselines"),
    "baseline count": (dict(baselines=(0.0, 0.0)), ValueError, "one entry an input"),
    "baseline in integers": (dict(inputs=torch.ones(2, 3, dtype=torch.long), baselines=0.5), TypeError, "integers"),
    "baseline not finite in integers": (
        dict(inputs=torch.ones(2, 3, dtype=torch.long), baselines=float("nan")),
        TypeError,
        "integers",
    ),
    "background shape": (dict(baselines=xaifast.Background(torch.zeros(4, 5))), ValueError, "Background"),
    "background empty": (dict(baselines=xaifast.Background(torch.zeros(0, 6))), ValueError, "R >= 1"),
    "removal unknown": (dict(removal="inpaint"), ValueError, "TokenDrop"),
    "removal array": (dict(removal=np.zeros(6)), ValueError, "TokenDrop"),
    "blur of no image": (dict(removal="blur"), ValueError, r"\[B, C, H, W\]"),
    "blur of integers": (dict(inputs=IMAGES.byte(), removal="blur", n_samples=70), ValueError, "floating"),
    "removal class": (dict(removal=TokenDrop), TypeError, r"TokenDrop\(\)"),
    "removal shape": (dict(removal=lambda x: x[:1]), ValueError, "inputs' shape"),
    "removal with baselines": (dict(removal=lambda x: x, baselines=1.0), ValueError, "left out"),
    "output kind": (dict(forward=lambda x: (x, x)), TypeError, "logits"),
    "output rows": (dict(forward=lambda x: x[:1]), ValueError, "number of rows"),
    "output scalar": (dict(forward=lambda x: x.sum()), ValueError, r"\[b\] or \[b, K\]"),
    "output rank": (dict(forward=lambda x: x[:, :, None]), ValueError, r"\[b\] or \[b, K\]"),
    "output without columns": (dict(forward=lambda x: x[:, :0]), ValueError, r"\[b\] or \[b, K\]"),
    "output nan": (dict(forward=lambda x: x.sum(1) * torch.nan), ValueError, "input 0, coalition 0"),
    "output nan when masked": (
        dict(forward=nan_when_masked),
        ValueError,
        r"input 0, coalition \d+ \([0-5] of 6 players",
    ),
    "dropout active": (dict(forward=nn.Sequential(nn.Dropout(0.5), nn.Linear(6, 2))), ValueError, r"model\.eval\(\)"),
    "batch statistics active": (
        dict(forward=nn.Sequential(nn.BatchNorm1d(6)).requires_grad_(False)),
        ValueError,
        "BatchNorm1d",
    ),
    "cuda graph on cpu": (dict(cuda_graph=True), ValueError, "CUDA"),
    "tokens of a function": (dict(inputs=IMAGES, removal=TokenDrop()), TypeError, "nn.Module"),
    "tokens without encoder": (
        dict(inputs=IMAGES, forward=nn.Sequential(nn.Flatten(), nn.Linear(64, 2)), removal=TokenSelect()),
        ValueError,
        "exactly one supported patch embedding",
    ),
    "tokens not aligned": (
        dict(inputs=IMAGES, forward=vit(), removal=TokenDrop(), feature_mask=xaifast.grid_mask((8, 8), 3)),
        ValueError,
        "constant within the model's patches",
    ),
    "tokens with baselines": (
        dict(
            inputs=IMAGES, forward=vit(), removal=TokenDrop(), feature_mask=xaifast.grid_mask((8, 8), 4), baselines=1.0
        ),
        ValueError,
        "takes no baselines",
    ),
    "tokens with an array": (
        dict(inputs=IMAGES, forward=vit(), removal=TokenDrop(), baselines=np.zeros(3)),
        ValueError,
        "takes no baselines",
    ),
    "tokens of a wrong name": (
        dict(inputs=IMAGES, forward=vit(), removal=TokenDrop("encoder"), feature_mask=xaifast.grid_mask((8, 8), 4)),
        ValueError,
        "submodule",
    ),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_bad_input_is_refused(case):
    arguments, error, message = case
    arguments = {"forward": linear, "inputs": X, **arguments}
    with pytest.raises(error, match=message) as caught:
        xaifast.kernel_shap(**arguments)
    assert str(caught.value).startswith("xaifast.")


def test_grid_mask_refuses_empty_sizes():
    with pytest.raises(ValueError, match="at least 1"):
        xaifast.grid_mask((0, 4), 2)


def test_training_mode_can_be_allowed():
    model = nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, 2))
    result = xaifast.kernel_shap(model, X, allow_training_mode=True)
    assert result.values.shape == (2, 6, 2) and model.training
