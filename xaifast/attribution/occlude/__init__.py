"""Parameter-space occlusion: updates of a first layer, undone or applied player by player."""

from .occluder import Occluder, resolve_target
from .update import occlude_update

__all__ = ["Occluder", "occlude_update", "resolve_target"]
