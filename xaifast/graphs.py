"""CUDA-graph replay of a model for chunks of one shape."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


class GraphedForward:
    """Captures ``forward(*rows, *args)`` on its first call and replays it after.

    The engine writes every chunk into the same buffers, so the captured addresses stay right; additional tensor
    arguments are copied into buffers of their own. Not yet run on a GPU.
    """

    def __init__(self, forward: Callable) -> None:
        self._forward = forward
        self.reset()

    def reset(self) -> None:
        """Forget the graph: the next call may bring other buffers."""
        self._graph: torch.cuda.CUDAGraph | None = None
        self._static: tuple = ()
        self._outputs: object = None

    def __call__(self, *args: object) -> object:
        """Replay on the captured buffers, or capture if the buffers changed."""
        if self._graph is not None and self._same_buffers(args):
            for static, arg in zip(self._static, args, strict=True):
                if isinstance(arg, Tensor) and arg.data_ptr() != static.data_ptr():
                    static.copy_(arg)
            self._graph.replay()
            return self._outputs
        with torch.cuda.device(args[0].device):
            return self._capture(args)

    def _same_buffers(self, args: tuple) -> bool:
        if len(args) != len(self._static) or args[0].data_ptr() != self._static[0].data_ptr():
            return False
        return all(
            arg.shape == static.shape if isinstance(arg, Tensor) else arg is static
            for arg, static in zip(args, self._static, strict=True)
        )

    def _capture(self, args: tuple) -> object:
        self.reset()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # warm-up outside the capture: libraries choose and allocate here
            for _ in range(2):
                self._forward(*args)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs = self._forward(*args)
        self._graph, self._static, self._outputs = graph, args, outputs  # only now: a capture may fail
        graph.replay()
        return outputs
