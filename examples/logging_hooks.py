"""Sends a run's metrics to TensorBoard, trackio or Weights & Biases: `on_epoch` is called with every epoch's line.

    pip install '.[lab]' tensorboard        # or trackio, or wandb
    python examples/logging_hooks.py tensorboard

In any case the run folder's metrics.jsonl has the same lines.
"""

import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from vmcr2.lab import train
from vmcr2.lab.recipes import RECIPES, Recipe

Hook = Callable[[dict[str, Any]], None]


def tensorboard(recipe: Recipe, folder: Path) -> Hook:
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(folder)
    writer.add_text("recipe", repr(recipe))

    def on_epoch(line: dict[str, Any]) -> None:
        for name, value in line.items():
            if value is not None:
                writer.add_scalar(name, value, line["epoch"])
        writer.flush()

    return on_epoch


def trackio(recipe: Recipe, folder: Path) -> Hook:
    import trackio

    trackio.init(project="vmcr2", name=f"{recipe.name}-{recipe.objective}-{recipe.seed}", config=vars(recipe))
    return lambda line: trackio.log({name: value for name, value in line.items() if value is not None})


def wandb(recipe: Recipe, folder: Path) -> Hook:
    import wandb

    run = wandb.init(project="vmcr2", dir=folder, config=vars(recipe))
    return lambda line: run.log(line, step=line["epoch"])


def main(service: str, epochs: int = 5, folder: str = "runs/logged") -> Path:
    """Trains digits with a service's hook and returns the run folder."""
    recipe = replace(RECIPES["digits"], epochs=epochs)
    hooks = {"tensorboard": tensorboard, "trackio": trackio, "wandb": wandb}
    if service not in hooks:
        raise SystemExit(f"service must be one of {', '.join(hooks)}, got {service}")
    run = train.start(recipe, folder, on_epoch=hooks[service](recipe, Path(tempfile.mkdtemp())))
    return run.path


if __name__ == "__main__":
    print(main(sys.argv[1] if len(sys.argv) > 1 else "tensorboard"))
