"""Recording of a plain training loop: when the states of a model are checkpoints."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from ..trajectory import Trajectory, TrajectoryError


class Recorder:
    """Decides which states become checkpoints, and counts optimizer steps.

    Frameworks call it; in a plain loop `recording` does.

    Args:
        trajectory: Where checkpoints go.
        every: ``"epoch"``, or a number of optimizer steps.
        part: Dotted name of the submodule to record; None for the whole model.

    Attributes:
        n_steps: Optimizer steps done.
    """

    def __init__(self, trajectory: Trajectory, every: str | int = "epoch", part: str | None = None) -> None:
        caller = "xaifast.training.Recorder"
        if not isinstance(trajectory, Trajectory):
            raise TypeError(f"{caller}: trajectory must be a xaifast.Trajectory, got {type(trajectory).__name__}")
        if every != "epoch" and (isinstance(every, bool) or not isinstance(every, int) or every < 1):
            raise ValueError(f'{caller}: every must be "epoch" or a positive number of steps, got {every!r}')
        self.trajectory, self.every, self.part, self.n_steps = trajectory, every, part, 0

    def begin(self, model: nn.Module, n_steps: int | None = None) -> None:
        """Record the start, or take up a trajectory that is there.

        Args:
            model: Before the first step, or as its checkpoint restored it.
            n_steps: Steps done before, of a framework that counts; checkpoints after them are dropped, as they will be
                recorded again. None goes on from the last checkpoint.
        """
        steps = self.trajectory.steps
        if steps and n_steps is None:
            n_steps = steps[-1]
            self.trajectory.truncate(len(steps))
        elif steps and n_steps:
            if None in steps:
                raise TrajectoryError(
                    "xaifast.training.Recorder: training goes on from step "
                    f"{n_steps}, but the trajectory does not say at which steps it was recorded; choose another "
                    "directory"
                )
            self.trajectory.truncate(max(1, sum(step <= n_steps for step in steps)))
        self.n_steps = n_steps or 0
        self._record(model)

    def after_step(self, model: nn.Module, n_steps: int | None = None) -> None:
        """Count an optimizer step, or be told how many there were, and record the state where it is due."""
        before, self.n_steps = self.n_steps, self.n_steps + 1 if n_steps is None else n_steps
        if self.every != "epoch" and self.n_steps // self.every > before // self.every:
            self._record(model)

    def after_epoch(self, model: nn.Module) -> None:
        """Record the state where epochs are checkpoints."""
        if self.every == "epoch":
            self._record(model)

    def finish(self, model: nn.Module) -> None:
        """Record the end, unless it is the last checkpoint."""
        if self.trajectory.steps[-1:] != [self.n_steps]:
            self._record(model)

    def _record(self, model: nn.Module) -> None:
        self.trajectory.record(model if self.part is None else model.get_submodule(self.part), step=self.n_steps)


class _Loop:
    """What `recording` gives to the loop."""

    def __init__(self, recorder: Recorder, model: nn.Module) -> None:
        self._recorder, self._model = recorder, model

    @property
    def n_steps(self) -> int:
        """Optimizer steps done, those of an earlier process included."""
        return self._recorder.n_steps

    def end_epoch(self) -> None:
        """Say that an epoch is over."""
        self._recorder.after_epoch(self._model)


@contextmanager
def recording(model: nn.Module, trajectory: Trajectory, every: str | int = "epoch") -> Iterator[_Loop]:
    """Record the model at entry, while optimizers step, and at the end.

    Steps of every optimizer that holds a parameter of the model count; each `torch.optim.Optimizer` reports its own, so
    the loop stays as it is. After an error nothing more is recorded: the state may be half a step.

    Args:
        model: In training. To go on with a trajectory, load its last state, ``traj[-1]``, first.
        trajectory: Where checkpoints go.
        every: A number of optimizer steps, or ``"epoch"``: then call ``.end_epoch()`` of what the context gives.

    Raises:
        TypeError, ValueError, TrajectoryError: as `Recorder` and `Trajectory.record`, out of ``optimizer.step()``.

    Cost: `Trajectory.record` at every checkpoint, a microsecond at other steps.

    Example:
        >>> model, traj = torch.nn.Linear(3, 1), xaifast.Trajectory()
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> with recording(model, traj, every=2):
        ...     for _ in range(5):
        ...         optimizer.zero_grad()
        ...         model(torch.rand(4, 3)).square().mean().backward()
        ...         optimizer.step()
        >>> traj.steps
        [0, 2, 4, 5]
    """
    recorder = Recorder(trajectory, every)
    ours = {id(parameter) for parameter in model.parameters()}
    relevant: dict[Optimizer, bool] = {}

    def after_step(optimizer: Optimizer, args: tuple, kwargs: dict) -> None:
        if optimizer not in relevant:
            relevant[optimizer] = any(id(p) in ours for group in optimizer.param_groups for p in group["params"])
        if relevant[optimizer]:
            recorder.after_step(model)

    recorder.begin(model)
    handle = register_optimizer_step_post_hook(after_step)
    try:
        yield _Loop(recorder, model)
    finally:
        handle.remove()
    recorder.finish(model)
