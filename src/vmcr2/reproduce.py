"""The paper's tables and figures: runs or resumes what they need, then writes them beside the paper's numbers."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from vmcr2 import bench, plot, train
from vmcr2.compare import hardware
from vmcr2.data import resolved
from vmcr2.errors import InputError
from vmcr2.recipes import RECIPES, Objective, Recipe
from vmcr2.report import describe_device, markdown_table
from vmcr2.run import RunFolder, write_atomically


@dataclass(frozen=True)
class Printed:
    """What the paper prints for one row and objective: ΔR of the training set and test accuracy; None where nothing."""

    reduction: float | None = None
    accuracy: float | None = None


TABLE2: dict[str, dict[Objective, Printed]] = {
    "mnist": {"mcr2": Printed(44.6429, 0.9785), "vmcr2": Printed(44.2117, 0.9788), "ce": Printed(None, 0.9738)},
    "cifar10": {"mcr2": Printed(49.40, 0.8956), "vmcr2": Printed(48.43, 0.8997), "ce": Printed(None, 0.8665)},
    "cifar100": {"mcr2": Printed(226.0519, 0.2421), "vmcr2": Printed(218.0185, 0.5872), "ce": Printed(None, 0.5840)},
    "tiny-imagenet": {
        "mcr2": Printed(227.6468, 0.1319),
        "vmcr2": Printed(231.1538, 0.2665),
        "ce": Printed(None, 0.1907),
    },
}
TABLE3: dict[str, dict[Objective, Printed]] = {
    "cifar100-strong": {"vmcr2": Printed(130.2177, 0.6951), "ce": Printed(None, 0.7146)},
    "tiny-imagenet-strong": {"vmcr2": Printed(134.9504, 0.4189), "ce": Printed(None, 0.4843)},
}
# Not in the paper: the property that MCR² is known for. digits is there for those without a GPU.
NOISE: dict[str, dict[Objective, Printed]] = {
    f"{name}-noise{percent}": {"mcr2": Printed(), "vmcr2": Printed(), "ce": Printed()}
    for name in ("digits", "mnist", "cifar10")
    for percent in (0, 10, 20, 30, 40, 50)
}
FIGURE1: dict[str, dict[Objective, Printed | None]] = {
    name: {"mcr2": None, "vmcr2": None}
    for name in ("mnist", "cifar10", "cifar100-d100", "cifar100", "tiny-imagenet-d200", "tiny-imagenet")
}
FIGURE2: dict[str, dict[Objective, Printed | None]] = {
    name: {"mcr2": None, "vmcr2": None} for name in ("mnist", "cifar10", "cifar100", "tiny-imagenet")
}


@dataclass(frozen=True)
class Request:
    """What to reproduce, and how much of it.

    Attributes:
        rows: names from the table; none means all.
        objectives: none means all of the table's.
        seeds: one run each.
        epochs: instead of the recipe's; None keeps them.
        train_size: the first so many training samples only; None keeps all.
        evaluate_every: epochs between measurements; None keeps the recipe's.
        ours: our own recipes instead of the paper's.
        out: where runs, tables and figures lie.
        data_root: where named data sets lie.
    """

    rows: tuple[str, ...] = ()
    objectives: tuple[Objective, ...] = ()
    seeds: tuple[int, ...] = (0,)
    epochs: int | None = None
    train_size: int | None = None
    evaluate_every: int | None = None
    ours: bool = False
    out: Path = Path("runs/paper")
    data_root: Path | None = None

    def chosen(self, rows: dict[str, Any], name: str) -> list[str]:
        """Returns the rows asked for.

        Raises:
            InputError: one of them is not in the table (a ValueError).
        """
        unknown = [row for row in self.rows if row not in rows]
        if unknown:
            raise InputError(f"rows of {name} must be among {', '.join(rows)}, got {', '.join(unknown)}")
        return [row for row in rows if not self.rows or row in self.rows]

    def recipe(self, row: str, objective: Objective, seed: int) -> Recipe:
        """Returns the recipe of one run."""
        base, _, percent = row.partition("-noise")
        name = f"{base}-ours" if self.ours else base
        if name not in RECIPES:
            raise InputError(f"ours: there is no recipe of our own for {row}")
        recipe = replace(RECIPES[name], objective=objective, seed=seed)
        if percent:
            noisy = replace(recipe.data, label_noise=int(percent) / 100)
            recipe = replace(recipe, name=f"{name}-noise{percent}", data=noisy)
        if self.epochs is not None:
            recipe = replace(recipe, epochs=self.epochs)
        if self.evaluate_every is not None:
            recipe = replace(recipe, evaluate_every=self.evaluate_every)
        return replace(recipe, data=resolved(replace(recipe.data, train_size=self.train_size)))

    def folder(self, recipe: Recipe) -> Path:
        """Returns where a run lies; runs on part of the data apart from those on all of it."""
        part = "" if self.train_size is None else f"-first{self.train_size}"
        return self.out / f"{recipe.name}{part}" / f"{recipe.objective}-seed{recipe.seed}"

    def size(self) -> str:
        """Returns what is smaller than in the paper, in words for a title."""
        parts = [] if self.epochs is None else [f"{self.epochs} of 2000 epochs"]
        if self.train_size is not None:
            parts.append(f"the first {self.train_size} training images only")
        return f" ({', '.join(parts)})" if parts else ""


def _runs(
    request: Request, rows: dict[str, dict[Objective, Any]], name: str, console: Console
) -> Iterator[tuple[str, Objective, list[RunFolder]]]:
    """Yields the runs of every row and objective, complete, running what is missing."""
    chosen = request.chosen(rows, name)
    planned = [
        (row, objective, [request.recipe(row, objective, seed) for seed in request.seeds])
        for row in chosen
        for objective in rows[row]
        if not request.objectives or objective in request.objectives
    ]
    if not planned:
        raise InputError(f"objectives must be some that {name} has, got {', '.join(request.objectives)}")
    for row, objective, wanted in planned:
        done = []
        for recipe in wanted:
            path = request.folder(recipe)
            if (path / "recipe.json").is_file():
                done.append(train.resume(RunFolder.open(path), recipe, request.data_root, console))
            else:
                done.append(train.start(recipe, path, request.data_root, console))
        yield row, objective, done


def _beside(value: float | None, printed: float | None, digits: int) -> str:
    if value is None:
        return "–"
    return f"{value:.{digits}f}" + ("" if printed is None else f" ({printed:.{digits}f})")


def _mean(summaries: list[dict[str, Any]], key: str) -> float | None:
    values = [summary[key] for summary in summaries]
    return None if None in values else sum(values) / len(values)


def _table(request: Request, rows: dict[str, dict[Objective, Printed]], name: str, console: Console) -> list[Path]:
    lines, records = [], []
    for row, objective, runs in _runs(request, rows, name, console):
        summaries = [run.summary() for run in runs]
        records += [{"row": row} | summary for summary in summaries]
        printed = rows[row][objective]
        lines.append(
            [
                f"{row}, {plot.OBJECTIVE_NAMES[objective]}",
                ", ".join(str(summary["seed"]) for summary in summaries),
                ", ".join(sorted({str(summary["epochs"]) for summary in summaries})),
                _beside(_mean(summaries, "train_expansion"), None, 2),
                _beside(_mean(summaries, "train_compression"), None, 2),
                _beside(_mean(summaries, "train_reduction"), printed.reduction, 2),
                _beside(_mean(summaries, "test_accuracy"), None if objective == "ce" else printed.accuracy, 4),
                _beside(_mean(summaries, "head_accuracy"), printed.accuracy, 4),
                _beside(_mean(summaries, "seconds_per_epoch"), None, 2),
            ]
        )
        # After every run, so that breaking off loses nothing that was there to see.
        columns = ["row", "seeds", "epochs", "R", "R_c", "ΔR", "test accuracy", "own head", "s/epoch"]
        settings = (
            "our settings" if request.ours else "the recipes' settings" if name == "noise" else "the paper's settings"
        )
        where = sorted({hardware(record) for record in records})
        text = (
            f"## {name}, {settings}{request.size()}\n\nThe paper's numbers, where it has some, in brackets. "
            f"{'; '.join(where)}.\n\n"
            f"{markdown_table(columns, lines)}"
        )
        path = request.out / f"{name}{'-ours' if request.ours else ''}{_suffix(request)}.md"
        write_atomically(path, text.encode())
        write_atomically(path.with_suffix(".json"), (json.dumps(records, indent=2) + "\n").encode())
    console.print(path.read_text(encoding="utf-8"), highlight=False, soft_wrap=True)
    return [path, path.with_suffix(".json")]


def _suffix(request: Request) -> str:
    return "" if request.train_size is None else f"-first{request.train_size}"


def table1(request: Request, console: Console) -> list[Path]:
    """Times an epoch of every row, each once for a device and a version of torch; epochs and seeds are not used."""
    rows = request.chosen(dict.fromkeys(bench.WORKLOADS), "table1")
    device = torch.device(train.chosen_device("auto"))
    where = describe_device(device)
    stored = request.out / "table1.json"
    known: dict[str, dict[str, Any]] = {}
    if stored.is_file():
        known = json.loads(stored.read_text(encoding="utf-8")).get(where, {})
    request.out.mkdir(parents=True, exist_ok=True)
    for row in rows:
        if row not in known:
            console.print(f"timing {row}", highlight=False)
            known[row] = asdict(bench.epoch_cost(bench.WORKLOADS[row], device, 9))
            write_atomically(stored, (json.dumps({where: known}, indent=2) + "\n").encode())
    costs = {row: bench.EpochCost.from_record(known[row]) for row in rows}
    text = f"## table1\n\nSeconds per epoch. Random images of the right size; {where}.\n\n" + markdown_table(
        bench.COLUMNS, bench.rows(costs)
    )
    path = request.out / "table1.md"
    write_atomically(path, text.encode())
    console.print(text, highlight=False, soft_wrap=True)
    return [path, stored]


def table2(request: Request, console: Console) -> list[Path]:
    """Trains MCR², V-MCR² and CE on every data set and writes ΔR and test accuracy."""
    return _table(request, TABLE2, "table2", console)


def table3(request: Request, console: Console) -> list[Path]:
    """The same with the strong recipe of Section 7.4, V-MCR² and CE."""
    return _table(request, TABLE3, "table3", console)


def noise(request: Request, console: Console) -> list[Path]:
    """Trains the three objectives with wrong labels, tests them on right ones, and draws the accuracies."""
    written = _table(request, NOISE, "noise", console)
    records = json.loads(written[-1].read_text(encoding="utf-8"))
    return [
        *written,
        plot.draw_noise(records, written[0].with_suffix(".png"), f"Wrong training labels{request.size()}"),
    ]


def figure1(request: Request, console: Console) -> list[Path]:
    """Draws ΔR of the training set over epochs, from the runs of table 2 and of the other feature dimensions."""
    runs = {(row, objective): found[0] for row, objective, found in _runs(request, FIGURE1, "figure1", console)}
    path = request.out / f"figure1{'-ours' if request.ours else ''}{_suffix(request)}.png"
    return [plot.draw_convergence(runs, path, f"ΔR of the training set{request.size()}")]


def figure2(request: Request, console: Console) -> list[Path]:
    """Draws |ZᵀZ| of training samples sorted by class, from the runs of table 2."""
    runs = {(row, objective): found[0] for row, objective, found in _runs(request, FIGURE2, "figure2", console)}
    path = request.out / f"figure2{'-ours' if request.ours else ''}{_suffix(request)}.png"
    return [plot.draw_similarities(runs, path, f"|cosine| between training samples, by class{request.size()}")]


TARGETS: dict[str, Callable[[Request, Console], list[Path]]] = {
    "table1": table1,
    "table2": table2,
    "table3": table3,
    "noise": noise,
    "figure1": figure1,
    "figure2": figure2,
}
