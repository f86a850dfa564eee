"""Label errors that people confirmed: who ranks them first, trained on data that nobody has made wrong.

    python benchmarks/label_errors.py ERRORS RUN [RUN ...] [--data-root DIR]    writes results/label_errors.md

ERRORS holds mnist.json and cifar10.json of https://github.com/cleanlab/label-errors (Northcutt et al., 2021): suspects
among the test labels, each shown to five people. An error is confirmed where fewer than three of them chose the given
label. The runs are run folders of MNIST or CIFAR-10 (`vmcr2 reproduce table2 --ours --rows mnist`). Every test label is
scored; the suspects were found by confident learning on cross-entropy, so errors that only another score would find
are not among them, and those that cross-entropy ranks first are.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import vmcr2
from vmcr2.lab.evaluate import extract
from vmcr2.lab.objectives import CrossEntropyHead
from vmcr2.lab.terminal import describe_device, markdown_table
from vmcr2.lab.trained import Checkpoint
from vmcr2.subspaces import class_subspaces, subspace_energies

RESULTS = Path(__file__).parent.parent / "results"
BUDGETS = (50, 100, 200)  # labels that one looks at


def confirmed(errors: Path, source: str, count: int) -> Tensor:
    """Returns which test labels fewer than three of five people chose."""
    found = torch.zeros(count, dtype=torch.bool)
    for suspect in json.loads((errors / f"{source}.json").read_text()):
        found[suspect["id"]] = suspect["mturk"]["given"] < 3
    return found


def margin(shares: Tensor, labels: Tensor) -> Tensor:
    """Returns the given label's share less the largest of another."""
    own = shares.gather(1, labels[:, None])[:, 0]
    return own - shares.scatter(1, labels[:, None], -torch.inf).amax(1)


@torch.no_grad()
def scores(checkpoint: Checkpoint, root: Path | None) -> tuple[str, dict[str, Tensor]]:
    """Returns the run's data set and each score of its test labels; low is suspect."""
    recipe, data = checkpoint.recipe, checkpoint.data(root)
    features = extract(checkpoint.model().model, data, recipe.augmentation, 1000)
    k, labels = data.num_classes, data.test_labels
    found = {
        f"subspaces of the training set, {r} component{'s' * (r > 1)}": margin(
            subspace_energies(features.test, class_subspaces(features.train, data.train_labels, k, r)), labels
        )
        for r in (1, recipe.feature_dim // k)
    }
    found["label_quality of the test set alone"] = torch.from_numpy(vmcr2.label_quality(features.test, labels).scores)
    head = checkpoint.objective().criterion
    if isinstance(head, CrossEntropyHead):
        found["own softmax, margin"] = margin(head.logits(features.test).softmax(1), labels)
    return recipe.data.source, found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("errors", type=Path)
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--data-root", type=Path)
    arguments = parser.parse_args()
    from sklearn.metrics import roc_auc_score

    rows: list[list[Any]] = []
    for path in arguments.runs:
        checkpoint = Checkpoint.open(path)
        source, found = scores(checkpoint, arguments.data_root)
        summary = checkpoint.run.summary()
        title = f"{source}, {summary['objective']}, {summary['epochs']} epochs"
        wrong = confirmed(arguments.errors, source, len(next(iter(found.values()))))
        for name, score in found.items():
            order = score.argsort()
            hits = [str(int(wrong[order[:budget]].sum())) for budget in BUDGETS]
            auroc = f"{roc_auc_score(wrong.numpy(), -score.numpy()):.4f}"
            rows.append([title, name, str(int(wrong.sum())), auroc, *hits])
    text = (
        "# Label errors in test sets, confirmed by people\n\nMade by `python benchmarks/label_errors.py`; "
        f"{describe_device(torch.device('cpu'))}. Each test set has 10,000 labels; one seed. The table shows the "
        "AUROC of the confirmed errors against all other labels, and how many of them are among the 50, 100 and 200 "
        "most suspect labels. The candidates that people were shown had been found by cross-entropy.\n\n"
    ) + markdown_table(["trained on", "score", "confirmed", "AUROC", *(f"of {n}" for n in BUDGETS)], rows)
    (RESULTS / "label_errors.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
