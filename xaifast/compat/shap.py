"""`KernelExplainer` in place of shap's: only the import line changes.

All rows are explained together on one paired design (`xaifast.ops.sample_coalitions`), the model is called on blocks
that stay in the caches, and the estimators are those of `kernel_shap`. docs/shap.md lists what differs from shap.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from numbers import Integral, Real

import numpy as np

from ._array_game import ArrayGame, Pace, one_thread
from ._selection import Regression, kept_at_most, penalises
from ._shap_inputs import (
    apply_link,
    as_data,
    as_link,
    as_model,
    as_outputs,
    dimension_error,
    is_a,
    is_sparse,
    players_of,
)

_CALLER = "xaifast.KernelExplainer"
_DEFAULT_L1 = "num_features(10)"
_ZERO = 1e-10  # what shap calls a rounding error
_BLOCK_VALUES = 1 << 22  # coalition values held at a time


class KernelExplainer:
    """Kernel SHAP for any function of arrays, with the interface of ``shap.KernelExplainer`` 0.51.

    Args:
        model: ``model(rows [n, P]) -> [n]`` or ``[n, K]``. Rows are arrays (sparse where ``data`` is; DataFrames with
            ``keep_index``); they are written again after the call, so a model that keeps them must copy.
        data: Background: array ``[N, P]``, DataFrame, Series, sparse matrix, or the result of ``shap.kmeans`` and
            ``shap.sample`` with weights and groups of columns. The value of a coalition is the weighted mean over it.
        feature_names: Names for explanations; a DataFrame brings its own.
        link: ``"identity"``, ``"logit"`` or a shap ``Link``, applied to coalition values after the mean.
        keep_index: Give the model DataFrames with the index of the rows.
        keep_index_ordered: Sort these by index.
        batch_size: Model rows a call, or ``"auto"`` (an addition): found by the time calls take, 64 MiB at most. With
            a number the calls, and so the last bits of a model that depend on them, are the same every time.
        **kwargs: Ignored, as by shap.

    Attributes:
        expected_value: Mean output over the background in link space: float, or ``[K]``.
        fnull: The same before the link, ``[K]``.
        data, model, link, linkfv: As shap holds them.
        N, P, D: Background rows, columns, outputs.
        vector_out: Whether the model returns ``[n, K]``.
        nsamples, l1_reg, M: Of the row that was explained last.

    Raises:
        AttributeError, IndexError, TypeError, ValueError: model, data, link or the model's answer of another kind or
            shape, as in shap.

    Example:
        >>> import numpy as np
        >>> explainer = KernelExplainer(lambda x: x @ np.array([1.0, 2.0]), np.zeros((1, 2)))
        >>> explainer.shap_values(np.ones((1, 2)), silent=True).round(6).tolist()
        [[1.0, 2.0]]
    """

    def __init__(
        self,
        model: object,
        data: object,
        feature_names: list[str] | None = None,
        link: object = "identity",
        *,
        keep_index: bool = False,
        keep_index_ordered: bool = False,
        batch_size: int | str = "auto",
        **kwargs: object,
    ) -> None:
        if batch_size != "auto" and not (isinstance(batch_size, Integral) and batch_size >= 1):
            raise ValueError(f'{_CALLER}: batch_size must be "auto" or a positive int, got {batch_size!r}')
        if feature_names is not None:
            self.data_feature_names = feature_names
        elif is_a(data, "pandas", "DataFrame"):
            self.data_feature_names = list(data.columns)
        self.keep_index, self.keep_index_ordered = keep_index, keep_index_ordered
        self.link = as_link(link)
        self.linkfv = np.vectorize(self.link.f)
        self.model = as_model(model, keep_index)
        self.data = as_data(data, keep_index)
        self.N, self.P = self.data.data.shape

        self._sparse = is_sparse(self.data.data)
        background = self.data.data.toarray() if self._sparse else np.asarray(self.data.data)
        self._index = getattr(self.data, "index_value", None) if keep_index else None
        outputs = self._run(background, self._index)
        self.vector_out = outputs.ndim == 2
        self.D = outputs.shape[1] if self.vector_out else 1
        # The model's resolution, below which a game passes for additive.
        floating = outputs.dtype if outputs.dtype.kind == "f" else np.float64
        self._output_eps = float(np.finfo(floating).eps)
        outputs = outputs.reshape(self.N, self.D).astype(np.float64)
        weights = np.asarray(self.data.weights, dtype=np.float64)
        self.fnull = (outputs * weights[:, None]).sum(0)
        expected = apply_link(self.link, self.fnull)
        self.expected_value = expected if self.vector_out else float(expected[0])

        self._background = background
        self._player_of = players_of(self.data.groups, self.P)
        row_bytes = self.P * background.dtype.itemsize
        self._pace = Pace(None if batch_size == "auto" else int(batch_size), row_bytes)
        self._game = ArrayGame(self._run_blocks, background, weights, self.D, self._pace)

    def __call__(
        self, X: object, l1_reg: str | float | bool = _DEFAULT_L1, silent: bool = False, nsamples: int | str = "auto"
    ) -> object:
        """Explain rows as a ``shap.Explanation``; arguments as in `shap_values` (shap's takes no ``nsamples``)."""
        try:
            from shap import Explanation
        except ImportError as error:
            raise ImportError(
                f"{_CALLER}: explanations are shap's; pip install 'xaifast[compat]', or call shap_values"
            ) from error
        started = time.time()
        frame = is_a(X, "pandas", "DataFrame")
        names = list(X.columns) if frame else getattr(self, "data_feature_names", None)
        values = self.shap_values(X, nsamples=nsamples, l1_reg=l1_reg, silent=silent)
        repeats = (len(values), 1) if self.vector_out else len(values)
        return Explanation(
            values,
            base_values=np.tile(self.expected_value, repeats),
            data=X.to_numpy() if frame else X,
            feature_names=names,
            compute_time=time.time() - started,
        )

    def shap_values(
        self,
        X: object,
        *,
        nsamples: int | str = "auto",
        l1_reg: str | float | bool = _DEFAULT_L1,
        silent: bool = False,
        gc_collect: bool = False,
        **kwargs: object,
    ) -> np.ndarray:
        """Shapley values of rows.

        Players whose columns equal the whole background get exactly zero and take part in no coalition.

        Args:
            X: Array ``[n, P]`` or one row ``[P]``, DataFrame, Series or sparse matrix.
            nsamples: Coalitions a row, nobody and everybody not counted, or ``"auto"``: 2 M + 2048 for the row's M
                varying players. Odd numbers are rounded up; ``2**M - 2`` are all, and exact.
            l1_reg: ``"num_features(k)"`` (the k largest), ``"aic"``, ``"bic"`` or the penalty of a lasso: only the
                chosen features get values. False or 0 keeps all features.
            silent: Draw no bar.
            gc_collect: Collect garbage at the end.
            **kwargs: Ignored, as by shap.

        Returns:
            float64 ``[n, players]``, or ``[n, players, K]`` for a model that returns ``[n, K]``; of one row without the
            first axis. Sums over players to the output less `expected_value`, in link space.

        Raises:
            AssertionError: ``X`` of another kind.
            DimensionError (of shap): ``X`` has neither one nor two axes.
            IndexError: ``X`` has too few columns.
            TypeError: ``nsamples`` of another kind.
            ValueError: ``X`` has too many columns, no ``nsamples``, or a model output that is not finite.

        The design's seed comes from NumPy's global generator, so ``np.random.seed`` fixes the values.

        Cost: ``nsamples * N`` model rows a row of X, and f(x).
        """
        from tqdm.auto import tqdm

        x, index = self._as_rows(X)
        single, x = x.ndim == 1, np.atleast_2d(x)
        seed = int(np.random.randint(0, 2**63 - 1, dtype=np.int64))
        phi = np.zeros((len(x), self.data.groups_size, self.D))
        full = self._outputs_of(x, index)
        with tqdm(total=len(x), disable=silent or single) as bar:
            for rows, varying in self._by_players(x):
                phi[rows] = self._explain(x[rows], full[rows], varying, nsamples, l1_reg, seed, bar.update)
        phi[np.abs(phi) < _ZERO] = 0
        if gc_collect:
            gc.collect()
        phi = phi if self.vector_out else phi[:, :, 0]
        return phi[0] if single else phi

    def explain(self, incoming_instance: object, **kwargs: object) -> np.ndarray:
        """Values ``[players]`` or ``[players, K]`` of one row ``[1, P]``; arguments as in `shap_values`."""
        return self.shap_values(incoming_instance[:1], **{**kwargs, "silent": True})[0]

    def _as_rows(self, X: object) -> tuple[np.ndarray, np.ndarray | None]:
        """X as an array, and the index to give to the model."""
        index = None
        if self.keep_index:
            index = X.index.values if is_a(X, "pandas", "DataFrame") else np.arange(len(np.atleast_2d(X)))
        if is_a(X, "pandas", "DataFrame", "Series"):
            X = X.values
        elif is_sparse(X):
            X = X.toarray()
        if type(X) is not np.ndarray:  # its subclasses compute otherwise
            raise AssertionError(
                f"{_CALLER}: X must be an array, a DataFrame, a Series or a sparse matrix, got {type(X).__name__}"
            )
        if X.ndim not in (1, 2):
            raise dimension_error(f"{_CALLER}: X must have shape [n, {self.P}] or [{self.P}], got {list(X.shape)}")
        if X.shape[-1] != self.P:
            kind = IndexError if X.shape[-1] < self.P else ValueError
            raise kind(
                f"{_CALLER}: X must have the {self.P} columns of the background, got shape {list(X.shape)}; select "
                "the same columns"
            )
        return X, index

    def _by_players(self, x: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Blocks of rows ``[b]`` with equally many varying players, and which these are, bool ``[b, players]``."""
        varying = np.zeros((len(x), self.data.groups_size), dtype=bool)
        for j, player in enumerate(self._player_of):
            varying[:, player] |= _differs(x[:, j], self._background[:, j])
        counts = varying.sum(1)
        for count in np.unique(counts):
            rows = np.flatnonzero(counts == count)
            yield rows, varying[rows]

    def _explain(
        self,
        x: np.ndarray,
        full: np.ndarray,
        varying: np.ndarray,
        nsamples: int | str,
        l1_reg: str | float | bool,
        seed: int,
        advance: Callable[[int], object],
    ) -> np.ndarray:
        """Values ``[b, players, K]`` of rows with the same number M of varying players."""
        phi = np.zeros((*varying.shape, self.D))
        self.M = n_players = int(varying[0].sum())
        full, empty = apply_link(self.link, full), apply_link(self.link, self.fnull)
        if n_players < 2:
            phi[varying] = np.repeat(full - empty, n_players, axis=0)
            advance(len(x))
            return phi
        self.l1_reg, self.nsamples = l1_reg, _budget(nsamples, n_players)
        at_most = kept_at_most(l1_reg)
        select = penalises(l1_reg, self.nsamples / (2**n_players - 2)) and (at_most is None or at_most < n_players)
        regression = Regression(n_players, self.nsamples, seed, self.N, self._output_eps)
        bits = regression.coalitions.bits[2:].contiguous()

        same = bool((varying == varying[0]).all())
        ids = np.where(varying, varying.cumsum(1) - 1, -1)  # [b, players]
        players = np.ascontiguousarray(ids[:, self._player_of])  # [b, P]
        block = max(1, _BLOCK_VALUES // (len(bits) * self.D))
        for start in range(0, len(x), block):
            part = slice(start, start + block)
            shown = players[0] if same else players[part]
            values = self._game(x[part], shown, bits, advance)
            ends = np.stack([full[part], np.broadcast_to(empty, full[part].shape)], 1)  # [b, 2, K]
            values = np.concatenate([ends, apply_link(self.link, values)], 1)
            with one_thread():
                solved = regression.select(values, l1_reg) if select else regression.solve(values)
            phi[part][varying[part]] = solved.reshape(-1, self.D)
        return phi

    def _outputs_of(self, x: np.ndarray, index: np.ndarray | None) -> np.ndarray:
        """The model on rows themselves: float64 ``[n, K]``."""
        full = np.empty((len(x), self.D))
        for start in range(0, len(x), self._pace.rows):
            part = slice(start, start + self._pace.rows)
            outputs = self._run(x[part], None if index is None else index[part])
            full[part] = self._matrix(outputs)
        if not np.isfinite(full).all():
            b, k = np.argwhere(~np.isfinite(full))[0]
            raise ValueError(f"{_CALLER}: model outputs must be finite, got {full[b, k]} for input {b}, output {k}")
        return full

    def _run_blocks(self, rows: np.ndarray, units: int) -> np.ndarray:
        """The model on ``units`` blocks of background rows: float64 ``[units * N, K]``."""
        return self._matrix(self._run(rows, None if self._index is None else np.tile(self._index, units)))

    def _matrix(self, outputs: np.ndarray) -> np.ndarray:
        if outputs.size != len(outputs) * self.D:
            raise ValueError(
                f"{_CALLER}: model must return as many outputs as for the background ({self.D}), got "
                f"{list(outputs.shape)}"
            )
        return outputs.reshape(-1, self.D).astype(np.float64, copy=False)

    def _run(self, rows: np.ndarray, index: np.ndarray | None) -> np.ndarray:
        """The model's answer ``[n]`` or ``[n, K]`` to rows in the form that it was promised."""
        if self._sparse:
            from scipy.sparse import csr_matrix

            return as_outputs(self.model.f(csr_matrix(rows)), len(rows))
        if index is None:
            return as_outputs(self.model.f(rows), len(rows))
        import pandas as pd

        name = getattr(self.data, "index_name", None)
        frame = pd.DataFrame(rows, columns=self.data.group_names, index=pd.Index(index, name=name))
        if not self.keep_index_ordered:
            return as_outputs(self.model.f(frame), len(rows))
        order = np.argsort(index, kind="stable")
        outputs = as_outputs(self.model.f(frame.iloc[order]), len(rows))
        return outputs[np.argsort(order, kind="stable")]


def _budget(nsamples: object, n_players: int) -> int:
    """Coalitions to evaluate: whole pairs, all at most."""
    everything = 2**n_players - 2
    if isinstance(nsamples, str) and nsamples == "auto":
        nsamples = 2 * n_players + 2048
    if isinstance(nsamples, Real) and nsamples >= everything:
        return everything
    if not isinstance(nsamples, Integral) or isinstance(nsamples, bool):
        raise TypeError(f'{_CALLER}: nsamples must be "auto" or an int, got {nsamples!r}')
    if nsamples < 1:
        raise ValueError(f"{_CALLER}: nsamples must be at least 1, got {nsamples}")
    return int(nsamples) + int(nsamples) % 2


def _differs(x: np.ndarray, background: np.ndarray) -> np.ndarray:
    """Whether each entry of a column ``[n]`` differs from any background row ``[N]``: bool ``[n]``.

    Numbers are equal within NumPy's tolerance, NaN equals NaN; other objects are compared as they are.
    """
    if x.dtype.kind not in "biuf" or background.dtype.kind not in "biuf":
        return (x[:, None] != background[None, :]).astype(bool).any(1)
    values = np.unique(background)
    equal = np.isclose(x, values[0], equal_nan=True)
    equal[equal] = np.isclose(x[equal, None], values[None, :], equal_nan=True).all(1)
    return ~equal
