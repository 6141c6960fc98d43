"""Callbacks for training frameworks. Each class is made when it is asked for, as its base is the framework's."""

from __future__ import annotations

import functools
import importlib
from typing import Any

from ..trajectory import Trajectory
from .recording import Recorder


@functools.cache
def lightning_recorder() -> type:
    """`LightningRecorder`, of ``lightning`` or ``pytorch_lightning``."""
    for module in ("lightning.pytorch", "pytorch_lightning"):
        try:
            base = importlib.import_module(module).Callback
            break
        except ImportError:
            continue
    else:
        raise ImportError("xaifast.training.LightningRecorder needs Lightning; pip install lightning")

    class LightningRecorder(base):
        """Records a trajectory under Lightning: ``Trainer(callbacks=[LightningRecorder(traj)])``.

        Only the process of rank 0 records. Training that goes on from step g (``fit(ckpt_path=...)``) drops checkpoints
        recorded after g.

        Args:
            trajectory: Where checkpoints go.
            every: ``"epoch"``, or a number of optimizer steps (``global_step``).
            part: Dotted name of the submodule to record, ``"net"``; None for the whole `LightningModule`.
        """

        def __init__(self, trajectory: Trajectory, every: str | int = "epoch", part: str | None = None) -> None:
            super().__init__()
            self._recorder = Recorder(trajectory, every, part)

        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            """Record the start."""
            if trainer.is_global_zero:
                self._recorder.begin(pl_module, trainer.global_step)

        def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: object) -> None:
            """Record after steps; batches whose gradients are accumulated are none."""
            if trainer.is_global_zero:
                self._recorder.after_step(pl_module, trainer.global_step)

        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            """Record after epochs."""
            if trainer.is_global_zero:
                self._recorder.after_epoch(pl_module)

        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            """Record the end."""
            if trainer.is_global_zero:
                self._recorder.finish(pl_module)

    return _published(LightningRecorder)


@functools.cache
def hugging_face_recorder() -> type:
    """`HuggingFaceRecorder`, of ``transformers``."""
    try:
        from transformers import TrainerCallback
    except ImportError as error:
        raise ImportError(
            "xaifast.training.HuggingFaceRecorder needs transformers; pip install 'xaifast[hf]' accelerate"
        ) from error

    class HuggingFaceRecorder(TrainerCallback):
        """Records a trajectory under the Hugging Face Trainer: ``Trainer(callbacks=[HuggingFaceRecorder(traj)])``.

        Only the process of rank 0 records. Training that goes on from step g (``train(resume_from_checkpoint=...)``)
        drops checkpoints recorded after g.

        Args:
            trajectory: Where checkpoints go.
            every: ``"epoch"``, or a number of optimizer steps (``global_step``).
            part: Dotted name of the submodule to record; None for the whole model.
        """

        def __init__(self, trajectory: Trajectory, every: str | int = "epoch", part: str | None = None) -> None:
            self._recorder = Recorder(trajectory, every, part)

        def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            """Record the start."""
            if state.is_world_process_zero:
                self._recorder.begin(model, state.global_step)

        def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            """Record after optimizer steps."""
            if state.is_world_process_zero:
                self._recorder.after_step(model, state.global_step)

        def on_epoch_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            """Record after epochs."""
            if state.is_world_process_zero:
                self._recorder.after_epoch(model)

        def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            """Record the end."""
            if state.is_world_process_zero:
                self._recorder.finish(model)

    return _published(HuggingFaceRecorder)


def _published(cls: type) -> type:
    """Named as users import it, so that it can be pickled."""
    cls.__module__, cls.__qualname__ = __package__, cls.__name__
    return cls
