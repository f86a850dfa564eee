"""Wrong training labels: V-MCR² beside cross-entropy, its robust variants and SupCon; and who finds the wrong labels.

    python benchmarks/noise.py run [--data-root DIR] [--only omniglot100 ...] [--methods ...]    runs what is missing
    python benchmarks/noise.py cleanlab [--only ...]              cleanlab's scores of out-of-sample probabilities
    python benchmarks/noise.py table                               results/noise.md and noise.png from the lines
    python benchmarks/noise.py influence                           results/influence.png: how hard a wrong label pulls

Nobody sees a clean label but the test set. Each method's learning rate is the one with the best accuracy on a
validation split with the same share of wrong labels, at 30 % and seed 0; a rate at the end of the range makes
the range longer. What predicts (its own head, or the nearest subspace of one or of ⌊d/k⌋ components) is chosen on
that split too. The final runs train on everything; `ce-stopped` keeps the split, and the epoch that did best on it.
`--lr` takes another rate for them, which the table shows in a row of its own.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from runs import Line, MissingRunError, Runs, best_rate
from torch import Tensor, nn
from torch.nn import functional

import vmcr2
from vmcr2.lab import sources, train
from vmcr2.lab.augmentation import Augmentation, plain
from vmcr2.lab.evaluate import Features, accuracy, extract, training_bases
from vmcr2.lab.objectives import Objective, Variational
from vmcr2.lab.processes import chosen_device, keep_freed_memory
from vmcr2.lab.recipes import RECIPES, Recipe
from vmcr2.lab.sources import Dataset
from vmcr2.lab.terminal import markdown_table, mean_and_spread
from vmcr2.subspaces import class_subspaces, nearest_subspace, places_in_class, subspace_energies

RESULTS = Path(__file__).parent.parent / "results"
DEVICE = chosen_device("auto")
RUNS = Runs(RESULTS / "noise.jsonl", ("data", "method", "share", "kind", "seed", "lr", "held"), DEVICE)
LEVELS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5)
CHOSEN_AT = 0.3
HELD_OUT = 7  # every seventh sample of a class is for validation

_SHIFTED = replace(RECIPES["omniglot100"], name="mnist5000", epochs=20, feature_dim=128)
BASES: dict[str, Recipe] = {
    "digits": RECIPES["digits"],
    "omniglot100": RECIPES["omniglot100"],
    "omniglot200": replace(
        RECIPES["omniglot100"],
        name="omniglot200",
        feature_dim=400,
        data=sources.DataSettings("omniglot", classes=200),
    ),
    "mnist5000": replace(_SHIFTED, data=sources.DataSettings("mnist", train_size=5000)),
    "cifar100-20": Recipe(
        name="cifar100-20",
        epochs=30,
        batch_size=250,
        network="resnet18",
        feature_dim=100,
        weight_decay=5e-4,
        schedule="cosine",
        warmup_epochs=2,
        data=sources.DataSettings("cifar100", classes=20),
        augmentation=Augmentation(crop=32, padding=4, flip=True),
    ),
}


class Head(nn.Module):
    """A linear layer on `scale` times the features, with a loss of its logits; `cosine` has rows of norm 1."""

    def __init__(
        self,
        loss: Callable[[Tensor, Tensor], Tensor],
        feature_dim: int,
        num_classes: int,
        scale: float = 1.0,
        cosine: bool = False,
    ) -> None:
        super().__init__()
        self.linear = nn.Linear(feature_dim, num_classes, bias=not cosine)
        self.loss, self.scale, self.cosine = loss, scale, cosine

    def logits(self, features: Tensor) -> Tensor:
        if not self.cosine:
            return self.linear(self.scale * features)
        return self.scale * functional.linear(features, functional.normalize(self.linear.weight, dim=1))

    def forward(self, features: Tensor, labels: Tensor) -> Tensor:
        return self.loss(self.logits(features), labels)

    def predict(self, features: Tensor) -> Tensor:
        return self.logits(features).argmax(1)


def generalised(logits: Tensor, labels: Tensor, q: float = 0.7) -> Tensor:
    """GCE (Zhang and Sabuncu, 2018) at its q."""
    own = logits.softmax(1).gather(1, labels[:, None])
    return ((1 - own.clamp_min(1e-7) ** q) / q).mean()


_MANY = 50  # classes from which rivals take their papers' settings for CIFAR-100; below, those for CIFAR-10


def symmetric(logits: Tensor, labels: Tensor) -> Tensor:
    """SCE (Wang et al., 2019), log 0 = −4, at its weights: α = 6 and β = 0.1 for many classes, 0.1 and 1 for few."""
    alpha, beta = (6, 0.1) if logits.shape[1] >= _MANY else (0.1, 1)
    own = logits.softmax(1).gather(1, labels[:, None])
    return alpha * functional.cross_entropy(logits, labels) + beta * (4 * (1 - own)).mean()


class EarlyLearning(Head):
    """ELR (Liu et al., 2020): cross-entropy, and a pull to what each sample was predicted before.

    λ = 7 and β = 0.9 for many classes, 3 and 0.7 for few. It is given the samples' places for their labels, since it
    remembers each one.
    """

    def __init__(self, given: Tensor, feature_dim: int, num_classes: int) -> None:
        super().__init__(functional.cross_entropy, feature_dim, num_classes)
        self.given = given
        self.register_buffer("remembered", torch.zeros(len(given), num_classes))
        self.weight, self.keep = (7, 0.9) if num_classes >= _MANY else (3, 0.7)

    def forward(self, features: Tensor, labels: Tensor) -> Tensor:
        logits = self.logits(features)
        shares = logits.softmax(1).clamp(1e-4, 1 - 1e-4)
        seen = shares.detach()
        fresh = seen / seen.sum(1, keepdim=True)
        self.remembered[labels] = self.keep * self.remembered[labels] + (1 - self.keep) * fresh
        agreement = (self.remembered[labels] * shares).sum(1)
        return functional.cross_entropy(logits, self.given[labels]) + self.weight * (1 - agreement).log().mean()


class SupCon(nn.Module):
    """The supervised contrastive loss (Khosla et al., 2020) over a batch, one view each, at temperature 0.1."""

    def forward(self, features: Tensor, labels: Tensor) -> Tensor:
        itself = torch.eye(len(labels), dtype=torch.bool, device=labels.device)
        alike = (labels[:, None] == labels) & ~itself
        scores = (features @ features.T / 0.1).masked_fill(itself, -math.inf)
        logs = torch.where(alike, scores - scores.logsumexp(1, keepdim=True), 0)
        counts = alike.sum(1)
        return -(logs.sum(1) / counts.clamp_min(1))[counts > 0].mean()


class Rival(Objective):
    """Any criterion, of which nothing is logged."""

    def log(self, features: Tensor, labels: Tensor) -> dict[str, float]:
        return {}


Given = tuple[Tensor, int, int]  # labels to train on, d, k
METHODS: dict[str, Callable[[Given], nn.Module]] = {
    "vmcr2": lambda g: vmcr2.VMCR2Loss(g[2], g[1]),
    "vmcr2-1": lambda g: vmcr2.VMCR2Loss(g[2], g[1], atoms_per_class=1),
    "vmcr2-1-pull": lambda g: vmcr2.VMCR2Loss(g[2], g[1], atoms_per_class=1, pull=0.3),
    "ce": lambda g: Head(functional.cross_entropy, g[1], g[2]),
    "ce-10": lambda g: Head(functional.cross_entropy, g[1], g[2], scale=10.0),
    "ce-stopped": lambda g: Head(functional.cross_entropy, g[1], g[2]),
    "smoothing": lambda g: Head(lambda x, y: functional.cross_entropy(x, y, label_smoothing=0.1), g[1], g[2]),
    "cosine": lambda g: Head(functional.cross_entropy, g[1], g[2], scale=20.0, cosine=True),
    "gce": lambda g: Head(generalised, g[1], g[2]),
    "sce": lambda g: Head(symmetric, g[1], g[2]),
    "elr": lambda g: EarlyLearning(g[0], g[1], g[2]),
    "supcon": lambda g: SupCon(),
    "mcr2": lambda g: vmcr2.MCR2Loss(g[2]),
}
# Trained twice: labels that `label_quality` suspects after the first time are dropped, or replaced by the suggested.
TWICE = {f"{base}-{how}": (base, how) for base in ("vmcr2-1", "ce") for how in ("dropped", "relabelled")}
TWICE |= {f"{base}-relabelled": (base, "relabelled") for base in ("vmcr2-1-pull", "ce-10")}
METHODS |= {method: METHODS[base] for method, (base, _) in TWICE.items()}
NAMES = {
    "vmcr2": "V-MCR²",
    "vmcr2-1": "V-MCR², s = 1",
    "vmcr2-1-pull": "V-MCR², s = 1, pull 0.3",
    "ce": "cross-entropy",
    "ce-10": "cross-entropy, features times 10",
    "ce-stopped": "cross-entropy, stopped early",
    "smoothing": "label smoothing 0.1",
    "cosine": "cosine softmax (NormSoftmax)",
    "gce": "GCE",
    "sce": "symmetric cross-entropy",
    "elr": "ELR",
    "supcon": "SupCon",
    "mcr2": "MCR²",
    "vmcr2-1-dropped": "V-MCR², s = 1, again without the suspects",
    "vmcr2-1-relabelled": "V-MCR², s = 1, again with suggested labels",
    "vmcr2-1-pull-relabelled": "V-MCR², s = 1, pull 0.3, again with suggested labels",
    "ce-dropped": "cross-entropy, again without the suspects",
    "ce-relabelled": "cross-entropy, again with suggested labels",
    "ce-10-relabelled": "cross-entropy, features times 10, again with suggested labels",
}
FIRST_RATES = {"vmcr2": (0.2, 0.5, 1.0), "vmcr2-1": (0.2, 0.5, 1.0), "mcr2": (0.003, 0.01, 0.03)}
OTHER_RATES = (0.1, 0.3, 1.0)


@dataclass(frozen=True)
class Setting:
    """One run. `held` keeps the validation split out of training."""

    data: str
    method: str
    share: float
    kind: str
    seed: int
    lr: float
    held: bool


def noisy(labels: Tensor, images: Tensor, k: int, share: float, kind: str, seed: int) -> Tensor:
    """Gives a share of the samples the label of another class: any ("symmetric"), or the most similar one ("similar").

    The most similar class is the one whose mean image has the largest cosine with that of the sample's class.
    """
    generator = torch.Generator().manual_seed(1000 + seed)
    wrong = torch.randperm(len(labels), generator=generator)[: round(share * len(labels))]
    changed = labels.clone()
    if kind == "symmetric":
        changed[wrong] = (labels[wrong] + torch.randint(1, k, (len(wrong),), generator=generator)) % k
        return changed
    flat = images.flatten(1).float()
    means = torch.stack([flat[labels == j].mean(0) for j in range(k)])
    means = functional.normalize(means - means.mean(0), dim=1)
    changed[wrong] = (means @ means.T).fill_diagonal_(-1).argmax(1)[labels[wrong]]
    return changed


def prepared(setting: Setting, root: Path | None) -> tuple[Recipe, Dataset, Tensor, tuple[Tensor, Tensor]]:
    """Returns the recipe, the data to train on, which labels are wrong, and the validation split."""
    base = BASES[setting.data]
    recipe = replace(base, seed=setting.seed, evaluate_every=1)
    whole = sources.load(recipe.data, root)
    given = noisy(whole.train_labels, whole.train_inputs, whole.num_classes, setting.share, setting.kind, setting.seed)
    aside = places_in_class(whole.train_labels) % HELD_OUT == 3
    kept = ~aside if setting.held else torch.ones_like(aside)
    wrong = (given != whole.train_labels)[kept]
    dataset = replace(
        whole, train_inputs=whole.train_inputs[kept], train_labels=given[kept], train_rows=None, train_files=()
    )
    return recipe, dataset.to(DEVICE), wrong, (whole.train_inputs[aside].to(DEVICE), given[aside].to(DEVICE))


PREDICTORS = ("head", "one", "many")


@torch.no_grad()
def accuracies(
    model: nn.Module, criterion: nn.Module, recipe: Recipe, dataset: Dataset, inputs: Tensor, labels: Tensor
) -> tuple[dict[str, float], Features]:
    """Returns each predictor's accuracy on some samples; subspaces are those of the given training labels."""
    judged = replace(dataset, test_inputs=inputs, test_labels=labels)
    features = extract(model, judged, recipe.augmentation, 1000)
    found = {
        name: accuracy(nearest_subspace(features.test, training_bases(features, judged, r)), labels)
        for name, r in (("one", 1), ("many", None))
    }
    if isinstance(criterion, Head):
        found["head"] = accuracy(criterion.predict(features.test), labels)
    return found, features


def auroc(scores: Tensor, wrong: Tensor) -> float:
    """Returns how often a wrong label scores below a right one."""
    from sklearn.metrics import roc_auc_score

    return float(roc_auc_score(wrong.numpy(), -scores.numpy()))


def precision(scores: Tensor, wrong: Tensor) -> float:
    """Returns the share of wrong labels among as many of the lowest scores as there are wrong ones."""
    return float(wrong[scores.argsort()[: int(wrong.sum())]].double().mean())


@torch.no_grad()
def finding(criterion: nn.Module, features: Tensor, labels: Tensor, wrong: Tensor, k: int) -> dict[str, list[float]]:
    """Returns AUROC and precision of each score of a training label, from the network that was trained on it."""
    energies = subspace_energies(features, class_subspaces(features, labels, k, 1))
    scores = {
        "first direction": energies.gather(1, labels[:, None])[:, 0],
        "label_quality": torch.from_numpy(vmcr2.label_quality(features, labels).scores),
    }
    if isinstance(criterion, Head):
        scores["own softmax"] = criterion.logits(features).log_softmax(1).gather(1, labels[:, None])[:, 0]
    return {name: [auroc(score.cpu(), wrong), precision(score.cpu(), wrong)] for name, score in scores.items()}


def trained(
    setting: Setting,
    recipe: Recipe,
    dataset: Dataset,
    after: Callable[[dict[str, Any], nn.Module, nn.Module], None] | None,
) -> tuple[nn.Module, nn.Module]:
    """Returns a network and its criterion, trained by a setting's method on a data set."""
    k, d = dataset.num_classes, recipe.feature_dim
    shape = plain(dataset.train_inputs[:1], recipe.augmentation).shape[1:]
    model = train.build(recipe, tuple(shape), k)[0].to(DEVICE)
    criterion = METHODS[setting.method]((dataset.train_labels, d, k)).to(DEVICE)
    ours = isinstance(criterion, vmcr2.VMCR2Loss)
    objective = Variational(criterion, latch_every=recipe.vmcr2.latch_every) if ours else Rival(criterion, k)
    parameters = [*model.parameters(), *criterion.parameters()]
    optimizer = torch.optim.SGD(parameters, setting.lr, recipe.momentum, weight_decay=recipe.weight_decay)
    given = dataset
    if isinstance(criterion, EarlyLearning):  # its labels are places
        given = replace(dataset, train_labels=torch.arange(len(dataset.train_labels), device=DEVICE))
    at_rate = replace(recipe, objective="ce", ce=replace(recipe.ce, lr=setting.lr))
    torch.manual_seed(setting.seed)
    with torch.enable_grad():
        train.fit(
            model,
            objective,
            lambda epoch: train.EpochBatches(given, recipe, epoch),
            optimizer,
            recipe.epochs,
            latch_on=lambda epoch: train.EpochBatches(given, recipe, epoch, augment=False),
            lr_at=at_rate.lr_at,
            on_epoch=None if after is None else lambda epoch: after(epoch, model, criterion),
        )
    return model, criterion


def corrected(dataset: Dataset, features: Tensor, how: str) -> Dataset:
    """Returns the data set without the labels that are suspect, or with those that suit better."""
    judged = vmcr2.label_quality(features, dataset.train_labels)
    suggested = torch.from_numpy(judged.suggested).to(DEVICE)
    if how == "relabelled":
        return replace(dataset, train_labels=suggested)
    kept = suggested == dataset.train_labels
    return replace(dataset, train_inputs=dataset.train_inputs[kept], train_labels=dataset.train_labels[kept])


def run_one(setting: Setting, root: Path | None) -> Line:
    """Trains one setting; a line of the file."""
    recipe, dataset, wrong, (held_inputs, held_labels) = prepared(setting, root)
    k = dataset.num_classes
    line: dict[str, Any] = {**vars(setting), "failed": None}
    best: dict[str, Any] = {}

    def state(model: nn.Module, criterion: nn.Module) -> dict[str, Any]:
        found: dict[str, Any] = {}
        if setting.held:
            found["validation"], _ = accuracies(model, criterion, recipe, dataset, held_inputs, held_labels)
        found["test"], features = accuracies(
            model, criterion, recipe, dataset, dataset.test_inputs, dataset.test_labels
        )
        if bool(wrong.any()) and setting.method not in TWICE:
            found["finding"] = finding(criterion, features.train, dataset.train_labels, wrong, k)
        return found

    def after(epoch: dict[str, Any], model: nn.Module, criterion: nn.Module) -> None:
        nonlocal best
        if setting.method != "ce-stopped" or epoch["epoch"] % max(1, recipe.epochs // 20):
            return
        now = state(model, criterion) | {"epoch": epoch["epoch"]}
        if not best or max(now["validation"].values()) > max(best["validation"].values()):
            best = now

    began = time.perf_counter()
    try:
        model, criterion = trained(setting, recipe, dataset, after)
        if setting.method in TWICE:
            features = extract(model, dataset, recipe.augmentation, 1000).train
            dataset = corrected(dataset, features, TWICE[setting.method][1])
            model, criterion = trained(setting, recipe, dataset, after)
        line |= best or state(model, criterion)
    except (vmcr2.InputError, vmcr2.NumericalError) as error:
        line["failed"] = str(error)[:160]
    return line | {"seconds": round(time.perf_counter() - began, 1)}


@torch.no_grad()
def out_of_sample(setting: Setting, root: Path | None) -> Line:
    """Returns cleanlab's scores of the labels from cross-entropy's probabilities in five folds, as it recommends."""
    from cleanlab.rank import get_label_quality_scores

    recipe, dataset, wrong, _ = prepared(setting, root)
    k, labels = dataset.num_classes, dataset.train_labels
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(setting.seed))
    shares = torch.zeros(len(labels), k)
    began = time.perf_counter()
    for fold in order.tensor_split(5):
        kept = torch.ones(len(labels), dtype=torch.bool)
        kept[fold] = False
        part = replace(dataset, train_inputs=dataset.train_inputs[kept], train_labels=labels[kept])
        model, criterion = trained(setting, recipe, part, None)
        assert isinstance(criterion, Head)
        features = extract(model, replace(part, test_inputs=dataset.train_inputs[fold]), recipe.augmentation, 1000)
        shares[fold] = criterion.logits(features.test).softmax(1).cpu()
    found = {}
    for name in ("self_confidence", "normalized_margin"):
        scores = torch.from_numpy(get_label_quality_scores(labels.cpu().numpy(), shares.numpy(), method=name))
        found[f"cleanlab, {name}"] = [auroc(scores, wrong), precision(scores, wrong)]
    seconds = round(time.perf_counter() - began, 1)
    return {**vars(setting), "method": "cleanlab", "failed": None, "finding": found, "seconds": seconds}


def best_of(line: Line) -> float:
    """Returns the best predictor's accuracy on the noisy validation split, −1 of a run that failed."""
    return max(line["validation"].values()) if "validation" in line else -1.0


def chosen(data: str, method: str, seek: Callable[[Setting], Line]) -> tuple[float, str]:
    """Returns the learning rate and the predictor that do best on the noisy validation split."""

    def at(lr: float) -> Line:
        return seek(Setting(data, method, CHOSEN_AT, "symmetric", 0, lr, True))

    if method in TWICE:  # what is best the first time
        return chosen(data, TWICE[method][0], seek)
    lr = best_rate(FIRST_RATES.get(method, OTHER_RATES), lambda lr: best_of(at(lr)))
    validation = at(lr)["validation"]
    return lr, max(validation, key=lambda name: validation[name])


def kept(setting: Setting) -> Line:
    return RUNS.kept(vars(setting))


def completed(setting: Setting, root: Path | None) -> Line:
    return RUNS.completed(vars(setting), lambda: run_one(setting, root))


def run(
    data: list[str], methods: list[str], shares: list[float], seeds: list[int], root: Path | None, rate: float | None
) -> None:
    for name in data:
        for seed in seeds:
            for method in methods:
                lr = chosen(name, method, lambda setting: completed(setting, root))[0] if rate is None else rate
                for share in shares:
                    completed(Setting(name, method, share, "symmetric", seed, lr, method == "ce-stopped"), root)
                completed(Setting(name, method, CHOSEN_AT, "similar", seed, lr, method == "ce-stopped"), root)


def run_cleanlab(data: list[str], seeds: list[int], root: Path | None) -> None:
    for name in data:
        lr, _ = chosen(name, "ce", lambda setting: completed(setting, root))
        for seed in seeds:
            setting = Setting(name, "ce", CHOSEN_AT, "symmetric", seed, lr, False)
            RUNS.completed(vars(setting) | {"method": "cleanlab"}, lambda setting=setting: out_of_sample(setting, root))


def table() -> None:
    """Writes results/noise.md and noise.png."""
    known = RUNS.lines()
    text = (
        "# Wrong training labels\n\nMade by `python benchmarks/noise.py`, "
        f"{RUNS.where()}. Test accuracy, on correct labels: mean ± standard deviation where there are several seeds; "
        "the column `seeds` gives their largest number. The learning rate and the predictor were chosen at 30 % wrong "
        "labels and seed 0, on a validation split with wrong labels. Other columns use the rate chosen there, so on "
        "clean labels cross-entropy is more accurate at its own rate (omniglot100/comparison.md). The rivals' other "
        "settings are those of their papers; SCE and ELR take the ones for CIFAR-100 where there are 50 classes or "
        "more, and otherwise the ones for CIFAR-10. Early stopping learns from six sevenths of the samples, whose rest "
        "says when to stop. `similar`: 30 % got the label of the most similar class.\n"
    )
    curves: dict[str, dict[str, list[tuple[float, float, float]]]] = {}
    for data, base in BASES.items():
        rows, found_rows = [], []
        for method, title in NAMES.items():
            try:
                lr, predictor = chosen(data, method, kept)
            except MissingRunError:
                continue
            finals = [
                line
                for line in known
                if line["data"] == data and line["method"] == method
                and line["held"] == (method == "ce-stopped") and not line["failed"]
            ]  # fmt: skip
            members = [line for line in finals if line["lr"] == lr]
            # Other rates are those that --lr asked for, where training at the chosen one had failed.
            for rate in dict.fromkeys([lr, *(line["lr"] for line in finals)]):
                cells, seeds = [], 0
                for share, kind in [*((share, "symmetric") for share in LEVELS), (CHOSEN_AT, "similar")]:
                    values = [
                        line["test"][predictor]
                        for line in finals
                        if (line["lr"], line["share"], line["kind"]) == (rate, share, kind)
                    ]
                    seeds = max(seeds, len(values))
                    cells.append(mean_and_spread(values, 3))
                    if values and kind == "symmetric" and rate == lr:
                        spread_value = statistics.stdev(values) if len(values) > 1 else math.nan
                        curves.setdefault(data, {}).setdefault(method, []).append(
                            (share, statistics.mean(values), spread_value)
                        )
                if seeds:
                    named = title if rate == lr else f"{title}, at another rate"
                    rows.append([named, f"{rate:g}", _PREDICTOR[predictor], str(seeds), *cells])
            scored = [
                line
                for line in members
                if (line["share"], line["kind"]) == (CHOSEN_AT, "symmetric") and "finding" in line
            ]
            if scored:
                found_rows.append([title, *(_found(scored, score) for score in _SCORES)])
        for score in ("self_confidence", "normalized_margin"):
            scored = [line for line in known if (line["data"], line["method"]) == (data, "cleanlab")]
            if scored:
                cell = _found(scored, f"cleanlab, {score}")
                found_rows.append([f"cross-entropy out of sample, cleanlab's {score}", "–", "–", cell])
        searched = [line for line in known if line["data"] == data and line["held"] and not line["failed"]]
        if rows or searched:
            text += f"\n## {data}: {base.network}, d = {base.feature_dim}, {base.epochs} epochs\n\n"
        if searched and not rows:
            text += (
                "Only the runs that choose the learning rate, seed 0: 30 % wrong, trained on six sevenths of the "
                "training set; the predictor is the best on the other seventh, whose labels are as wrong.\n\n"
            )
            text += markdown_table(["", "lr", "predictor", "noisy validation", "test"], _search_rows(searched))
        if rows:
            shares = [f"{share:.0%}" for share in LEVELS]
            text += markdown_table(["", "lr", "predictor", "seeds", *shares, "similar"], rows)
            text += "\nFinding the 30 % wrong training labels: AUROC and precision at their true number, by score:\n\n"
            text += markdown_table(["features of", *_SCORES], found_rows)
    (RESULTS / "noise.md").write_text(text, encoding="utf-8")
    print(text)
    _draw(curves)


def _search_rows(lines: list[dict[str, Any]]) -> list[list[str]]:
    """Returns a row of each run that has a validation split, by method and learning rate."""
    methods, rows = list(NAMES), []
    for line in sorted(lines, key=lambda line: (methods.index(line["method"]), line["lr"])):
        best = max(line["validation"], key=lambda name: line["validation"][name])
        values = [f"{line[part][best]:.3f}" for part in ("validation", "test")]
        rows.append([NAMES[line["method"]], f"{line['lr']:g}", _PREDICTOR[best], *values])
    return rows


_PREDICTOR = {"head": "own head", "one": "subspace, 1", "many": "subspace, ⌊d/k⌋"}
_SCORES = ("first direction", "label_quality", "own softmax")


def _found(members: list[dict[str, Any]], score: str) -> str:
    values = [line["finding"][score] for line in members if score in line["finding"]]
    if not values:
        return "–"
    return ", ".join(f"{statistics.mean(value[i] for value in values):.3f}" for i in (0, 1))


def _draw(curves: dict[str, dict[str, list[tuple[float, float, float]]]]) -> None:
    """Draws accuracy against the share of wrong labels, a panel per data set."""
    import matplotlib.pyplot as plt

    drawn = {data: methods for data, methods in curves.items() if any(len(points) > 1 for points in methods.values())}
    if not drawn:
        return
    columns = min(2, len(drawn))
    lines_of = -(-len(drawn) // columns)
    figure, panels = plt.subplots(
        lines_of, columns, figsize=(3.4 + 4.6 * columns, 4.2 * lines_of), squeeze=False, layout="constrained"
    )
    for spare in panels.flat[len(drawn) :]:
        spare.set_axis_off()
    rivals = [method for method in NAMES if not method.startswith("vmcr2")]
    palette = [*(f"C{i}" for i in range(1, 10)), "black", "tan", "lightcoral"]
    for axes, (data, methods) in zip(panels.flat, drawn.items(), strict=False):
        for method, name in NAMES.items():
            points = sorted(methods.get(method, []))
            if len(points) < 2:
                continue
            ours = method.startswith("vmcr2")
            share, mean, spread = (np.array(values) for values in zip(*points, strict=True))
            if ours:
                colours = {"vmcr2": "navy", "vmcr2-1": "dodgerblue", "vmcr2-1-pull": "teal"}
                colour, marker = colours.get(method, "mediumorchid"), "o"
            else:
                place = rivals.index(method)
                colour, marker = palette[place % len(palette)], "svD^Xp"[place % 6]
            axes.errorbar(
                100 * share, mean, spread, color=colour, capsize=2, marker=marker,
                label=name.replace("s = 1", "one atom per class"), markersize=5,
                linewidth=2.5 if ours else 1.2, linestyle="-" if ours else "--",
            )  # fmt: skip
            alone = np.isnan(spread)
            axes.plot(100 * share[alone], mean[alone], marker, color="white", markersize=3, zorder=10)
        axes.set(title=data, xlabel="wrong training labels, %", ylabel="test accuracy (right labels)")
        axes.grid(alpha=0.3)
    lines: dict[str, Any] = {}
    for axes in panels.flat:
        lines |= dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    note = "hollow: one seed; else mean and\nstandard deviation of several"
    room = panels.size > len(drawn)  # the last panel is empty
    place, at = (panels.flat[-1], "center left") if room else (figure, "outside right upper")
    place.legend(lines.values(), lines.keys(), loc=at, fontsize=8, title=note, title_fontsize=8)
    figure.savefig(RESULTS / "noise.png", dpi=130)
    plt.close(figure)


def influence() -> None:
    """Draws how hard a sample is pulled to the class of its label, by its angle to that class: results/influence.png.

    The feature turns from the class it is labelled with (0°) to one that is orthogonal to it (90°), where a wrongly
    labelled sample of that class lies. Each pull is the derivative of the sample's loss in the angle, by autograd, over
    its largest. V-MCR²'s is that of eq. (9) with one atom per class, −⟨B_j, z zᵀ⟩ (and `pull`); the softmax has the two
    classes' directions for weights.
    """
    import matplotlib.pyplot as plt

    angle = torch.linspace(0, math.pi / 2, 200, dtype=torch.float64, requires_grad=True)
    own, other = angle.cos(), angle.sin()
    share = own.square()

    def softmax(scale: float) -> Tensor:
        return torch.stack([scale * own, scale * other], 1).log_softmax(1)[:, 0]

    def shortfall(pull: float) -> Tensor:
        return (1 - (share + 1 / 200) ** pull) / pull

    losses: dict[str, tuple[Tensor, dict[str, Any]]] = {
        "V-MCR²": (1 - share, {"color": "C0", "linewidth": 3}),
        "V-MCR², pull 0.3": (shortfall(0.3), {"color": "C0", "linestyle": ":", "linewidth": 2}),
        "cross-entropy": (-softmax(10.0), {"color": "C2"}),
        "label smoothing 0.1": (
            -0.95 * softmax(10.0) - 0.05 * torch.stack([10 * own, 10 * other], 1).log_softmax(1)[:, 1],
            {"color": "C4", "linestyle": "--"},
        ),
        "GCE": ((1 - softmax(10.0).exp() ** 0.7) / 0.7, {"color": "C6"}),
    }
    figure, axes = plt.subplots(figsize=(8.4, 4.2), layout="constrained")
    for title, (loss, style) in losses.items():
        (force,) = torch.autograd.grad(loss.sum(), angle, retain_graph=True)
        axes.plot(torch.rad2deg(angle.detach()), force / force.abs().max(), label=title, **style)
    axes.set(
        title="How hard a label pulls on a sample. Wrong labels lie at the right:\n"
        "V-MCR² and GCE let go of them, cross-entropy does not",
        xlabel="angle between the feature and the class of its label, degrees",
        ylabel="pull, its largest = 1",
    )
    axes.grid(alpha=0.3)
    axes.legend(loc="center left", bbox_to_anchor=(1.02, 0.5))
    figure.savefig(RESULTS / "influence.png", dpi=130)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("run", "cleanlab", "table", "influence"))
    parser.add_argument("--data-root", type=Path)
    parser.add_argument("--only", nargs="*", choices=tuple(BASES), default=["digits", "omniglot100"])
    parser.add_argument("--methods", nargs="*", choices=tuple(METHODS), default=list(METHODS))
    parser.add_argument("--shares", nargs="*", type=float, default=list(LEVELS))
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--lr", type=float, help="the final runs at this rate, whichever is chosen")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    if arguments.command == "table":
        table()
    elif arguments.command == "influence":
        influence()
    elif arguments.command == "cleanlab":
        run_cleanlab(arguments.only, arguments.seeds, arguments.data_root)
    else:
        run(arguments.only, arguments.methods, arguments.shares, arguments.seeds, arguments.data_root, arguments.lr)


if __name__ == "__main__":
    main()
