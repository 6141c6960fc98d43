"""The Kernel SHAP jobs: models, inputs, and the same explanation by xaifast, Captum and shap."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

import xaifast
from xaifast.removal import TokenDrop, TokenSelect


@dataclass
class Job:
    """One piece of work and everyone who does it.

    Attributes:
        name: Row of the table.
        model: What is explained.
        rows: Preassembled model inputs ``[n, ...]``: the floor's evaluations, all of them.
        contenders: Name to a function that does the whole job.
        peers: The same for other packages; slow ones run fewer rounds.
    """

    name: str
    model: Callable[[Tensor], Tensor]
    rows: Tensor
    contenders: dict[str, Callable[[], object]]
    peers: dict[str, Callable[[], object]] = field(default_factory=dict)


class LeNet5(nn.Sequential):
    """LeNet-5 for 32 x 32 grey images (LeCun et al., 1998), with relu and average pooling."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(1, 6, 5), nn.ReLU(), nn.AvgPool2d(2),
            nn.Conv2d(6, 16, 5), nn.ReLU(), nn.AvgPool2d(2),
            nn.Flatten(), nn.Linear(400, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, 10),
        )  # fmt: skip


def masked_rows(x: Tensor, mask: Tensor, n: int) -> Tensor:
    """``n`` masked rows of each input, ``[B * n, ...]``, for the floor."""
    n_players = int(mask.max()) + 1
    present = torch.rand(n, n_players, generator=torch.Generator().manual_seed(0)) < 0.5
    kept = present[:, mask].view(n, *(1,) * (x.dim() - 1 - mask.dim()), *mask.shape)
    return torch.cat([torch.where(kept, row, 0.0) for row in x])


def captum_kernel_shap(
    model: nn.Module, x: Tensor, mask: Tensor, n: int, per_eval: int, target: int
) -> Callable[[], object]:
    """Captum's Kernel SHAP, one image after the other as it does itself."""

    def run() -> object:
        from captum.attr import KernelShap

        explainer = KernelShap(model)
        with torch.inference_mode():
            return torch.cat([
                explainer.attribute(
                    row[None], target=target, feature_mask=mask[None], n_samples=n, perturbations_per_eval=per_eval
                )
                for row in x
            ])  # fmt: skip

    return run


def shap_image_values(model: nn.Module, x: Tensor, mask: Tensor, n: int, target: int, batch: int) -> np.ndarray:
    """shap's KernelExplainer on players, without feature selection, the forward in batches; ``[B, M]``."""
    import shap

    n_players = int(mask.max()) + 1
    values = []
    for row in x:

        def forward(z: np.ndarray, row: Tensor = row) -> np.ndarray:
            present = torch.from_numpy(z.astype(bool))
            outputs = []
            with torch.inference_mode():
                for part in present.split(batch):
                    outputs.append(model(torch.where(part[:, mask][:, None], row, 0.0))[:, target])
            return torch.cat(outputs).numpy()

        explainer = shap.KernelExplainer(forward, np.zeros((1, n_players)))
        shown = explainer.shap_values(np.ones((1, n_players)), nsamples=n - 2, l1_reg=False, silent=True)
        values.append(shown[0])
    return np.stack(values)


def vit_job() -> Job:
    """ViT-tiny, 224 px, patch 32: M = 49, n = 500, one image."""
    torch.manual_seed(0)
    model = xaifast.models.VisionTransformer(224, 32, 1000, dim=192, depth=12, heads=3).eval()
    x, mask = torch.rand(1, 3, 224, 224), xaifast.grid_mask((224, 224), 32)

    def ours(**kwargs: object) -> Callable[[], object]:
        return lambda: xaifast.kernel_shap(
            model, x, feature_mask=mask, n_samples=500, target=3, estimator="wls", **kwargs
        )

    return Job(
        "ViT-tiny 224 px, M = 49, n = 500, 1 image",
        model,
        masked_rows(x, mask, 500),
        {
            "pixels, wls": ours(),
            "TokenSelect, wls": ours(removal=TokenSelect()),
            "TokenDrop, wls": ours(removal=TokenDrop()),
        },
        {
            "Captum default": captum_kernel_shap(model, x, mask, 500, 1, 3),
            "Captum 50 per call": captum_kernel_shap(model, x, mask, 500, 50, 3),
            "shap": lambda: shap_image_values(model, x, mask, 500, 3, 32),
        },
    )


def lenet_job() -> Job:
    """LeNet-5, 32 px: M = 64, n = 500, 16 images."""
    torch.manual_seed(0)
    model = LeNet5().eval()
    x, mask = torch.rand(16, 1, 32, 32), xaifast.grid_mask((32, 32), 4)

    def ours(estimator: str) -> Callable[[], object]:
        return lambda: xaifast.kernel_shap(model, x, feature_mask=mask, n_samples=500, target=3, estimator=estimator)

    return Job(
        "LeNet-5 32 px, M = 64, n = 500, 16 images",
        model,
        masked_rows(x, mask, 500),
        {"wls": ours("wls"), "auto": ours("auto")},
        {
            "Captum default": captum_kernel_shap(model, x, mask, 500, 1, 3),
            "Captum 100 per call": captum_kernel_shap(model, x, mask, 500, 100, 3),
            "shap": lambda: shap_image_values(model, x, mask, 500, 3, 256),
        },
    )


def tabular_job() -> Job:
    """MLP 30-64-64-2 with 100 background rows: 32 rows, n = 512."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(30, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2)).eval()
    x, background = torch.randn(32, 30), torch.randn(100, 30)

    def ours(estimator: str) -> Callable[[], object]:
        return lambda: xaifast.kernel_shap(
            model, x, baselines=xaifast.Background(background), n_samples=512, estimator=estimator
        )

    def by_shap() -> object:
        import shap

        def forward(rows: np.ndarray) -> np.ndarray:
            with torch.inference_mode():
                return model(torch.from_numpy(rows.astype(np.float32))).numpy()

        explainer = shap.KernelExplainer(forward, background.numpy())
        return explainer.shap_values(x.numpy(), nsamples=510, l1_reg=False, silent=True)

    return Job(
        "MLP 30-64-64-2, 100 background rows, n = 512, 32 rows",
        model,
        torch.randn(32 * 512 * 100, 30),
        {"wls": ours("wls"), "auto": ours("auto")},
        {"shap": by_shap},
    )


JOBS = {"vit": vit_job, "lenet": lenet_job, "tabular": tabular_job}
