"""What a run is judged by."""

import pytest
import torch

from vmcr2.lab import networks
from vmcr2.lab.augmentation import Augmentation
from vmcr2.lab.evaluate import Features, extract, for_figures
from vmcr2.lab.sources import Dataset


def two_classes():
    """Returns a data set of embeddings: class 0 along the first axis, class 1 along the second."""
    labels = torch.tensor([0, 0, 1, 1, 1])
    test, test_labels = torch.eye(3)[[0, 1, 1, 1]], torch.tensor([0, 0, 0, 1])  # two of class 0 look like class 1
    return Dataset(torch.eye(3)[labels], labels, test, test_labels, ("ash", "elm"))


def test_the_confusion_matrix_has_true_classes_down_and_predicted_ones_across():
    dataset = two_classes()
    bases = torch.eye(3)[:2, :, None]
    made = for_figures(Features(dataset.train_inputs, dataset.test_inputs), dataset, bases)
    assert made["confusion"].tolist() == [[1, 2], [0, 1]]


@pytest.mark.parametrize("training", [True, False])
def test_extraction_takes_eval_mode_and_leaves_the_mode_as_it_was(training):
    model = torch.nn.Sequential(torch.nn.Dropout(0.9), networks.Normalize()).train(training)
    dataset = two_classes()
    features = extract(model, dataset, Augmentation(), 2)
    assert torch.equal(features.train, dataset.train_inputs)
    assert torch.equal(features.test, dataset.test_inputs)
    assert model.training == training
