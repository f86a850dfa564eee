"""Finding wrong labels: digits, of which a third get the label of another class on purpose.

    python examples/label_errors.py

prints how many of the suspects are actually wrong, the ten worst, and how a classifier gains from dropping them.
"""

from __future__ import annotations

import argparse

import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from sklearn.neighbors import KNeighborsClassifier

import vmcr2


def broken(labels: np.ndarray, share: float, seed: int) -> np.ndarray:
    """Returns the labels with a share of them, drawn at random, changed to another class."""
    random, k = np.random.default_rng(seed), labels.max() + 1
    wrong = random.choice(len(labels), round(share * len(labels)), replace=False)
    given = labels.copy()
    given[wrong] = (labels[wrong] + random.integers(1, k, len(wrong))) % k
    return given


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--share", type=float, default=1 / 3, help="of the labels that are broken")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    pixels, labels = load_digits(return_X_y=True)
    train, test, labels, expected = train_test_split(pixels, labels, random_state=options.seed, stratify=labels)
    given = broken(labels, options.share, options.seed)
    wrong = given != labels

    quality = vmcr2.label_quality(train, given)  # any embeddings will do; here the pixels themselves

    print(f"{wrong.sum()} of {len(given)} labels are wrong. {quality}")
    worst = quality.order[: wrong.sum()]
    print(f"of the {wrong.sum()} lowest scores {wrong[worst].mean():.1%} belong to wrong labels")
    print(f"the right label is suggested for {(quality.suggested == labels)[wrong].mean():.1%} of the wrong ones")
    for title, kept, target in (
        ("all labels as given", np.ones_like(wrong), given),
        ("without the suspects", quality.suggested == given, given),
        ("with suggested labels", np.ones_like(wrong), quality.suggested),
    ):
        accuracy = KNeighborsClassifier(3).fit(train[kept], target[kept]).score(test, expected)
        print(f"3 nearest neighbours, {title:22s} {accuracy:.3f}")


if __name__ == "__main__":
    main()
