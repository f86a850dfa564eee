"""Seconds per epoch of each objective, as in the paper's Table 1, on any machine, with random images of its sizes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.benchmark import Timer

from vmcr2.lab import networks
from vmcr2.lab.augmentation import augmented, plain
from vmcr2.lab.objectives import CrossEntropyHead
from vmcr2.lab.paper import PAPER, TABLE1
from vmcr2.lab.recipes import Recipe
from vmcr2.losses import MCR2Loss, VMCR2Loss


@dataclass(frozen=True)
class Workload:
    """One row of Table 1: the recipe, and the properties of its data that determine the cost of an epoch.

    Attributes:
        recipe: its network, d, s, batch size and augmentation.
        samples: training images in an epoch.
        shape: of one image as it is stored.
        classes: k.
    """

    recipe: Recipe
    samples: int
    shape: tuple[int, int, int]
    classes: int


WORKLOADS: dict[str, Workload] = {
    "mnist": Workload(PAPER["mnist"], 60_000, (1, 28, 28), 10),
    "cifar10": Workload(PAPER["cifar10"], 50_000, (3, 32, 32), 10),
    "cifar100": Workload(PAPER["cifar100"], 50_000, (3, 32, 32), 100),
    "tiny-imagenet": Workload(PAPER["tiny-imagenet"], 100_000, (3, 32, 32), 200),
}


@dataclass(frozen=True)
class Timing:
    """Seconds per call over repeated calls: the median, and the distance between the quartiles."""

    median: float
    spread: float


def timed(call: Callable[[], object], seconds: float = 1.0) -> Timing:
    """Returns how long a call takes, after one warm-up call; waits for its work on a GPU.

    Args:
        call: what to time.
        seconds: the call is repeated for at least this long, and at least once.
    """
    timer = Timer("call()", globals={"call": call}, num_threads=torch.get_num_threads())
    measured = timer.blocked_autorange(min_run_time=seconds)
    return Timing(measured.median, measured.iqr)


@dataclass(frozen=True)
class EpochCost:
    """The cost of an epoch, with the objective, the network and augmentation measured separately.

    Attributes:
        augmentation: of one batch of images stored on the device.
        network: one step of the network, forward, backward and update, without an objective.
        objectives: one step of each objective, forward and backward, on given features.
        steps: steps in an epoch.
    """

    augmentation: Timing
    network: Timing
    objectives: dict[str, Timing]
    steps: int

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> EpochCost:
        """Rebuilds the object from the result of `dataclasses.asdict`, read back from JSON."""
        objectives = {name: Timing(**timing) for name, timing in record["objectives"].items()}
        return cls(Timing(**record["augmentation"]), Timing(**record["network"]), objectives, record["steps"])

    def step(self, objective: str) -> float:
        """Returns the seconds of one step with an objective."""
        return self.augmentation.median + self.network.median + self.objectives[objective].median

    def epoch(self, objective: str) -> float:
        """Returns the seconds per epoch with an objective."""
        return self.steps * self.step(objective)

    def beyond_ce(self, objective: str) -> float:
        """Returns how much longer an epoch is than with cross-entropy, as a share."""
        return self.epoch(objective) / self.epoch("ce") - 1


def epoch_cost(workload: Workload, device: torch.device, seconds: float = 1.0) -> EpochCost:
    """Times one row of the table; the objectives are at their defaults, apart from s.

    Args:
        workload: the sizes.
        device: where to run.
        seconds: the least time for each measurement.
    """
    torch.manual_seed(0)
    recipe, k = workload.recipe, workload.classes
    m, d, s = recipe.batch_size, recipe.feature_dim, recipe.vmcr2.atoms_per_class
    stored = torch.randint(256, (m, *workload.shape), dtype=torch.uint8, device=device)
    images = plain(stored, recipe.augmentation)
    model = networks.channels_last(networks.build(recipe.network, tuple(images.shape[1:]), d).to(device))
    optimizer = torch.optim.SGD(model.parameters(), 1e-3, momentum=0.9)
    labels = torch.arange(m, device=device)[torch.randperm(m, device=device)] % k
    upstream = nn.functional.normalize(torch.randn(m, d, device=device), dim=1)

    def network_step() -> None:
        optimizer.zero_grad()
        model(images).backward(upstream / m)
        optimizer.step()

    criteria: dict[str, nn.Module] = {
        "ce": CrossEntropyHead(d, k).to(device),
        "mcr2": MCR2Loss(k),
        "vmcr2": VMCR2Loss(k, d, atoms_per_class=s).to(device),
        "vmcr2 block": VMCR2Loss(k, d, atoms_per_class=s, structure="block").to(device),
    }
    many = nn.functional.normalize(torch.randn(20 * k, d, device=device), dim=1)
    for criterion in criteria.values():
        if isinstance(criterion, VMCR2Loss):
            criterion.latch(many, torch.arange(20 * k, device=device) % k)
    features = upstream.clone().requires_grad_()

    def objective_step(criterion: nn.Module) -> Callable[[], Tensor]:
        return lambda: torch.autograd.grad(criterion(features, labels), features)[0]

    generator = torch.Generator(device).manual_seed(0)
    augmentation = timed(lambda: augmented(stored, recipe.augmentation, generator), seconds)
    network = timed(network_step, seconds)
    costs = {name: timed(objective_step(criterion), seconds) for name, criterion in criteria.items()}
    return EpochCost(augmentation, network, costs, -(-workload.samples // m))


COLUMNS = ("row", "s/epoch", "paper's A100 s/epoch", "beyond CE", "ms/step", "augmentation", "network", "objective")


def rows(costs: Mapping[str, EpochCost]) -> list[list[str]]:
    """Returns the table's lines: seconds per epoch; median, quartile distance and share of each part of a step."""
    lines = []
    for name, cost in costs.items():
        for objective, timing in cost.objectives.items():
            step = cost.step(objective)
            parts = [
                f"{1e3 * part.median:.3g} ± {1e3 * part.spread:.1g} ({part.median / step:.1%})"
                for part in (cost.augmentation, cost.network, timing)
            ]
            lines.append(
                [
                    f"{name}, {objective}",
                    f"{cost.epoch(objective):.3g}",
                    str(TABLE1[name].get(objective, "–")),
                    f"{100 * cost.beyond_ce(objective):+.1f} %",
                    f"{1e3 * step:.3g}",
                    *parts,
                ]
            )
    return lines
