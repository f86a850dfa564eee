"""What `WholeMapConv2d` and `keep_freed_memory` save: steps of the networks on a CPU with and without them.

    python benchmarks/network.py    writes results/network.md

Nothing else may run beside it.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from torch import nn

from vmcr2.lab import networks
from vmcr2.lab.processes import keep_freed_memory
from vmcr2.lab.terminal import describe_device, markdown_table

ROUNDS = 7
CASES = (
    ("resnet18, 3×32×32", "resnet18", (3, 32, 32), 500),
    ("resnet18, 3×64×64", "resnet18", (3, 64, 64), 500),
    ("cnn, 1×32×32", "cnn", (1, 32, 32), 128),
    ("conv4, 1×28×28", "conv4", (1, 28, 28), 200),
)


def least(network: str, shape: tuple[int, ...], d: int, kinds: tuple[type, ...]) -> list[float]:
    """Returns the least seconds of a forward and a backward pass with each kind of convolution, interleaved."""
    torch.manual_seed(0)
    images = torch.rand(250, *shape).contiguous(memory_format=torch.channels_last)
    model = networks.build(network, shape, d).to(memory_format=torch.channels_last)
    layers = [layer for layer in model.modules() if isinstance(layer, networks.WholeMapConv2d)]
    seconds: dict[type, list[float]] = {kind: [] for kind in kinds}
    for _ in range(ROUNDS + 1):
        for kind, taken in seconds.items():
            for layer in layers:
                layer.__class__ = kind
            began = time.perf_counter()
            model(images)[:, 0].sum().backward()
            taken.append(time.perf_counter() - began)
    return [min(taken[1:]) for taken in seconds.values()]  # the first round warms up


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    before = [least(*case, (nn.Conv2d, networks.WholeMapConv2d)) for _, *case in CASES]
    keep_freed_memory()
    after = [least(*case, (networks.WholeMapConv2d,)) for _, *case in CASES]
    rows = [
        [title, *(f"{value:.2f}" for value in (torchs, ours, kept)), f"{torchs / kept:.2f}"]
        for (title, *_), (torchs, ours), (kept,) in zip(CASES, before, after, strict=True)
    ]
    text = (
        "# The networks on a CPU\n\nMade by `python benchmarks/network.py`; "
        f"{describe_device(torch.device('cpu'))}. Time of a forward and a backward pass of a batch of 250, the least "
        f"of {ROUNDS}. `vmcr2` trains with both changes: a convolution whose outputs see the whole map is one "
        "matrix product, and glibc is told to keep freed memory.\n\n"
    ) + markdown_table(["network", "nn.Conv2d, s", "WholeMapConv2d, s", "and freed memory kept, s", "ratio"], rows)
    (Path(__file__).parent.parent / "results" / "network.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
