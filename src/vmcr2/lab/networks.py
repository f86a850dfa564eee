"""The networks: maps from inputs to features of norm 1. Each name here is a value of a recipe's `network`."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from vmcr2.errors import InputError
from vmcr2.lab._torchvision import import_torchvision


class Normalize(nn.Module):
    """Scales every row to norm 1, in float32 or wider: the constraint Z ∈ S of eq. (1)."""

    def forward(self, features: Float[Tensor, "m d"]) -> Float[Tensor, "m d"]:
        """Returns the rows at norm 1."""
        return functional.normalize(features.to(torch.promote_types(features.dtype, torch.float32)), dim=1)


def reshaping_head(width: int, feature_dim: int) -> list[nn.Module]:
    """Returns Architecture 2's head from `width` to unit features; the paper has width 512."""
    return [
        nn.Linear(width, width, bias=False),
        nn.BatchNorm1d(width),
        nn.ReLU(),
        nn.Linear(width, feature_dim),
        Normalize(),
    ]


def _mlp(input_shape: tuple[int, ...], feature_dim: int) -> nn.Module:
    """Two hidden layers of 512 with BatchNorm, then the reshaping head: for embeddings and very small images."""
    width = 512
    layers: list[nn.Module] = [nn.Flatten(), nn.Linear(torch.Size(input_shape).numel(), width, bias=False)]
    layers += [nn.BatchNorm1d(width), nn.ReLU(), *reshaping_head(width, feature_dim)]
    return nn.Sequential(*layers)


def _conv4(input_shape: tuple[int, ...], feature_dim: int) -> nn.Module:
    """Four stride-2 convolutions with BatchNorm, flattened, then the reshaping head: Omniglot-sized images."""
    channels = [_channels(input_shape), 64, 64, 128, 128]
    layers: list[nn.Module] = []
    for before, after in pairwise(channels):
        layers += [nn.Conv2d(before, after, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), *_head_for(layers, input_shape, feature_dim))


def _head_for(layers: list[nn.Module], input_shape: tuple[int, ...], feature_dim: int) -> list[nn.Module]:
    with torch.no_grad():
        body = nn.Sequential(*layers).eval()
        width = body(torch.zeros(1, *input_shape)).numel()
    body.train()
    return reshaping_head(width, feature_dim)


def _cnn(input_shape: tuple[int, ...], feature_dim: int) -> nn.Module:
    """Architecture 1 of the paper, for MNIST at 32×32: two convolutions, no BatchNorm, dropout."""
    height, width = input_shape[1] - 4, input_shape[2] - 4
    return nn.Sequential(
        nn.Conv2d(_channels(input_shape), 32, 3),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Dropout(0.25),
        nn.Flatten(),
        nn.Linear(64 * (height // 2) * (width // 2), feature_dim),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.Linear(feature_dim, feature_dim),
        Normalize(),
    )


def _resnet18(input_shape: tuple[int, ...], feature_dim: int) -> nn.Module:
    """Architecture 2 of the paper: torchvision's ResNet-18 with its 7×7 stride-2 stem, and the reshaping head."""
    network = import_torchvision().models.resnet18(weights=None)
    if _channels(input_shape) != 3:
        network.conv1 = nn.Conv2d(_channels(input_shape), 64, 7, stride=2, padding=3, bias=False)
    network.fc = nn.Sequential(*reshaping_head(512, feature_dim))
    return network


class PreActBlock(nn.Module):
    """A residual block with BatchNorm and ReLU before each convolution (He et al., 2016, Fig. 4e)."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(before)
        self.conv1 = nn.Conv2d(before, after, 3, stride=stride, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(after)
        self.conv2 = nn.Conv2d(after, after, 3, padding=1, bias=False)
        alike = stride == 1 and before == after
        self.shortcut = None if alike else nn.Conv2d(before, after, 1, stride=stride, bias=False)

    def forward(self, images: Float[Tensor, "m c h w"]) -> Float[Tensor, "m e i j"]:
        """Returns the block's output; the shortcut, where shapes change, starts after the first activation."""
        active = functional.relu(self.norm1(images))
        kept = images if self.shortcut is None else self.shortcut(active)
        return self.conv2(functional.relu(self.norm2(self.conv1(active)))) + kept


def _preact_resnet18(input_shape: tuple[int, ...], feature_dim: int) -> nn.Module:
    """PreAct ResNet-18 with a 3×3 stem, for 32×32 images (Section 7.4), and the reshaping head.

    A last BatchNorm and ReLU precede the pooling, as in He et al.; some later versions leave them out.
    """
    layers: list[nn.Module] = [nn.Conv2d(_channels(input_shape), 64, 3, padding=1, bias=False)]
    before = 64
    for after, stride in ((64, 1), (128, 2), (256, 2), (512, 2)):
        layers += [PreActBlock(before, after, stride), PreActBlock(after, after, 1)]
        before = after
    layers += [nn.BatchNorm2d(512), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*layers, *reshaping_head(512, feature_dim))


def _channels(input_shape: tuple[int, ...]) -> int:
    if len(input_shape) != 3:
        raise InputError(f"this network takes images (c, h, w), got inputs of shape {input_shape}; use network = mlp")
    return input_shape[0]


NETWORKS: dict[str, Callable[[tuple[int, ...], int], nn.Module]] = {
    "mlp": _mlp,
    "conv4": _conv4,
    "cnn": _cnn,
    "resnet18": _resnet18,
    "preact_resnet18": _preact_resnet18,
}


TIMM = "timm:"


def _timm(name: str, input_shape: tuple[int, ...], feature_dim: int) -> nn.Module:
    """A network of the package timm by its name there, from random weights, and the reshaping head."""
    channels = _channels(input_shape)
    import_torchvision()  # timm imports it, and would fail beside a torch it was not built for
    try:
        import timm  # pyrefly: ignore[missing-import]
    except ModuleNotFoundError as error:
        raise InputError(f"network {TIMM}{name} needs the package timm: pip install timm") from error
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=1)
        hint = f"; did you mean {TIMM}{near[0]}?" if near else ""
        raise InputError(f"network must be a name that timm.list_models() has, got {TIMM}{name}{hint}")
    given = {"pretrained": False, "in_chans": channels, "num_classes": 0}
    try:
        body = timm.create_model(name, img_size=input_shape[1:], **given)
    except TypeError:  # a convolutional one, which takes any size
        body = timm.create_model(name, **given)
    return nn.Sequential(body, *_head_for([body], input_shape, feature_dim))


def check_network(network: str) -> None:
    """Raises InputError unless the name is one of `NETWORKS` or timm:NAME (timm itself is not looked into)."""
    if network not in NETWORKS and not (network.startswith(TIMM) and len(network) > len(TIMM)):
        raise InputError(f"network must be one of {', '.join(NETWORKS)}, or {TIMM}NAME, got {network!r}")


def build(network: str, input_shape: tuple[int, ...], feature_dim: int) -> nn.Module:
    """Returns a freshly initialised featurizer.

    Args:
        network: one of `NETWORKS`, or timm:NAME.
        input_shape: of one input: (c, h, w) or (d,).
        feature_dim: d, the dimension of the features.

    Raises:
        InputError: the network is unknown or does not take such inputs (a ValueError).
    """
    check_network(network)
    try:
        if network.startswith(TIMM):
            return _timm(network.removeprefix(TIMM), input_shape, feature_dim)
        return NETWORKS[network](input_shape, feature_dim)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"network {network} cannot take inputs of shape {input_shape}: {error}") from error


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Returns the context in which a network computes: "bf16" by torch's autocast, anything else as it is."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")
