"""Recording while training: in a plain loop, under Lightning and under the Hugging Face Trainer.

`LightningRecorder` and `HuggingFaceRecorder` are made on first use and need the framework; `recording` needs nothing.
"""

from __future__ import annotations

from typing import Any

from .recording import Recorder, recording

__all__ = ["Recorder", "recording"]

# Class: the function of `frameworks` that makes it.
_CALLBACKS = {"HuggingFaceRecorder": "hugging_face_recorder", "LightningRecorder": "lightning_recorder"}


def __getattr__(name: str) -> Any:
    if name not in _CALLBACKS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import frameworks

    return getattr(frameworks, _CALLBACKS[name])()


def __dir__() -> list[str]:
    return sorted({*globals(), *_CALLBACKS})
