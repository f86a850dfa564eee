"""Do the defaults train? `VMCR2Loss(num_classes, feature_dim)` and nothing else, in a plain loop, over a grid.

    python benchmarks/defaults.py run [--data-root DIR] [--only digits ...]    runs what is missing, a JSON line per run
    python benchmarks/defaults.py table                                       results/defaults.md from the lines

Data sets × networks with and without BatchNorm × optimisers × batch sizes, beside exact MCR² and cross-entropy in the
same loop. Nothing is augmented, no gradient clipped, no schedule followed. Accuracy is that of nearest subspaces on a
validation split, a fifth of the training set.
"""

from __future__ import annotations

import argparse
import itertools
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from runs import Runs
from torch import Tensor, nn

import vmcr2
from vmcr2.lab import networks, sources
from vmcr2.lab.objectives import CrossEntropyHead
from vmcr2.lab.terminal import markdown_table
from vmcr2.subspaces import class_subspaces, nearest_subspace

RESULTS = Path(__file__).parent.parent / "results"
# data set: settings, network, feature dimension, epochs
DATA = {
    "digits": (sources.DataSettings("digits"), "mlp", 128, 40),
    "omniglot100": (sources.DataSettings("omniglot", classes=100), "conv4", 200, 30),
    "mnist5000": (sources.DataSettings("mnist", train_size=5000, test_size=1000), "conv4", 128, 10),
}
OPTIMISERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "SGD 0.05": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9),
    "SGD 0.2": lambda p: torch.optim.SGD(p, 0.2, momentum=0.9),
    "SGD 0.5": lambda p: torch.optim.SGD(p, 0.5, momentum=0.9),
    "AdamW 1e-3": lambda p: torch.optim.AdamW(p, 1e-3),
}
BATCHES = (64, 256, 1000)
OBJECTIVES = ("vmcr2", "mcr2", "ce")


def without_norms(module: nn.Module) -> nn.Module:
    """Takes the BatchNorm layers out of a network, in place."""
    for name, inner in module.named_children():
        if isinstance(inner, nn.modules.batchnorm._BatchNorm):
            setattr(module, name, nn.Identity())
        else:
            without_norms(inner)
    return module


def split(data: str, data_root: Path | None) -> tuple[Tensor, Tensor, Tensor, Tensor, int]:
    """Returns training images and labels, those of the validation split (every fifth sample), and k."""
    dataset = sources.load(DATA[data][0], data_root)
    held = torch.arange(len(dataset.train_labels)) % 5 == 0
    images = dataset.train_inputs.float() / 255
    return images[~held], dataset.train_labels[~held], images[held], dataset.train_labels[held], dataset.num_classes


def trained(objective: str, data: str, norms: bool, optimiser: str, batch: int, seed: int, parts: tuple) -> dict:
    """Runs one cell of the grid."""
    x, y, x_held, y_held, k = parts
    _, network, d, epochs = DATA[data]
    torch.manual_seed(seed)
    model = networks.build(network, tuple(x.shape[1:]), d)
    model = model if norms else without_norms(model)
    kinds = {
        "vmcr2": lambda: vmcr2.VMCR2Loss(k, d),
        "mcr2": lambda: vmcr2.MCR2Loss(k),
        "ce": lambda: CrossEntropyHead(d, k),
    }
    loss = kinds[objective]()
    optimizer = OPTIMISERS[optimiser]([*model.parameters(), *loss.parameters()])
    generator = torch.Generator().manual_seed(seed)
    began, why = time.perf_counter(), None
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            for _ in range(epochs):
                order = torch.randperm(len(x), generator=generator)
                for rows in order.tensor_split(-(-len(x) // batch)):
                    value = loss(model(x[rows]), y[rows])
                    optimizer.zero_grad()
                    value.backward()
                    optimizer.step()
        except (vmcr2.InputError, vmcr2.NumericalError) as error:
            why = str(error)
    line = {
        "objective": objective, "data": data, "norms": norms, "optimiser": optimiser, "batch": batch, "seed": seed,
        "seconds": time.perf_counter() - began, "failed": why,
        "warned": any("collapsed" in str(warning.message) for warning in said),
    }  # fmt: skip
    if why is None:
        model.eval()
        with torch.no_grad():
            z, z_held = (torch.cat([model(part) for part in images.split(500)]) for images in (x, x_held))
        if bool(z.isfinite().all()) and bool(z_held.isfinite().all()):
            predicted = nearest_subspace(z_held, class_subspaces(z, y, k))
            rates = vmcr2.rate_reduction(z, y, num_classes=k)
            accuracy = float((predicted == y_held).double().mean())
            return line | {
                "reduction": float(rates.reduction),
                "expansion": float(rates.expansion),
                "accuracy": accuracy,
            }
    return line | {"reduction": None, "expansion": None, "accuracy": None}


RUNS = Runs(RESULTS / "defaults.jsonl", ("objective", "data", "norms", "optimiser", "batch", "seed"))


def run(data_root: Path | None, only: list[str], objectives: list[str], seeds: list[int]) -> None:
    for data in only:
        parts = split(data, data_root)
        for cell in itertools.product(seeds, objectives, (True, False), OPTIMISERS, BATCHES):
            setting = {"data": data} | dict(
                zip(("seed", "objective", "norms", "optimiser", "batch"), cell, strict=True)
            )
            RUNS.completed(setting, lambda setting=setting, parts=parts: trained(**setting, parts=parts))


def table() -> None:
    """Writes results/defaults.md: a row per network, optimiser and batch; ΔR and accuracy of each objective."""
    held = {tuple(line[key] for key in RUNS.keys): line for line in RUNS.lines()}
    text = (
        "# Do the defaults train?\n\nMade by `python benchmarks/defaults.py`; seed 0, "
        f"{RUNS.where()}. "
        "Cells show ΔR of the training part and accuracy on the validation split. V-MCR² is `VMCR2Loss(num_classes, "
        "feature_dim)`, latched on the first batches. Batches are of equal size, at most the size given: 1000 stands "
        "for 575 on digits, 600 on omniglot100 and 1000 on mnist5000; 256 stands for 230, 240 and 250.\n"
    )
    for data, (_, network, d, epochs) in DATA.items():
        rows = []
        for norms, optimiser, batch in itertools.product((True, False), OPTIMISERS, BATCHES):
            cells = [held.get((objective, data, norms, optimiser, batch, 0)) for objective in OBJECTIVES]
            if any(cells):
                shown = [
                    "–" if cell is None else "diverged" if cell["reduction"] is None
                    else f"{cell['reduction']:.2f}, {cell['accuracy']:.3f}" + (" (warned)" if cell["warned"] else "")
                    for cell in cells
                ]  # fmt: skip
                rows.append([f"{network}{'' if norms else ' without BatchNorm'}, {optimiser}, {batch}", *shown])
        if rows:
            text += f"\n## {data}, d = {d}, {epochs} epochs\n\n"
            text += markdown_table(["network, optimiser, batch", "V-MCR²", "MCR²", "cross-entropy"], rows)
    (RESULTS / "defaults.md").write_text(text, encoding="utf-8")
    print(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("run", "table"))
    parser.add_argument("--data-root", type=Path)
    parser.add_argument("--only", nargs="*", choices=tuple(DATA), default=list(DATA))
    parser.add_argument("--objectives", nargs="*", choices=OBJECTIVES, default=list(OBJECTIVES))
    parser.add_argument("--seeds", nargs="*", type=int, default=[0])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.command == "run":
        run(arguments.data_root, arguments.only, arguments.objectives, arguments.seeds)
    table()


if __name__ == "__main__":
    main()
