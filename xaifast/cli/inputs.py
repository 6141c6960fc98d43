"""From a data source's items to what a model takes: batches of a chunk, and pictures for people."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from ..attribution.dataset import Batch
from ..data import DataSource
from ..data.segmentations import IGNORED, OBJECT, Segmentations
from ..models import LoadedModel


class InputLoader:
    """Loads, preprocesses and segments inputs of a data set by index.

    Args:
        data: Where items come from.
        model: Its own preprocessing is used for images where it has one.
        image_size: Side or (H, W) images are scaled to where the model does not say; None keeps their size.
        mean, std: Per channel, of the default preprocessing.
        segments: Superpixels wanted of each image, or None.
        skip: Whether inputs that cannot be read are left out; else they raise.
        segmentations: Loaded with the images and resized and cropped as they are. An image whose mask is missing or
            cannot be read raises.
        skip_masks: Whether it has a mask of NaN instead.
    """

    def __init__(
        self,
        data: DataSource,
        model: LoadedModel,
        *,
        image_size: tuple[int, int] | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        segments: int | None = None,
        skip: bool = False,
        segmentations: Segmentations | None = None,
        skip_masks: bool = False,
    ) -> None:
        self.data, self._segments, self._skip = data, segments, skip
        self._segmentations, self._skip_masks = segmentations, skip_masks
        self._mean, self._std = mean, std
        self._preprocess: Callable[[list[object]], Tensor] = torch.stack
        self._preprocess_masks: Callable[[list[np.ndarray]], Tensor] | None = _stack_masks
        self.preprocessing: dict | None = None
        if data.kind == "images" and model.preprocess is not None:
            if image_size or mean or std:
                raise ValueError(
                    "xaifast: --image-size, --mean and --std are for models without preprocessing of their "
                    f"own, and {model.spec} has one; leave them out"
                )
            self._preprocess, self.preprocessing = model.preprocess, model.preprocessing
            self._preprocess_masks = model.preprocess_masks
            self._mean, self._std = model.preprocessing.get("image_mean"), model.preprocessing.get("image_std")
        elif data.kind == "images":
            size = image_size or model.input_size
            self._preprocess = lambda items: scale_images(items, size, mean, std)
            self._preprocess_masks = lambda masks: _stack_masks(masks, size)
            self.preprocessing = {"image_size": size, "image_mean": mean, "image_std": std}
        elif image_size or mean or std:
            raise ValueError(
                f"xaifast: --image-size, --mean and --std are for images, and {data.spec} holds model inputs; "
                "leave them out"
            )
        if segmentations is not None and self._preprocess_masks is None:
            raise ValueError(
                f"xaifast: masks must be resized and cropped as images are, but {model.spec} does not say how; give "
                "the model an attribute preprocess_masks (docs/evaluate.md)"
            )

    def __call__(self, start: int, stop: int) -> Batch:
        """The inputs ``[start, stop)``, with their superpixels.

        Raises:
            ValueError: an input cannot be read and is not to be skipped; names it.
        """
        batch = self._read(start, stop, masks=True)
        if self._segments is not None:
            found = [superpixels(x, self._segments) for x in batch.inputs]
            batch.segments = torch.stack(found) if found else torch.empty(0)
        return batch

    def _read(self, start: int, stop: int, *, masks: bool = False) -> Batch:
        loaded = self.data.load(range(start, stop))
        if loaded.failures and not self._skip:
            position, reason = next(iter(sorted(loaded.failures.items())))
            raise ValueError(
                f"xaifast: cannot read {loaded.names[position]}: {reason}; repair or remove it, or pass --on-error skip"
            )
        kept = [i for i in range(stop - start) if i not in loaded.failures]
        items = [loaded.items[i] for i in kept]
        inputs = self._preprocess(items) if kept else torch.empty(0)
        found = self._masks(items, inputs, [loaded.names[i] for i in kept]) if masks and self._segmentations else None
        labels = loaded.labels if loaded.labels is not None else torch.full((stop - start,), -1)
        skipped = {start + i: reason for i, reason in loaded.failures.items()}
        return Batch(start, inputs, kept, loaded.names, labels, skipped=skipped, masks=found)

    def _masks(self, items: list[object], inputs: Tensor, names: list[str]) -> Tensor:
        """Masks of images as the model sees them; see `Batch`."""
        masks = torch.full((len(items), *inputs.shape[-2:]), torch.nan)
        for i, (item, name) in enumerate(zip(items, names, strict=True)):
            try:
                codes = self._segmentations.load(name, _size_of(item))
            except ValueError as error:
                if self._skip_masks:
                    continue
                raise ValueError(
                    f"xaifast: {error}; mend or add it, or pass --on-error skip to leave the image out of what is "
                    "compared with masks"
                ) from None
            made = self._preprocess_masks([codes])[0]
            masks[i] = torch.where(made == IGNORED, torch.nan, (made == OBJECT).float())
        return masks

    def first(self, n: int) -> Tensor:
        """The first ``n`` readable inputs, ``[<= n, ...]``.

        Raises:
            ValueError: none of the data set's can be read.
        """
        found: list[Tensor] = []
        start = 0
        while start < len(self.data) and len(found) < n:
            stop = min(len(self.data), start + n)
            batch = self._read(start, stop)
            found += batch.inputs[: n - len(found)]
            start = stop
        if not found:
            raise ValueError(f"xaifast: no input of {self.data.spec} can be read")
        return torch.stack(found)

    def picture(self, index: int) -> np.ndarray:
        """An input as the model sees it, for display: ``[H, W]`` or ``[H, W, 3]`` in 0..1, or a row of numbers."""
        batch = self._read(index, index + 1)
        if not batch.kept:
            raise ValueError(f"xaifast: {batch.names[0]} cannot be read: {batch.skipped[index]}")
        x = batch.inputs[0].double()
        if x.dim() != 3:
            return x.numpy()
        if self._mean is not None and self._std is not None:
            std, mean = (torch.tensor(v, dtype=torch.float64).view(-1, 1, 1) for v in (self._std, self._mean))
            x = x * std + mean
        elif x.min() < 0 or x.max() > 1:
            low, high = x.min(), x.max()
            x = (x - low) / (high - low).clamp_min(1e-12)
        x = x.clamp(0, 1)
        return (x.permute(1, 2, 0) if x.shape[0] == 3 else x.mean(0)).numpy()


def scale_images(
    items: list[object], size: tuple[int, int] | None, mean: Sequence[float] | None, std: Sequence[float] | None
) -> Tensor:
    """Default preprocessing: bilinear resize, 0..255 to 0..1, mean and standard deviation a channel.

    Args:
        items: PIL images or uint8 arrays ``[H, W(, 3)]``.
        size: H, W, or None to keep the size, which must then be the same for all.
        mean, std: Or None.

    Returns:
        float32 ``[b, C, H, W]``.
    """
    from PIL import Image

    images = [item if isinstance(item, Image.Image) else Image.fromarray(item) for item in items]
    if size is not None:
        images = [image.resize((size[1], size[0]), Image.Resampling.BILINEAR) for image in images]
    elif len(sizes := {image.size for image in images}) > 1:
        raise ValueError(
            f"xaifast: images must have one size, got {sorted(sizes)[:4]} (width, height); pass --image-size"
        )
    pixels = torch.stack([torch.from_numpy(np.array(image)) for image in images]).float() / 255
    pixels = pixels.unsqueeze(1) if pixels.dim() == 3 else pixels.permute(0, 3, 1, 2)
    for given, name in ((mean, "--mean"), (std, "--std")):
        if given is not None and len(given) not in (1, pixels.shape[1]):
            raise ValueError(f"xaifast: {name} must hold {pixels.shape[1]} numbers, got {len(given)}")
    if mean is not None:
        pixels = pixels - torch.tensor(mean).view(-1, 1, 1)
    if std is not None:
        pixels = pixels / torch.tensor(std).view(-1, 1, 1)
    return pixels.contiguous()


def _size_of(item: object) -> tuple[int, int]:
    """H, W of a PIL image, of an array ``[H, W(, 3)]`` or of a model input ``[C, H, W]``."""
    if isinstance(item, Tensor):
        return tuple(item.shape[-2:])
    return item.shape[:2] if isinstance(item, np.ndarray) else item.size[::-1]


def _stack_masks(masks: list[np.ndarray], size: tuple[int, int] | None = None) -> Tensor:
    """uint8 ``[b, H, W]``, scaled to H, W where given: each pixel takes the nearest value."""
    from PIL import Image

    if size is not None:
        masks = [
            np.asarray(Image.fromarray(mask).resize((size[1], size[0]), Image.Resampling.NEAREST)) for mask in masks
        ]
    return torch.from_numpy(np.stack(masks))


def superpixels(x: Tensor, n_segments: int) -> Tensor:
    """SLIC superpixels of one image as the model sees it.

    Args:
        x: ``[C, H, W]``.
        n_segments: At most so many; the algorithm may find fewer.

    Returns:
        LongTensor ``[H, W]``, ids 0..M-1 without gaps.

    Source: Achanta et al., "SLIC superpixels compared to state-of-the-art superpixel methods", TPAMI 2012, as in
    scikit-image.
    """
    try:
        from skimage.segmentation import slic
    except ImportError as error:
        raise ImportError("superpixels need scikit-image; pip install 'xaifast[segments]'") from error
    pixels = x.double().permute(1, 2, 0).numpy()
    low, high = pixels.min(), pixels.max()
    pixels = (pixels - low) / max(high - low, 1e-12)
    wanted = n_segments
    while True:
        ids = torch.from_numpy(slic(pixels, n_segments=wanted, start_label=0, channel_axis=-1)).long()
        _, ids = torch.unique(ids, return_inverse=True)
        if int(ids.max()) < n_segments or wanted == 1:
            return ids
        wanted = max(1, wanted * 9 // 10)
