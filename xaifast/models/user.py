"""Models that the user's own Python code makes: the one form that runs code."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from torch import Tensor, nn

from ..data.base import require
from ..data.fingerprint import hash_values
from ..model_state import find_modules
from .loading import LoadedModel

_CALLER = "xaifast.load_model"


class Estimator:
    """A scikit-learn estimator as a forward: rows go to NumPy in float64, probabilities come back."""

    def __init__(self, estimator: object, feature_names: list[str] | None) -> None:
        self.estimator, self.feature_names = estimator, feature_names

    def __call__(self, rows: Tensor) -> Tensor:
        """Probabilities float64 ``[b, K]`` of rows ``[b, F]``."""
        table = rows.detach().double().cpu().numpy()
        if self.feature_names is not None:  # fitted on a data frame, and pipelines may pick columns by name
            table = require("pandas", "data", _CALLER).DataFrame(table, columns=self.feature_names)
        return torch.from_numpy(np.asarray(self.estimator.predict_proba(table), np.float64)).to(rows.device)


def load_user(spec: str, where: str, device: torch.device) -> LoadedModel:
    """Import ``MODULE``, with the current directory first on the path, and take ``CALLABLE`` from it.

    That is a model (``nn.Module``, estimator with ``predict_proba``, or function of one tensor), or something that
    returns one when it is called without arguments. Modules behind it are put in eval mode and moved to ``device``.
    Attributes of the model are used where it has them: ``preprocess``, ``preprocess_masks``, ``class_names``,
    ``feature_names``, ``input_size``, ``patch_size`` (of estimators: ``classes_``, ``feature_names_in_``).

    The fingerprint covers the source file of ``MODULE`` and the weights of the modules found behind the model; code and
    arrays that come from elsewhere are not seen.

    Raises:
        ValueError: no such module or name, or the code raises.
        TypeError: what it names or returns is no model, or an attribute is not what it must be.
    """
    module_name, _, attribute = where.partition(":")
    if not attribute.isidentifier() or not all(part.isidentifier() for part in module_name.split(".")):
        raise ValueError(
            f"{_CALLER}: py: takes a module as in import and a name in it, like py:vision.nets:make, got {spec!r}"
        )
    with _current_directory_first():
        module = _import(module_name)
        model = _make(_named(module, attribute), spec)
    file = inspect.getsourcefile(module) if getattr(module, "__file__", None) else None
    identity: dict[str, object] = {"source": Path(file).read_text(errors="replace") if file else None}
    forward = model
    if isinstance(model, nn.Module) or not hasattr(model, "predict_proba"):
        for i, part in enumerate(find_modules(model)):
            part.eval().to(device)
            identity |= {f"{i}.{name}": _hashable(value) for name, value in part.state_dict().items()}
    else:
        forward = Estimator(model, _names(getattr(model, "feature_names_in_", None), "feature_names_in_"))
        identity["estimator"] = _hash_estimator(model, spec)
    preprocess, patch_size = getattr(model, "preprocess", None), getattr(model, "patch_size", None)
    if not (preprocess is None or callable(preprocess)) or not (patch_size is None or isinstance(patch_size, int)):
        raise TypeError(
            f"{_CALLER}: preprocess must be a function of a list of images and patch_size an int, got {preprocess!r} "
            f"and {patch_size!r}; rename attributes that are something else"
        )
    return LoadedModel(
        forward=forward,
        spec=spec,
        fingerprint=hash_values(identity),
        class_names=_names(getattr(model, "class_names", getattr(model, "classes_", None)), "class_names"),
        preprocess=preprocess,
        preprocess_masks=getattr(model, "preprocess_masks", None),
        preprocessing={"preprocess": spec} if preprocess else {},
        input_size=_size(getattr(model, "input_size", None)),
        patch_size=patch_size,
        feature_names=_names(
            getattr(model, "feature_names", getattr(model, "feature_names_in_", None)), "feature_names"
        ),
    )


@contextmanager
def _current_directory_first() -> Iterator[None]:
    entry = str(Path.cwd())
    sys.path.insert(0, entry)
    try:
        yield
    finally:
        if entry in sys.path:
            sys.path.remove(entry)


def _import(name: str) -> ModuleType:
    importlib.invalidate_caches()
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise ValueError(f"{_CALLER}: importing {name} failed: {error}; install what it needs") from error
        raise ValueError(
            f"{_CALLER}: there must be a module {name!r} in {Path.cwd()} or on the Python path, got none; name it as "
            "in import, without .py"
        ) from error
    except Exception as error:  # the user's code raises what it likes
        raise ValueError(f"{_CALLER}: importing {name} failed: {type(error).__name__}: {error}") from error


def _named(module: ModuleType, attribute: str) -> object:
    if hasattr(module, attribute):
        return getattr(module, attribute)
    names = [
        name
        for name, value in vars(module).items()
        if not name.startswith("_") and _may_be_model(value) and getattr(value, "__module__", None) == module.__name__
    ]
    raise ValueError(
        f"{_CALLER}: {module.__name__} ({getattr(module, '__file__', 'built in')}) must define {attribute!r}, but does "
        f"not; it defines {names[:8] or 'no callable'}"
    )


def _may_be_model(value: object) -> bool:
    return callable(value) or hasattr(value, "predict_proba")


def _make(named: object, spec: str) -> Callable | object:
    """The model itself, or what a callable without arguments returns."""
    is_model = isinstance(named, nn.Module) or (hasattr(named, "predict_proba") and not isinstance(named, type))
    if is_model:
        return named
    if not callable(named):
        raise TypeError(f"{_CALLER}: {spec} must name a model or a callable, got {type(named).__name__}")
    if _needs_arguments(named):
        if isinstance(named, type):
            raise TypeError(
                f"{_CALLER}: {spec} is a class that needs arguments; name a function without arguments that builds it"
            )
        return named
    try:
        made = named()
    except Exception as error:  # the user's code raises what it likes
        raise ValueError(f"{_CALLER}: {spec} raised {type(error).__name__}: {error}") from error
    if isinstance(made, type) or not _may_be_model(made):
        raise TypeError(
            f"{_CALLER}: {spec} must return a model (nn.Module, function of a tensor, or an object with "
            f"predict_proba), got {made if isinstance(made, type) else type(made).__name__}; wrap predict of a "
            "regressor in a function of a tensor"
        )
    return made


def _needs_arguments(function: Callable) -> bool:
    try:
        parameters = inspect.signature(function).parameters.values()
    except ValueError:  # some built-in functions do not say
        return True
    optional = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return any(p.default is inspect.Parameter.empty and p.kind not in optional for p in parameters)


def _hash_estimator(estimator: object, spec: str) -> str:
    joblib = require("joblib", "data", _CALLER)
    try:
        return joblib.hash(estimator)
    except Exception as error:  # objects refuse in their own ways
        raise ValueError(
            f"{_CALLER}: the {type(estimator).__name__} of {spec} must be picklable, which is how estimators are told "
            f"apart, got {error!r}; name a function of a tensor that calls it instead"
        ) from error


def _hashable(value: object) -> object:
    if not isinstance(value, Tensor):
        return repr(value)
    return value.dequantize() if value.is_quantized else value.to_dense() if value.layout != torch.strided else value


def _names(names: object, attribute: str) -> list[str] | None:
    if names is None:
        return None
    if isinstance(names, str) or not hasattr(names, "__iter__"):
        raise TypeError(f"{_CALLER}: {attribute} must be a list of names, got {names!r}")
    return [str(name) for name in names]


def _size(size: object) -> tuple[int, int] | None:
    if size is None:
        return None
    try:
        height, width = (size, size) if isinstance(size, int) else size
        return int(height), int(width)
    except (TypeError, ValueError):
        raise TypeError(
            f"{_CALLER}: input_size must be a side or (height, width) in pixels, got {size!r}; correct or rename it"
        ) from None
