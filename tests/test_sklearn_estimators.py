"""The estimators: scikit-learn's conventions, what they learn, streams, odd class sizes, pipelines and pickles."""

import copy
import pickle
import sys
from concurrent.futures import ThreadPoolExecutor

import joblib
import numpy as np
import pytest
import torch
from conftest import normal, random_labels, unit_rows
from sklearn.base import clone
from sklearn.datasets import load_digits
from sklearn.metrics import log_loss, roc_auc_score
from sklearn.model_selection import GridSearchCV, cross_val_score, train_test_split
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

import vmcr2
from vmcr2.sklearn import _of_trained_features

SMALL = {"hidden": 32, "epochs": 3, "random_state": 0}


MISSING_OR_MIXED = {
    "None": ["a", "b", None] * 10,
    "NaN": np.array(["a", "b", np.nan] * 10, dtype=object),
    "no date": np.array(["2026-01-01", "2026-01-02", "NaT"] * 10, dtype="datetime64[D]"),
    "numbers and text": [3, "3", "a"] * 10,
}


@pytest.mark.parametrize("kind", [vmcr2.NearestSubspaceClassifier, vmcr2.CodingRateTransformer])
@pytest.mark.parametrize("labels", MISSING_OR_MIXED.values(), ids=MISSING_OR_MIXED)
def test_labels_that_are_missing_or_of_several_kinds_are_named(kind, labels):
    for call in (kind().fit, kind().partial_fit):
        for given in (labels, np.array(labels, dtype=object)[:, None]):
            with pytest.raises(vmcr2.InputError, match="y must (be of one kind|not be missing)"):
                call(unit_rows(30, 4).numpy(), given)
    with pytest.raises(vmcr2.InputError, match="classes must (be of one kind|not be missing)"):
        kind().partial_fit(unit_rows(30, 4).numpy(), ["a", "b", "c"] * 10, classes=labels)


@pytest.fixture(scope="module")
def digits():
    pixels, labels = load_digits(return_X_y=True)
    return train_test_split(pixels, labels, test_size=0.3, random_state=0, stratify=labels)


@pytest.fixture(scope="module")
def fitted(digits):
    train, _, labels, _ = digits
    return vmcr2.CodingRateClassifier(random_state=0).fit(train, labels)


@parametrize_with_checks(
    [
        vmcr2.CodingRateTransformer(hidden=16, epochs=2),
        vmcr2.CodingRateTransformer(hidden=16, epochs=2, objective="mcr2"),
        vmcr2.CodingRateClassifier(hidden=32, epochs=12, feature_dim=16),
    ]
)
def test_scikit_learn_conventions(estimator, check):
    check(estimator)


def test_defaults_learn_digits(digits, fitted):
    train, test, _, expected = digits
    assert fitted.score(test, expected) > 0.97
    features = fitted.transform(test)
    assert features.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(features, axis=1), 1, rtol=1e-5)
    found, raw = vmcr2.report(features, expected), vmcr2.report(test - train.mean(0), expected)
    assert found.reduction / found.maximum > 2 * raw.reduction / raw.maximum
    assert len(fitted.history_) == 24  # 5 batches an epoch: what 120 steps take
    assert fitted.feature_dim_ == 64


def test_exact_objective_learns_digits(digits):
    train, test, labels, expected = digits
    found = vmcr2.CodingRateClassifier(objective="mcr2", epochs=10, random_state=0).fit(train, labels)
    assert found.score(test, expected) > 0.95
    assert isinstance(found.loss_, vmcr2.MCR2Loss)


def test_probabilities_follow_predictions(digits, fitted):
    _, test, _, expected = digits
    chances = fitted.predict_proba(test)
    np.testing.assert_allclose(chances.sum(1), 1)
    assert (fitted.classes_[chances.argmax(1)] == fitted.predict(test)).all()
    assert (fitted.decision_function(test).argmax(1) == chances.argmax(1)).all()
    assert log_loss(expected, chances) < 0.3


def test_probabilities_of_hard_new_samples_are_better_than_none(digits):
    """The network parts the classes of its training set whatever they are like."""
    train, test, labels, expected = digits
    noise = np.random.default_rng(0)
    train, test = (part + noise.normal(0, 8, part.shape) for part in (train[:300], test))
    found = vmcr2.CodingRateClassifier(random_state=0, epochs=10).fit(train, labels[:300])
    assert log_loss(expected, found.predict_proba(test)) < np.log(10)
    found.partial_fit(train[:64], labels[:64])
    assert log_loss(expected, found.predict_proba(test)) < np.log(10)


@pytest.mark.parametrize("k", [2, 10, 100])
def test_the_temperature_of_trained_features_is_not_0_where_all_are_told_apart(k):
    """One label in a hundred counts as drawn from all classes: a right one then has the chance 0.99 + 0.01/k."""
    labels = np.repeat(np.arange(k), 4)
    found = _of_trained_features(1).fit(np.eye(k)[labels], labels)
    np.testing.assert_allclose(found.predict_proba(np.eye(k)).diagonal(), 0.99 + 0.01 / k, rtol=1e-3)
    assert vmcr2.NearestSubspaceClassifier(1).fit(np.eye(k)[labels], labels).predict_proba(np.eye(k)).min() < 1e-9


def test_classes_that_are_still_to_come_do_not_change_the_temperature(digits):
    train, _, labels, _ = digits
    few, many = (_of_trained_features(3).partial_fit(train, labels, classes=range(k)) for k in (10, 500))
    assert many.temperature_ == pytest.approx(few.temperature_, rel=1e-3)


def test_temperature_makes_probabilities_honest(digits):
    """Where subspaces overlap, a chance of 0.8 is right in about 8 of 10 cases."""
    train, test, labels, expected = digits
    found = vmcr2.NearestSubspaceClassifier(1).fit(train / 16, labels)
    chances = found.predict_proba(test / 16)
    right = found.predict(test / 16) == expected
    assert abs(chances.max(1).mean() - right.mean()) < 0.05
    sharper = chances**4 / (chances**4).sum(1, keepdims=True)
    assert log_loss(expected, chances) < log_loss(expected, sharper)


@pytest.mark.parametrize("kind", ["subspaces", "network"])
def test_novel_samples_score_lower(digits, kind):
    train, test, labels, expected = digits
    known = labels < 8
    if kind == "network":
        estimator = vmcr2.CodingRateClassifier(random_state=0, epochs=10)
    else:
        estimator = vmcr2.NearestSubspaceClassifier(6)
    scores = estimator.fit(train[known], labels[known]).score_samples(test)
    assert scores.min() >= -1
    assert scores.max() <= 0
    assert roc_auc_score(expected < 8, scores) > 0.8


def test_wrong_labels_are_found(digits):
    train, _, labels, _ = digits
    given = labels.copy()
    given[::5] = (given[::5] + 1 + np.arange(len(given[::5])) % 9) % 10
    found = vmcr2.CodingRateClassifier(random_state=0).fit(train, given).label_quality(train, given)
    assert roc_auc_score(given != labels, -found.scores) > 0.98
    assert (found.suggested == labels)[given != labels].mean() > 0.9


def test_a_stream_of_batches_gives_the_subspaces_of_the_whole():
    z, labels = unit_rows(90, 6).numpy(), random_labels(90, 4).numpy()
    whole = vmcr2.NearestSubspaceClassifier(2).fit(z, labels)
    streamed = vmcr2.NearestSubspaceClassifier(2)
    for start in range(0, 90, 15):  # more samples than k d on the way
        streamed.partial_fit(z[start : start + 15], labels[start : start + 15], classes=np.arange(4))
    for ours, theirs in zip(streamed.components_, whole.components_, strict=True):
        np.testing.assert_allclose(ours @ ours.T, theirs @ theirs.T, atol=1e-8)
    again = pickle.loads(pickle.dumps(streamed)).partial_fit(z[:5], labels[:5])
    assert np.isfinite(again.predict_proba(z)).all()


@pytest.mark.parametrize("scale", [1e-4, 1e-2])
def test_a_short_sample_leaves_a_streams_temperature(scale):
    z, labels = unit_rows(500, 8).numpy(), np.arange(500) % 3
    z[np.arange(500), labels] += 1
    z /= np.linalg.norm(z, axis=1, keepdims=True)
    found = vmcr2.NearestSubspaceClassifier(2).partial_fit(z, labels, classes=range(3))
    before = found.temperature_
    found.partial_fit(scale * z[:1], labels[:1])
    assert 0.9 < found.temperature_ / before < 1.1


def test_the_temperature_scales_with_features_of_which_none_can_be_judged():
    z, labels = unit_rows(3, 4).numpy(), np.arange(3)  # one sample per class
    fitted = [vmcr2.NearestSubspaceClassifier(1).fit(scale * z, labels).temperature_ for scale in (1, 1e3)]
    np.testing.assert_allclose(fitted[1], 1e6 * fitted[0])


def test_a_first_batch_has_the_temperature_of_fit():
    random = np.random.default_rng(0)
    labels = np.concatenate([np.arange(1200) % 2, np.repeat(np.arange(2, 40), 3)])  # rare classes, in few folds
    z = np.eye(60)[labels] + random.normal(size=(len(labels), 60)) / 10
    fitted = vmcr2.NearestSubspaceClassifier(1).fit(z, labels)
    streamed = vmcr2.NearestSubspaceClassifier(1).partial_fit(z, labels, classes=np.unique(labels))
    assert streamed.temperature_ == fitted.temperature_


def test_a_stream_whose_batch_fails_has_not_taken_it_in(monkeypatch):
    z, labels = unit_rows(60, 6).numpy(), np.arange(60) % 3
    found = vmcr2.NearestSubspaceClassifier(2).partial_fit(z[:30], labels[:30], classes=range(3))
    with monkeypatch.context() as patch:
        patch.setattr("vmcr2.sklearn.spanned", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            found.partial_fit(z[30:], labels[30:])
    assert found.class_count_.sum() == found._stream.counts.sum() == 30
    expected = vmcr2.NearestSubspaceClassifier(2).fit(z, labels)
    np.testing.assert_array_equal(found.partial_fit(z[30:], labels[30:]).predict(z), expected.predict(z))


def test_a_partial_fit_that_fails_changes_nothing():
    z, labels = unit_rows(60, 6).numpy(), np.arange(60) % 3
    found = vmcr2.CodingRateClassifier(8, hidden=8, epochs=2, random_state=0).fit(z, labels)
    before, lines, mean = found.transform(z), list(found.history_), found.scaler_.mean_.copy()
    with pytest.raises(vmcr2.NumericalError, match="training diverged"):
        found.set_params(learning_rate=1e29).partial_fit(z + 50, labels)
    np.testing.assert_array_equal(found.transform(z), before)
    np.testing.assert_array_equal(found.scaler_.mean_, mean)
    assert found.history_ == lines
    assert np.isfinite(found.set_params(learning_rate=1e-3).partial_fit(z, labels).transform(z)).all()


@pytest.mark.parametrize("scale", [1e-25, 1e25])
def test_the_temperature_of_float32_whose_squares_overflow_is_that_of_float64(scale):
    z, labels = unit_rows(40, 4).numpy() * scale, np.arange(40) % 2
    z[labels == 1, 0] += 4 * scale
    found, expected = (vmcr2.NearestSubspaceClassifier(1).fit(z.astype(kind), labels) for kind in ("f4", "f8"))
    np.testing.assert_allclose(found.temperature_, expected.temperature_, rtol=1e-4)


def test_a_warning_points_at_the_users_line():
    z, labels = unit_rows(20, 3).numpy(), np.arange(20) % 2
    for call in (
        lambda: vmcr2.label_quality(z, labels, 3),
        lambda: vmcr2.NearestSubspaceClassifier(3).fit(z, labels),
        lambda: vmcr2.NearestSubspaceClassifier(3).partial_fit(z, labels, [0, 1]),
    ):
        with pytest.warns(UserWarning, match="n_components = 3 is the number") as seen:
            call()
        assert (seen[0].filename, seen[0].lineno) == (__file__, call.__code__.co_firstlineno)


def test_a_device_that_is_gone_is_named():
    z, labels = unit_rows(20, 3).numpy(), np.arange(20) % 2
    found = vmcr2.CodingRateTransformer(4, hidden=4, epochs=1).fit(z, labels)
    with pytest.raises(vmcr2.InputError, match="device must be one that torch can use here, got 'nope'"):
        found.set_params(device="nope").transform(z)


def test_a_last_small_batch_leaves_probabilities_honest(digits):
    train, test, labels, expected = digits
    streamed = vmcr2.NearestSubspaceClassifier()
    streamed.partial_fit(train[:600], labels[:600], classes=range(10))
    before = log_loss(expected, streamed.predict_proba(test))
    for row in range(600, 610):
        streamed.partial_fit(train[row : row + 1], labels[row : row + 1])
        assert log_loss(expected, streamed.predict_proba(test)) < 1.05 * before


def test_partial_fit_after_fit_says_that_it_starts_afresh():
    z, labels = unit_rows(40, 6).numpy(), np.arange(40) % 2
    found = vmcr2.NearestSubspaceClassifier(2).fit(z, labels)
    with pytest.warns(UserWarning, match="afresh"):
        found.partial_fit(z[:20], labels[:20])
    expected = vmcr2.NearestSubspaceClassifier(2).fit(z[:20], labels[:20])
    np.testing.assert_array_equal(found.predict(z), expected.predict(z))


def test_a_network_learns_from_a_stream(digits):
    train, test, labels, expected = digits
    streamed = vmcr2.CodingRateClassifier(random_state=0, batch_size=64)
    for part in np.array_split(np.arange(len(labels)), 4) * 4:
        streamed.partial_fit(train[part], labels[part], classes=range(10))
    assert streamed.score(test, expected) > 0.95
    single = streamed.partial_fit(train[:1], labels[:1])  # BatchNorm alone could not
    assert single.score(test, expected) > 0.9


def test_the_losss_settings_reach_the_loss():
    z, labels = unit_rows(40, 4).numpy(), np.arange(40) % 2
    settings = {"atoms_per_class": 2, "energy": 1.0, "pull": 0.3, "expand": 0.2, "eps_sq": 0.4}
    found = vmcr2.CodingRateClassifier(8, hidden=8, epochs=1, random_state=0, **settings).fit(z, labels)
    assert {name: getattr(found.loss_, name) for name in settings} == settings


def test_no_sample_is_left_alone_in_a_batch():
    z, labels = unit_rows(51, 4).numpy(), np.arange(51) % 3  # 25 twos and one
    found = vmcr2.CodingRateTransformer(8, hidden=8, batch_size=2, epochs=2, random_state=0).fit(z, labels)
    assert np.isfinite(found.partial_fit(z[:7], labels[:7]).transform(z)).all()


def test_partial_fit_tunes_what_fit_has_learnt(digits, fitted):
    train, test, labels, expected = digits
    tuned = copy.deepcopy(fitted)
    chosen = labels < 5  # the other classes keep their subspaces
    tuned.partial_fit(train[chosen], labels[chosen])
    assert tuned.score(test, expected) > 0.9
    assert fitted.score(test, expected) > 0.97


def test_two_classes():
    pixels, labels = load_digits(n_class=2, return_X_y=True)
    found = vmcr2.CodingRateClassifier(random_state=0, epochs=5).fit(pixels[::2], np.array(["no", "yes"])[labels[::2]])
    assert (found.predict(pixels[1::2]) == np.array(["no", "yes"])[labels[1::2]]).mean() > 0.98
    assert found.decision_function(pixels).shape == (len(pixels),)
    assert found.predict_proba(pixels).shape == (len(pixels), 2)


def test_unbalanced_classes(digits):
    """One class has half of the samples, another ten of them; the small ones are not given up."""
    train, test, labels, expected = digits
    sizes = np.array([120, 60, 60, 40, 40, 30, 30, 20, 15, 10])
    chosen = np.concatenate([np.flatnonzero(labels == j)[:n] for j, n in enumerate(sizes)])
    found = vmcr2.CodingRateClassifier(random_state=0).fit(train[chosen], labels[chosen])
    right = found.predict(test) == expected
    assert np.mean([right[expected == j].mean() for j in range(10)]) > 0.88
    assert min(right[expected == j].mean() for j in range(10)) > 0.5


def test_five_thousand_classes():
    random = np.random.default_rng(0)
    centres = random.standard_normal((5000, 24))
    labels = np.repeat(np.arange(5000), 3)
    samples = centres[labels] + 0.1 * random.standard_normal((15000, 24))
    found = vmcr2.CodingRateClassifier(
        random_state=0, hidden=64, epochs=1, feature_dim=32, batch_size=2048, learning_rate=3e-3
    ).fit(samples, labels)
    assert found.loss_.structure == "block"
    assert found.subspaces_.components_.shape == (5000, 32, 1)
    assert found.predict_proba(samples[:7]).shape == (7, 5000)
    assert found.score(samples[::10], labels[::10]) > 0.3  # chance is 0.0002
    direct = vmcr2.NearestSubspaceClassifier().fit(samples, labels)
    assert direct.score(samples[::10], labels[::10]) > 0.9


def test_equal_seeds_give_equal_features_and_leave_torch_alone(digits):
    train, _, labels, _ = digits
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    first, second = (vmcr2.CodingRateTransformer(**SMALL).fit(train, labels).transform(train) for _ in range(2))
    np.testing.assert_array_equal(first, second)
    torch.testing.assert_close(torch.rand(3), expected)
    other = vmcr2.CodingRateTransformer(**(SMALL | {"random_state": 1})).fit(train, labels).transform(train)
    assert np.abs(other - first).max() > 0.1


def test_pipeline_grid_search_and_cross_validation(digits):
    train, test, labels, expected = digits
    train, labels = train[:400], labels[:400]
    line = make_pipeline(StandardScaler(), vmcr2.CodingRateTransformer(**SMALL), KNeighborsClassifier(3))
    search = GridSearchCV(line, {"codingratetransformer__feature_dim": [16, 32]}, cv=2).fit(train, labels)
    assert search.best_estimator_.score(test, expected) > 0.5
    scores = cross_val_score(vmcr2.CodingRateClassifier(**SMALL), train, labels, cv=2, n_jobs=1)
    assert scores.min() > 0.3


def test_pickle_joblib_and_clone(digits, fitted, tmp_path):
    _, test, _, _ = digits
    joblib.dump(fitted, tmp_path / "fitted.joblib")
    for again in (pickle.loads(pickle.dumps(fitted)), joblib.load(tmp_path / "fitted.joblib"), copy.deepcopy(fitted)):
        np.testing.assert_array_equal(again.predict_proba(test), fitted.predict_proba(test))
    fresh = clone(fitted)
    assert not hasattr(fresh, "network_")
    assert fresh.get_params() == fitted.get_params()


def test_pandas_in_and_out(digits):
    import pandas  # of the dev extra

    train, _, labels, _ = digits
    frame = pandas.DataFrame(train, columns=[f"pixel{i}" for i in range(64)], index=np.arange(len(train))[::-1])
    found = vmcr2.CodingRateClassifier(**SMALL, feature_dim=16).set_output(transform="pandas")
    features = found.fit(frame, pandas.Series(labels, index=frame.index)).transform(frame)
    assert list(features.columns) == [f"codingrateclassifier{i}" for i in range(16)]
    assert (features.index == frame.index).all()
    assert list(found.feature_names_in_[:2]) == ["pixel0", "pixel1"]
    assert found.predict(frame).shape == labels.shape
    assert found.label_quality(frame, labels).scores.shape == labels.shape


class Convolutional(torch.nn.Module):
    """Rows of 64 pixels as images."""

    def __init__(self, feature_dim):
        super().__init__()
        self.conv = torch.nn.Conv2d(1, 8, 3)
        self.drop = torch.nn.Dropout(0.1)
        self.last = torch.nn.Linear(8 * 36, feature_dim)

    def forward(self, rows):
        return self.last(self.drop(self.conv(rows.view(-1, 1, 8, 8)).relu().flatten(1)))


def convolutional(columns, feature_dim):
    assert columns == 64
    return Convolutional(feature_dim)


def test_a_network_of_ones_own(digits):
    train, test, labels, expected = digits
    found = vmcr2.CodingRateClassifier(network=convolutional, random_state=0, feature_dim=32).fit(train, labels)
    assert isinstance(found.network_, Convolutional)
    assert found.score(test, expected) > 0.9
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(found)).predict(test), found.predict(test))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"feature_dim": 0}, "feature_dim"),
        ({"epochs": 0}, "epochs"),
        ({"batch_size": 1}, "batch_size"),
        ({"learning_rate": -1.0}, "learning_rate"),
        ({"objective": "ce"}, "objective"),
        ({"network": 3}, "network must be"),
        ({"network": lambda columns, d: None}, "network must return"),
        ({"network": lambda columns, d: torch.nn.Linear(columns, d + 1)}, "network must map"),
        ({"eps_sq": 0.0}, "eps_sq"),
        ({"device": "nowhere"}, "device"),
        ({"energy": 0.0}, "energy"),
        ({"pull": 1.5}, "pull"),
        ({"learning_rate": 1e39}, "learning_rate"),
        ({"expand": -1.0}, "expand"),
        ({"atoms_per_class": 0}, "atoms_per_class"),
        ({"atoms_per_class": 9, "feature_dim": 8}, "atoms_per_class"),
        ({"n_components": 33, "feature_dim": 32}, "n_components"),
        ({"n_components": 70}, "n_components"),
    ],
)
def test_wrong_parameters_are_named(settings, message):
    with pytest.raises(vmcr2.InputError, match=message):
        vmcr2.CodingRateClassifier(**settings).fit(unit_rows(20, 4).numpy(), np.arange(20) % 2)


def test_wrong_labels_and_classes_are_named():
    z, labels = unit_rows(20, 4).numpy(), np.arange(20) % 2
    for estimator in (vmcr2.NearestSubspaceClassifier(1), vmcr2.CodingRateClassifier(**SMALL)):
        with pytest.raises(vmcr2.InputError, match="2 classes"):
            estimator.fit(z, np.zeros(20))
        begun = clone(estimator).partial_fit(z, labels, classes=[0, 1])
        with pytest.raises(vmcr2.InputError, match="among classes"):
            begun.partial_fit(z, labels + 1)
        with pytest.raises(vmcr2.InputError, match="first call"):
            begun.partial_fit(z, labels, classes=[0, 1, 2])
    with pytest.raises(vmcr2.InputError, match="must be given"):
        vmcr2.NearestSubspaceClassifier().partial_fit(z, labels)
    with pytest.raises(vmcr2.InputError, match="classes_"):
        vmcr2.CodingRateClassifier(**SMALL).fit(z, labels).label_quality(z, labels + 1)
    with pytest.raises(vmcr2.InputError, match="y must not be missing"):
        vmcr2.CodingRateClassifier(**SMALL).fit(z, labels).label_quality(z, ["a", None] * 10)


def test_a_fit_that_fails_changes_nothing():
    z, labels = unit_rows(60, 4).numpy(), np.arange(60) % 3
    estimator = vmcr2.CodingRateClassifier(**SMALL, n_components=2, feature_dim=16).fit(z, labels)
    expected = estimator.predict(z)
    for settings, X, y in (
        ({"n_components": 17}, z, labels + 5),
        ({}, z, np.zeros(60)),
        ({"network": lambda columns, d: torch.nn.Linear(columns, d + 1)}, z[:, :3], labels + 5),
        ({"learning_rate": 1e30, "epochs": 1}, z, labels + 5),  # seen after the last step alone
        ({"learning_rate": 1e30, "epochs": 3}, z, labels + 5),
        ({"learning_rate": 1e10, "epochs": 3}, z, labels + 5),  # norms of features overflow
    ):
        before = estimator.get_params()
        with pytest.raises(vmcr2.NumericalError if "learning_rate" in settings else vmcr2.InputError):
            estimator.set_params(**settings).fit(X, y)
        estimator.set_params(**before)
        assert estimator.predict(z).tolist() == expected.tolist()
    with pytest.raises(vmcr2.InputError, match="n_components"):  # before the network is tuned away from its subspaces
        estimator.set_params(n_components=17).partial_fit(z, labels)
    assert estimator.predict(z).tolist() == expected.tolist()


@pytest.mark.parametrize("kind", [vmcr2.CodingRateTransformer, vmcr2.CodingRateClassifier])
def test_a_first_partial_fit_that_fails_can_be_made_again(kind):
    z, labels = unit_rows(20, 4).numpy(), np.arange(20) % 2
    estimator = kind(**SMALL)
    with pytest.raises(vmcr2.InputError, match="2 classes"):
        estimator.partial_fit(z, np.zeros(20))
    assert estimator.partial_fit(z, labels).transform(z).shape == (20, 64)


@pytest.mark.parametrize("rich", [True, False])
def test_verbose_shows_progress(rich, capsys, monkeypatch):
    if not rich:
        monkeypatch.setitem(sys.modules, "rich.progress", None)
    vmcr2.CodingRateTransformer(**SMALL, verbose=True).fit(unit_rows(20, 4).numpy(), np.arange(20) % 2)
    assert "loss" in capsys.readouterr().out
    vmcr2.CodingRateTransformer(**SMALL).fit(unit_rows(20, 4).numpy(), np.arange(20) % 2)
    assert capsys.readouterr().out == ""


def test_a_network_that_is_built_already_is_refused():
    estimator = vmcr2.CodingRateClassifier(**SMALL, network=torch.nn.Linear(4, 16))
    with pytest.raises(vmcr2.InputError, match="network must be None or a function of two ints .* got Linear"):
        estimator.fit(unit_rows(20, 4).numpy(), np.arange(20) % 2)


class Shifting(torch.nn.Linear):
    """A network whose forward makes float32 tensors of its own."""

    def forward(self, inputs):
        return super().forward(inputs) @ torch.eye(self.out_features)


def test_a_network_of_the_users_is_given_float32_throughout():
    z, labels = unit_rows(20, 4).numpy(), np.arange(20) % 2
    estimator = vmcr2.CodingRateTransformer(**SMALL, network=Shifting).fit(z.astype(np.float64), labels)
    assert estimator.transform(z).dtype == np.float32


def test_a_small_batch_after_fit_leaves_the_other_samples_known():
    X, y = load_digits(return_X_y=True)
    estimator = vmcr2.CodingRateClassifier(random_state=0, epochs=5).fit(X[:600], y[:600])
    before = estimator.score(X[600:], y[600:])
    for i in range(3):
        estimator.partial_fit(X[i : i + 1], y[i : i + 1])
    assert before > 0.9
    assert estimator.score(X[600:], y[600:]) > before - 0.03


@pytest.mark.parametrize("after", ["fit", "partial_fit"])
def test_the_dimension_of_subspaces_may_change_between_batches(after):
    z, y = unit_rows(60, 8).numpy(), np.arange(60) % 3
    for estimator in (vmcr2.NearestSubspaceClassifier(3), vmcr2.CodingRateClassifier(n_components=3, **SMALL)):
        if after == "fit" and isinstance(estimator, vmcr2.CodingRateClassifier):
            estimator.fit(z, y)
        else:
            estimator.partial_fit(z, y, classes=range(4))  # one of them has no sample
        for n_components in (2, 4):
            estimator.set_params(n_components=n_components).partial_fit(z[:20], y[:20])
            held = getattr(estimator, "subspaces_", estimator)
            assert held.components_.shape[2] == n_components
            assert np.isfinite(held.components_).all()


def test_a_class_of_zeros_has_the_point_0_for_a_subspace():
    X = np.where((np.arange(30) % 3 == 1)[:, None], 0, unit_rows(30, 6).numpy())
    estimator = vmcr2.NearestSubspaceClassifier(2).fit(X, np.arange(30) % 3)
    assert np.isfinite(estimator.decision_function(X)).all()
    np.testing.assert_allclose(estimator.decision_function(X)[:, 1], -np.square(X).sum(1))
    assert estimator.class_count_.tolist() == [10, 10, 10]


def test_probabilities_of_samples_far_longer_than_any_fitted_are_numbers():
    z, y = unit_rows(40, 6).numpy(), np.arange(40) % 4
    estimator = vmcr2.NearestSubspaceClassifier(1).fit(1e-80 * z, y)
    likely = estimator.predict_proba(1e75 * z)
    np.testing.assert_allclose(likely.sum(1), 1)
    assert (estimator.classes_[likely.argmax(1)] == estimator.predict(1e75 * z)).all()


def test_equal_seeds_are_equal_in_threads():
    z, y = unit_rows(60, 8).numpy(), np.arange(60) % 3
    expected = vmcr2.CodingRateTransformer(**SMALL).fit(z, y).transform(z)
    with ThreadPoolExecutor(3) as pool:
        fitted = list(pool.map(lambda _: vmcr2.CodingRateTransformer(**SMALL).fit(z, y), range(3)))
    for estimator in fitted:
        np.testing.assert_array_equal(estimator.transform(z), expected)


def test_it_trains_whatever_the_default_dtype_and_within_inference_mode():
    z, y = unit_rows(30, 6).numpy(), np.arange(30) % 3
    torch.set_default_dtype(torch.float64)
    try:
        vmcr2.CodingRateClassifier(**SMALL).fit(z, y)
    finally:
        torch.set_default_dtype(torch.float32)
    with torch.inference_mode():
        estimator = vmcr2.CodingRateClassifier(**SMALL).fit(z, y)
    with torch.no_grad():
        estimator.partial_fit(z, y)


@pytest.mark.parametrize(
    ("network", "got"),
    [
        (lambda columns, d: torch.nn.Flatten(), "none to train"),
        (lambda columns, d: torch.nn.Linear(columns, d).requires_grad_(False), "none to train"),
        (lambda columns, d: torch.nn.Linear(columns, d).double(), "torch.float64"),
    ],
)
def test_a_network_that_cannot_be_trained_is_named(network, got):
    with pytest.raises(vmcr2.InputError, match=f"parameters to train, all in float32, got {got}"):
        vmcr2.CodingRateTransformer(**SMALL, network=network).fit(unit_rows(20, 4).numpy(), np.arange(20) % 2)


def test_a_function_of_one_argument_is_no_network():
    with pytest.raises(vmcr2.InputError, match="network must be None or a function of two ints"):
        vmcr2.CodingRateTransformer(network=lambda columns: None).fit(unit_rows(20, 4).numpy(), np.arange(20) % 2)


def test_classes_may_be_a_set_but_not_a_number():
    z, y = unit_rows(20, 4).numpy(), np.arange(20) % 2
    assert vmcr2.NearestSubspaceClassifier().partial_fit(z, y, classes={0, 1}).classes_.tolist() == [0, 1]
    with pytest.raises(vmcr2.InputError, match=r"classes must be a list or an array \(k,\) of labels, got shape \(\)"):
        vmcr2.NearestSubspaceClassifier().partial_fit(z, y, classes=2)


def test_labels_are_judged_by_the_estimators_own_subspaces():
    z, y = unit_rows(60, 8).numpy(), np.arange(60) % 3
    estimator = vmcr2.CodingRateClassifier(n_components=1, **SMALL).fit(z, y)
    expected = vmcr2.label_quality(estimator.transform(z), y, 1)
    np.testing.assert_array_equal(estimator.label_quality(z, y).scores, expected.scores)
    with pytest.raises(vmcr2.InputError, match="y must have shape"):
        estimator.label_quality(z, y[:5])


def test_estimators_and_report_do_not_follow_a_default_device():
    features = np.random.default_rng(0).normal(size=(40, 5))
    labels = np.arange(40) % 4

    def results():
        subspaces = vmcr2.NearestSubspaceClassifier().fit(features, labels)
        trained = vmcr2.CodingRateClassifier(epochs=1, device="cpu", random_state=0).fit(features, labels)
        return (
            subspaces.predict_proba(features),
            trained.predict_proba(features),
            vmcr2.report(features, labels).overlap,
        )

    expected = results()
    with torch.device("meta"):  # any but the estimators' own
        found = results()
    for there, here in zip(found, expected, strict=True):
        np.testing.assert_array_equal(there, here)


def test_a_state_does_not_follow_a_default_device():
    loss = vmcr2.VMCR2Loss(4, 8)
    with torch.device("meta"):
        loss.load_state_dict(loss.state_dict())


@pytest.mark.parametrize(
    "estimator", [vmcr2.NearestSubspaceClassifier(), vmcr2.CodingRateTransformer(), vmcr2.CodingRateClassifier()]
)
def test_masked_arrays_are_refused(estimator):
    z, y = unit_rows(20, 4).numpy(), np.arange(20) % 2
    with pytest.raises(vmcr2.InputError, match="X must have no masked entries, got"):
        estimator.fit(np.ma.masked_less(z, 0), y)
    for method in (estimator.fit, estimator.partial_fit):
        with pytest.raises(vmcr2.InputError, match="y must have no masked entries, got 10"):
            method(z, np.ma.masked_equal(y, 1))


def small(monkeypatch=None, **settings):
    z, labels = normal(41, 4).numpy(), np.arange(41) % 2
    options = {"hidden": 8, "batch_size": 20, "epochs": 3, "random_state": 0} | settings
    return vmcr2.CodingRateClassifier(8, **options).fit(z, labels), z, labels


def test_the_networks_settings_reach_the_network_and_its_optimizer():
    found, _, _ = small(hidden=24, weight_decay=0.3)
    assert [layer.out_features for layer in found.network_ if isinstance(layer, torch.nn.Linear)] == [24, 24, 8]
    assert [group["weight_decay"] for group in found._optimizer.param_groups] == [0.3]
    exact, _, _ = small(objective="mcr2", eps_sq=0.3)
    assert exact.loss_.eps_sq == 0.3


def test_the_learning_rate_falls_along_a_half_cosine_in_fit_and_is_constant_in_partial_fit(monkeypatch):
    rates, step = [], torch.optim.AdamW.step

    def noted(self, *given):
        rates.append(self.param_groups[0]["lr"])
        return step(self, *given)

    monkeypatch.setattr(torch.optim.AdamW, "step", noted)
    found, z, labels = small(learning_rate=2e-3)
    assert rates == pytest.approx([1e-3 * (1 + np.cos(np.pi * (i + 0.5) / 9)) for i in range(9)])
    rates.clear()
    found.set_params(learning_rate=5e-4).partial_fit(z, labels)
    assert rates == pytest.approx([5e-4] * 3)


def test_the_loss_is_latched_in_the_first_epoch_and_every_so_many(monkeypatch):
    epochs, latch_from = [], vmcr2.VMCR2Loss.latch_from

    def noted(self, *given):
        epochs.append(self.dictionary.steps_taken / 3)
        latch_from(self, *given)

    monkeypatch.setattr(vmcr2.VMCR2Loss, "latch_from", noted)
    small(epochs=5, latch_every=2)
    assert epochs == [0, 2, 4]


def test_history_is_the_mean_over_samples_whatever_the_batches(monkeypatch):
    seen, forward = [], vmcr2.MCR2Loss.forward

    def noted(self, features, labels):
        value = forward(self, features, labels)
        seen.append((value.item(), len(labels)))
        return value

    monkeypatch.setattr(vmcr2.MCR2Loss, "forward", noted)
    found, _, _ = small(objective="mcr2", epochs=1)
    values, sizes = map(np.array, zip(*seen, strict=True))
    assert len(set(sizes.tolist())) == 2
    assert found.history_ == pytest.approx([values @ sizes / 41])


def test_running_statistics_after_fit_are_those_of_all_samples_and_go_on_moving():
    found, z, _ = small(batch_size=41)
    hidden, norm = found.network_[0], found.network_[1]
    with torch.no_grad():
        outputs = hidden(torch.from_numpy(found._inputs(z)))
    torch.testing.assert_close(norm.running_mean, outputs.mean(0), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(norm.running_var, outputs.var(0), rtol=1e-4, atol=1e-5)
    assert norm.momentum == 0.1


def test_columns_keep_their_proportions():
    z, labels = normal(40, 3).numpy() * [1, 10, 100] + 5, np.arange(40) % 2
    found = vmcr2.CodingRateTransformer(4, hidden=8, epochs=1, random_state=0).fit(z, labels)
    inputs = found._inputs(z)
    np.testing.assert_allclose(inputs.mean(0), 0, atol=1e-5)
    np.testing.assert_allclose(inputs.std(0) / inputs.std(0)[0], z.std(0) / z.std(0)[0], rtol=1e-4)
    assert inputs.var(0).mean() == pytest.approx(1, rel=1e-5)


def test_of_many_classes_partial_fit_remembers_a_few_samples_each(monkeypatch):
    monkeypatch.setattr("vmcr2.sklearn._KEPT", 8)
    found, _, _ = small()
    assert np.bincount(found._kept[1]).tolist() == [16, 16]
