"""The engine: inputs x perturbations through any model, streamed."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from numbers import Integral

import torch
from torch import Tensor

from .coalitions import Perturbations
from .graphs import GraphedForward
from .model_state import check_deterministic, is_compiled
from .players import Players
from .removal import Group, Prepared, resolve_removal
from .stream import Stream, auto_rows


def as_inputs(inputs: object, caller: str) -> tuple[Tensor, ...]:
    """Check inputs: a tensor or a tuple of tensors with one common batch axis; return a tuple.

    Raises:
        TypeError: something else was given, or a sparse or complex tensor.
        ValueError: no batch axis, an empty batch, different batch sizes or devices.
    """
    given = inputs if isinstance(inputs, tuple) else (inputs,)
    if not given or not all(isinstance(x, Tensor) for x in given):
        kinds = [type(x).__name__ for x in given]
        raise TypeError(f"{caller}: inputs must be a tensor or a tuple of tensors, got {kinds}")
    for x in given:
        if x.layout != torch.strided or x.is_complex():
            raise TypeError(f"{caller}: inputs must be dense real tensors, got layout {x.layout} and dtype {x.dtype}")
        if x.dim() < 2 or x.shape[0] == 0 or x[0].numel() == 0:
            raise ValueError(
                f"{caller}: inputs must have shape [B, ...] with B >= 1 and at least one feature, got "
                f"{tuple(x.shape)}; add a batch axis with x.unsqueeze(0)"
            )
    if len({x.shape[0] for x in given}) > 1 or len({x.device for x in given}) > 1:
        raise ValueError(
            f"{caller}: all inputs must share batch size and device, got shapes {[tuple(x.shape) for x in given]} on "
            f"{[str(x.device) for x in given]}"
        )
    return given


class Evaluator:
    """A model, its inputs and a removal, ready to be asked for the values of coalitions or other perturbations.

    Building it prepares the removal, evaluates the clean inputs (the first chunk, where a wrong output shape, target or
    dtype shows) and settles the target. Calling it evaluates perturbations. Memory beside the results is that of one
    chunk, whatever their number. Nothing synchronises with the device or runs in Python per perturbation; one check
    for non-finite outputs ends each call.

    Args:
        forward: ``forward(*inputs_rows, *additional_forward_args) -> [b]``, ``[b, K]`` or an object with ``.logits``.
        inputs: Tuple of ``[B, ...]`` (see `as_inputs`).
        players: Feature masks of the inputs; None where the removal reads perturbations that are no coalitions.
        baselines: Number, tensor, tuple or `Background`.
        target: int, LongTensor ``[B]``, ``"predicted"`` or None for all outputs.
        removal: See `xaifast.removal.resolve_removal`.
        score: What becomes of the model's outputs ``[rows, K]`` before the target's is taken: a callable to
            ``[rows, K]`` or ``[rows]``, applied to every row alone; None leaves them.
        additional_forward_args: Passed on after the inputs; tensors with leading B are repeated with their input.
        batch_size: Model rows a call, or ``"auto"``.
        autocast: dtype for ``torch.autocast`` around the model, or None.
        cuda_graph: Capture the model once for the chunk shape and replay it (CUDA only).
        allow_training_mode: Skip the check for active dropout and batch statistics.
        show_progress: Draw a bar.
        caller: Prefix of messages.
    """

    def __init__(
        self,
        forward: Callable,
        inputs: tuple[Tensor, ...],
        *,
        players: Players | None = None,
        baselines: object = 0.0,
        target: int | str | Tensor | None = None,
        removal: object = None,
        score: Callable[[Tensor], Tensor] | None = None,
        additional_forward_args: object = None,
        batch_size: int | str = "auto",
        autocast: torch.dtype | None = None,
        cuda_graph: bool = False,
        allow_training_mode: bool = False,
        show_progress: bool = False,
        caller: str = "xaifast.evaluate",
    ) -> None:
        self.caller = caller
        self.forward, self.inputs = forward, inputs
        self.n_inputs, self.device = inputs[0].shape[0], inputs[0].device
        self.show_progress = show_progress
        self._autocast = autocast
        self._args = _as_args(additional_forward_args)
        if not callable(forward):
            raise TypeError(f"{caller}: forward must be callable, got {type(forward).__name__}")
        if batch_size != "auto" and (not isinstance(batch_size, int) or batch_size < 1):
            raise ValueError(f'{caller}: batch_size must be "auto" or a positive int, got {batch_size!r}')
        if cuda_graph and self.device.type != "cuda":
            raise ValueError(f"{caller}: cuda_graph=True needs inputs on a CUDA device, got {self.device}")
        if not allow_training_mode:
            check_deterministic(forward, caller)
        self._check_target(target)
        removal = resolve_removal(removal, caller)
        self._prepared: Prepared = removal.prepare(forward, inputs, players, baselines, self._args, caller)
        # A compiled model or a captured graph wants one shape: the last chunk is then filled up with rows of the
        # chunk before.
        self._graph = GraphedForward(forward) if cuda_graph else None
        self._one_shape = cuda_graph or is_compiled(forward)
        self.n_background = self._prepared.n_background
        self.output_dtype: torch.dtype | None = None
        self._target: int | Tensor | None = None
        self._n_outputs: int | None = None  # None: the model returns [b]
        self._score: Callable[[Tensor], Tensor] | None = None  # the clean outputs come first, as they are

        auto = batch_size == "auto"
        self.batch_size = self._auto_rows() if auto else batch_size
        measure = auto and self.device.type == "cuda" and not self._one_shape  # another size is another shape
        if measure:
            torch.cuda.reset_peak_memory_stats(self.device)
            before = torch.cuda.memory_allocated(self.device)
        clean = removal.clean(players)
        outputs = self._evaluate(clean, "clean inputs", show_progress=False)[:, 0]  # [B, K]
        if measure:
            rows = min(self.batch_size, self.n_inputs * self.n_background)
            self.batch_size = self._auto_rows((torch.cuda.max_memory_allocated(self.device) - before) // rows)
        self._resolve_target(target, outputs)
        self.predicted = outputs.argmax(1) if self._n_outputs is not None else None  # [B]
        self._score = score
        with torch.no_grad():
            scored = self._scored(outputs.to(self.output_dtype)).double()
        self.full = self._pick(scored, self._target_column(range(self.n_inputs), 1))  # [B, K]

    def _auto_rows(self, peak_row_bytes: int | None = None) -> int:
        flat = all(x.dim() == 2 for x in self.inputs)
        return auto_rows(self._prepared.row_bytes, self.device, flat=flat, peak_row_bytes=peak_row_bytes)

    @property
    def has_output_axis(self) -> bool:
        """Whether results have a K axis: all outputs of a ``[b, K]`` model were asked for."""
        return self._n_outputs is not None and self._target is None

    @property
    def targets(self) -> Tensor | None:
        """LongTensor ``[B]``: the output asked for of each input; None where all were, or there is one only."""
        if isinstance(self._target, int):
            return torch.full((self.n_inputs,), self._target, device=self.device)
        return self._target

    def __call__(self, perturbations: Perturbations) -> Tensor:
        """Values of perturbations.

        Returns:
            float64 ``[B, N, K]`` on the inputs' device, K = 1 where one output was asked for; the mean over the
            background where there is one.

        Raises:
            ValueError: a non-finite model output or score; names input and perturbation.
        """
        return self._evaluate(perturbations, self.caller.removeprefix("xaifast."), show_progress=self.show_progress)

    def _evaluate(self, perturbations: Perturbations, description: str, *, show_progress: bool) -> Tensor:
        code = perturbations.code.to(self.device)
        n = code.shape[-2]
        values: Tensor | None = None
        groups = self._prepared.groups(perturbations)
        total = self.n_inputs * n
        units = max(1, self.batch_size // self.n_background)
        with Stream(total, units, show_progress=show_progress, description=description, unit="evaluation") as stream:
            for group in groups:
                part = self._evaluate_group(group, code, stream)  # [b, n, K]
                if group.members is None:
                    values = part
                    continue
                if values is None:
                    values = part.new_empty(self.n_inputs, n, part.shape[2])
                values[group.inputs, group.members.to(self.device)] = part
        self._check_finite(values, perturbations)
        return values

    def _evaluate_group(self, group: Group, code: Tensor, stream: Stream) -> Tensor:
        prepared, inputs = group.prepared, range(*group.inputs.indices(self.n_inputs))
        if code.dim() == 3:
            code = code[group.inputs]
        if group.members is not None:
            code = code.index_select(-2, group.members.to(code.device))
        code = code.contiguous()
        n = code.shape[-2]
        n_units, background = len(inputs) * n, prepared.n_background
        first_unit = inputs.start * n
        targets = self._target_column(inputs, n)
        values: Tensor | None = None
        buffers: tuple[Tensor, ...] = ()  # written again by every chunk
        pieces = Stream(background, self.batch_size, show_progress=False, description="background")

        def step(start: int, stop: int) -> None:
            nonlocal values, buffers
            if stop - start == 1 and background > 1 and (background > self.batch_size or stream.rows == 1):
                outputs = self._run_background(prepared, code, start, first_unit, n, pieces)
            else:
                n_rows = (stop - start) * background
                # A chunk of one shape is full; the stream's chunks get smaller when memory runs out.
                units = stream.rows if self._one_shape else min(stream.rows, n_units)
                capacity = max(n_rows, units * background)
                if not buffers or not n_rows <= buffers[0].shape[0] <= capacity:
                    buffers = ()  # freed before others are made
                    if self._graph is not None:
                        self._graph.reset()
                    buffers = self._buffers(prepared, capacity)
                rows = prepared.rows(code, start, stop, tuple(buffer[:n_rows] for buffer in buffers))
                if self._one_shape and buffers:
                    rows = buffers
                replay = bool(buffers)  # a graph reads the addresses it was captured with
                outputs = self._model(prepared, rows, first_unit + start, stop - start, n, replay=replay)[:n_rows]
            outputs = self._scored(outputs).view(stop - start, background, -1)
            outputs = outputs[:, 0] if background == 1 else outputs.double().mean(1)
            picked = self._pick(outputs, targets[start:stop] if isinstance(targets, Tensor) else targets)
            if values is None:
                with torch.inference_mode(False):
                    values = torch.empty(n_units, picked.shape[1], dtype=torch.float64, device=self.device)
            values[start:stop] = picked

        with torch.inference_mode(), prepared.session():
            stream.run(n_units, step, scale=prepared.chunk_scale)
        return values.view(len(inputs), n, -1)

    def _buffers(self, prepared: Prepared, n_rows: int) -> tuple[Tensor, ...]:
        """Row buffers, defined where a model may see rows that no chunk has written."""
        buffers = prepared.empty(n_rows)
        return tuple(buffer.zero_() for buffer in buffers) if self._one_shape else buffers

    def _run_background(
        self, prepared: Prepared, code: Tensor, unit: int, first_unit: int, n: int, pieces: Stream
    ) -> Tensor:
        """One perturbation, its background in pieces of at most the batch size."""
        outputs = []

        def step(start: int, stop: int) -> None:
            piece = prepared.background_slice(start, stop)
            rows = piece.rows(code, unit, unit + 1, piece.empty(stop - start))
            # A copy: a model may answer in the same memory every time.
            outputs.append(self._model(piece, rows, first_unit + unit, 1, n, replay=False).clone())

        pieces.run(prepared.n_background, step)
        return torch.cat(outputs)

    def _model(
        self, prepared: Prepared, rows: tuple[Tensor, ...], first_unit: int, n_units: int, n: int, *, replay: bool
    ) -> Tensor:
        """Model outputs ``[rows, K]`` of one chunk, checked for shape."""
        n_rows = rows[0].shape[0]
        args = self._args_of(first_unit, n_units, n, n_rows, prepared.n_background)
        forward = self._graph if replay and self._graph is not None else self.forward
        autocast = nullcontext()
        if self._autocast is not None:  # a graph must not read weights from a cache that ends with the context
            autocast = torch.autocast(self.device.type, dtype=self._autocast, cache_enabled=self._graph is None)
        with autocast:
            outputs = prepared.run(forward, rows, args)
        outputs = getattr(outputs, "logits", outputs)
        if not isinstance(outputs, Tensor):
            raise TypeError(
                f"{self.caller}: forward must return a tensor or an object with .logits, got {type(outputs).__name__}; "
                "wrap the model in a function that picks its output"
            )
        if outputs.dim() not in (1, 2) or outputs.shape[0] != n_rows or outputs.numel() == 0:
            raise ValueError(
                f"{self.caller}: forward must return [b] or [b, K] with b the number of rows given ({n_rows}), got "
                f"shape {tuple(outputs.shape)}; wrap the model in a function that reduces its output"
            )
        if outputs.dtype.is_complex or outputs.dtype == torch.bool:
            raise TypeError(f"{self.caller}: forward must return real numbers, got dtype {outputs.dtype}")
        if self.output_dtype is None:
            self.output_dtype = outputs.dtype
            self._n_outputs = outputs.shape[1] if outputs.dim() == 2 else None
        return outputs if outputs.dim() == 2 else outputs.unsqueeze(1)

    def _args_of(self, first_unit: int, n_units: int, n: int, n_rows: int, background: int) -> tuple:
        """Additional arguments of a chunk's rows; rows that fill up a chunk take those of the last unit."""
        if not any(self._is_batched(arg) for arg in self._args):
            return self._args
        unit = torch.arange(n_rows, device=self.device).div(background, rounding_mode="floor").clamp(max=n_units - 1)
        owner = (unit + first_unit).div(n, rounding_mode="floor")
        return tuple(arg.index_select(0, owner.to(arg.device)) if self._is_batched(arg) else arg for arg in self._args)

    def _is_batched(self, arg: object) -> bool:
        return isinstance(arg, Tensor) and arg.dim() > 0 and arg.shape[0] == self.n_inputs

    def _check_target(self, target: object) -> None:
        """What can be said about a target before the model has run."""
        if isinstance(target, Tensor):
            if target.shape != (self.n_inputs,) or target.dtype.is_floating_point or target.dtype == torch.bool:
                raise ValueError(
                    f"{self.caller}: target must be an int or a LongTensor of shape [B] = [{self.n_inputs}], got "
                    f"shape {tuple(target.shape)} and dtype {target.dtype}"
                )
        elif isinstance(target, bool) or not (target is None or isinstance(target, Integral) or target == "predicted"):
            raise TypeError(
                f'{self.caller}: target must be an int, a LongTensor [B], "predicted" or None, got {target!r}'
            )

    def _resolve_target(self, target: object, outputs: Tensor) -> None:
        if target is None:
            return
        if self._n_outputs is None:
            raise ValueError(
                f"{self.caller}: target must be None for a forward that returns one number an input, got {target!r}"
            )
        if isinstance(target, str):
            self._target = outputs.argmax(1)
            return
        targets = target.tolist() if isinstance(target, Tensor) else [int(target)]
        if min(targets) < 0 or max(targets) >= self._n_outputs:
            raise ValueError(
                f"{self.caller}: target must lie in 0..{self._n_outputs - 1} (the model's outputs), got "
                f"{sorted(set(targets))}"
            )
        self._target = target.to(self.device, torch.int64) if isinstance(target, Tensor) else int(target)

    def _scored(self, outputs: Tensor) -> Tensor:
        """The score's answer ``[rows, K]`` to outputs ``[rows, K]``, checked for shape."""
        if self._score is None:
            return outputs
        scores = self._score(outputs)
        shape = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
        if shape not in (tuple(outputs.shape), (outputs.shape[0],)):
            raise ValueError(
                f"{self.caller}: score must map outputs [b, K] to [b, K] or [b], got {shape} for {tuple(outputs.shape)}"
            )
        return scores if scores.dim() == 2 else scores.unsqueeze(1)

    def _target_column(self, inputs: range, n: int) -> int | Tensor | None:
        """Which output each unit of inputs is asked for: one for all, LongTensor ``[units, 1]``, or None for all."""
        if isinstance(self._target, Tensor):
            return self._target[inputs.start : inputs.stop].repeat_interleave(n).unsqueeze(1)
        return self._target

    def _pick(self, outputs: Tensor, targets: int | Tensor | None) -> Tensor:
        """The targets' columns of outputs ``[units, K]``, or all columns."""
        if targets is None or outputs.shape[1] == 1:
            return outputs
        return outputs[:, targets : targets + 1] if isinstance(targets, int) else outputs.gather(1, targets)

    def _check_finite(self, values: Tensor, perturbations: Perturbations) -> None:
        finite = torch.isfinite(values).all(2)  # [B, N]
        if not bool(finite.all()):
            b, n = (~finite).nonzero()[0].tolist()
            n_bad = int((~finite).sum())
            raise ValueError(
                f"{self.caller}: model outputs must be finite, got {values[b, n].tolist()[:4]} for input {b}, "
                f"{perturbations.describe(b, n)}; {n_bad} of {finite.numel()} evaluations are not finite; check the "
                "model on masked inputs and the baselines"
            )


def _as_args(additional: object) -> tuple:
    if additional is None:
        return ()
    return additional if isinstance(additional, tuple) else (additional,)
