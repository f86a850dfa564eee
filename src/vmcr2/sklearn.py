"""scikit-learn estimators for features that exist already."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

try:
    from sklearn.base import BaseEstimator, ClassifierMixin
    from sklearn.utils.multiclass import check_classification_targets
    from sklearn.utils.validation import check_is_fitted, validate_data  # pyrefly: ignore[missing-module-attribute]
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"vmcr2's estimators need scikit-learn: pip install 'vmcr2[sklearn]' ({error})", name="sklearn"
    ) from error

from vmcr2.errors import InputError
from vmcr2.subspaces import class_subspaces, default_components, subspace_energies


class NearestSubspaceClassifier(ClassifierMixin, BaseEstimator):
    """Assigns a sample to the class whose subspace through the origin is nearest (paper, eq. 8).

    Each class is described by the top principal directions of its uncentred second moment. The features should lie
    on the unit sphere, as MCR² features do; others work, but long samples then weigh more in the subspaces.

    Args:
        n_components: dimension of each subspace, from 1 to the number of features; None means ⌊d/k⌋, 1 at least.

    Attributes:
        classes_: (k,), the labels seen in `fit`.
        components_: (k, d, n_components_), orthonormal bases; columns beyond a class's rank are zero.
        n_components_: the dimension used.
        n_features_in_: d.
    """

    def __init__(self, n_components: int | None = None) -> None:
        self.n_components = n_components

    def fit(self, X: Any, y: Any) -> NearestSubspaceClassifier:
        """Finds the classes' subspaces.

        Args:
            X: (m, d), float32 or float64; other types are converted to float64.
            y: (m,), labels of any kind.

        Raises:
            InputError: n_components is out of range (a ValueError); ValueError for wrong X or y.
        """
        X, y = validate_data(self, X, y, dtype=[np.float64, np.float32])
        check_classification_targets(y)
        self.classes_, labels = np.unique(y, return_inverse=True)
        if len(self.classes_) < 2:
            raise InputError(f"y must hold at least 2 classes, got 1 class: {self.classes_[0]!r}")
        k, d = len(self.classes_), X.shape[1]
        self.n_components_ = default_components(d, k) if self.n_components is None else self.n_components
        bases = class_subspaces(_tensor(X), torch.as_tensor(labels), k, self.n_components_)
        self.components_ = bases.numpy()
        return self

    def decision_function(self, X: Any) -> np.ndarray:
        """Returns minus the squared distance to each subspace, (m, k); for two classes the difference (m,)."""
        check_is_fitted(self)
        X = validate_data(self, X, dtype=[np.float64, np.float32], reset=False)
        dtype = np.result_type(X.dtype, self.components_.dtype)
        energies = subspace_energies(_tensor(X.astype(dtype)), _tensor(self.components_.astype(dtype))).numpy()
        if len(self.classes_) == 2:
            return energies[:, 1] - energies[:, 0]
        return energies - np.square(X.astype(dtype)).sum(1, keepdims=True)

    def predict(self, X: Any) -> np.ndarray:
        """Returns the label of the nearest subspace, (m,)."""
        scores = self.decision_function(X)
        nearest = (scores > 0).astype(int) if scores.ndim == 1 else scores.argmax(1)
        return self.classes_[nearest]

    def __sklearn_tags__(self) -> Any:
        """Returns scikit-learn's tags: subspaces through the origin suit no cloud of points away from it."""
        tags = super().__sklearn_tags__()  # pyrefly: ignore[missing-attribute]
        tags.classifier_tags.poor_score = True
        return tags


def _tensor(array: np.ndarray) -> torch.Tensor:
    """Returns a tensor of the array, copied where torch could not share it."""
    array = np.ascontiguousarray(array)
    return torch.from_numpy(array if array.flags.writeable else array.copy())
