"""What `MapConv2d` saves: a step of ResNet-18 on a CPU with it and with torch's convolutions, interleaved.

python benchmarks/network.py
"""

from __future__ import annotations

import time

import torch
from torch import nn

from vmcr2.lab import networks
from vmcr2.lab.report import describe_device, markdown_table

ROUNDS = 7


def step(model: nn.Module, images: torch.Tensor) -> float:
    """Returns the seconds of a forward and a backward pass."""
    began = time.perf_counter()
    model(images)[:, 0].sum().backward()
    return time.perf_counter() - began


def main() -> None:
    rows = []
    for title, size in (("CIFAR", 32), ("Tiny ImageNet", 64)):
        torch.manual_seed(0)
        images = torch.rand(250, 3, size, size).contiguous(memory_format=torch.channels_last)
        model = networks.build("resnet18", (3, size, size), 500).to(memory_format=torch.channels_last)
        layers = [layer for layer in model.modules() if isinstance(layer, networks.MapConv2d)]
        seconds: dict[type, list[float]] = {networks.MapConv2d: [], nn.Conv2d: []}
        for _ in range(ROUNDS + 1):
            for kind, taken in seconds.items():
                for layer in layers:
                    layer.__class__ = kind
                taken.append(step(model, images))
        ours, theirs = (min(taken[1:]) for taken in seconds.values())  # the first round warms up
        rows.append([f"{title}, {size}×{size}", f"{theirs:.2f}", f"{ours:.2f}", f"{theirs / ours:.2f}"])
    print(f"Batches of 250, least of {ROUNDS}; {describe_device(torch.device('cpu'))}\n")
    print(markdown_table(["images", "nn.Conv2d, s", "MapConv2d, s", "ratio"], rows))


if __name__ == "__main__":
    main()
