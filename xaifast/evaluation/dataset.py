"""Evaluation of attributions over a data set: what a chunk of inputs becomes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .. import metrics
from ..attribution.dataset import Batch
from ..attribution.occlusion import occlusion
from ..attribution.rise import rise
from ..jobs import Chunk
from ..metrics._baselines import resolve_baseline
from ..metrics._features import Features, resolve_features
from ..metrics.curve_result import Curves
from ..metrics.curves import insertion_deletion
from .methods import gradient_x_input, random_map

_CALLER = "xaifast evaluate"
COMPARED = ("random", "gradient-x-input", "occlusion", "rise")
RISE_CELLS = 7  # as in the paper


@dataclass
class Explained:
    """Inputs of one chunk with what stored runs say about them.

    Attributes:
        batch: Its ``segments`` are those of the first run.
        values: Of each run, ``[b, M]``, the values of its players; NaN beyond an input's own.
        segments: Of each run, LongTensor ``[b, H, W]``, or None where all inputs share its mask.
        predicted: LongTensor ``[b]``, -1 where the model has one output.
        target: LongTensor ``[b]``, the output explained, -1 where the model has one.
    """

    batch: Batch
    values: list[Tensor]
    segments: list[Tensor | None]
    predicted: Tensor
    target: Tensor


@dataclass
class EvaluationChunks:
    """Turns the batches of a data set into chunks of curves and scores, methods side by side.

    An input's results depend on the seed, its index in the data set and its attributions; the others of its chunk
    change at most the last bits, through the model.

    Attributes:
        forward: The model.
        one_output: Whether it returns one number an input.
        masks: Of each run, the feature mask that all inputs share; None where they have superpixels of their own.
        compared: Methods made on the fly, of `COMPARED`.
        by_player: Whether curves perturb the players of the runs, which then share them, or else pixels.
        n_players: At most, of any input.
        scores: Those stored, of `xaifast.evaluation.scores.SCORES`.
        steps: Of the curves.
        baselines: ``insertion`` and ``deletion`` as `insertion_deletion` takes them; None: its own.
        score: As `insertion_deletion` takes it.
        seed: Of random orders, noise and RISE's masks.
        window: Side of occlusion's windows in pixels.
        hidden: What occlusion and RISE show instead of the input: a number or a tensor of one input's shape.
        n_masks: Of RISE.
        patch: Side of the patches that segmentations are compared on.
        options: Further arguments of `insertion_deletion`: ``removal``, ``order``, ``autocast``.
        device: Where the model is.
    """

    forward: Callable
    one_output: bool
    masks: list[Tensor | None]
    compared: list[str]
    by_player: bool
    n_players: int
    scores: list[str]
    steps: int
    baselines: dict[str, object]
    score: str
    seed: int
    window: int
    hidden: float | Tensor
    n_masks: int
    patch: int | None
    options: dict
    device: str | torch.device = "cpu"

    def __call__(self, chunk: int, loaded: Explained, rows: int) -> Chunk:
        """Evaluate a batch with ``rows`` model rows a call.

        Raises:
            ValueError: as `insertion_deletion` does, with the names of the inputs.
        """
        batch = loaded.batch
        tensors = self._empty(batch)
        if batch.kept:
            try:
                found = self._evaluate(loaded, rows)
            except ValueError as error:
                names = [batch.names[i] for i in batch.kept]
                listed = ", ".join(names[:8]) + (", ..." if names[8:] else "")
                raise ValueError(f"{error} (inputs: {listed})") from error
            for name, values in found.items():
                tensors[name][batch.kept] = values.cpu()
        return Chunk(tensors, batch.names, batch.skipped)

    def _empty(self, batch: Batch) -> dict[str, Tensor]:
        """Results of a chunk in which nothing could be read."""
        n, n_methods = len(batch.names), len(self.masks) + len(self.compared)
        real = torch.promote_types(batch.inputs.dtype, torch.float32)
        tensors = {name: torch.full((n,), -1) for name in ("label", "predicted", "target")}
        tensors["fractions"] = torch.full((n, self.steps + 1), torch.nan, dtype=torch.float64)
        for name in ("insertion", "deletion"):
            tensors[name] = torch.full((n, n_methods, self.steps + 1), torch.nan, dtype=real)
        for name in self.scores:
            tensors[name] = torch.full((n, n_methods), torch.nan, dtype=real)
        return tensors

    def _evaluate(self, loaded: Explained, rows: int) -> dict[str, Tensor]:
        """Results of the inputs that could be read."""
        batch = loaded.batch
        x = batch.inputs.to(self.device)
        target = None if self.one_output else loaded.target.to(self.device)
        mask = self.players(loaded) if self.by_player else None
        maps = [self._stored(loaded, r) for r in range(len(self.masks))]
        maps += [self._made(name, batch, x, target, rows, maps[0]) for name in self.compared]
        features = [resolve_features(a, x, mask, _CALLER) for a in maps]
        curves = [self._curves(batch, x, a, target, mask, rows) for a in maps]
        results = {
            "label": batch.labels[batch.kept],
            "predicted": loaded.predicted,
            "target": loaded.target,
            "fractions": curves[0].fractions.double().expand(len(x), -1),
        }
        for name in ("insertion", "deletion", "insertion_auc", "deletion_auc", "srg"):
            if name != "srg" or "srg" in self.scores:
                results[name] = torch.stack([getattr(c, name) for c in curves], 1)
        results |= self._agreement(features)
        if batch.masks is not None:
            results |= self._overlap(batch.masks, [self._pixels(a, loaded) for a in maps])
        return results

    def probe(self, loaded: Explained, rows: int) -> Curves:
        """Curves of the first run in one step."""
        x, mask = loaded.batch.inputs.to(self.device), self.players(loaded) if self.by_player else None
        target = None if self.one_output else loaded.target.to(self.device)
        return replace(self, steps=1)._curves(loaded.batch, x, self._stored(loaded, 0), target, mask, rows)

    def occlusion_window(self, x: Tensor) -> tuple[int, int]:
        """Side and stride of occlusion's windows: overlapping by half on images, single elements elsewhere."""
        return (self.window, max(1, self.window // 2)) if x.dim() == 4 else (1, 1)

    def players(self, loaded: Explained) -> Tensor:
        """The players, of the first run: ``[*feat]``, or ``[b, 1, H, W]`` where inputs have their own."""
        own = loaded.segments[0]
        return (self.masks[0] if own is None else own.unsqueeze(1)).to(self.device)

    def _stored(self, loaded: Explained, r: int) -> Tensor:
        """A run's attributions of players, or of pixels."""
        values = loaded.values[r].to(self.device)
        return values if self.by_player else self._expanded(values, loaded, r)

    def _expanded(self, values: Tensor, loaded: Explained, r: int) -> Tensor:
        """Values of players ``[b, M]`` on the elements of an input, ``[b, H, W]`` or ``[b, *feat]``."""
        own = loaded.segments[r]
        if own is None:
            return values[:, self.masks[r].to(values.device)]
        own = own.to(values.device)
        return values.gather(1, own.flatten(1)).view(own.shape)

    def _made(self, name: str, batch: Batch, x: Tensor, target: Tensor | None, rows: int, like: Tensor) -> Tensor:
        """Attributions of a method that is none of the runs'."""
        engine = {"target": target, "autocast": self.options["autocast"], "batch_size": rows}
        if name == "random":
            # Orders of all the players there may be, so that an input's does not depend on those of others.
            shape = (self.n_players,) if like.dim() == 2 else like.shape[1:]
            every = random_map((len(batch.names), *shape), seed=self.seed, first_index=batch.start)
            return every[batch.kept][..., : like.shape[-1]].to(self.device)
        if name == "gradient-x-input":
            return gradient_x_input(self.forward, x, target=target, rows=rows, autocast=self.options["autocast"])
        if name == "occlusion":
            window, stride = self.occlusion_window(x)
            return occlusion(self.forward, x, window=window, stride=stride, baselines=self.hidden, **engine)
        return rise(
            self.forward,
            x,
            n_masks=self.n_masks,
            cells=min(RISE_CELLS, *x.shape[-2:]),
            seed=self.seed,
            score="logit" if self.one_output else "softmax",
            baselines=self.hidden,
            **engine,
        )

    def _curves(
        self, batch: Batch, x: Tensor, attributions: Tensor, target: Tensor | None, mask: Tensor | None, rows: int
    ) -> Curves:
        baselines = {f"{name}_baseline": self._baseline(given, batch, x) for name, given in self.baselines.items()}
        return insertion_deletion(
            self.forward,
            x,
            attributions,
            target=target,
            steps=self.steps,
            feature_mask=mask,
            score=self.score,
            batch_size=rows,
            seed=self.seed,
            **baselines,
            **self.options,
        )

    def _baseline(self, given: object, batch: Batch, x: Tensor) -> object:
        """Noise by index in the data set: inputs that were left out move no others."""
        if not (isinstance(given, str) and given == "noise"):
            return given
        every = x.new_empty(len(batch.names), *x.shape[1:])
        noise = resolve_baseline("noise", every, "noise", _CALLER, seed=self.seed, first_index=batch.start)
        return noise[batch.kept]

    def _agreement(self, features: list[Features]) -> dict[str, Tensor]:
        """How much importance methods spend and how far they agree with the first, ``[b, R]`` each."""
        n_present = features[0].n_present
        names = [name for name in ("sparsity", "rank_correlation", "iou_top") if name in self.scores]
        results = {name: torch.full((len(n_present), len(features)), torch.nan) for name in names}
        for n in n_present.unique().tolist():  # players that do not occur in an input are the last ones
            group = (n_present == n).nonzero().squeeze(1)
            scores = [f.scores[group.to(f.scores.device), :n] for f in features]
            for m, one in enumerate(scores):
                results["sparsity"][group, m] = metrics.sparsity(_importance(one)).float().cpu()
                if len(features) > 1:
                    same = metrics.rank_correlation(one, scores[0]), metrics.iou_at_k(one, scores[0], top_tenth(n))
                    for name, values in zip(names[1:], same, strict=True):
                        results[name][group, m] = values.float().cpu()
        return results

    def _pixels(self, attributions: Tensor, loaded: Explained) -> Tensor:
        """Any attribution as a map of images ``[b, H, W]``."""
        if attributions.dim() == 2:
            return self._expanded(attributions, loaded, 0)
        return attributions.sum(1) if attributions.dim() == 4 else attributions

    def _overlap(self, segmentation: Tensor, maps: list[Tensor]) -> dict[str, Tensor]:
        """Agreement with the segmentation on patches, ``[b, R]`` each; NaN for inputs without one."""
        seg = metrics.to_patches(segmentation, self.patch, ignore=torch.nan, normalise=False)
        importance = [metrics.to_patches(a.cpu(), self.patch).float() for a in maps]
        return {
            "segmentation_difference": torch.stack([metrics.segmentation_difference(a, seg) for a in importance], 1),
            "macro_iou": torch.stack([metrics.macro_iou(a, seg) for a in importance], 1),
        }


def top_tenth(n_features: int) -> int:
    """Features that the overlap of two methods looks at."""
    return max(1, round(n_features / 10))


def _importance(scores: Tensor) -> Tensor:
    """Scores ``[b, P]`` in 0..1: negative ones count as 0, the largest as 1."""
    positive = scores.double().clamp(min=0)
    largest = positive.amax(1, keepdim=True)
    return positive / torch.where(largest > 0, largest, 1)
