"""The report on embeddings, and the search for wrong labels."""

import json
import runpy
import sys

import numpy as np
import pandas as pd
import pytest
import reference
import scipy.sparse
import torch
from conftest import REPOSITORY, normal, random_labels, unit_rows
from sklearn.datasets import load_digits
from sklearn.metrics import roc_auc_score

import vmcr2
from vmcr2.rates import largest_reduction, reduction_of_lines


def orthogonal_classes(sizes, dims, seed=0):
    """Samples of classes on orthogonal subspaces, with equal energy in each direction of a class."""
    random = np.random.default_rng(seed)
    rows, labels, start = [], [], 0
    for j, (size, r) in enumerate(zip(sizes, dims, strict=True)):
        z = np.zeros((size, sum(dims)))
        z[np.arange(size), start + np.arange(size) % r] = random.choice([-1, 1], size)
        rows.append(z)
        labels += [j] * size
        start += r
    return np.concatenate(rows), np.array(labels)


def broken(labels, share, seed=0):
    random, k = np.random.default_rng(seed), labels.max() + 1
    wrong = random.choice(len(labels), round(share * len(labels)), replace=False)
    found = labels.copy()
    found[wrong] = (labels[wrong] + random.integers(1, k, len(wrong))) % k
    return found


def test_rates_and_ranks_are_those_of_the_definition():
    z, labels = unit_rows(50, 6).numpy(), random_labels(50, 3).numpy()
    found = vmcr2.report(z, labels)
    expansion, compression = reference.rates(z.T, reference.one_hot(labels, 3), 0.5)
    np.testing.assert_allclose([found.expansion, found.compression], [expansion, compression])
    np.testing.assert_allclose(found.reduction, expansion - compression)
    for j in range(3):
        rows = z[labels == j]
        shares = np.linalg.eigvalsh(rows.T @ rows / len(rows))
        np.testing.assert_allclose(found.class_ranks[j], np.exp(-(shares * np.log(shares)).sum()))
    moments = [z[labels == j].T @ z[labels == j] for j in range(3)]
    cosine = (moments[0] * moments[2]).sum() / np.linalg.norm(moments[0]) / np.linalg.norm(moments[2])
    np.testing.assert_allclose(found.overlap[0, 2], cosine)
    np.testing.assert_allclose(found.transrate, vmcr2.transrate(torch.tensor(z), torch.tensor(labels)))


def test_orthogonal_classes_reach_the_maximum():
    z, labels = orthogonal_classes([40, 40, 40], [4, 4, 4])
    found = vmcr2.report(z, labels)
    np.testing.assert_allclose(found.reduction, found.maximum)
    np.testing.assert_allclose(found.effective_rank, 12)
    np.testing.assert_allclose(found.class_ranks, 4)
    assert found.mean_overlap == 0
    assert found.warnings == ()


@pytest.mark.parametrize(("d", "k", "printed"), [(128, 10, 50.8), (500, 100, 261.4), (500, 200, 267.2)])
def test_maximum_of_balanced_classes_is_the_closed_form(d, k, printed):
    found = largest_reduction(d, np.full(k, 1000), 0.5)
    np.testing.assert_allclose(found, d / 2 * (np.log(3) - np.log(1 + k / 0.5) / k), rtol=1e-6)
    assert abs(found - printed) < 0.1


def test_maximum_of_unbalanced_classes_is_above_all_allotments():
    counts, d = np.array([90, 30, 12]), 9
    best = largest_reduction(d, counts, 0.5)
    tried = []
    for first in range(1, 8):
        for second in range(1, 9 - first):
            z, labels = orthogonal_classes(counts, [first, second, d - first - second])
            tried.append(vmcr2.report(z, labels).reduction)
    assert max(tried) <= best < max(tried) + 0.1
    assert largest_reduction(4, np.full(9, 5), 0.5) > 0  # more classes than dimensions


def test_more_lines_than_dimensions_reach_the_bound():
    angles = np.pi * np.arange(3) / 3
    z = np.repeat(np.stack([np.cos(angles), np.sin(angles)], 1), 4, 0)
    found = vmcr2.report(z, np.repeat(np.arange(3), 4))
    np.testing.assert_allclose(found.reduction, found.maximum)


def highest_reduction(start, features_and_labels):
    """Ascends ΔR from rows of any norm, of which it takes the directions; returns where it arrives."""
    start.requires_grad_()
    optimizer = torch.optim.LBFGS([start], max_iter=100, line_search_fn="strong_wolfe")

    def fallen():
        optimizer.zero_grad()
        value = -vmcr2.rate_reduction(*features_and_labels(torch.nn.functional.normalize(start, dim=1))).reduction
        value.backward()
        return value

    optimizer.step(fallen)
    return -float(fallen().detach())


@pytest.mark.parametrize(
    ("counts", "d", "share"),
    [((1, 1, 1, 40, 40), 6, 0.97), ((30, 1, 1, 1), 4, 0.97), ((30, 20, 8, 4, 2, 1), 4, 0.999), ((20, 20, 20), 6, 0.99)],
)
def test_no_features_exceed_the_maximum_and_some_come_near_it(counts, d, share):
    """Found by gradient ascent on ΔR; with classes so small that they share directions, too."""
    rows = torch.from_numpy(np.repeat(np.arange(len(counts)), counts))
    features = unit_rows(len(rows), d)
    reached = highest_reduction(features, lambda z: (z, rows))
    assert share < reached / largest_reduction(d, np.array(counts), 0.5) < 1 + 1e-6


def test_a_long_tail_comes_near_the_maximum():
    z, labels = orthogonal_classes([1000, 1000], [10, 10])
    z, labels = np.concatenate([z, np.eye(20)[:18]]), np.concatenate([labels, 2 + np.arange(18)])
    found = vmcr2.report(z, labels)
    assert 0.95 < found.reduction / found.maximum <= 1
    assert "97% of the largest possible" in str(found)


def test_in_one_dimension_there_is_nothing_to_reach():
    found = vmcr2.report(np.ones((100, 1)), np.arange(100) % 4)
    assert found.reduction == found.maximum == 0
    assert "ΔR 0.00" in str(found)


@pytest.mark.parametrize("counts", [(30, 1, 1, 1), (30, 20, 8, 4, 2, 1), (9, 9, 9, 9, 9)])
def test_lines_of_as_many_classes_as_dimensions_are_spread_as_evenly_as_they_can_be(counts):
    """The best lines are found by gradient ascent on ΔR."""
    d, rows = 4, torch.from_numpy(np.repeat(np.arange(len(counts)), counts))
    best = 0.0
    for seed in range(3):
        lines = unit_rows(len(counts), d, seed=seed)
        best = max(best, highest_reduction(lines, lambda z: (z[rows], rows)))
    np.testing.assert_allclose(reduction_of_lines(torch.tensor(counts), d, 0.5), best, rtol=1e-3)


def test_lines_of_fewer_classes_than_dimensions_are_orthogonal():
    z, labels = orthogonal_classes([9, 4, 1], [1, 1, 1])
    expected = vmcr2.report(z, labels).reduction
    np.testing.assert_allclose(reduction_of_lines(torch.tensor([4, 0, 9, 1]), z.shape[1], 0.5), expected)


@pytest.mark.parametrize("sizes", [[27, 18, 1], [1] * 36, [3, 3, 2, 2, 1]])
def test_classes_without_samples_add_no_lines(sizes):
    alone = reduction_of_lines(torch.tensor(sizes), 40, 0.5)
    np.testing.assert_allclose(reduction_of_lines(torch.tensor(sizes + [0] * 200), 40, 0.5), alone)


def test_unbalanced_orthogonal_classes_are_not_called_collapsed():
    labels = np.repeat(np.arange(10), [2000] + [10] * 9)
    found = vmcr2.report(np.eye(10)[labels], labels)
    np.testing.assert_allclose(found.reduction, reduction_of_lines(torch.tensor([2000] + [10] * 9), 10, 0.5))
    assert found.warnings == ()
    same = vmcr2.report(np.ones((2090, 10)), labels)
    assert "collapsed" in same.warnings[0]


def test_report_is_ready_for_json_whatever_number_eps_sq_is():
    z, labels = unit_rows(10, 4), np.arange(10) % 2
    assert json.loads(json.dumps(vmcr2.report(z, labels, eps_sq=np.float32(0.5)).as_dict()))["eps_sq"] == 0.5


def test_components_as_many_as_features_are_warned_of():
    z, labels = unit_rows(40, 4), random_labels(40, 2)
    with pytest.warns(UserWarning, match="n_components = 4 is the number of features"):
        vmcr2.label_quality(z, labels, 4)
    with pytest.warns(UserWarning, match="n_components = 4 is the number of features"):
        vmcr2.NearestSubspaceClassifier(4).fit(z.numpy(), labels.numpy())


def test_scale_is_taken_out_and_said():
    z, labels = 7 * unit_rows(40, 5), random_labels(40, 2)
    scaled, unit = vmcr2.report(z, labels), vmcr2.report(z / 7, labels)
    assert scaled.normalized
    assert not unit.normalized
    np.testing.assert_allclose(scaled.reduction, unit.reduction)
    assert "scaled to norm 1" in str(scaled)


@pytest.mark.parametrize("kind", ["numpy", "torch", "float32", "integers", "strings"])
def test_any_kind_of_features_and_labels(kind):
    z, labels = unit_rows(40, 5), random_labels(40, 3)
    expected = vmcr2.report(z, labels)
    names = np.array(["ash", "elm", "oak"])[labels.numpy()]
    features, given = {
        "numpy": (z.numpy(), labels.numpy()),
        "torch": (z.requires_grad_(), labels),
        "float32": (z.detach().float(), labels.tolist()),
        "integers": ((1000 * z.detach()).round().long().numpy(), labels),
        "strings": (z.detach().numpy(), names),
    }[kind]
    found = vmcr2.report(features, given)
    np.testing.assert_allclose(found.reduction, expected.reduction, rtol=1e-2)
    if kind == "strings":
        assert found.class_names == ("ash", "elm", "oak")
        assert set(vmcr2.label_quality(features, given).suggested) <= set(names)


def test_warnings_name_what_is_wrong():
    random = np.random.default_rng(0)
    one_way = np.eye(8)[np.zeros(40, int)] + 0.01 * random.standard_normal((40, 8))
    labels = np.arange(40) % 2
    assert "collapsed" in vmcr2.report(one_way, labels).warnings[0]
    assert "large mean" in vmcr2.report(0.3 * random.standard_normal((40, 8)) + 1, labels).warnings[0]
    lines = np.eye(8)[labels] + 0.01 * random.standard_normal((40, 8))
    assert "single direction" in " ".join(vmcr2.report(lines, labels).warnings)
    noise = random.standard_normal((4000, 8))
    assert "barely separated" in " ".join(vmcr2.report(noise, np.arange(4000) % 2).warnings)
    few = vmcr2.report(noise[:12], np.arange(12) % 9).warnings
    assert any("cannot all be orthogonal" in text for text in few)
    assert any("fewer than 5" in text for text in few)
    assert any("only one class" in text for text in vmcr2.report(noise, np.zeros(4000, int)).warnings)


def test_entangled_classes_are_named():
    z, labels = orthogonal_classes([20, 20, 20, 20], [2, 2, 2, 2])
    z[labels == 3, 4:6] = z[labels == 3, 6:8]
    found = vmcr2.report(z, labels, ["ash", "elm", "oak", "yew"])
    assert (found.entangled[0].first, found.entangled[0].second) == ("oak", "yew")
    np.testing.assert_allclose(found.entangled[0].overlap, 0.5)
    assert "oak and yew" in str(found)


def test_many_classes_are_described_by_their_first_directions(monkeypatch):
    spectrum = 0.5 ** np.arange(20)
    labels = np.arange(600) % 30
    steep = np.stack([normal(20, 20, seed=j).numpy() * spectrum for j in range(30)])
    z = np.einsum("md,mde->me", normal(600, 20, seed=99).numpy(), steep.transpose(0, 2, 1)[labels])
    flat = unit_rows(600, 20).numpy()
    whole = [vmcr2.report(each, labels).overlap for each in (z, flat)]
    monkeypatch.setattr("vmcr2.embeddings._MOMENT_ELEMENTS", 10)
    part = [vmcr2.report(each, labels).overlap for each in (z, flat)]
    np.testing.assert_allclose(part[0], whole[0], atol=1e-3)
    assert (part[1] <= whole[1] + 1e-5).all()
    assert part[1].sum() < 0.7 * whole[1].sum()  # where no direction stands out much is left out
    np.testing.assert_array_equal(part[1].diagonal(), 1)


def test_as_dict_is_json():
    found = vmcr2.report(unit_rows(40, 5), random_labels(40, 3)).as_dict()
    assert json.loads(json.dumps(found)) == found
    assert {"expansion", "maximum", "transrate", "warnings", "classes", "entangled"} <= set(found)


@pytest.mark.parametrize("k", [3, 60])
def test_figure_has_four_panels_that_fit(k, tmp_path):
    figure = vmcr2.report(unit_rows(300, 20), np.arange(300) % k).figure()
    figure.savefig(tmp_path / "report.png")
    assert (tmp_path / "report.png").stat().st_size > 10_000
    panels = [axes for axes in figure.axes if axes.get_title()]
    assert len(panels) == 4
    assert all("Good" in axes.get_title() for axes in panels)


def test_figure_names_the_missing_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"vmcr2\[lab\]"):
        vmcr2.report(unit_rows(20, 5), random_labels(20, 2)).figure()


@pytest.mark.parametrize("function", [vmcr2.report, vmcr2.label_quality])
@pytest.mark.parametrize(
    ("features", "labels", "message"),
    [
        (np.ones((4, 3)), np.zeros(5, int), "labels must have shape"),
        (np.ones(4), np.zeros(4, int), "features must have shape"),
        (np.full((4, 3), np.nan), np.arange(4), "finite"),
        (np.zeros((4, 3)), np.arange(4), "zeros"),
        (np.array([["a"]] * 4), np.arange(4), "real numbers"),
        (np.ones((4, 3)), np.array([0.5, 1, 1, 2]), "integers"),
        (np.ones((4, 3)), np.array([0, 1, 1, 2j]), "integers"),
        (np.ones((4, 3)), ["a", None] * 2, "labels must not be missing, but 2 of 4 are"),
        (np.ones((4, 3)), ["a", float("nan")] * 2, "labels must not be missing, but 2 of 4"),
        (
            np.ones((4, 3)),
            np.array(["a", float("nan")] * 2, dtype=object),
            "labels must not be missing, but 2 of 4",
        ),
        (
            np.ones((4, 3)),
            np.array([1, float("nan")] * 2, dtype=object),
            "labels must not be missing, but 2 of 4 are",
        ),
        (np.ones((4, 3)), ["a", 1] * 2, "labels must be of one kind.* got int and str"),
        (np.ones((4, 3)), [None] * 4, "labels must not be missing, but 4 of 4 are"),
    ],
)
def test_bad_input_is_named(function, features, labels, message):
    with pytest.raises(vmcr2.InputError, match=message):
        function(features, labels)


def test_other_bad_input_is_named():
    z, labels = unit_rows(10, 4), np.arange(10) % 2
    for call, message in (
        (lambda: vmcr2.report(z, labels, ["one"]), "class_names"),
        (lambda: vmcr2.report(z, labels, 3), "class_names must be a list, a tuple or an array of names, got 3"),
        (lambda: vmcr2.report(z, labels, {"a": 0, "b": 1}), "class_names must be a list"),
        (lambda: vmcr2.report(z, torch.zeros(10, dtype=torch.bfloat16)), "labels must be of shape"),
        (lambda: vmcr2.report(z, [[0]] * 5 + [[0, 1]] * 5), "labels must be of shape"),
        (
            lambda: vmcr2.report(z, np.array(["2020", "NaT"] * 5, dtype="datetime64[D]")),
            "labels .* missing, but 5 of 10",
        ),
        (lambda: vmcr2.report(z, np.array([0.0, np.nan] * 5)), "labels must not be missing, but 5 of 10"),
        (lambda: vmcr2.report(np.ma.masked_less(z.numpy(), 0), labels), "features must have no masked entries, got"),
        (lambda: vmcr2.label_quality(z, np.ma.masked_equal(labels, 1)), "labels must have no masked entries, got 5"),
        (lambda: vmcr2.report(z, labels, eps_sq=0), "eps_sq"),
        (lambda: vmcr2.label_quality(z, labels, 5), "n_components"),
        (lambda: vmcr2.label_quality(z, np.zeros(10)), "2 classes"),
    ):
        with pytest.raises(vmcr2.InputError, match=message):
            call()


@pytest.mark.parametrize("share", [0.1, 0.3, 0.4])
def test_wrong_labels_of_digits_are_found(share):
    pixels, labels = load_digits(return_X_y=True)
    given = broken(labels, share)
    wrong = given != labels
    found = vmcr2.label_quality(pixels, given)
    assert found.scores.min() >= 0
    assert found.scores.max() <= 1
    assert roc_auc_score(wrong, -found.scores) > 0.99
    assert wrong[found.order[: wrong.sum()]].mean() > 0.95
    assert (found.suggested == labels)[wrong].mean() > 0.93
    assert (found.suggested[found.suspects] != given[found.suspects]).all()
    assert f"{len(found.suspects)} of 1797" in str(found)


def test_subspaces_as_large_as_a_class_do_not_learn_wrong_labels_by_heart():
    """Each class has fewer samples than its subspace could hold: judged by it, every label would look right."""
    z, labels = orthogonal_classes([12] * 5, [3] * 5)
    given = broken(labels, 0.15)
    wrong = given != labels
    found = vmcr2.label_quality(z + 0.02 * np.random.default_rng(0).standard_normal(z.shape), given, n_components=10)
    assert roc_auc_score(wrong, -found.scores) > 0.9


def test_the_few_correct_labels_of_a_small_class_are_not_suspect():
    """Of two classes the smaller decides how many directions each may have."""
    features, labels = load_digits(return_X_y=True)
    eights = labels == 8
    rare, others = (np.flatnonzero(eights == which)[:n] for which, n in ((True, 30), (False, 1000)))
    rows = np.concatenate([rare, others])
    found = vmcr2.label_quality(features[rows], eights[rows])
    assert (found.suspects < 30).sum() <= 6
    assert len(found.suspects) <= 0.1 * len(rows)


def test_more_than_half_suspects_are_said_to_mean_little():
    z, labels = unit_rows(200, 2).numpy(), np.arange(200) % 10
    assert "more than half: these features hardly tell the classes apart" in str(vmcr2.label_quality(z, labels))
    z, labels = orthogonal_classes([9, 9], [1, 1])
    assert "more than half" not in str(vmcr2.label_quality(z, labels))


def test_of_a_sample_alone_in_its_class_nothing_is_said():
    z, labels = unit_rows(12, 6), np.array(["ash", "elm"] + ["oak"] * 5 + ["yew"] * 5)
    found = vmcr2.label_quality(z, labels)
    assert found.scores[:2].tolist() == [0.5, 0.5]
    assert found.suggested[:2].tolist() == ["ash", "elm"]
    assert not {0, 1} & set(found.suspects)
    assert np.isfinite(found.scores).all()
    # Nor where all samples are alone.
    assert vmcr2.label_quality(z, np.arange(12)).scores.tolist() == [0.5] * 12


def test_the_example_finds_wrong_labels(capsys):
    example = runpy.run_path(str(REPOSITORY / "examples" / "label_errors.py"))
    example["main"](["--share", "0.2"])
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("of the 269 lowest scores 9") for line in lines)
    accuracies = [float(line.split()[-1]) for line in lines if line.startswith("3 nearest")]
    assert accuracies[2] > accuracies[0] + 0.05


def test_class_names_with_dollar_signs_are_drawn_as_they_are(tmp_path):
    names = np.array(["$\\foo$", "costs $5", "b", "c"])
    figure = vmcr2.report(unit_rows(40, 8), names[np.arange(40) % 4]).figure()
    figure.savefig(tmp_path / "report.png")
    shown = [label.get_text() for axes in figure.axes for label in axes.get_yticklabels() + axes.get_xticklabels()]
    assert any(r"costs \$5" in text for text in shown)


@pytest.mark.parametrize("features", [unit_rows(20, 4).to_sparse(), torch.empty(20, 4, device="meta")])
def test_tensors_that_hold_no_dense_values_are_refused(features):
    for call in (vmcr2.report, vmcr2.label_quality):
        with pytest.raises(vmcr2.InputError, match="features must be a dense tensor with values"):
            call(features, np.arange(20) % 2)


def test_features_too_long_for_transrate_are_reported_on_without_it():
    made = vmcr2.report(1e9 * unit_rows(40, 8), np.arange(40) % 4)
    assert made.transrate is None
    assert "TransRate –" in str(made)
    assert any("TransRate" in warning for warning in made.warnings)
    json.dumps(made.as_dict())


def test_features_that_all_coincide_make_no_label_suspect():
    z, labels = np.repeat(np.random.default_rng(0).normal(size=(1, 64)), 300, 0), np.arange(300) % 3
    judged = vmcr2.label_quality(z, labels)
    assert not len(judged.suspects)
    np.testing.assert_array_equal(judged.suggested, labels)


def test_classes_of_one_subspace_make_no_label_suspect():
    """Each sample's energies in the two differ by rounding alone."""
    plane = np.linalg.qr(np.random.default_rng(0).normal(size=(64, 2)))[0]
    judged = vmcr2.label_quality(np.random.default_rng(1).normal(size=(200, 2)) @ plane.T, np.arange(200) % 2, 2)
    assert not len(judged.suspects)
    np.testing.assert_allclose(judged.scores, 0.5)


@pytest.mark.parametrize(("m", "d", "k", "r"), [(96, 40, 2, 6), (96, 8, 2, 4), (20, 40, 4, 1)])
def test_label_quality_takes_an_eighth_of_a_classs_samples_for_its_dimension_and_d_over_k_at_most(m, d, k, r):
    z, labels = unit_rows(m, d), np.arange(m) % k
    chosen, given, other = (vmcr2.label_quality(z, labels, n) for n in (None, r, r + 1))
    np.testing.assert_array_equal(chosen.scores, given.scores)
    assert (chosen.scores != other.scores).any()


@pytest.mark.parametrize(
    ("features", "message"),
    [
        ([[1.0, 2.0], [3.0]], "features must hold real numbers, \\(m, d\\)"),
        (scipy.sparse.eye(4).tocsr(), "features must be dense, got csr_matrix; .toarray"),
        (np.eye(4)[[0, 1, 2, 2]] * [1, 1, 0, 1], "no row of zeros, got 2, the first at 2"),
    ],
)
def test_features_that_will_not_do_are_named(features, message):
    with pytest.raises(vmcr2.InputError, match=message):
        vmcr2.report(features, np.arange(len(features) if isinstance(features, list) else 4) % 2)


def test_tables_of_mixed_columns_are_read():
    z, labels = unit_rows(30, 4).numpy(), np.arange(30) % 3
    frame = pd.DataFrame(z).astype({0: "Float64"}).assign(flag=labels == 1)
    expected = vmcr2.report(np.column_stack([z, labels == 1]), labels)
    assert vmcr2.report(frame, labels).as_dict() == expected.as_dict()


def test_the_mean_overlap_is_that_of_pairs_of_different_classes():
    z = np.array([[1.0, 0], [1, 0], [0.6, 0.8]])
    found = vmcr2.report(z, np.arange(3))  # overlaps are squared cosines
    assert found.mean_overlap == pytest.approx((1 + 0.36 + 0.36) / 3)


def test_suspects_come_the_most_suspect_first():
    found = vmcr2.LabelQuality(np.array([0.3, 0.9, 0.1, 0.2]), np.array([1, 0, 1, 0]), np.array([0, 0, 0, 0]))
    assert found.suspects.tolist() == [2, 0]
    assert found.order.tolist() == [2, 3, 0, 1]
