"""Small networks of the package's own: a convolutional one for images, a perceptron for tables."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn


class ConvNet(nn.Module):
    """Convolutions of 3 x 3 with ReLU, halved by max-pooling after every second one, and two linear layers.

    Args:
        in_channels: Image channels C.
        size: Height and width of the square images, pixels.
        n_classes: Outputs K.
        widths: Channels of each convolution.
        hidden: Width of the linear layer before the last.
        dropout: Share of its units dropped in training.

    Example:
        >>> ConvNet()(torch.zeros(3, 1, 8, 8)).shape
        torch.Size([3, 10])
    """

    def __init__(
        self,
        in_channels: int = 1,
        size: int = 8,
        n_classes: int = 10,
        widths: Sequence[int] = (16, 32),
        hidden: int = 64,
        dropout: float = 0.3,
    ) -> None:
        super().__init__()
        side = size >> (len(widths) // 2)
        if not widths or side < 1:
            raise ValueError(
                f"ConvNet: widths must name at least one convolution and at most two for every halving of the image, "
                f"got widths {tuple(widths)} and size {size}; change one of them"
            )
        self.config = dict(
            in_channels=in_channels,
            size=size,
            n_classes=n_classes,
            widths=list(widths),
            hidden=hidden,
            dropout=dropout,
        )
        self.input_size = (size, size)
        layers: list[nn.Module] = []
        for i, width in enumerate(widths):
            layers += (nn.Conv2d(widths[i - 1] if i else in_channels, width, 3, padding=1), nn.ReLU())
            if i % 2:
                layers.append(nn.MaxPool2d(2))
        layers += (nn.Flatten(), nn.Linear(widths[-1] * side * side, hidden), nn.ReLU(), nn.Dropout(dropout))
        self.layers = nn.Sequential(*layers, nn.Linear(hidden, n_classes))

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``[B, K]`` of images ``[B, C, H, W]``."""
        return self.layers(images)


class MLP(nn.Module):
    """Linear layers with ReLU between them.

    Args:
        in_features: F.
        n_classes: Outputs K.
        hidden: Widths between.

    Example:
        >>> MLP(30, 2)(torch.zeros(5, 30)).shape
        torch.Size([5, 2])
    """

    def __init__(self, in_features: int, n_classes: int, hidden: Sequence[int] = (64, 64)) -> None:
        super().__init__()
        self.config = dict(in_features=in_features, n_classes=n_classes, hidden=list(hidden))
        widths = (in_features, *hidden)
        layers: list[nn.Module] = []
        for before, after in zip(widths, hidden, strict=False):
            layers += (nn.Linear(before, after), nn.ReLU())
        self.flatten = nn.Flatten()
        self.layers = nn.Sequential(*layers, nn.Linear(widths[-1], n_classes))

    def forward(self, rows: Tensor) -> Tensor:
        """Logits ``[B, K]`` of rows ``[B, F]``, or of inputs of F elements."""
        return self.layers(self.flatten(rows))
