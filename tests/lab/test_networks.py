"""The networks have the sizes they should."""

import sys

import pytest
import torch
from conftest import needs

from vmcr2.errors import InputError
from vmcr2.lab import networks
from vmcr2.lab._torchvision import import_torchvision
from vmcr2.lab.recipes import Recipe


def test_preact_resnet18_has_the_parameters_it_should():
    model = networks.build("preact_resnet18", (3, 32, 32), 500)
    body = sum(parameter.numel() for layer in list(model)[:-5] for parameter in layer.parameters())
    # The well-known CIFAR variant has 11,171,146 with a linear layer of 5,130 and no last BatchNorm.
    assert body == 11_171_146 - 5_130 + 2 * 512
    features = model(torch.rand(4, 3, 32, 32))
    assert features.shape == (4, 500)
    assert torch.allclose(features.norm(dim=1), torch.ones(4))


def test_a_network_of_timm_is_trained_by_its_name():
    import_torchvision()
    needs("timm")
    for name, size in (("resnet10t", 32), ("vit_tiny_patch16_224", 48)):
        model = networks.build(f"timm:{name}", (1, size, size), 24)
        features = model(torch.rand(3, 1, size, size))
        assert features.shape == (3, 24)
        assert torch.allclose(features.norm(dim=1), torch.ones(3))
    with pytest.raises(InputError, match="got timm:resnet19; did you mean timm:resnet1"):
        networks.build("timm:resnet19", (3, 32, 32), 24)


def test_timm_is_named_where_it_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(InputError, match="network timm:resnet10t needs the package timm: pip install timm"):
        networks.build("timm:resnet10t", (3, 32, 32), 24)
    with pytest.raises(InputError, match=r"takes images \(c, h, w\)"):
        networks.build("timm:resnet10t", (7,), 24)
    for wrong in ("timm:", "resnet19"):
        with pytest.raises(InputError, match="network must be one of mlp, .*, or timm:NAME"):
            Recipe(network=wrong)
    assert Recipe(network="timm:anything").network == "timm:anything"
