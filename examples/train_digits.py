"""Trains a small convolutional network on scikit-learn's handwritten digits and saves it.

python examples/train_digits.py models/digits
xaifast explain --model xaifast:models/digits --data digits --out runs/digits
"""

from __future__ import annotations

import sys
import time

import torch
import torch.nn.functional as F
from sklearn.model_selection import train_test_split
from torch import Tensor

from xaifast.data import open_data
from xaifast.models import ConvNet, save_model


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training images ``[1347, 1, 8, 8]``, test images ``[450, 1, 8, 8]``, and their labels."""
    data = open_data("digits")
    loaded = data.load(range(len(data)))
    images = torch.stack(loaded.items)
    train, test = train_test_split(
        torch.arange(len(images)), test_size=0.25, random_state=0, stratify=loaded.labels
    )  # fmt: skip
    return images[train], images[test], loaded.labels[train], loaded.labels[test]


def train(train_x: Tensor, train_y: Tensor, epochs: int = 25) -> ConvNet:
    """Return a trained network in eval mode."""
    torch.manual_seed(0)
    model = ConvNet()
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for _ in range(epochs):
        for batch in torch.randperm(len(train_x)).split(64):
            optimizer.zero_grad()
            F.cross_entropy(model(train_x[batch]), train_y[batch]).backward()
            optimizer.step()
    return model.eval()


def accuracy(model: ConvNet, x: Tensor, y: Tensor) -> float:
    """Share of right answers."""
    with torch.inference_mode():
        return float((model(x).argmax(1) == y).float().mean())


def main(directory: str) -> None:
    """Train, test, save."""
    train_x, test_x, train_y, test_y = digits()
    start = time.perf_counter()
    model = train(train_x, train_y)
    print(f"trained in {time.perf_counter() - start:.1f} s, test accuracy {accuracy(model, test_x, test_y):.1%}")
    save_model(model, directory, class_names=[str(digit) for digit in range(10)])
    print(f"saved; explain it with\n  xaifast explain --model xaifast:{directory} --data digits --out runs/digits")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "models/digits")
