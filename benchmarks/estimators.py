"""Estimators beside LDA, NCA, logistic regression and k-NN on three sets of embeddings, cross-validated; wrong labels.

    python benchmarks/estimators.py --data-root DIR

writes results/estimators.md. The sets: scikit-learn's digits (raw pixels), and 20 classes of CIFAR-100 and 100 of
Omniglot through a small convolutional network that `vmcr2.lab` has trained on other classes by cross-entropy.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import sklearn
import torch
from sklearn.datasets import load_digits
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss, roc_auc_score
from sklearn.model_selection import GridSearchCV, StratifiedKFold
from sklearn.neighbors import KNeighborsClassifier, NeighborhoodComponentsAnalysis
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import vmcr2
from vmcr2 import embeddings
from vmcr2.lab import networks, sources
from vmcr2.lab.objectives import CrossEntropyHead, Objective
from vmcr2.lab.terminal import describe_device
from vmcr2.lab.train import fit

RESULTS = Path(__file__).parents[1] / "results" / "estimators.md"
WRONG = 0.3
SHARES = (0.1, 0.2, 0.3, 0.4)
SETTINGS: tuple[dict[str, Any], ...] = (
    {},
    {"epochs": 10},
    {"epochs": 50},
    {"learning_rate": 3e-4},
    {"learning_rate": 3e-3},
    {"feature_dim": 32},
    {"feature_dim": 128},
    {"n_components": 1},
    {"energy": 1.0},
)
Arrays = tuple[np.ndarray, np.ndarray]


def embedded(
    source: str, trained_on: int, evaluated: int, a_class: int, epochs: int, data_root: Path | None, seed: int = 0
) -> Arrays:
    """Returns embeddings and labels of classes that the network which made them has never seen."""
    data = sources.load(sources.DataSettings(source), data_root)
    inputs = torch.cat([data.train_inputs, data.test_inputs])
    labels = torch.cat([data.train_labels, data.test_labels])
    torch.manual_seed(seed)
    order = torch.randperm(len(labels))
    inputs, labels = inputs[order], labels[order]
    known = labels < trained_on
    seen, held = inputs[known].float() / 255, labels[known]
    model = networks.build("conv4", tuple(seen.shape[1:]), 128)
    head = CrossEntropyHead(128, trained_on)
    parameters = [*model.parameters(), *head.parameters()]
    steps = -(-len(held) // 128)

    def batches(_: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        return [(seen[part], held[part]) for part in torch.randperm(len(held)).tensor_split(steps)]

    optimizer = torch.optim.AdamW(parameters, lr=1e-3)
    fit(model, Objective(head, trained_on), batches, optimizer, epochs, lr_at=lambda t: 3e-3 * (1 - t / epochs))
    chosen = torch.cat([(labels == j).nonzero()[:a_class, 0] for j in range(trained_on, trained_on + evaluated)])
    model.eval()
    with torch.no_grad():
        features = torch.cat([model(part.float() / 255) for part in inputs[chosen].split(512)])
    return features.numpy(), labels[chosen].numpy() - trained_on


def broken(labels: np.ndarray, share: float, seed: int) -> np.ndarray:
    """Returns labels of which a share, drawn at random, is that of another class."""
    random, k = np.random.default_rng(seed), labels.max() + 1
    wrong = random.choice(len(labels), round(share * len(labels)), replace=False)
    found = labels.copy()
    found[wrong] = (labels[wrong] + random.integers(1, k, len(wrong))) % k
    return found


def methods() -> dict[str, Callable[[], Any]]:
    """Returns what is compared: ours at the defaults, rivals tuned by an inner cross-validation where that helps."""
    inner = StratifiedKFold(3, shuffle=True, random_state=1)
    neighbours = {"n_neighbors": [1, 3, 5, 10, 20]}
    strengths = {"logisticregression__C": [0.01, 0.1, 1.0]}
    return {
        "LDA (shrinkage)": lambda: LinearDiscriminantAnalysis(solver="lsqr", shrinkage="auto"),
        "logistic regression": lambda: GridSearchCV(
            make_pipeline(StandardScaler(), LogisticRegression(max_iter=300)), strengths, cv=inner
        ),
        "k-NN": lambda: GridSearchCV(KNeighborsClassifier(), neighbours, cv=inner),
        "NCA, k-NN": lambda: make_pipeline(
            NeighborhoodComponentsAnalysis(32, max_iter=20, random_state=0),
            GridSearchCV(KNeighborsClassifier(), neighbours, cv=inner),
        ),
        "NearestSubspaceClassifier": vmcr2.NearestSubspaceClassifier,
        "CodingRateClassifier": lambda: vmcr2.CodingRateClassifier(random_state=0),
        "CodingRateClassifier, mcr2": lambda: vmcr2.CodingRateClassifier(objective="mcr2", random_state=0),
        "CodingRateTransformer, k-NN": lambda: make_pipeline(
            vmcr2.CodingRateTransformer(random_state=0), GridSearchCV(KNeighborsClassifier(), neighbours, cv=inner)
        ),
    }


def compared(name: str, arrays: Arrays, folds: int) -> list[str]:
    """Returns a table's rows: accuracy with right and with wrong training labels, log-loss, seconds per fit."""
    features, labels = arrays
    rows = []
    for method, make in methods().items():
        clean, noisy, losses, seconds = [], [], [], []
        split = StratifiedKFold(folds, shuffle=True, random_state=0).split(features, labels)
        for number, (train, test) in enumerate(split):
            began = time.perf_counter()
            estimator = make().fit(features[train], labels[train])
            seconds.append(time.perf_counter() - began)
            clean.append(estimator.score(features[test], labels[test]))
            chances = np.clip(estimator.predict_proba(features[test]), 1e-6, 1)
            losses.append(log_loss(labels[test], chances / chances.sum(1, keepdims=True)))
            estimator = make().fit(features[train], broken(labels[train], WRONG, number))
            noisy.append(estimator.score(features[test], labels[test]))
        rows.append(
            f"| {name} | {method} | {_mean(clean)} | {_mean(noisy)} | {np.mean(losses):.2f} | {np.mean(seconds):.1f} |"
        )
        print(rows[-1], flush=True)
    return rows


def audited(name: str, arrays: Arrays, seeds: int) -> list[str]:
    """Returns a table's rows: how well wrong labels are found, by AUROC and precision at their true number."""
    features, labels = arrays
    rows = []
    for share in SHARES:
        figures: dict[str, list[tuple[float, float, float]]] = {}
        for seed in range(seeds):
            given = broken(labels, share, seed)
            wrong = given != labels
            classifier = vmcr2.CodingRateClassifier(random_state=seed).fit(features, given)
            for method, quality in (
                ("label_quality of the embeddings", vmcr2.label_quality(features, given)),
                ("the same, n_components=1", vmcr2.label_quality(features, given, 1)),
                ("the same, no sample left out as suspect", _in_one_round(features, given)),
                ("CodingRateClassifier.label_quality", classifier.label_quality(features, given)),
            ):
                figures.setdefault(method, []).append(_found(wrong, quality.scores, quality.suggested == labels))
            neighbours = KNeighborsClassifier(11).fit(features, given).kneighbors(return_distance=False)
            votes = np.stack([np.bincount(given[row], minlength=labels.max() + 1) for row in neighbours])
            own = votes[np.arange(len(given)), given] / 11
            figures.setdefault("votes of 11 neighbours", []).append(_found(wrong, own, votes.argmax(1) == labels))
        for method, values in figures.items():
            cells = " | ".join(f"{mean:.3f}" for mean in np.mean(values, axis=0))
            rows.append(f"| {name} | {share:.0%} | {method} | {cells} |")
            print(rows[-1], flush=True)
    return rows


def _in_one_round(features: np.ndarray, given: np.ndarray) -> vmcr2.LabelQuality:
    with mock.patch.object(embeddings, "_ROUNDS", 1):
        return vmcr2.label_quality(features, given)


def settings_tried(arrays: Arrays, folds: int) -> list[str]:
    """Returns a table's rows: the default settings and their neighbours, by cross-validation."""
    rows = []
    for settings in SETTINGS:
        text = ", ".join(f"{name}={value!r}" for name, value in settings.items()) or "defaults"
        clean, noisy = [], []
        split = StratifiedKFold(folds, shuffle=True, random_state=1).split(*arrays)
        for number, (train, test) in enumerate(split):
            given = broken(arrays[1][train], WRONG, number)
            for target, scores in ((arrays[1][train], clean), (given, noisy)):
                estimator = vmcr2.CodingRateClassifier(random_state=0, **settings).fit(arrays[0][train], target)
                scores.append(estimator.score(arrays[0][test], arrays[1][test]))
        rows.append(f"| {text} | {_mean(clean)} | {_mean(noisy)} |")
        print(rows[-1], flush=True)
    return rows


def _found(wrong: np.ndarray, scores: np.ndarray, right: np.ndarray) -> tuple[float, float, float]:
    worst = np.argsort(scores, kind="stable")[: wrong.sum()]
    return float(roc_auc_score(wrong, -scores)), float(wrong[worst].mean()), float(right[wrong].mean())


def _mean(values: list[float]) -> str:
    return f"{np.mean(values):.3f} ± {np.std(values):.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-root", type=Path, help="of CIFAR-100 and Omniglot; default $VMCR2_DATA_ROOT or ./data")
    parser.add_argument("--folds", type=int, default=5)
    parser.add_argument("--seeds", type=int, default=3, help="of the draws of wrong labels")
    options = parser.parse_args()
    warnings.filterwarnings("ignore", category=sklearn.exceptions.ConvergenceWarning)
    torch.set_num_threads(1)
    pixels, digits = load_digits(return_X_y=True)
    sets = {
        "digits, pixels": (pixels / 16, digits),
        "CIFAR-100, 20 unseen classes": embedded("cifar100", 50, 20, 150, 6, options.data_root),
        "Omniglot, 100 unseen characters": embedded("omniglot", 500, 100, 20, 10, options.data_root),
    }
    lines = [
        "# Estimators on embeddings",
        "",
        f"`python benchmarks/estimators.py --folds {options.folds} --seeds {options.seeds}`; "
        f"{describe_device(torch.device('cpu'))}, scikit-learn {sklearn.__version__}.",
        "",
        f"Accuracy is mean ± standard deviation over {options.folds} folds; under *wrong labels*, {WRONG:.0%} of the",
        "training labels were those of another class. Our estimators are at their defaults. The strength of logistic",
        "regression and the number of neighbours are chosen by an inner cross-validation.",
        "",
        "| embeddings | method | accuracy | wrong labels | log-loss | seconds per fit |",
        "|---|---|---|---|---|---|",
    ]
    for name, arrays in sets.items():
        lines += compared(name, arrays, options.folds)
    lines += [
        "",
        f"Finding wrong labels, mean of {options.seeds} draws: AUROC, precision at their true number, and the share of "
        "wrong labels for which the correct label is suggested.",
        "",
        "| embeddings | wrong | method | AUROC | precision | suggested rightly |",
        "|---|---|---|---|---|---|",
    ]
    for name, arrays in sets.items():
        lines += audited(name, arrays, options.seeds)
    lines += [
        "",
        "Settings of `CodingRateClassifier` on digits, by cross-validation; the defaults were chosen from such tables.",
        "",
        "| settings | accuracy | wrong labels |",
        "|---|---|---|",
        *settings_tried(sets["digits, pixels"], options.folds),
    ]
    RESULTS.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
