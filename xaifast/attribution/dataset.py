"""Kernel SHAP over a data set: what a chunk of inputs becomes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..jobs import Chunk
from .kernel_shap import kernel_shap
from .shapley_result import ShapleyResult

DESIGN_BLOCK = 256  # inputs that share a design; chunks divide it, so designs do not depend on the chunk size
_CHUNK_FLOP = 2e11  # some seconds of two CPU cores: what an interruption may cost
_CHUNK_VALUES = 2**25  # coalition values of a chunk held at a time, 256 MiB


@dataclass
class Batch:
    """Loaded inputs of one chunk; those that could not be read are left out of the tensors.

    Attributes:
        start: Data-set index of the chunk's first input.
        inputs: ``[b, ...]``.
        kept: Positions in the chunk of the b inputs.
        names: Of all inputs of the chunk.
        labels: LongTensor of all inputs of the chunk, -1 unknown.
        segments: LongTensor ``[b, H, W]``, superpixels of each input, or None where all share a mask.
        skipped: Reason by data-set index.
        masks: float32 ``[b, H, W]``, 1 object, 0 background, NaN neither, or None where nobody asked.
    """

    start: int
    inputs: Tensor
    kept: list[int]
    names: list[str]
    labels: Tensor
    segments: Tensor | None = None
    skipped: dict[int, str] = field(default_factory=dict)
    masks: Tensor | None = None


def chunk_size(n_samples: int, n_rows: int, row_flop: float, n_outputs: int) -> int:
    """Inputs a chunk: a power of two up to `DESIGN_BLOCK`, from quantities that no machine changes.

    Args:
        n_samples: Coalitions an input.
        n_rows: Model rows an input.
        row_flop: Floating-point operations of a model row.
        n_outputs: Outputs kept of each.
    """
    most = min(_CHUNK_FLOP / (n_rows * max(row_flop, 1.0)), _CHUNK_VALUES / (n_samples * n_outputs), DESIGN_BLOCK)
    return 1 << max(0, int(most).bit_length() - 1)


@dataclass
class ShapleyChunks:
    """Turns the batches of a data set into chunks of Shapley values.

    An input's values depend on the seed, its index in the data set and its own number of players; the others of its
    chunk change at most the last bits, through the model.

    Attributes:
        forward: The model.
        seed: Of all designs.
        target: ``"predicted"``, an output, LongTensor ``[N]`` of one for each input of the data set, or None for all.
        n_outputs: K of the results; None where they have no K axis.
        feature_mask: Shared by all inputs; None where batches bring superpixels.
        options: Further arguments of `kernel_shap`.
        device: Where the model is.
    """

    forward: Callable
    seed: int
    target: int | str | Tensor | None
    n_outputs: int | None
    feature_mask: Tensor | None
    options: dict
    device: str | torch.device = "cpu"

    def __call__(self, chunk: int, batch: Batch, rows: int) -> Chunk:
        """Explain a batch with ``rows`` model rows a call.

        Raises:
            ValueError: as `kernel_shap` does, with the names of the inputs.
        """
        kept = torch.tensor(batch.kept, dtype=torch.int64)
        if self.feature_mask is not None:
            n_players = int(self.feature_mask.max()) + 1
            players = torch.full_like(kept, n_players)  # [b]
        else:
            players = batch.segments.flatten(1).amax(1) + 1 if batch.kept else kept
            n_players = int(players.max()) if batch.kept else 1
        tensors = self._empty(batch, n_players)
        if batch.segments is not None and batch.kept:
            tensors["n_players"][kept] = players
            tensors["segments"][kept] = batch.segments.to(torch.int16)
        for n in players.unique().tolist():
            group = (players == n).nonzero().squeeze(1)
            result, places = self._explain(batch, group, rows), kept[group]
            tensors["values"][places, :n] = result.values.cpu()
            tensors["std_errors"][places, :n] = result.std_errors.cpu()
            tensors["base_values"][places] = result.base_values.cpu()
            tensors["full_values"][places] = result.full_values.cpu()
            if result.targets is not None:
                tensors["target"][places] = result.targets.cpu()
            if result.predicted is not None:
                tensors["predicted"][places] = result.predicted.cpu()
        return Chunk(tensors, batch.names, batch.skipped)

    def _empty(self, batch: Batch, n_players: int) -> dict[str, Tensor]:
        """Results of a chunk in which nothing could be read."""
        count, outputs = len(batch.names), () if self.n_outputs is None else (self.n_outputs,)
        dtype = torch.promote_types(batch.inputs.dtype, torch.float32)
        tensors = {
            "values": torch.full((count, n_players, *outputs), torch.nan, dtype=dtype),
            "std_errors": torch.full((count, n_players, *outputs), torch.nan, dtype=dtype),
            "base_values": torch.full((count, *outputs), torch.nan, dtype=dtype),
            "full_values": torch.full((count, *outputs), torch.nan, dtype=dtype),
            "label": batch.labels,
            "target": torch.full((count,), -1),
            "predicted": torch.full((count,), -1),
        }
        if batch.segments is not None:
            tensors["n_players"] = torch.zeros(count, dtype=torch.int64)
            tensors["segments"] = torch.full((count, *batch.segments.shape[1:]), -1, dtype=torch.int16)
        return tensors

    def _explain(self, batch: Batch, group: Tensor, rows: int) -> ShapleyResult:
        places = [batch.kept[i] for i in group.tolist()]
        target = self.target
        if isinstance(target, Tensor):
            target = target[[batch.start + i for i in places]].to(self.device)
        try:
            return kernel_shap(
                self.forward,
                batch.inputs[group].to(self.device),
                feature_mask=self.feature_mask if batch.segments is None else batch.segments[group].unsqueeze(1),
                target=target,
                seed=self.seed,
                block=batch.start // DESIGN_BLOCK,
                batch_size=rows,
                **self.options,
            )
        except ValueError as error:
            names = [batch.names[i] for i in places]
            listed = ", ".join(f"{i} = {name}" for i, name in enumerate(names[:8])) + (", ..." if names[8:] else "")
            raise ValueError(f"{error} (inputs: {listed})") from error
