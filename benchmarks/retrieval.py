"""Classes never seen in training: retrieval among them, and telling them from the classes that were.

    python benchmarks/retrieval.py run [--data-root DIR] [--methods ...]    runs what is missing, a JSON line per run
    python benchmarks/retrieval.py table                                   results/retrieval.md from the lines

Omniglot, conv4, d = 384, 20 epochs of class-balanced batches (100 classes × 5 samples) for every method. 300 classes
for training, 300 others for test. Each method's learning rate is the one with the best MAP@R on 60 of the training
classes that a network trained on the other 240 has not seen; a rate at the end of the range makes the range longer.
Losses and measures other than ours are pytorch-metric-learning's (the extra `benchmarks`), at its
defaults. The optimiser is SGD with momentum 0.9.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from runs import Line, MissingRunError, Runs, best_rate
from torch import Tensor, nn

import vmcr2
from vmcr2.lab import networks, sources
from vmcr2.lab.augmentation import Augmentation, augmented, plain
from vmcr2.lab.objectives import CrossEntropyHead
from vmcr2.lab.processes import keep_freed_memory
from vmcr2.lab.terminal import markdown_table, mean_and_spread
from vmcr2.subspaces import class_subspaces, subspace_energies

RESULTS = Path(__file__).parent.parent / "results"
RUNS = Runs(RESULTS / "retrieval.jsonl", ("method", "seed", "lr", "held"))
CLASSES, HELD_CLASSES, D, EPOCHS = 300, 60, 384, 20
SHIFTED = Augmentation(padding=2, crop=28)


def _ours(**given: Any) -> Callable[[int], nn.Module]:
    return lambda k: vmcr2.VMCR2Loss(k, D, **given)


def _theirs(name: str, *arguments: int) -> nn.Module:
    from pytorch_metric_learning import losses  # late: the table is written without it

    return getattr(losses, name)(*arguments)


METHODS: dict[str, tuple[str, Callable[[int], nn.Module], tuple[float, ...]]] = {
    "vmcr2": ("V-MCR² (s = 1)", _ours(), (0.2, 0.5, 1.0)),
    "vmcr2-2": ("V-MCR², s = 2", _ours(atoms_per_class=2), (0.2, 0.5, 1.0)),
    "vmcr2-pull0.3": ("V-MCR², pull 0.3", _ours(pull=0.3), (0.2, 0.5, 1.0)),
    "vmcr2-2-pull0.3": ("V-MCR², s = 2, pull 0.3", _ours(atoms_per_class=2, pull=0.3), (0.2, 0.5, 1.0)),
    "vmcr2-pull0.1": ("V-MCR², pull 0.1", _ours(pull=0.1), (0.2, 0.5, 1.0)),
    "vmcr2-pull0.3-expand0.2": ("V-MCR², pull 0.3, expand 0.2", _ours(pull=0.3, expand=0.2), (0.2, 0.5, 1.0)),
    "vmcr2-pull0.3-rho0.25": ("V-MCR², pull 0.3, ρ = 0.25", _ours(pull=0.3, balance=0.25), (0.2, 0.5, 1.0)),
    "vmcr2-rho0.01": ("V-MCR², ρ = 0.01", _ours(balance=0.01), (0.2, 0.5, 1.0)),
    "vmcr2-rho0.25": ("V-MCR², ρ = 0.25", _ours(balance=0.25), (0.2, 0.5, 1.0)),
    "vmcr2-energy1": ("V-MCR², energy 1", _ours(energy=1.0), (0.2, 0.5, 1.0)),
    "mcr2": ("MCR²", vmcr2.MCR2Loss, (0.003, 0.01, 0.03)),
    "ce": ("cross-entropy", lambda k: CrossEntropyHead(D, k), (0.3, 1.0, 3.0)),
    "normsoftmax": ("NormSoftmax", lambda k: _theirs("NormalizedSoftmaxLoss", k, D), (0.03, 0.1, 0.3)),
    "arcface": ("ArcFace", lambda k: _theirs("ArcFaceLoss", k, D), (0.03, 0.1, 0.3)),
    "supcon": ("SupCon", lambda k: _theirs("SupConLoss"), (0.1, 0.3, 1.0)),
}


@dataclass(frozen=True)
class Setting:
    """One run. `held` trains on 240 classes and measures on the 60 others."""

    method: str
    seed: int
    lr: float
    held: bool


def images(root: Path | None, held: bool) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Returns training images and labels, unseen samples of the same classes, and the samples of other classes."""
    data = sources.load(sources.DataSettings("omniglot", classes=2 * CLASSES), root)
    # Neighbouring classes are of one alphabet: those for training and those for test take turns.
    turn = torch.arange(2 * CLASSES) % 2
    inside, outside = (turn == 0).nonzero()[:, 0], (turn == 1).nonzero()[:, 0]
    if held:
        last = torch.arange(CLASSES) % (CLASSES // HELD_CLASSES) == 4
        inside, outside = inside[~last], inside[last]

    def of(classes: Tensor, inputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        places = torch.full((2 * CLASSES,), -1)
        places[classes] = torch.arange(len(classes))
        mapped = places[labels]
        return inputs[mapped >= 0], mapped[mapped >= 0]

    train = of(inside, data.train_inputs, data.train_labels)
    seen = of(inside, data.test_inputs, data.test_labels)
    both = torch.cat([data.train_inputs, data.test_inputs]), torch.cat([data.train_labels, data.test_labels])
    return *train, *seen, *of(outside, *both)


@torch.no_grad()
def features(model: nn.Module, inputs: Tensor) -> Tensor:
    model.eval()
    return torch.cat([model(plain(part, SHIFTED)) for part in inputs.split(1000)])


def auroc(seen: Tensor, unseen: Tensor) -> float:
    """Returns how often a seen class's sample scores above one of an unseen class."""
    from sklearn.metrics import roc_auc_score

    truth = torch.cat([torch.ones(len(seen)), torch.zeros(len(unseen))])
    return float(roc_auc_score(truth.numpy(), torch.cat([seen, unseen]).numpy()))


@torch.no_grad()
def novelty(criterion: nn.Module, z: Tensor, y: Tensor, seen: Tensor, unseen: Tensor) -> dict[str, float]:
    """Returns the AUROC of each score that tells samples of seen classes from those of unseen ones."""
    k = int(y.max()) + 1
    bases = class_subspaces(z, y, k, 1)
    found = {
        "subspaces": auroc(*(subspace_energies(each, bases).amax(1) for each in (seen, unseen))),
        "k-NN": auroc(*((each @ z.T).topk(5, dim=1).values[:, -1] for each in (seen, unseen))),
    }
    if not isinstance(criterion, CrossEntropyHead):
        return found
    weight, bias = criterion.linear.weight, criterion.linear.bias
    logits = [criterion.linear(each) for each in (seen, unseen)]
    found["max softmax"] = auroc(*(each.softmax(1).amax(1) for each in logits))
    found["energy"] = auroc(*(each.logsumexp(1) for each in logits))
    # ViM (Wang et al., 2022): the norm outside the principal subspace as one more logit, scaled to the others' maximum.
    origin = -torch.linalg.pinv(weight) @ bias
    _, vectors = torch.linalg.eigh((z - origin).T @ (z - origin))
    rest = vectors[:, : D // 2]
    scale = criterion.linear(z).amax(1).mean() / ((z - origin) @ rest).norm(dim=1).mean()
    found["ViM"] = auroc(
        *(
            each.logsumexp(1) - scale * ((part - origin) @ rest).norm(dim=1)
            for each, part in zip(logits, (seen, unseen), strict=True)
        )
    )
    return found


def run_one(setting: Setting, root: Path | None) -> Line:
    """Trains one setting; a line of the file."""
    from pytorch_metric_learning import distances
    from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
    from pytorch_metric_learning.utils.inference import CustomKNN

    x, y, x_seen, _, x_new, y_new = images(root, setting.held)
    k = int(y.max()) + 1
    torch.manual_seed(setting.seed)
    model = networks.build("conv4", (1, 28, 28), D)
    criterion = METHODS[setting.method][1](k)
    optimizer = torch.optim.SGD([*model.parameters(), *criterion.parameters()], setting.lr, momentum=0.9)
    sampler = vmcr2.ClassBalancedBatchSampler(y, 5, classes_per_batch=100, seed=setting.seed)
    generator = torch.Generator().manual_seed(setting.seed)
    if isinstance(criterion, vmcr2.VMCR2Loss):
        criterion.latch_from(model, [(plain(x[rows], SHIFTED), y[rows]) for rows in sampler])
    began = time.perf_counter()
    line: dict[str, Any] = {**vars(setting), "failed": None}
    try:
        for epoch in range(EPOCHS):
            sampler.set_epoch(epoch)
            model.train()
            for rows in sampler:
                value = criterion(model(augmented(x[rows], SHIFTED, generator)), y[rows])
                optimizer.zero_grad()
                value.backward()
                optimizer.step()
    except (vmcr2.InputError, vmcr2.NumericalError) as error:
        return line | {"failed": str(error)[:160]}
    z, seen, new = (features(model, each) for each in (x, x_seen, x_new))
    if not all(bool(each.isfinite().all()) for each in (z, seen, new)):
        return line | {"failed": "the features are not finite"}
    knn = CustomKNN(distances.CosineSimilarity())
    judge = AccuracyCalculator(
        include=("precision_at_1", "mean_average_precision_at_r"), knn_func=knn, k="max_bin_count"
    )
    measured = judge.get_accuracy(new, y_new)
    line |= {"r_at_1": measured["precision_at_1"], "map_at_r": measured["mean_average_precision_at_r"]}
    if not setting.held:
        line["novelty"] = novelty(criterion, z, y, seen, new)
    return line | {"seconds": round(time.perf_counter() - began, 1)}


def chosen_rate(method: str, seek: Callable[[Setting], Line]) -> float:
    """Returns the learning rate that does best on the held-out classes."""
    return best_rate(METHODS[method][2], lambda lr: seek(Setting(method, 0, lr, True)).get("map_at_r", -1.0))


def kept(setting: Setting) -> Line:
    return RUNS.kept(vars(setting))


def run(methods: list[str], seeds: list[int], root: Path | None) -> None:
    def completed(setting: Setting) -> Line:
        return RUNS.completed(vars(setting), lambda: run_one(setting, root))

    for method in methods:
        lr = chosen_rate(method, completed)
        for seed in seeds:
            completed(Setting(method, seed, lr, False))


_NOVELTY = ("subspaces", "k-NN", "max softmax", "energy", "ViM")


def table() -> None:
    """Writes results/retrieval.md."""
    rows, novel = [], []
    for method, (title, *_) in METHODS.items():
        try:
            lr = chosen_rate(method, kept)
        except MissingRunError:
            continue
        members = [line for line in RUNS.lines() if (line["method"], line["lr"], line["held"]) == (method, lr, False)]
        members = [line for line in members if not line["failed"]]
        if not members:
            continue
        rows.append(
            [
                title,
                f"{lr:g}",
                str(len(members)),
                *(mean_and_spread([line[of] for line in members], 3) for of in ("r_at_1", "map_at_r")),
            ]
        )
        novel.append([title, *(mean_and_spread([line["novelty"].get(by) for line in members], 3) for by in _NOVELTY)])
    text = (
        "# Classes never seen in training\n\nMade by `python benchmarks/retrieval.py`, "
        f"{RUNS.where()}. Omniglot: 300 classes of 15 samples for training, and 300 others of 20 samples for test. "
        "They are from the same alphabets and drawn by the same people, which is easier than new alphabets. The "
        f"network is conv4, d = {D}, trained for {EPOCHS} epochs of class-balanced batches. Figures are mean ± "
        "standard deviation over seeds. Learning rates were chosen on 60 of the training classes. The rivals' other "
        "settings are the defaults of pytorch-metric-learning; SupCon has one view."
        "\n\n## Retrieval among unseen classes\n\n"
        + markdown_table(["", "lr", "seeds", "R@1", "MAP@R"], rows)
        + "\n## Novelty: AUROC of samples of seen classes (five drawers unseen) against those of unseen classes\n\n"
        + markdown_table(["features of", *_NOVELTY], novel)
    )
    (RESULTS / "retrieval.md").write_text(text, encoding="utf-8")
    print(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("run", "table"))
    parser.add_argument("--data-root", type=Path)
    parser.add_argument("--methods", nargs="*", choices=tuple(METHODS), default=list(METHODS))
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    if arguments.command == "table":
        table()
    else:
        run(arguments.methods, arguments.seeds, arguments.data_root)


if __name__ == "__main__":
    main()
