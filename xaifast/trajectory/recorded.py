"""`Trajectory`: the states of a model in training, recorded and replayed."""

from __future__ import annotations

import json
import math
import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from .class_updates import ClassUpdates, check_parts
from .encoding import distance, encode, replay
from .folder import Folder, TrajectoryError
from .layout import Layout, State, check_finite, take_state
from .memory import Memory
from .selection import choose

_RECORD = "xaifast.Trajectory.record"


class Trajectory:
    """States of a model at checkpoints of its training, in memory or in a directory.

    ``traj[t]`` is the state dict of checkpoint t, on the CPU. A tensor that a step left alone is not stored again, tied
    parameters are stored once. With ``deltas="exact"`` a replayed state equals the recorded one, bit for bit in every
    dtype (but the sign of a zero may be that of the checkpoint before), and reading one checkpoint reads one file where
    all tensors changed. With ``deltas="bf16"`` differences of float32 and float64 parameters to the *replayed* state
    are stored in bfloat16, half or a quarter of the room, where the replayed parameter p then keeps
    ``||replayed p - p|| <= tolerance ||p - start of p||``; elsewhere, as at the first steps, p is stored as it is.
    Buffers always are.

    A directory survives a kill: a checkpoint whose `record` returned is there. Files are written to a temporary name,
    synced and renamed, and chained by checksums. To go on, open the directory again, load ``traj[-1]`` or a checkpoint
    of your own (then `truncate`) into the model, and record on.

    Args:
        directory: Made by the first `record`; None keeps all in memory.
        deltas: ``"exact"`` or ``"bf16"``; None for what the directory has, or ``"exact"``.
        tolerance: See above; of a new directory.
        run: Whatever tells runs apart (seed, data, learning rate), as JSON: a directory of another run is refused.
        check_run: Refuse to append a model to a directory whose recorded run it does not seem to continue.

    Raises:
        TrajectoryError: the directory holds something else or another run; checkpoints are missing, swapped or corrupt.
        TypeError, ValueError: what must hold, what was given, what to do.

    Memory: one state of the model (``"bf16"``: two), and in memory T states, of which bfloat16 ones count half;
    ``nbytes`` says what is stored. Recording copies the model once; nothing refers to its parameters afterwards.

    Source: storage of XtrAIn's checkpoints (arXiv 2606.10877 needs all of them); the format is this package's.

    Example:
        >>> model, traj = torch.nn.Linear(3, 2), Trajectory()
        >>> _ = traj.record(model)
        >>> with torch.no_grad():
        ...     _ = model.weight.add_(1)
        >>> traj.record(model)
        1
        >>> len(traj), torch.equal(traj[1]["weight"], model.weight), torch.equal(traj[0]["bias"], model.bias)
        (2, True, True)
    """

    def __init__(
        self,
        directory: str | Path | None = None,
        *,
        deltas: str | None = None,
        tolerance: float = 1e-5,
        run: object = None,
        check_run: bool = True,
    ) -> None:
        if deltas not in (None, "exact", "bf16"):
            raise ValueError(f'xaifast.Trajectory: deltas must be "exact" or "bf16", got {deltas!r}')
        if isinstance(tolerance, bool) or not isinstance(tolerance, int | float) or not 0 < tolerance < 1:
            raise ValueError(f"xaifast.Trajectory: tolerance must lie between 0 and 1, got {tolerance!r}")
        try:
            run = json.loads(json.dumps(run))
        except (TypeError, ValueError) as error:
            raise TypeError(
                f"xaifast.Trajectory: run must be JSON (numbers, text, lists, dicts), got {error}"
            ) from None
        self._store = Memory() if directory is None else Folder(directory)
        self._layout: Layout | None = None
        self._last: State | None = None
        self._start: State | None = None
        self._check_run = check_run
        self._settings = {"deltas": deltas or "exact", "tolerance": tolerance, "run": run}
        if self._store.manifest is not None:
            self._take_up(deltas, run)

    def __len__(self) -> int:
        """Number of checkpoints, T."""
        return len(self._store.notes)

    def __getitem__(self, t: int) -> State:
        """State dict of checkpoint t, negative from the end: tensors of its own, on the CPU."""
        (state,) = self.states([self._valid(t)])
        return state

    def __iter__(self) -> Iterator[State]:
        return self.states()

    def __repr__(self) -> str:
        where = "in memory" if self.directory is None else repr(str(self.directory))
        return f"Trajectory({len(self)} checkpoints, {self.nbytes / 1e6:.1f} MB, {where})"

    @property
    def directory(self) -> Path | None:
        """Where checkpoints are; None in memory."""
        return self._store.directory

    @property
    def nbytes(self) -> int:
        """Bytes stored."""
        return self._store.nbytes

    @property
    def steps(self) -> list[int | None]:
        """What `record` was told of each checkpoint: optimizer steps done."""
        return [notes["step"] for notes in self._store.notes]

    @property
    def parameters(self) -> list[str]:
        """Names of the parameters, tied ones once."""
        return [] if self._layout is None else self._layout.parameters

    def record(
        self, model: nn.Module, *, step: int | None = None, class_updates: Mapping[str, Tensor] | None = None
    ) -> int:
        """Append the model's state: at initialisation, then after every step or epoch.

        Args:
            model: On any device, the same architecture every time; `DistributedDataParallel`, `DataParallel` and
                `torch.compile` are looked through. In distributed training record on one process.
            step: Optimizer steps done, to find the checkpoint again.
            class_updates: By parameter name, parts ``[K, *shape]`` that each class had in its update since the last
                checkpoint, see `xaifast.trajectory.class_gradients`. Kept as given.

        Returns:
            The checkpoint's number. The first record after a directory was opened again is not repeated where the model
            is at the last checkpoint.

        Raises:
            ValueError: another architecture or dtype; a weight that is not finite, by name.
            TrajectoryError: the disk; another process that records here; a model that does not continue the run. The
                trajectory is then as it was before, and `record` may be called again.

        Cost: a copy of the state and three passes over it; in a directory a checksum and a synced write as well.
        """
        if step is not None and (isinstance(step, bool) or not isinstance(step, int) or step < 0):
            raise ValueError(f"{_RECORD}: step must be an int of at least 0, got {step!r}")
        layout, state = take_state(model, _RECORD)
        if not len(self):
            check_finite(layout.stored, state, _RECORD)
            self._checked_parts(class_updates, state)
            self._store.begin({**self._settings, "tensors": layout.as_json()})
            self._store.append(
                {f"state/{name}": value for name, value in state.items()}, {"step": step, "changes": None}
            )
            self._layout, self._last = layout, state
            self._start = state if self._compact else None
            return 0
        self._layout.check_same(layout, _RECORD)
        check_finite(layout.buffers, state, _RECORD)
        if self._last is None and self._resume(state):
            return len(self) - 1
        stored, replayed, changes = encode(layout, state, self._last, self._start, self._settings["tolerance"])
        if not all(map(math.isfinite, changes)):
            check_finite(layout.stored, state, _RECORD)
        parts, residuals = self._checked_parts(class_updates, state)
        notes = {"step": step, "changes": changes}
        if residuals:
            notes["class_updates"] = residuals
        self._store.append({**stored, **parts}, notes)
        self._last = replayed
        return len(self) - 1

    def states(self, checkpoints: Iterable[int] | None = None) -> Iterator[State]:
        """State dicts of checkpoints in ascending order, each file read at most once.

        Args:
            checkpoints: Numbers, strictly ascending; None for all.

        Yields:
            Tensors by name, on the CPU, in the model's dtypes and order; tied names share a tensor, and nothing is
            shared with the trajectory or with other checkpoints.

        Raises:
            IndexError, ValueError: numbers that do not exist, or are out of order.
            TrajectoryError: a file that is missing or corrupt.
        """
        wanted = range(len(self)) if checkpoints is None else [self._valid(t) for t in checkpoints]
        if any(a >= b for a, b in zip(wanted, wanted[1:], strict=False)):
            raise ValueError(f"xaifast.Trajectory.states: checkpoints must be strictly ascending, got {list(wanted)}")
        return self._states(wanted)

    def select(
        self, checkpoints: str | Sequence[int] = "uniform", *, n_steps: int = 8, layer: str | None = None
    ) -> list[int]:
        """Numbers of the checkpoints that stand for the whole run (Xstep).

        Args:
            checkpoints: ``"endpoints"``: first and last. ``"uniform"``: equally many checkpoints between.
                ``"update_norm"``:
                equal arc length, the sum of ||D||_F of the steps between. ``"all"``. Or a list, ascending, negative
                numbers from the end.
            n_steps: K, coarse steps; fewer where the nearest checkpoints coincide.
            layer: Parameter, or module, whose updates make the arc length; None for all parameters together.

        Returns:
            At least two numbers, strictly ascending.
        """
        caller = "xaifast.Trajectory.select"
        if len(self) < 2:
            raise ValueError(
                f"{caller}: a step needs two checkpoints, got {len(self)}; record after training steps too"
            )
        if not isinstance(checkpoints, str):
            checkpoints = [self._valid(t) for t in checkpoints]
        return choose(checkpoints, n_steps, lambda: self.update_norms(layer), len(self), caller)

    def update_norms(self, layer: str | None = None) -> Tensor:
        """||D^t||_F of every step, float64 ``[T-1]``, noted while recording.

        Args:
            layer: Parameter, or module whose parameters count; None for all parameters.
        """
        if layer is None:
            rows = slice(None)
        else:
            rows = [i for i, name in enumerate(self.parameters) if name == layer or name.startswith(f"{layer}.")]
            if not rows:
                known = ", ".join(self.parameters[:6])
                raise ValueError(
                    f"xaifast.Trajectory.update_norms: layer must name a parameter or a module ({known}, ...), got "
                    f"{layer!r}"
                )
        changes = [notes["changes"] for notes in self._store.notes[1:]]
        table = torch.tensor(changes, dtype=torch.float64).reshape(len(changes), len(self.parameters))
        return torch.linalg.vector_norm(table[:, rows], dim=1)

    def class_updates(self, t: int) -> dict[str, ClassUpdates]:
        """By parameter, what each class had in the update from checkpoint t to t + 1; empty where none was recorded."""
        t = self._valid(t, len(self) - 1)
        notes = self._store.notes[t + 1].get("class_updates", {})
        tensors = self._store.read(t + 1) if notes else {}
        return {
            name: ClassUpdates(tensors[f"class_updates/{name}"].clone(), residual, exact)
            for name, (residual, exact) in notes.items()
        }

    def truncate(self, length: int) -> None:
        """Drop the checkpoints from ``length`` on, to go on from an earlier one.

        The next `record` is then checked as that after opening a directory, also where nothing is dropped.

        Raises:
            ValueError: not 1..T.
        """
        if isinstance(length, bool) or not isinstance(length, int) or not 1 <= length <= len(self):
            raise ValueError(f"xaifast.Trajectory.truncate: length must lie in 1..{len(self)}, got {length!r}")
        self._store.truncate(length)
        self._last = None

    @property
    def _compact(self) -> bool:
        return self._settings["deltas"] == "bf16"

    def _valid(self, t: int, length: int | None = None) -> int:
        length = len(self) if length is None else length
        number = operator.index(t)
        if not -length <= number < length:
            raise IndexError(f"xaifast.Trajectory: numbers must lie in 0..{length - 1}, got {t}")
        return number % length

    def _states(self, wanted: Sequence[int]) -> Iterator[State]:
        state, at = {}, -1
        for t in wanted:
            state, at = replay(state, at, t, self._store.keys, self._store.read), t
            copies = {name: value.clone() for name, value in state.items()}
            yield {entry.name: copies[entry.tied_to or entry.name] for entry in self._layout.entries}

    def _checked_parts(self, class_updates: Mapping[str, Tensor] | None, state: State) -> tuple[State, dict]:
        def lost(name: str) -> float:
            if self._start is None:
                return 0.0
            return self._settings["tolerance"] * distance({name: self._last[name]}, self._start)

        return check_parts(class_updates or {}, state, self._last if len(self) else None, _RECORD, lost)

    def _take_up(self, deltas: str | None, run: object) -> None:
        """Settings of the directory, which must not contradict the arguments."""
        manifest = self._store.manifest
        self._settings = {key: manifest[key] for key in self._settings}
        self._layout = Layout.from_json(manifest["tensors"])
        if deltas not in (None, manifest["deltas"]):
            raise TrajectoryError(
                f"xaifast.Trajectory: {self.directory} was begun with deltas={manifest['deltas']!r}, got {deltas!r}; "
                "leave it out, or choose another directory"
            )
        if run is not None and run != manifest["run"]:
            raise TrajectoryError(
                f"xaifast.Trajectory: {self.directory} holds another run, {manifest['run']!r}, got {run!r}; choose "
                "another directory"
            )

    def _resume(self, state: State) -> bool:
        """Replay the last checkpoint to go on from; whether the model is there already.

        A model that continues a run is nearer to its end than to its start, and nearer to it than to weights of 0; one
        that was initialised anew is neither.
        """
        start, last = (replay({}, -1, t, self._store.keys, self._store.read) for t in (0, len(self) - 1))
        at_last = all(torch.equal(value, last[name]) for name, value in state.items())
        if not at_last and self._check_run:
            names = self._layout.parameters  # but scales and biases begin alike in all runs
            names = [name for name in names if state[name].dim() > 1] or names
            weights = {name: state[name] for name in names}
            ahead, back = distance(weights, last), distance(weights, start)
            if (len(self) > 1 and back < ahead) or ahead > distance({name: last[name] for name in names}):
                raise TrajectoryError(
                    f"{_RECORD}: {self.directory or 'the trajectory'} holds {len(self)} checkpoints of a run that this "
                    f"model does not seem to continue: its distance to the last one is {ahead:.3g}, to the first one "
                    f"{back:.3g}. Load traj[-1] into the model to go on; truncate() to go on from an earlier one; "
                    "choose another directory for another run; or pass check_run=False"
                )
        self._last, self._start = last, start if self._compact else None
        return at_last
