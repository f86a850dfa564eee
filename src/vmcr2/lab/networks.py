"""The networks: maps from inputs to features of norm 1. Each name here is a value of a recipe's `network`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.parallel import DistributedDataParallel

from vmcr2.checks import did_you_mean
from vmcr2.distributed import process_rank, sum_over_ranks, total_over_ranks, world_size
from vmcr2.errors import InputError
from vmcr2.lab._torchvision import import_torchvision
from vmcr2.linalg import unit_rows


class Normalize(nn.Module):
    """`unit_rows` as the last layer of a network."""

    def forward(self, features: Float[Tensor, "m d"]) -> Float[Tensor, "m d"]:
        """Returns the rows scaled to norm 1."""
        return unit_rows(features)


class WholeMapConv2d(nn.Conv2d):
    """A convolution that, on a CPU, is one matrix product if each of its outputs sees the whole input map.

    This is so in the last stages of a ResNet on small images, 3×3 over maps of 2×2 and 1×1, where most of the kernel
    lies on padding. It is the same function of the same parameters; `benchmarks/network.py` times both.
    """

    def forward(self, input: Float[Tensor, "m c h w"]) -> Float[Tensor, "m o i j"]:
        """Returns the convolution of the maps."""
        rows, columns = (self._offsets(axis, length) for axis, length in enumerate(input.shape[2:]))
        plain = self.groups == 1 and self.dilation == (1, 1) and self.padding_mode == "zeros"
        if input.device.type != "cpu" or not plain or not rows or not columns:
            return super().forward(input)
        h, w = input.shape[2:]
        weight = self.weight.permute(0, 2, 3, 1)  # channels last, as the maps are
        seen = torch.stack([weight[:, y : y + h, x : x + w] for y in rows for x in columns])
        bias = None if self.bias is None else self.bias.repeat(len(seen))
        maps = functional.linear(input.permute(0, 2, 3, 1).flatten(1), seen.flatten(2).flatten(0, 1), bias)
        return maps.unflatten(1, (len(rows), len(columns), -1)).permute(0, 3, 1, 2)

    def _offsets(self, axis: int, length: int) -> list[int]:
        """Where in the kernel the map starts, for each output along an axis; empty if one sees only part of the map."""
        size, stride, padding = self.kernel_size[axis], self.stride[axis], self.padding[axis]
        if isinstance(padding, str):
            return []
        offsets = [padding - stride * i for i in range((length + 2 * padding - size) // stride + 1)]
        return offsets if all(0 <= start <= size - length for start in offsets) else []


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
    channels = _channels(input_shape)
    height, width = input_shape[1] - 4, input_shape[2] - 4
    return nn.Sequential(
        nn.Conv2d(channels, 32, 3),
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
        skipped = images if self.shortcut is None else self.shortcut(active)
        return self.conv2(functional.relu(self.norm2(self.conv1(active)))) + skipped


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
    """A network from the package timm, by its name there, with random weights, and the reshaping head."""
    channels = _channels(input_shape)
    import_torchvision()  # timm imports it, and would fail with a torch that torchvision was not built for
    try:
        import timm  # pyrefly: ignore[missing-import]
    except ModuleNotFoundError as error:
        raise InputError(f"network {TIMM}{name} needs the package timm: pip install timm") from error
    if not timm.is_model(name):
        hint = did_you_mean(name, timm.list_models(), TIMM)
        raise InputError(f"network must be a name that timm.list_models() has, got {TIMM}{name}{hint}")
    given = {"pretrained": False, "in_chans": channels, "num_classes": 0}
    try:
        body = timm.create_model(name, img_size=input_shape[1:], **given)
    except TypeError:  # a convolutional network, which accepts any size
        body = timm.create_model(name, **given)
    return nn.Sequential(body, *_head_for([body], input_shape, feature_dim))


def check_network(network: str) -> None:
    """Raises InputError unless the name is one of `NETWORKS` or timm:NAME (NAME itself is not checked)."""
    if network not in NETWORKS and not (network.startswith(TIMM) and len(network) > len(TIMM)):
        raise InputError(f"network must be one of {', '.join(NETWORKS)}, or {TIMM}NAME, got {network!r}")


def build(network: str, input_shape: tuple[int, ...], feature_dim: int) -> nn.Module:
    """Returns a freshly initialised featurizer.

    Args:
        network: one of `NETWORKS`, or timm:NAME.
        input_shape: of one input: (c, h, w) or (d,).
        feature_dim: d, the dimension of the features.

    Raises:
        InputError: the network is unknown or does not accept such inputs (a ValueError).
    """
    check_network(network)
    try:
        if network.startswith(TIMM):
            model = _timm(network.removeprefix(TIMM), input_shape, feature_dim)
        else:
            model = NETWORKS[network](input_shape, feature_dim)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"network {network} cannot take inputs of shape {input_shape}: {error}") from error
    for layer in model.modules():
        if type(layer) is nn.Conv2d:
            layer.__class__ = WholeMapConv2d  # it has the same state
    return model


class SyncBatchNorm(_BatchNorm):
    """BatchNorm that uses the statistics of all processes' batches together wherever it uses a batch's.

    torch's own refuses a CPU, and in eval mode, in which latching runs a network, uses only its own process's
    statistics. This is not a subclass of it, since DistributedDataParallel refuses those on a CPU too.
    """

    process_group = None  # needed by torch's methods, which are used here as well
    _check_non_zero_input_channels = nn.SyncBatchNorm._check_non_zero_input_channels
    _check_input_dim = nn.SyncBatchNorm._check_input_dim

    def forward(self, input: Float[Tensor, "m c ..."]) -> Float[Tensor, "m c ..."]:
        """Returns the normalised input."""
        batch = self.training or self.running_mean is None
        if not batch:
            return super().forward(input)
        if self.training and input.is_cuda:  # its kernels are faster
            return nn.SyncBatchNorm.forward(self, input)  # pyrefly: ignore[bad-argument-type]
        wide = input.float() if input.dtype in (torch.bfloat16, torch.float16) else input
        others, shape = [0, *range(2, wide.ndim)], [1, -1] + [1] * (wide.ndim - 2)
        count = wide.new_full((1,), wide.numel() / wide.shape[1])
        *sums, n = total_over_ranks(torch.cat([wide.sum(others), count])).split([wide.shape[1], 1])
        n = n.detach()
        mean = sums[0] / n
        centred = wide - mean.view(shape)
        variance = total_over_ranks(centred.square().sum(others)) / n
        if self.training and self.track_running_stats:
            self._follow(mean.detach(), variance.detach() * n / (n - 1))
        normal = centred * (variance + self.eps).rsqrt().view(shape)
        if self.affine:
            normal = normal * self.weight.view(shape) + self.bias.view(shape)
        return normal.to(input.dtype)

    def _follow(self, mean: Tensor, variance: Tensor) -> None:
        assert self.num_batches_tracked is not None
        assert self.running_mean is not None
        assert self.running_var is not None
        self.num_batches_tracked.add_(1)
        step = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), step)
        self.running_var.lerp_(variance.to(self.running_var.dtype), step)


def synchronise_batchnorm(model: nn.Module) -> nn.Module:
    """Returns the network with every BatchNorm replaced by a `SyncBatchNorm` with the same parameters and buffers.

    Raises:
        InputError: it has another kind of BatchNorm layer, which cannot be replaced safely (a ValueError).
    """
    if isinstance(model, _BatchNorm):
        if type(model) not in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d):
            raise InputError(f"sync_batchnorm must be false for a network with layers of {type(model).__name__}")
        synced = SyncBatchNorm(model.num_features, model.eps, model.momentum, model.affine, model.track_running_stats)
        synced._parameters, synced._buffers = model._parameters, model._buffers
        return synced.train(model.training)
    for name, child in model.named_children():
        setattr(model, name, synchronise_batchnorm(child))
    return model


def has_batchnorm(model: nn.Module) -> bool:
    """Whether a layer uses statistics of its own process's batch, which must then have at least 2 samples."""
    return any(isinstance(layer, _BatchNorm) and not isinstance(layer, SyncBatchNorm) for layer in model.modules())


def draw_dropout_for_all(model: nn.Module) -> None:
    """Makes dropout in training draw for the batch of all processes, each of which then uses its own part.

    A sample thus gets the same mask as with one process, and the generators of all ranks advance equally, whatever
    their shares: a run resumed with another number of processes draws what it would have drawn.
    """
    layers = [layer for layer in model.modules() if isinstance(layer, _DropoutNd)]
    if not layers:
        return
    before = after = 0

    def meet(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        nonlocal before, after
        if module.training:
            rank = process_rank()
            sizes = torch.zeros(world_size(), dtype=torch.long, device=inputs[0].device)
            sizes[rank] = len(inputs[0])
            shares = sum_over_ranks(sizes).tolist()
            before, after = sum(shares[:rank]), sum(shares[rank + 1 :])

    def widen(layer: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor | None:
        (given,) = inputs
        return functional.pad(given, [0, 0] * (given.ndim - 1) + [before, after]) if layer.training else None

    def narrow(layer: nn.Module, _: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        return output[before : len(output) - after] if layer.training else None

    model.register_forward_pre_hook(meet)
    for layer in layers:
        layer.register_forward_pre_hook(widen)
        layer.register_forward_hook(narrow)


def distributed(model: nn.Module) -> nn.Module:
    """Returns the network with gradients averaged over the processes, or as it is if there is only one."""
    if world_size() == 1:
        return model
    device = next(model.parameters()).device
    return DistributedDataParallel(model, device_ids=None if device.index is None else [device.index])


def share_statistics(model: nn.Module) -> None:
    """Gives every process the first one's buffers, such as BatchNorm's running statistics."""
    if world_size() > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)


def channels_last(model: nn.Module) -> nn.Module:
    """Stores the weights of a network's convolutions with channels last, which is faster on CPUs and GPUs."""
    for parameter in model.parameters():
        if parameter.ndim == 4:  # convolutions follow the layout of their weights
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
    return model


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Sets a network to eval mode, and afterwards each of its layers to the mode that it had."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Returns the context in which a network computes: torch's autocast for "bf16", no change for anything else."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")
