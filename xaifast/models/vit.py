"""A small vision transformer whose tokens can be dropped."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PatchEmbeddings(nn.Module):
    """Image ``[B, C, H, W]`` to class token and patch tokens with positions added, ``[B, 1 + P, D]``."""

    def __init__(self, image_size: int, patch: int, channels: int, dim: int) -> None:
        super().__init__()
        if image_size % patch:
            raise ValueError(f"PatchEmbeddings: patch must divide image_size, got patch {patch} and size {image_size}")
        self.projection = nn.Conv2d(channels, dim, kernel_size=patch, stride=patch)
        self.class_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.positions = nn.Parameter(torch.randn(1, 1 + (image_size // patch) ** 2, dim) * 0.02)

    def forward(self, images: Tensor) -> Tensor:
        """Embed images ``[B, C, H, W]``."""
        patches = self.projection(images).flatten(2).transpose(1, 2)  # [B, P, D]
        tokens = torch.cat((self.class_token.expand(images.shape[0], -1, -1), patches), dim=1)
        return tokens + self.positions


class _Block(nn.Module):
    def __init__(self, dim: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.up, self.down = nn.Linear(dim, hidden), nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, dim = x.shape
        qkv = self.qkv(self.norm1(x)).view(batch, length, 3, self.heads, dim // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # [B, heads, T, D / heads] each
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, length, dim)
        x = x + self.out(mixed)
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class VisionTransformer(nn.Module):
    """Pre-norm vision transformer classified from its class token (Dosovitskiy et al., ICLR 2021).

    ``embeddings`` is the one place where pixels become tokens, so `xaifast.removal.TokenDrop` and ``TokenSelect`` work
    on it.

    Args:
        image_size: Height and width of the square images, pixels.
        patch: Patch side, divides ``image_size``.
        n_classes: Outputs K.
        channels: Image channels C.
        dim: Token width D, divisible by ``heads``.
        depth: Number of blocks.
        heads: Attention heads.
        mlp_ratio: Hidden width of a block's MLP over ``dim``.

    Example:
        >>> model = VisionTransformer(28, 4, 10, channels=1, dim=32, depth=2, heads=2)
        >>> model(torch.zeros(3, 1, 28, 28)).shape
        torch.Size([3, 10])
    """

    def __init__(
        self,
        image_size: int,
        patch: int,
        n_classes: int,
        *,
        channels: int = 3,
        dim: int = 192,
        depth: int = 12,
        heads: int = 3,
        mlp_ratio: int = 4,
    ) -> None:
        super().__init__()
        self.config = dict(
            image_size=image_size,
            patch=patch,
            n_classes=n_classes,
            channels=channels,
            dim=dim,
            depth=depth,
            heads=heads,
            mlp_ratio=mlp_ratio,
        )
        self.input_size, self.patch_size = (image_size, image_size), patch
        self.embeddings = PatchEmbeddings(image_size, patch, channels, dim)
        self.blocks = nn.Sequential(*(_Block(dim, heads, mlp_ratio * dim) for _ in range(depth)))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, n_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``[B, K]`` of images ``[B, C, H, W]``."""
        tokens = self.blocks(self.embeddings(images))
        return self.head(self.norm(tokens[:, 0]))
