"""The measures of a run: exact ΔR of the training set, nearest-subspace accuracy, spectra."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from vmcr2.distributed import gather_rows, process_rank, world_size
from vmcr2.lab.augmentation import Augmentation, plain
from vmcr2.lab.networks import autocast, evaluating
from vmcr2.lab.sources import Dataset
from vmcr2.rates import rate_reduction
from vmcr2.subspaces import class_subspaces, nearest_subspace

_SHOWN_CLASSES = 10  # classes whose samples figures show


@dataclass(frozen=True)
class Features:
    """Features of a whole data set, in eval mode and without augmentation."""

    train: Float[Tensor, "m d"]
    test: Float[Tensor, "t d"]


@torch.no_grad()
def extract(
    model: nn.Module, dataset: Dataset, augmentation: Augmentation, batch_size: int, precision: str = "float32"
) -> Features:
    """Returns the features of a data set, on the device that holds it; the modes of the model's layers are restored.

    With several processes each sends its share of the samples through the network, and all receive all features.

    Args:
        model: the network, on any device.
        dataset: its inputs.
        augmentation: its crop size is cut from the middle.
        batch_size: inputs at once, in all processes together.
        precision: of the network: float32 or bf16.
    """
    world = world_size()
    device = next(model.parameters(), dataset.train_inputs).device

    def features(inputs: Tensor) -> Tensor:
        parts = inputs.tensor_split(world)
        own = parts[process_rank()]
        # Not every network accepts an empty batch.
        batches = own.split(max(1, batch_size // world)) if len(own) else [inputs[:1]]
        found = torch.cat([model(plain(batch.to(device), augmentation)) for batch in batches])[: len(own)]
        return gather_rows(found, shares=[len(part) for part in parts])[0].to(inputs.device)

    with evaluating(model), autocast(device, precision):
        return Features(features(dataset.train_inputs), features(dataset.test_inputs))


def training_bases(features: Features, dataset: Dataset, components: int | None = None) -> Float[Tensor, "k d r"]:
    """Returns bases of the classes' training features, with which eq. (8) classifies; None means ⌊d/k⌋ components."""
    return class_subspaces(features.train, dataset.train_labels, dataset.num_classes, components)


@dataclass(frozen=True)
class Measures:
    """Rates of the whole training set in nats, and accuracies on the test set."""

    train_expansion: float
    train_compression: float
    train_reduction: float
    test_accuracy: float
    head_accuracy: float | None


@torch.no_grad()
def measure(
    features: Features,
    dataset: Dataset,
    bases: Float[Tensor, "k d r"],
    eps_sq: float,
    predict: Callable[[Tensor], Tensor] | None = None,
) -> Measures:
    """Returns exact R, R_c and ΔR on the training set, and the accuracy of nearest subspaces (eq. 8) on the test set.

    Args:
        features: of the data set.
        dataset: its labels.
        bases: from `training_bases`.
        eps_sq: ε².
        predict: a classifier that was trained with the network, whose accuracy is returned too, or None.
    """
    k = dataset.num_classes
    rates = rate_reduction(features.train, dataset.train_labels, num_classes=k, eps_sq=eps_sq)
    predicted = nearest_subspace(features.test, bases)
    return Measures(
        float(rates.expansion),
        float(rates.compression),
        float(rates.reduction),
        accuracy(predicted, dataset.test_labels),
        None if predict is None else accuracy(predict(features.test), dataset.test_labels),
    )


def accuracy(predicted: Shaped[Tensor, " t"], labels: Shaped[Tensor, " t"]) -> float:
    """Returns the share of labels predicted correctly."""
    return float((predicted == labels).double().mean())


@torch.no_grad()
def accuracy_by_components(features: Features, dataset: Dataset, components: list[int]) -> dict[int, float]:
    """Returns the nearest-subspace test accuracy for each dimension of the subspaces."""
    bases = training_bases(features, dataset, max(components, default=1))  # strongest directions first
    return {r: accuracy(nearest_subspace(features.test, bases[..., :r]), dataset.test_labels) for r in components}


@torch.no_grad()
def for_figures(features: Features, dataset: Dataset, bases: Float[Tensor, "k d r"]) -> dict[str, np.ndarray]:
    """Returns what the figures need: features of a few classes sorted by class, spectra, and the confusion matrix.

    If there are more than ten classes, ten are shown, evenly spread; each with at most 50 samples.
    """
    k = dataset.num_classes
    chosen = torch.linspace(0, k - 1, min(k, _SHOWN_CLASSES)).long().tolist()
    rows = [(dataset.train_labels == j).nonzero()[:50, 0] for j in chosen]
    picked = torch.cat(rows)
    depth = min(features.train.shape[1], int(torch.bincount(dataset.train_labels).max()))
    spectra = features.train.new_zeros(k, depth)
    for j in range(k):
        own = features.train[dataset.train_labels == j]
        values = torch.linalg.svdvals(own).square() / max(1, len(own))
        spectra[j, : len(values)] = values
    pairs = dataset.test_labels * k + nearest_subspace(features.test, bases)
    counts = torch.bincount(pairs, minlength=k * k)
    return {
        "features": features.train[picked].cpu().numpy().astype(np.float16),
        "labels": dataset.train_labels[picked].cpu().numpy(),
        "spectra": spectra.cpu().numpy().astype(np.float32),
        "confusion": counts.view(k, k).cpu().numpy().astype(np.int32),  # true classes down, predicted ones across
        "class_names": np.asarray(dataset.class_names),
    }
