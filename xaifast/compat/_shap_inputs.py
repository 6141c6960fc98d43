"""What `shap.KernelExplainer` accepts, in one form: models, background data, links, and the models' answers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np


def is_a(value: object, package: str, *names: str) -> bool:
    """Whether a value's class or one of its bases has one of these names in a package, which need not be loaded."""
    return any(kind.__name__ in names and kind.__module__.split(".")[0] == package for kind in type(value).__mro__)


def is_sparse(value: object) -> bool:
    """Whether a value is a SciPy sparse matrix or array."""
    return type(value).__module__.startswith("scipy.sparse") and hasattr(value, "toarray")


@dataclass
class Model:
    """A function of rows, under the names shap gives it."""

    f: Callable
    out_names: list[str] | None = None


def as_model(model: object, keep_index: bool) -> Model:
    """Wrap a function, or take a shap ``Model``.

    Bound methods of scikit-learn estimators that were fitted on a frame lose the estimator's feature names, on a copy:
    they are given arrays and would warn at every call.

    Raises:
        TypeError: what cannot be called.
    """
    f = model if callable(model) else getattr(model, "f", None)
    if not callable(f):
        raise TypeError(
            f"xaifast.KernelExplainer: model must be a function of an array [n, features], got {type(model).__name__}; "
            "pass its predict method"
        )
    owner = getattr(f, "__self__", None)
    if not keep_index and hasattr(owner, "feature_names_in_"):
        owner = copy.copy(owner)
        try:
            owner.feature_names_in_ = None
        except AttributeError:  # a pipeline asks its first step
            return Model(f)
        f = getattr(owner, f.__name__)
    return Model(f)


class Data:
    """Background rows with weights and groups of columns, under the names of shap's ``DenseData``.

    Attributes:
        data: ``[N, P]``, array or sparse matrix.
        weights: float64 ``[N]`` of sum one.
        groups: Columns of each player.
        groups_size: Number of players.
        group_names: A name a player.
        index_value, index_name: Of the rows, where they are kept; else None.
    """

    transposed = False

    def __init__(self, data: object, names: list, index: object = None) -> None:
        self.data, self.group_names = data, names
        self.weights = np.full(data.shape[0], 1 / max(data.shape[0], 1))
        self.groups = [np.array([i]) for i in range(data.shape[1])]
        self.groups_size = len(self.groups)
        self.index_value = None if index is None else index.values
        self.index_name = None if index is None else index.name


def as_data(data: object, keep_index: bool) -> object:
    """Background data in the form of `Data`; a shap ``DenseData`` (of ``shap.kmeans`` or ``shap.sample``) is one.

    Raises:
        TypeError: another kind.
        IndexError: an array of fewer than two axes.
        ValueError: no rows, or more than two axes.
        DimensionError (of shap): transposed ``DenseData``.
    """
    if is_a(data, "pandas", "DataFrame"):
        made = Data(data.values, list(data.columns), data.index if keep_index else None)
    elif is_a(data, "pandas", "Series"):
        made = Data(data.values.reshape(1, -1), list(data.index))
    elif is_sparse(data):
        made = Data(data.tocsr(), [str(i) for i in range(data.shape[1])])
    elif isinstance(data, np.ndarray):
        if data.ndim != 2:
            kind = IndexError if data.ndim < 2 else ValueError
            raise kind(
                f"xaifast.KernelExplainer: data must have shape [rows, features], got {list(data.shape)}; a single "
                "row is data.reshape(1, -1)"
            )
        made = Data(data, [str(i) for i in range(data.shape[1])])
    elif all(hasattr(data, name) for name in ("data", "weights", "groups", "transposed")):
        if data.transposed:
            raise dimension_error(
                "xaifast.KernelExplainer: data must have a row a sample, got transposed DenseData; transpose it"
            )
        made = data if data.groups is not None else as_data(data.data, keep_index)
    else:
        raise TypeError(
            "xaifast.KernelExplainer: data must be an array, a DataFrame, a Series, a sparse matrix or what "
            f"shap.kmeans and shap.sample return, got {type(data).__name__}"
        )
    if made.data.shape[0] == 0:
        raise ValueError("xaifast.KernelExplainer: data must have at least one row, got none")
    return made


def players_of(groups: list, n_columns: int) -> np.ndarray:
    """The player of each column, int64 ``[P]``.

    Raises:
        ValueError: a column in two groups or in none.
    """
    player_of = np.full(n_columns, -1, dtype=np.int64)
    for player, columns in enumerate(groups):
        player_of[columns] = player
    if (player_of < 0).any() or sum(len(columns) for columns in groups) != n_columns:
        raise ValueError(
            f"xaifast.KernelExplainer: data's groups must hold each of the {n_columns} columns once, got "
            f"{[list(columns) for columns in groups]}"
        )
    return player_of


def dimension_error(message: str) -> Exception:
    """shap's exception for wrong numbers of dimensions; ValueError where shap is missing."""
    try:
        from shap.utils._exceptions import DimensionError
    except ImportError:
        return ValueError(message)
    return DimensionError(message)


class Identity:
    """Values as they are."""

    def __str__(self) -> str:
        return "identity"

    @staticmethod
    def f(x: np.ndarray) -> np.ndarray:
        """Model output to value."""
        return x

    @staticmethod
    def finv(x: np.ndarray) -> np.ndarray:
        """Value to model output."""
        return x


class Logit:
    """Log-odds of probabilities, which are kept 1e-15 away from 0 and 1."""

    def __str__(self) -> str:
        return "logit"

    @staticmethod
    def f(x: np.ndarray) -> np.ndarray:
        """Model output to value."""
        p = np.clip(x, 1e-15, 1 - 1e-15)
        return np.log(p / (1 - p))

    @staticmethod
    def finv(x: np.ndarray) -> np.ndarray:
        """Value to model output."""
        return 1 / (1 + np.exp(-x))


def as_link(link: object) -> object:
    """``"identity"``, ``"logit"`` or a shap ``Link``.

    Raises:
        TypeError: anything else.
    """
    if isinstance(link, str) and link in ("identity", "logit"):
        return Identity() if link == "identity" else Logit()
    if is_a(link, "shap", "Link"):
        return link
    raise TypeError(
        f'xaifast.KernelExplainer: link must be "identity", "logit" or an instance of a shap Link, got {link!r}'
    )


def apply_link(link: object, values: np.ndarray) -> np.ndarray:
    """The link of each value, float64; links that are not known to take arrays are called value by value."""
    known = isinstance(link, Identity | Logit) or is_a(link, "shap", "IdentityLink", "LogitLink")
    linked = link.f(values) if known else np.vectorize(link.f, otypes=[np.float64])(values)
    return np.asarray(linked, dtype=np.float64)


def as_outputs(answer: object, n_rows: int) -> np.ndarray:
    """A model's answer as an array ``[n]`` or ``[n, K]``; a frame with one column is ``[n]``.

    Raises:
        AttributeError: an answer that is no array.
        IndexError: one without axes.
        TypeError: one that does not hold numbers.
        ValueError: another shape.
    """
    kind, outputs = None, np.asarray(answer)
    if is_a(answer, "pandas", "DataFrame") and outputs.shape[1] == 1:
        outputs = outputs[:, 0]
    if not hasattr(answer, "shape"):
        kind = AttributeError
    elif outputs.ndim == 0:
        kind = IndexError
    elif outputs.dtype.kind not in "biufO":
        kind = TypeError
    elif outputs.ndim > 2 or len(outputs) != n_rows or outputs.size == 0:
        kind = ValueError
    if kind:
        raise kind(
            f"xaifast.KernelExplainer: model must return an array of numbers [n] or [n, K] for n = {n_rows} rows, got "
            f"{outputs.dtype} {list(outputs.shape)} ({type(answer).__name__}); wrap it in a function that does"
        )
    return outputs
