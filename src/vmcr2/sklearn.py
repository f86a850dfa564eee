"""scikit-learn estimators: eq. (8) on existing features, and networks trained on arrays by (V-)MCR²."""

from __future__ import annotations

import copy
import inspect
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Literal, TypeVar, get_args

import numpy as np
import torch

try:
    from sklearn.base import BaseEstimator, ClassifierMixin, ClassNamePrefixFeaturesOutMixin, TransformerMixin
    from sklearn.preprocessing import StandardScaler
    from sklearn.utils import check_random_state
    from sklearn.utils.multiclass import check_classification_targets
    from sklearn.utils.validation import check_is_fitted, validate_data  # pyrefly: ignore[missing-module-attribute]
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"vmcr2's estimators need scikit-learn: pip install 'vmcr2[sklearn]' ({error})", name="sklearn"
    ) from error
from torch import Tensor, nn

from vmcr2.checks import check_choice, check_count, check_number, refuse_distributed, refuse_masked, tensor_of
from vmcr2.dictionary import default_structure
from vmcr2.embeddings import LabelQuality, label_quality, sorted_classes
from vmcr2.errors import InputError, NumericalError
from vmcr2.latching import MomentStream
from vmcr2.linalg import bisected, check_eps_sq, unit_rows
from vmcr2.losses import SETTING_CHECKS, MCR2Loss, VMCR2Loss
from vmcr2.membership import as_membership
from vmcr2.sampling import batch_count
from vmcr2.subspaces import (
    check_components,
    class_subspaces,
    default_components,
    held_out_energies,
    nearest,
    places_in_class,
    spanned,
    subspace_energies,
    warn_of_small_classes,
)

_FLOATS = [np.float64, np.float32]
_LIKELIHOODS = 2**20  # about how many entries the table of samples by classes, which sets the temperature, may have
_RECENT = 1000  # samples from which a stream's temperature is found, if the table holds as many
_EMBEDDED = 4096  # samples embedded at once
_EPOCHS, _STEPS = 20, 120  # enough for digits, by cross-validation; at 50 epochs wrong labels are memorised
_KEPT = 4096  # samples that partial_fit remembers, approximately
_KEPT_A_CLASS = 16  # and at least this many per class
_GENERATORS = threading.RLock()  # held while torch's global random generators are seeded
_SAY_SECONDS = 10.0
_DEFAULT_TEMPERATURE = 0.1  # as a share of the energy, where nothing can be judged
# In the temperature of features that the network was trained on, the share of labels that count as drawn from all
# classes alike. It has pulled these features apart, so the likeliest temperature may be 0, and any prediction certain.
_DOUBT = 0.01  # of 0.003 to 0.1, by the log-loss of held-out thirds of the sets in results/estimators.md
_LARGEST_RATE = 1e30  # float32 holds it
_LARGEST = 1e150  # squares of larger entries overflow float64; squares of entries below its inverse underflow

Objective = Literal["vmcr2", "mcr2"]
Network = Callable[[int, int], nn.Module]
_Estimator = TypeVar("_Estimator", bound="CodingRateTransformer")


class NearestSubspaceClassifier(ClassifierMixin, BaseEstimator):
    """Assigns a sample to the class whose subspace through the origin is nearest (paper, eq. 8).

    Each class is described by the top principal directions of its uncentred second moment. The features should lie
    on the unit sphere, as MCR² features do; others work, but long samples then weigh more in the subspaces.

    Args:
        n_components: dimension of each subspace, from 1 to the number of features d; None means ⌊d/k⌋, at least 1. At d
            the subspace of every class with d samples or more is the whole space, and such classes tie. A class with
            fewer samples than this loses new samples to larger ones: choose fewer dimensions for unbalanced classes.

    Attributes:
        classes_: (k,), the labels seen in `fit`.
        components_: (k, d, n_components_), orthonormal bases; columns beyond a class's rank are zero.
        n_components_: the dimension used.
        class_count_: (k,), how many samples of each class have been seen.
        temperature_: the squared distance at which a subspace is e times less likely than one that contains the sample.
        n_features_in_: d.
    """

    _doubt = 0.0  # as `_temperature` takes it

    def __init__(self, n_components: int | None = None) -> None:
        self.n_components = n_components

    def fit(self, X: Any, y: Any) -> NearestSubspaceClassifier:
        """Finds the classes' subspaces and, by cross-validation, the temperature of `predict_proba`.

        Args:
            X: (m, d), float32 or float64; other types are converted to float64.
            y: (m,), labels of any kind.

        Raises:
            InputError: n_components is out of range (a ValueError); ValueError for wrong X or y.
        """
        with _all_or_nothing(self):
            X, y = _validated(self, X, y)
            check_classification_targets(y)
            self.classes_, labels = np.unique(y, return_inverse=True)
            k = len(_at_least_two(self.classes_))
            self._stream: MomentStream | None = None
            self._recent: tuple[Tensor, Tensor] | None = None  # a stream's latest energies and labels
            self._set_components(X.shape[1])
            features = tensor_of(_in_range(X))
            self.components_ = class_subspaces(features, torch.from_numpy(labels), k, self.n_components_).numpy()
            judged = _fold_energies(features, labels, k, self.n_components_)
            self.temperature_ = _temperature(features, *judged, self._doubt)
            self.class_count_ = np.bincount(labels, minlength=k)
        if self.n_components is None:
            _warn_of_small_classes(self, stacklevel=2)
        return self

    def partial_fit(self, X: Any, y: Any, classes: Any = None) -> NearestSubspaceClassifier:
        """Adds a batch of samples, and finds the subspaces of all samples since the first `partial_fit`.

        About k d² numbers are kept. After `fit`, which keeps none, it starts afresh with the same classes, and warns
        that it does. The temperature is that of the latest thousand samples (fewer with thousands of classes), each
        judged before it was learnt from; after the first batch it is found as in `fit`.

        Args:
            X: (m, d), as in `fit`.
            y: (m,), labels among `classes`.
            classes: (k,), all labels that will occur; required in the first call.

        Raises:
            InputError: n_components is out of range, classes are missing or differ, or y holds another class (a
                ValueError); ValueError for wrong X or y.
        """
        with _all_or_nothing(self, changed=("_stream",)):
            first = not hasattr(self, "classes_")
            X, y = _validated(self, X, y, reset=first)
            labels = _enter_classes(self, y, classes, first)
            if not first and self._stream is None:
                warnings.warn("partial_fit starts afresh: fit keeps no samples", stacklevel=2)
                first = True
            k, d = len(_at_least_two(self.classes_)), X.shape[1]
            self._set_components(d)
            if first:
                self.class_count_ = np.zeros(k, dtype=np.int64)
                self._stream, self._recent = MomentStream(k, d, torch.float64, torch.device("cpu")), None
            assert self._stream is not None
            features, places = tensor_of(_in_range(X).astype(np.float64)), torch.from_numpy(labels)
            most = min(_RECENT, max(1, _LIKELIHOODS // k))
            if self._recent is None:
                energies, owners = _fold_energies(features, labels, k, self.n_components_)
                self.temperature_ = _temperature(features, energies, owners, self._doubt)
                spread = slice(None, None, max(1, -(-len(owners) // most)))  # the table is in the order of folds
                self._recent = energies[spread], owners[spread]
            else:
                part = _spread(len(features), k)
                judged = subspace_energies(features[part], tensor_of(self.components_)), places[part]
                energies, owners = (torch.cat(parts)[-most:] for parts in zip(self._recent, judged, strict=True))
                self._recent = energies, owners
                self.temperature_ = _temperature(features, energies, owners, self._doubt)
            checked = as_membership(features, places, k)
            self._stream.add(features, checked)
            blocks, energies = self._stream.blocks(self.n_components_)
            self.components_ = spanned(blocks, energies).numpy()
            self.class_count_ = self.class_count_ + np.bincount(labels, minlength=k)
        return self

    def _set_components(self, d: int) -> None:
        self.n_components_ = (
            default_components(d, len(self.classes_)) if self.n_components is None else self.n_components
        )
        self.n_components_ = check_components(self.n_components_, d, stacklevel=3)

    def _read(self, X: Any) -> Tensor:
        """Returns checked samples, in float64."""
        check_is_fitted(self, "components_")
        return tensor_of(_in_range(_validated(self, X, reset=False)).astype(np.float64))

    def _energies(self, rows: Tensor) -> Tensor:
        """Returns ‖V^(j)ᵀ z‖² (m, k), −∞ for a class without a sample so far."""
        energies = subspace_energies(rows, tensor_of(self.components_))
        return energies.masked_fill_(torch.from_numpy(self.class_count_ == 0), -torch.inf)

    def _nearest(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the share of energy in the nearest subspace, and whose it is: a class with a sample so far."""
        return nearest(rows, tensor_of(self.components_), torch.from_numpy(self.class_count_ == 0))

    def decision_function(self, X: Any) -> np.ndarray:
        """Returns minus the squared distance to each subspace, (m, k); for two classes the difference (m,).

        It is −∞ for a class without a sample so far.
        """
        rows = self._read(X)
        energies = self._energies(rows)
        if len(self.classes_) == 2:
            return (energies[:, 1] - energies[:, 0]).numpy()
        return energies.sub_(rows.square().sum(1, keepdim=True)).numpy()

    def predict(self, X: Any) -> np.ndarray:
        """Returns the label of the nearest subspace, (m,)."""
        _, nearest = self._nearest(self._read(X))
        return self.classes_[nearest.numpy()]

    def predict_proba(self, X: Any) -> np.ndarray:
        """Returns how likely each class is, (m, k): the softmax of minus the squared distances over `temperature_`."""
        energies = self._energies(self._read(X))
        return torch.softmax(energies.sub_(energies.amax(1, keepdim=True)).div_(self.temperature_), 1).numpy()

    def score_samples(self, X: Any) -> np.ndarray:
        """Returns minus the distance to the nearest subspace over ‖z‖, (m,), from −1 to 0: higher is more normal."""
        rows = self._read(X)
        shares, _ = self._nearest(rows)
        return -(1 - shares).clamp(0, 1).sqrt().numpy()

    def __sklearn_tags__(self) -> Any:
        """Returns scikit-learn's tags: subspaces through the origin do not suit clouds of points away from it."""
        tags = super().__sklearn_tags__()  # pyrefly: ignore[missing-attribute]
        tags.classifier_tags.poor_score = True
        return tags


class CodingRateTransformer(ClassNamePrefixFeaturesOutMixin, TransformerMixin, BaseEstimator):
    """Trains a network on arrays so that the classes of its features lie on separate, orthogonal subspaces.

    Columns are first centred, and all divided by one number so that their mean variance is 1, which suits pixels and
    embeddings. If columns have units of their own, put a `StandardScaler` before this in a pipeline. The network's
    outputs are scaled to norm 1; features are float32.

    Args:
        feature_dim: d, the dimension of the features; None means 2 k, but at least 64 and at most 512.
        objective: "vmcr2", the variational objective (eq. 7); "mcr2", the exact one (eq. 1), for up to a few tens of
            classes.
        network: a function of the number of columns and of d that returns the `nn.Module` to train, from (m, columns)
            to (m, d), in float32; None means two hidden layers with BatchNorm and ReLU.
        hidden: the width of the default network's layers.
        epochs: passes over the samples in `fit`; None means 20, or more to make 120 steps. `partial_fit` makes one.
        batch_size: the largest number of samples per step, at least 2; batches are as equal as possible. With 2, and an
            odd number of samples, one batch has 3: BatchNorm does not accept a single one.
        learning_rate: of AdamW. In `fit` it falls to 0 along a half cosine.
        weight_decay: of AdamW.
        eps_sq: the squared precision ε² > 0.
        atoms_per_class: for "vmcr2", s, from 1 to feature_dim; None means ⌊d/k⌋, at least 1. Use 1 if labels may be
            wrong.
        energy: for "vmcr2", what a class's codes sum to: None for accuracy, 1 to keep the variety within a class.
        pull: for "vmcr2", exponent in (0, 1]; a smaller one pulls distant samples harder: 1 resists wrong labels.
        expand: for "vmcr2", λ ≥ 0, the weight of the features' own R beside the residual: 0.2 to 0.6, with `pull` 0.3,
            for more variety within a class.
        latch_every: for "vmcr2", epochs between latchings.
        device: where to train and embed, such as "cuda"; None means a GPU if there is one.
        random_state: an int for reproducible results, a NumPy RandomState, or None.
        verbose: whether to show progress: a bar if rich is installed, otherwise lines.

    Attributes:
        classes_: (k,), the labels seen.
        network_: the trained module.
        loss_: the criterion; with "vmcr2" it holds the dictionary.
        scaler_: the columns' means and variances, scikit-learn's StandardScaler.
        history_: mean loss of each epoch; for "vmcr2" it is the mismatch with a moving dictionary and need not fall.
        feature_dim_: d as used.
        n_features_in_: columns of X.
        feature_names_in_: their names, if X had any.
    """

    def __init__(
        self,
        feature_dim: int | None = None,
        *,
        objective: Objective = "vmcr2",
        network: Network | None = None,
        hidden: int = 512,
        epochs: int | None = None,
        batch_size: int = 256,
        learning_rate: float = 1e-3,
        weight_decay: float = 1e-2,
        eps_sq: float = 0.5,
        atoms_per_class: int | None = None,
        energy: float | None = None,
        pull: float = 1.0,
        expand: float = 0.0,
        latch_every: int = 50,
        device: str | torch.device | None = None,
        random_state: int | np.random.RandomState | None = None,
        verbose: bool = False,
    ) -> None:
        self.feature_dim = feature_dim
        self.objective = objective
        self.network = network
        self.hidden = hidden
        self.epochs = epochs
        self.batch_size = batch_size
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.eps_sq = eps_sq
        self.atoms_per_class = atoms_per_class
        self.energy = energy
        self.pull = pull
        self.expand = expand
        self.latch_every = latch_every
        self.device = device
        self.random_state = random_state
        self.verbose = verbose

    def fit(self: _Estimator, X: Any, y: Any) -> _Estimator:
        """Trains a new network.

        Args:
            X: (m, columns), numbers.
            y: (m,), labels of any kind, at least 2.

        Raises:
            InputError: a wrong parameter (a ValueError); ValueError for wrong X or y.
            NumericalError: training diverged.
        """
        self._check_parameters()
        with _all_or_nothing(self):
            X, y = _validated(self, X, y)
            check_classification_targets(y)
            X = _in_range(X)
            self.classes_, labels = np.unique(y, return_inverse=True)
            self._begin(X.shape[1])
            self._fit(X, labels)
        return self

    def partial_fit(self: _Estimator, X: Any, y: Any, classes: Any = None) -> _Estimator:
        """Continues training with one pass over a batch of samples, at the constant learning rate.

        After `fit` this tunes its network further. The scaling of columns follows all samples seen. Of the parameters
        changed since the first call, only `learning_rate` (and the classifier's `n_components`) takes effect.

        Args:
            X: (m, columns), as in `fit`.
            y: (m,), labels among `classes`.
            classes: (k,), all labels that will occur; by default those of the first batch.

        Raises:
            InputError: a wrong parameter, or classes other than before (a ValueError); ValueError for wrong X or y.
            NumericalError: training diverged.
        """
        self._check_parameters()
        with _all_or_nothing(self, changed=("network_", "loss_", "_optimizer", "scaler_", "history_")):
            first = not hasattr(self, "classes_")
            X, y = _validated(self, X, y, reset=first)
            labels = _enter_classes(self, y, np.unique(y) if first and classes is None else classes, first)
            if first:
                self._begin(X.shape[1])
            self._partial_fit(_in_range(X), labels)
        return self

    def transform(self, X: Any) -> np.ndarray:
        """Returns the features, (m, d) float32, rows of norm 1.

        Args:
            X: (m, columns).

        Raises:
            ValueError: X is wrong, or the estimator is not fitted (NotFittedError).
        """
        return self._transformed(X)

    def _transformed(self, X: Any) -> np.ndarray:
        """Returns the features as an array, whatever `set_output` has set for `transform`."""
        check_is_fitted(self, "network_")
        X = _validated(self, X, reset=False)
        return self._embed(self._inputs(X))

    def _check_parameters(self) -> None:
        for name, value in (
            ("hidden", self.hidden),
            ("batch_size", self.batch_size),
            ("latch_every", self.latch_every),
        ):
            check_count(name, value, at_least=2 if name == "batch_size" else 1)
        for name, value in (
            ("feature_dim", self.feature_dim),
            ("epochs", self.epochs),
            ("atoms_per_class", self.atoms_per_class),
        ):
            if value is not None:
                check_count(name, value)
        check_number("learning_rate", self.learning_rate, at_most=_LARGEST_RATE)
        check_number("weight_decay", self.weight_decay, positive=False, at_most=_LARGEST_RATE)
        check_number("eps_sq", self.eps_sq)
        for name in ("energy", "pull", "expand"):
            SETTING_CHECKS[name](name, getattr(self, name))
        check_choice("objective", self.objective, get_args(Objective))
        self._device()
        if self.network is not None and (isinstance(self.network, nn.Module) or not _takes_two(self.network)):
            got = type(self.network).__name__ if isinstance(self.network, nn.Module) else repr(self.network)
            raise InputError(
                "network must be None or a function of two ints that builds one, as lambda columns, feature_dim: "
                f"nn.Linear(columns, feature_dim), got {got}"
            )

    def _feature_dim(self, k: int) -> int:
        return min(512, max(64, 2 * k)) if self.feature_dim is None else self.feature_dim

    def _device(self) -> torch.device:
        if self.device is None:
            return torch.device("cuda" if torch.cuda.is_available() else "cpu")
        try:
            if torch.empty(0, device=self.device).is_meta:
                raise RuntimeError("meta holds no values")
            return torch.device(self.device)
        except (RuntimeError, TypeError, AssertionError) as error:
            raise InputError(f"device must be one that torch can use here, got {self.device!r}: {error}") from error

    def _begin(self, columns: int) -> None:
        """Builds what is to be trained, for this many columns and `classes_`."""
        k = len(_at_least_two(self.classes_))
        self.feature_dim_ = self._feature_dim(k)
        check_eps_sq(self.feature_dim_, self.eps_sq)
        self.scaler_ = StandardScaler()
        self.history_: list[float] = []
        device = self._device()
        self._seed = int(check_random_state(self.random_state).randint(2**31))
        with _seeded(self._seed, device), torch.device("cpu"):
            if self.network is None:
                network = _mlp(columns, self.feature_dim_, self.hidden)
            else:
                network = self.network(columns, self.feature_dim_)
        if not isinstance(network, nn.Module):
            raise InputError(f"network must return a torch.nn.Module, got {type(network).__name__}")
        trained = [each for each in network.parameters() if each.requires_grad]
        dtypes = {str(each.dtype) for each in network.parameters() if each.is_floating_point()}
        if not trained or dtypes != {"torch.float32"}:
            got = ", ".join(sorted(dtypes)) if trained else "none to train"
            raise InputError(f"network must return a module with parameters to train, all in float32, got {got}")
        self.network_ = network.to(device)
        if self.objective == "mcr2":
            loss = MCR2Loss(k, eps_sq=self.eps_sq)
        else:
            with torch.device("cpu"):
                loss = VMCR2Loss(
                    k,
                    self.feature_dim_,
                    atoms_per_class=self.atoms_per_class,
                    eps_sq=self.eps_sq,
                    energy=self.energy,
                    pull=self.pull,
                    expand=self.expand,
                    structure=default_structure(k),
                )
        self.loss_ = loss.to(device)
        self._optimizer = torch.optim.AdamW(network.parameters(), lr=self.learning_rate, weight_decay=self.weight_decay)

    def _inputs(self, X: np.ndarray) -> np.ndarray:
        """Returns X scaled, as float32, computed in float64 so that a large mean costs no digits."""
        assert self.scaler_.mean_ is not None
        assert self.scaler_.var_ is not None
        scale = np.sqrt(self.scaler_.var_.mean()) or 1.0
        return ((X.astype(np.float64) - self.scaler_.mean_) / scale).astype(np.float32)

    def _fit(self, X: np.ndarray, labels: np.ndarray) -> None:
        self.scaler_.fit(X.astype(np.float64))
        inputs, places = tensor_of(self._inputs(X)), torch.from_numpy(labels)
        epochs = self.epochs
        if epochs is None:
            epochs = max(_EPOCHS, -(-_STEPS // batch_count(len(inputs), self.batch_size)))
        progress = _Progress(type(self).__name__, epochs, bool(self.verbose))
        with _seeded(self._seed, self._device()), progress:
            for epoch in range(epochs):
                if epoch % self.latch_every == 0:
                    self._latch(inputs, places)
                self._epoch(inputs, places, lambda share, epoch=epoch: (epoch + share) / epochs)
                progress.show(epoch + 1, self.history_[-1])
            self._recompute_statistics(inputs)

    def _partial_fit(self, X: np.ndarray, labels: np.ndarray) -> None:
        self.scaler_.partial_fit(X.astype(np.float64))
        with _seeded(self._seed + len(self.history_), self._device()):
            self._epoch(tensor_of(self._inputs(X)), torch.from_numpy(labels), None)

    def _batches(self, inputs: Tensor, labels: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Returns the batches of a shuffled epoch; in `partial_fit` there may be a single sample."""
        device, number = self._device(), max(1, batch_count(len(inputs), self.batch_size))
        parts = torch.randperm(len(inputs), device="cpu").tensor_split(number)
        return [(inputs[part].to(device), labels[part].to(device)) for part in parts]

    def _features(self, inputs: Tensor, network: nn.Module | None = None) -> Tensor:
        features = (network or self.network_)(inputs)
        if not isinstance(features, Tensor) or features.shape != (len(inputs), self.feature_dim_):
            got = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
            raise InputError(f"network must map to shape ({len(inputs)}, feature_dim = {self.feature_dim_}), got {got}")
        return unit_rows(features).float()

    def _latch(self, inputs: Tensor, labels: Tensor) -> None:
        if isinstance(self.loss_, VMCR2Loss):
            self.network_.train()
            self.loss_.latch_from(self._features, self._batches(inputs, labels))

    def _epoch(self, inputs: Tensor, labels: Tensor, done: Callable[[float], float] | None) -> None:
        self.network_.to(self._device()).train(len(inputs) > 1)
        self.loss_.to(self._device()).train()
        batches = self._batches(inputs, labels)
        total = 0.0
        for step, (part, places) in enumerate(batches):
            rate = self.learning_rate
            if done is not None:
                rate *= 0.5 * (1 + np.cos(np.pi * done((step + 0.5) / len(batches))))
            for group in self._optimizer.param_groups:
                group["lr"] = rate
            self._optimizer.zero_grad()
            features = self._features(part)
            _check_trained(features)
            loss = self.loss_(features, places)
            loss.backward()
            self._optimizer.step()
            total += loss.item() * len(part)
        self.history_.append(total / len(inputs))
        # The last step may have spoilt the network with no loss after it to show that.
        self.network_.eval()
        with torch.no_grad():
            _check_trained(self._features(batches[-1][0]))

    @torch.no_grad()
    def _recompute_statistics(self, inputs: Tensor) -> None:
        """Sets BatchNorm's running statistics to those of the trained network over all samples."""
        norms = [module for module in self.network_.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
        norms = [norm for norm in norms if norm.track_running_stats]
        if not norms or len(inputs) < 2:
            return
        momenta = [norm.momentum for norm in norms]
        self.network_.eval()
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # the plain mean over batches
            norm.train()
        for part, _ in self._batches(inputs, inputs.new_zeros(len(inputs))):
            self.network_(part)
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        self.network_.eval()

    @torch.no_grad()
    def _embed(self, inputs: np.ndarray) -> np.ndarray:
        device = self._device()
        network, parts = self.network_.to(device).eval(), tensor_of(inputs).split(_EMBEDDED)
        if device.type == "cpu" and isinstance(network, _MLP):  # a user's own network is promised float32
            # In float64, a sample's features do not vary, by rounding, with the others that it is embedded with.
            network, parts = copy.deepcopy(network).double(), tuple(part.double() for part in parts)
        features = torch.cat([self._features(part.to(device), network).cpu() for part in parts])
        if not features.isfinite().all():
            raise NumericalError(
                "the network's features of these samples are not finite: X is far from what was fitted"
            )
        return features.numpy()

    @property
    def _n_features_out(self) -> int:
        return self.feature_dim_

    def __getstate__(self) -> dict[str, Any]:
        """Returns the state to pickle, on the CPU, so that it loads where there is no GPU."""
        state = dict(super().__getstate__())
        if "network_" in state and any(p.device.type != "cpu" for p in self.network_.parameters()):
            names = ("network_", "loss_", "_optimizer")
            copies = dict(zip(names, copy.deepcopy(tuple(state[name] for name in names)), strict=True))
            copies["network_"].cpu()
            copies["loss_"].cpu()
            for slots in copies["_optimizer"].state.values():
                slots.update({name: value.cpu() for name, value in slots.items() if isinstance(value, Tensor)})
            state.update(copies)
        return state

    def __sklearn_tags__(self) -> Any:
        """Returns scikit-learn's tags: y is needed, features are float32."""
        tags = super().__sklearn_tags__()  # pyrefly: ignore[missing-attribute]
        tags.target_tags.required = True
        tags.transformer_tags.preserves_dtype = ["float32"]
        return tags


class CodingRateClassifier(ClassifierMixin, CodingRateTransformer):
    """`CodingRateTransformer` with the nearest-subspace classifier of eq. (8) on its features.

    Args:
        feature_dim: as in `CodingRateTransformer`, like all others except n_components.
        n_components: dimension of each class's subspace; None means ⌊d/k⌋, at least 1.
        objective: see there.
        network: see there.
        hidden: see there.
        epochs: see there.
        batch_size: see there.
        learning_rate: see there.
        weight_decay: see there.
        eps_sq: see there.
        atoms_per_class: see there.
        energy: see there.
        pull: see there.
        expand: see there.
        latch_every: see there.
        device: see there.
        random_state: see there.
        verbose: see there.

    Attributes:
        subspaces_: the fitted `NearestSubspaceClassifier` on features.
        classes_: (k,), the labels seen; all other attributes as in `CodingRateTransformer`.
    """

    def __init__(
        self,
        feature_dim: int | None = None,
        *,
        n_components: int | None = None,
        objective: Objective = "vmcr2",
        network: Network | None = None,
        hidden: int = 512,
        epochs: int | None = None,
        batch_size: int = 256,
        learning_rate: float = 1e-3,
        weight_decay: float = 1e-2,
        eps_sq: float = 0.5,
        atoms_per_class: int | None = None,
        energy: float | None = None,
        pull: float = 1.0,
        expand: float = 0.0,
        latch_every: int = 50,
        device: str | torch.device | None = None,
        random_state: int | np.random.RandomState | None = None,
        verbose: bool = False,
    ) -> None:
        super().__init__(
            feature_dim,
            objective=objective,
            network=network,
            hidden=hidden,
            epochs=epochs,
            batch_size=batch_size,
            learning_rate=learning_rate,
            weight_decay=weight_decay,
            eps_sq=eps_sq,
            atoms_per_class=atoms_per_class,
            energy=energy,
            pull=pull,
            expand=expand,
            latch_every=latch_every,
            device=device,
            random_state=random_state,
            verbose=verbose,
        )
        self.n_components = n_components

    def _begin(self, columns: int) -> None:
        super()._begin(columns)
        self._kept: tuple[np.ndarray, np.ndarray] | None = None  # samples and labels, for a later partial_fit

    def _check_components(self) -> None:
        if self.n_components is not None:
            check_count("n_components", self.n_components, at_most=self.feature_dim_, limit="feature_dim")

    def _fit(self, X: np.ndarray, labels: np.ndarray) -> None:
        self._check_components()
        super()._fit(X, labels)
        self._keep(X, labels)
        components = self.n_components or default_components(self.feature_dim_, len(self.classes_))
        self.subspaces_ = _of_trained_features(components).fit(self._embed(self._inputs(X)), labels)
        if self.n_components is None:
            _warn_of_small_classes(self.subspaces_, stacklevel=3)

    def _partial_fit(self, X: np.ndarray, labels: np.ndarray) -> None:
        self._check_components()
        super()._partial_fit(X, labels)
        X, labels = self._keep(X, labels)
        features = tensor_of(self._embed(self._inputs(X)))
        before = getattr(self, "subspaces_", None)
        self.subspaces_ = _of_all_classes(features, labels, len(self.classes_), self.n_components, before)

    def _keep(self, X: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns some samples of each class, from those kept before and these, and keeps them.

        Samples are kept, not features, since features from an earlier state of the network would be of no use.
        """
        if self._kept is not None:
            X, labels = np.concatenate([self._kept[0], X]), np.concatenate([self._kept[1], labels])
        drawn = np.random.default_rng(self._seed + len(self.history_)).permutation(len(labels))
        order = drawn[np.argsort(labels[drawn], kind="stable")]
        most = max(_KEPT_A_CLASS, _KEPT // len(self.classes_))
        kept = order[places_in_class(torch.from_numpy(labels[order])).numpy() < most]
        self._kept = X[kept], labels[kept]
        return self._kept

    def decision_function(self, X: Any) -> np.ndarray:
        """Returns minus the squared distance to each subspace, (m, k); for two classes the difference (m,)."""
        features = self._transformed(X)
        return self.subspaces_.decision_function(features)

    def predict(self, X: Any) -> np.ndarray:
        """Returns the label of the nearest subspace, (m,)."""
        features = self._transformed(X)
        return self.classes_[self.subspaces_.predict(features)]

    def predict_proba(self, X: Any) -> np.ndarray:
        """Returns how likely each class is, (m, k).

        The temperature is found on the training set, which the network has seen, as if one label in a hundred were
        drawn from all classes alike. Probabilities of hard new samples may still be too confident;
        `sklearn.calibration.CalibratedClassifierCV` corrects that.
        """
        features = self._transformed(X)
        return self.subspaces_.predict_proba(features)

    def score_samples(self, X: Any) -> np.ndarray:
        """Returns minus the distance to the nearest subspace, (m,), from −1 to 0: higher is more normal."""
        features = self._transformed(X)
        return self.subspaces_.score_samples(features)

    def label_quality(self, X: Any, y: Any) -> LabelQuality:
        """Returns how well each label fits its sample, for the samples the estimator was fitted on.

        The classes' subspaces are found from these samples, so give it many of each class; some of their labels may be
        wrong. For new samples, compare their labels with `predict` instead.

        Args:
            X: (m, columns).
            y: (m,), the labels to judge, among `classes_`.

        Returns:
            The result of `vmcr2.label_quality` for the features, at the estimator's `n_components`.

        Raises:
            InputError: y holds other labels (a ValueError).
        """
        features = self._transformed(X)
        strange = np.setdiff1d(sorted_classes(y, len(features), "y", "X")[0], self.classes_)
        if len(strange):
            raise InputError(f"y must hold only labels in classes_, got {strange[:1].tolist()[0]!r}")
        return label_quality(features, y, self.n_components)


def _in_range(X: np.ndarray) -> np.ndarray:
    largest = float(np.abs(X).max())
    if largest > _LARGEST:
        raise InputError(f"X must have entries of at most {_LARGEST:g} in size, got {largest:g}: float64 overflows")
    if 0 < largest < 1 / _LARGEST:
        raise InputError(
            f"X must have entries above {1 / _LARGEST:g} in size, got {largest:g}: squares are 0 in float64"
        )
    return X


def _at_least_two(classes: np.ndarray) -> np.ndarray:
    if len(classes) < 2:
        raise InputError(f"y must hold at least 2 classes, got {len(classes)} class: {classes.tolist()}")
    return classes


def _validated(estimator: Any, X: Any, *y: Any, **options: Any) -> Any:
    """Returns X, and y if given, as scikit-learn validates them; refuses masks, which it would drop.

    Tensors may have a gradient, be on a GPU or hold bfloat16, of which NumPy knows nothing.
    """
    given = []
    for name, array in zip("Xy", (X, *y), strict=False):
        refuse_masked(name, array)
        refuse_distributed(name, array)
        given.append(_plain_tensor(array) if isinstance(array, Tensor) else array)
    for labels in given[1:]:
        _refuse_unsortable("y", labels)
    return validate_data(estimator, *given, dtype=_FLOATS, **options)


def _refuse_unsortable(name: str, labels: Any) -> None:
    """Raises InputError if labels are missing or of several kinds: NumPy would fail, or take 3 and "3" for the same."""
    try:
        array = np.asarray(labels)
    except (TypeError, ValueError):  # scikit-learn will say what is wrong
        return
    if array.dtype.kind not in "OUmM":
        return
    if array.ndim == 1:
        sorted_classes(labels, len(array), name, "X")
    elif array.ndim == 2 and array.shape[1] == 1:  # scikit-learn takes a column, too
        sorted_classes(array[:, 0], len(array), name, "X")


def _warn_of_small_classes(fitted: NearestSubspaceClassifier, stacklevel: int) -> None:
    sizes = torch.from_numpy(fitted.class_count_)
    cure = f"give a smaller n_components, such as {max(1, int(sizes.min()) // 4)}"
    warn_of_small_classes(sizes, fitted.n_components_, cure, stacklevel + 1)


def _plain_tensor(tensor: Tensor) -> Tensor:
    tensor = tensor.detach().cpu()
    return tensor.float() if tensor.dtype == torch.bfloat16 else tensor


def _enter_classes(estimator: Any, y: Any, classes: Any, first: bool) -> np.ndarray:
    """Sets `classes_` in the first call of partial_fit, and returns y as indices into them."""
    check_classification_targets(y)
    if first and classes is None:
        raise InputError("classes must be given in the first call of partial_fit")
    if classes is not None:
        classes = list(classes) if isinstance(classes, set | frozenset) else classes
        _refuse_unsortable("classes", classes)
        classes = np.asarray(classes)
        if classes.ndim != 1:
            raise InputError(f"classes must be a list or an array (k,) of labels, got shape {classes.shape}")
    given = None if classes is None else np.unique(classes)
    known = given if first else estimator.classes_
    assert known is not None
    if given is not None and not np.array_equal(given, known):
        raise InputError(f"classes must be those of the first call, {known.tolist()}, got {given.tolist()}")
    strange = np.setdiff1d(y, known)
    if len(strange):
        raise InputError(f"y must hold labels among classes, {known.tolist()}, got {strange[:1].tolist()[0]!r}")
    if first:
        estimator.classes_ = known
    return np.searchsorted(known, y)


def _fold_energies(features: Tensor, labels: np.ndarray, k: int, n_components: int) -> tuple[Tensor, Tensor]:
    """Returns the energies of samples in subspaces found without them, (n, k), and their labels (n,), by folds."""
    places = torch.from_numpy(labels)
    judged = torch.zeros(len(features), dtype=torch.bool, device="cpu")
    judged[_spread(len(features), k)] = True
    tables, owners = [features.new_zeros(0, k, dtype=torch.float64)], [places[:0]]
    for rows, energies in held_out_energies(features, places, k, n_components, judged=judged):
        tables.append(energies)
        owners.append(places[rows])
    return torch.cat(tables), torch.cat(owners)


def _spread(m: int, k: int) -> slice:
    """Returns which of m samples to judge, so that the table of their energies in k subspaces stays small."""
    return slice(None, None, max(1, m * k // _LIKELIHOODS))


def _temperature(features: Tensor, energies: Tensor, labels: Tensor, doubt: float) -> float:
    """Returns the τ at which the labels are likeliest, p_j ∝ exp(‖V^(j)ᵀ z‖²/τ); log-likelihood is concave in 1/τ.

    Args:
        features: (m, d); their scale is used if nothing could be judged.
        energies: ‖V^(j)ᵀ z‖² of the judged samples, (n, k).
        labels: their labels, (n,).
        doubt: the share of the labels, in [0, 1), that counts as drawn from all classes alike.
    """
    known = energies.gather(1, labels[:, None])[:, 0] > 0  # the others' class has no subspace yet
    if not known.any():
        return _DEFAULT_TEMPERATURE * (float(features.double().square().sum(1).mean()) or 1.0)
    scale = float(energies[known].amax(1).mean())
    table, own = energies[known].double() / scale, labels[known, None]
    gains = (table - table.gather(1, own))[:, (table > 0).any(0)]  # of the classes that have a subspace

    def falls(exponent: float) -> bool:
        """Whether the likelihood falls from 1/τ = 10**exponent onwards."""
        expected = (torch.softmax(10**exponent * gains, 1) * gains).sum(1)
        return not (expected - doubt * gains.mean(1)).mean() < 0

    return scale / 10 ** float(bisected(falls, -2.0, 5.0, 30)[1])


def _of_trained_features(n_components: int | None) -> NearestSubspaceClassifier:
    classifier = NearestSubspaceClassifier(n_components)
    classifier._doubt = _DOUBT
    return classifier


def _of_all_classes(
    features: Tensor, labels: np.ndarray, k: int, n_components: int | None, before: NearestSubspaceClassifier | None
) -> NearestSubspaceClassifier:
    """Returns the classifier of k classes; those without a sample keep what they had before."""
    classifier = _of_trained_features(n_components).partial_fit(features.numpy(), labels, np.arange(k))
    classifier._stream = classifier._recent = None
    if before is not None:
        absent = np.bincount(labels, minlength=k) == 0
        r = min(classifier.n_components_, before.n_components_)
        classifier.components_[absent, :, :r] = before.components_[absent, :, :r]
        classifier.class_count_[absent] = before.class_count_[absent]
    return classifier


class _MLP(nn.Sequential):
    """The default network, which can be evaluated in float64 too."""


def _mlp(columns: int, feature_dim: int, hidden: int) -> _MLP:
    layers: list[nn.Module] = []
    for before in (columns, hidden):
        layers += [nn.Linear(before, hidden, bias=False), nn.BatchNorm1d(hidden), nn.ReLU()]
    return _MLP(*layers, nn.Linear(hidden, feature_dim)).float()  # whatever the default dtype


def _takes_two(network: Any) -> bool:
    """Whether `network` can be called with two arguments, as far as its signature shows."""
    try:
        inspect.signature(network).bind(1, 1)
    except TypeError:  # what cannot be called has no signature either
        return False
    except ValueError:
        return callable(network)
    return True


def _check_trained(features: Tensor) -> None:
    if not features.isfinite().all():
        raise NumericalError("training diverged: the network's features are not finite; lower learning_rate")


@contextmanager
def _all_or_nothing(estimator: BaseEstimator, changed: Sequence[str] = ()) -> Iterator[None]:
    """Restores the estimator's attributes if a fit fails or is stopped: no new labels beside old subspaces.

    Args:
        estimator: the estimator.
        changed: attributes that are changed in place, not replaced: they are copied beforehand, together.
    """
    before = dict(vars(estimator))
    names = [name for name in changed if name in before]
    before.update(zip(names, copy.deepcopy([before[name] for name in names]), strict=True))
    try:
        with torch.inference_mode(False), torch.enable_grad():  # in whatever mode it is called
            yield
    except BaseException:
        vars(estimator).clear()
        vars(estimator).update(before)
        raise


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Seeds torch's generators within, and restores them after; threads, which share them, take turns."""
    with _GENERATORS, torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


class _Progress:
    """Shows epochs as a bar if rich is installed, otherwise as lines every ten seconds; nothing unless asked to."""

    def __init__(self, title: str, epochs: int, shown: bool) -> None:
        self.title, self.epochs, self.shown = title, epochs, shown
        self.said = time.monotonic()
        self.bar: Any = None
        if shown:
            try:
                from rich.progress import Progress
            except ModuleNotFoundError:
                return
            self.bar = Progress()
            self.task = self.bar.add_task(title, total=epochs)

    def __enter__(self) -> _Progress:
        if self.bar is not None:
            self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bar is not None:
            self.bar.stop()

    def show(self, epoch: int, loss: float) -> None:
        if self.bar is not None:
            self.bar.update(self.task, completed=epoch, description=f"{self.title}  loss {loss:.4g}")
        elif self.shown and (epoch in (1, self.epochs) or time.monotonic() - self.said >= _SAY_SECONDS):
            self.said = time.monotonic()
            print(f"{self.title}: epoch {epoch} of {self.epochs}, loss {loss:.4g}", flush=True)
