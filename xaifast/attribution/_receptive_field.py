"""The removal of `xaifast.occlusion` that recomputes only what a window changes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx, nn

from ..coalitions import Perturbations
from ..ops.plan import SelectPlan
from ..players import Players
from ..removal import Group, Prepared
from ..removal.windows import Grid, PreparedWindows, SlidingWindow, Windows
from ..stream import is_out_of_memory
from ._patched_graph import FieldError, PatchedGraph
from ._patches import Chunk, Span

# Largest difference from the plain path, as a share of the largest output.
_TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 5e-2}


@dataclass
class _CleanMaps:
    """Maps of the inputs of the latest chunk."""

    inputs: range = range(0)
    maps: dict[fx.Node, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class PreparedField(Prepared):
    """Patches of the input instead of rows.

    Attributes:
        plain: Makes whole rows: for the clean inputs, and to be compared with.
        images: ``[B, C, H, W]``, channels last.
        baseline: ``[1, C, H, W]`` or ``[B, C, H, W]``, channels last.
        starts: int64 ``[count]`` along height and width, first index of each window's box.
        box: Its height and width.
        graph: The network.
    """

    plain: PreparedWindows
    images: Tensor
    baseline: Tensor
    starts: tuple[Tensor, Tensor]
    box: tuple[int, int]
    graph: PatchedGraph
    _clean: _CleanMaps = field(default_factory=_CleanMaps)

    @property
    def row_bytes(self) -> int:
        """Bytes of a whole row."""
        return self.plain.row_bytes

    @property
    def chunk_scale(self) -> float:
        """Patches are smaller than rows."""
        return self.graph.shrinkage

    def groups(self, perturbations: Perturbations) -> list[Group]:
        """Windows by their fields; the clean inputs whole."""
        clean = bool((perturbations.code[:, 0] < 0).any())
        return [Group(self.plain if clean else self, slice(None), None)]

    def empty(self, n_rows: int) -> tuple[Tensor, ...]:
        """Nothing: the graph makes its own."""
        return ()

    def rows(self, code: Tensor, start: int, stop: int, out: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The windows' boxes ``[n, C, p, q]``, and where they belong, ``[n, 3]``."""
        first, last = start // len(code), (stop - 1) // len(code) + 1
        if self._clean.inputs != range(first, last):
            self._clean.maps = {}
            self._clean.maps = self.graph.clean(self.images[first:last])
            self._clean.inputs = range(first, last)
        unit = torch.arange(start, stop, device=code.device)
        owner, window = unit.div(len(code), rounding_mode="floor"), code[unit % len(code), 2:]
        place, inside, numbers = [], [], []
        for d, stride in enumerate(self.plain.grids[0].stride[1:]):
            numbers.append(window[:, d] // stride)
            place.append(self.starts[d][numbers[d], None] + torch.arange(self.box[d], device=code.device))
            inside.append(place[d] >= window[:, d, None])  # a box at the border may begin before its window
        pixels = (owner[:, None, None], place[0][:, :, None], place[1][:, None, :])
        shown = (pixels[0] if len(self.baseline) > 1 else torch.zeros_like(pixels[0]), *pixels[1:])
        boxes = torch.where(
            (inside[0][:, :, None] & inside[1][:, None, :])[..., None],
            self.baseline.permute(0, 2, 3, 1)[shown],
            self.images.permute(0, 2, 3, 1)[pixels],
        )  # [n, p, q, C]
        return boxes.permute(0, 3, 1, 2), torch.stack((owner - first, *numbers), 1)

    def run(self, forward: Callable, rows: tuple[Tensor, ...], args: tuple) -> object:
        """The network on the boxes."""
        patches, place = rows
        return self.graph(patches, self._clean.maps, Chunk(*place.unbind(1)))


@dataclass(frozen=True)
class FieldWindow(SlidingWindow):
    """`SlidingWindow` for convolutional networks, by receptive fields; compared with it before it is used.

    Raises:
        FieldError: (prepare) the model cannot be traced or run in parts, has hooks or takes other inputs; or the
            results differ.
    """

    def prepare(
        self,
        forward: Callable,
        inputs: tuple[Tensor, ...],
        players: Players | None,
        baselines: object,
        args: tuple,
        caller: str,
    ) -> PreparedField:
        """Trace the model, and run the windows at the corners and in the middle both ways on the first input."""
        self._check(forward, inputs, args, caller)
        plain = super().prepare(forward, inputs, players, baselines, args, caller)
        if plain.n_background > 1:
            raise FieldError(f"{caller}: receptive_field needs one baseline, got a Background of {plain.n_background}")
        plan, grid = plain.plans[0], self.grids[0]
        spans = tuple(_windows_along(grid, d) for d in (1, 2))
        images, baseline = (_channels_last(part, plan) for part in (plan.x, plan.baseline.reshape(-1, plan.x.shape[1])))
        starts, box = tuple(span.start.to(images.device) for span in spans), tuple(span.length for span in spans)
        try:
            with torch.inference_mode():
                graph = PatchedGraph(forward, images[:1], *spans, plan.memory_format, caller)
                prepared = PreparedField(plain, images, baseline, starts, box, graph)
                _compare(forward, prepared, caller)
        except Exception as error:  # whatever operations say that do not suit patches
            if isinstance(error, FieldError) or is_out_of_memory(error):
                raise
            raise FieldError(
                f"{caller}: receptive_field must be able to run the traced model, got {type(error).__name__}: {error}; "
                "pass receptive_field=False"
            ) from error
        return prepared

    def _check(self, forward: Callable, inputs: tuple[Tensor, ...], args: tuple, caller: str) -> None:
        given = [tuple(x.shape) for x in inputs]
        if not isinstance(forward, nn.Module):
            raise FieldError(
                f"{caller}: receptive_field needs forward to be an nn.Module, got {type(forward).__name__}; pass the "
                "module, or receptive_field=False"
            )
        if args or len(inputs) > 1 or inputs[0].dim() != 4 or inputs[0].dtype not in _TOLERANCE:
            raise FieldError(
                f"{caller}: receptive_field needs one floating input [B, C, H, W] and no additional arguments, got "
                f"shapes {given}, {inputs[0].dtype} and {len(args)} arguments; pass receptive_field=False"
            )
        if self.grids[0].counts[0] > 1:
            raise FieldError(
                f"{caller}: receptive_field needs windows over all channels, got {self.grids[0].window}; name "
                "(h, w) only"
            )


def _windows_along(grid: Grid, d: int) -> Span:
    low = grid.stride[d] * torch.arange(grid.counts[d], device="cpu")
    return Span.of(grid.shape[d], low, low + grid.window[d])


def _channels_last(flat: Tensor, plan: SelectPlan) -> Tensor:
    """``[n, F]`` in the plan's order as ``[n, C, H, W]``, channels last."""
    channels, height, width = plan.shape
    if plan.memory_format is torch.channels_last:
        return flat.view(-1, height, width, channels).permute(0, 3, 1, 2)
    return flat.view(-1, channels, height, width).contiguous(memory_format=torch.channels_last)


def _compare(forward: nn.Module, prepared: PreparedField, caller: str) -> None:
    code, counts = Windows.of(prepared.plain.grids).code, prepared.plain.grids[0].counts[1:]
    rows, columns = (sorted({0, count // 2, count - 1}) for count in counts)
    code = code[[row * counts[1] + column for row in rows for column in columns]].to(prepared.images.device)
    answers = []
    for way in (prepared.plain, prepared):
        answer = way.run(forward, way.rows(code, 0, len(code), way.empty(len(code))), ())
        answers.append(getattr(answer, "logits", answer))
    plain, patched = answers
    if not all(isinstance(answer, Tensor) for answer in answers) or plain.shape != patched.shape:
        raise FieldError(f"{caller}: receptive_field needs a model that returns a tensor; pass receptive_field=False")
    tolerance = _TOLERANCE[prepared.images.dtype]
    off, scale = (patched - plain).abs().max().item(), plain.abs().max().item()
    if not off <= tolerance * scale and bool(torch.isfinite(plain).all()):
        raise FieldError(
            f"{caller}: receptive_field must give what whole images give, within {tolerance:g} of the largest output "
            f"{scale:g}, but differs by {off:g}; pass receptive_field=False"
        )
