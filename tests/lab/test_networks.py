"""The networks: their sizes, what they accept, and what they are refused for."""

import sys

import pytest
import torch
from conftest import needs
from torch import nn

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


@pytest.mark.parametrize("size", [(1, 1), (2, 2), (1, 2), (2, 3), (3, 3), (4, 2), (5, 5)])
@pytest.mark.parametrize(
    "kind", [{}, {"stride": 2}, {"padding": 0}, {"padding": 2}, {"padding": "same"}, {"dilation": 2}, {"groups": 2}]
)
def test_a_convolution_of_a_small_map_is_the_convolution(size, kind):
    torch.manual_seed(0)
    kind = {"padding": 1, **kind}
    if kind["padding"] == 0 and min(size) < 3:
        kind["padding"] = 1  # torch takes no map that is smaller than the kernel
    ours = networks.WholeMapConv2d(4, 6, 3, dtype=torch.float64, **kind)
    theirs = nn.Conv2d(4, 6, 3, dtype=torch.float64, **kind)
    theirs.load_state_dict(ours.state_dict())
    maps = torch.randn(3, 4, *size, dtype=torch.float64, requires_grad=True)
    if kind.get("dilation") == 2:
        maps = torch.randn(3, 4, size[0] + 4, size[1] + 4, dtype=torch.float64, requires_grad=True)
    out, expected = ours(maps), theirs(maps)
    weights = torch.randn_like(expected)
    found = torch.autograd.grad((out * weights).sum(), [maps, *ours.parameters()])
    right = torch.autograd.grad((expected * weights).sum(), [maps, *theirs.parameters()])
    for value, reference in zip((out, *found), (expected, *right), strict=True):
        torch.testing.assert_close(value, reference)


def test_a_resnet_on_small_images_takes_products_in_its_last_stages_and_is_the_same_function(monkeypatch):
    torch.manual_seed(0)
    model = networks.build("resnet18", (3, 32, 32), 10).double()
    images = torch.rand(4, 3, 32, 32, dtype=torch.float64)
    plain, convolve = [], nn.Conv2d._conv_forward
    monkeypatch.setattr(nn.Conv2d, "_conv_forward", lambda self, *given: plain.append(1) or convolve(self, *given))
    features = model(images)
    assert len(plain) == 20 - 7  # three over maps of 2×2, one down to 1×1, three over 1×1
    for layer in model.modules():
        if isinstance(layer, networks.WholeMapConv2d):
            layer.__class__ = nn.Conv2d
    torch.testing.assert_close(features, model(images))


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
