"""The networks have the sizes they should."""

import torch

from vmcr2.lab import networks


def test_preact_resnet18_has_the_parameters_it_should():
    model = networks.build("preact_resnet18", (3, 32, 32), 500)
    body = sum(parameter.numel() for layer in list(model)[:-5] for parameter in layer.parameters())
    # The well-known CIFAR variant has 11,171,146 with a linear layer of 5,130 and no last BatchNorm.
    assert body == 11_171_146 - 5_130 + 2 * 512
    features = model(torch.rand(4, 3, 32, 32))
    assert features.shape == (4, 500)
    assert torch.allclose(features.norm(dim=1), torch.ones(4))
