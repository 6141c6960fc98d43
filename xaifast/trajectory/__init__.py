"""Recorded training: the states a model went through, for methods that explain by parameter updates."""

from .class_updates import ClassUpdates, class_gradients
from .folder import TrajectoryError
from .recorded import Trajectory

__all__ = ["ClassUpdates", "Trajectory", "TrajectoryError", "class_gradients"]
