"""Variety within a class beside accuracy: by `energy`, `pull` and `expand` of `VMCR2Loss`, and when expansion ends.

    python benchmarks/variety.py run [--data-root DIR] [--only omniglot100 ...]    runs what is missing, a line per run
    python benchmarks/variety.py table                                            results/variety.md from the lines

A grid on a validation split, a fifth of the training set, at seed 0; then, at each length, the most accurate setting
and the most accurate of those with at least 0.8 of the ΔR there can be (or, if none has so much, that with the most),
on the test set.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from noise import BASES
from rich.console import Console
from runs import Line, MissingRunError, Runs

from vmcr2.errors import NumericalError
from vmcr2.lab import sources
from vmcr2.lab.processes import keep_freed_memory
from vmcr2.lab.recipes import Recipe
from vmcr2.lab.sweep import completed
from vmcr2.lab.terminal import markdown_table, mean_and_spread
from vmcr2.rates import largest_reduction

RESULTS = Path(__file__).parent.parent / "results"
RUNS = Runs(
    RESULTS / "variety.jsonl",
    ("data", "energy", "pull", "expand", "until", "balance", "atoms", "longer", "seed", "held"),
)
DATA = ("digits", "omniglot100", "omniglot200", "cifar100-20")
SEEDS = dict.fromkeys(DATA, (0, 1, 2)) | {"cifar100-20": (0,)}  # of the runs measured on the test set
ENOUGH = 0.8  # of the ΔR there can be


@dataclass(frozen=True)
class Setting:
    """One run.

    Expansion ends after the share `until` of the epochs; `longer` multiplies the recipe's epochs; `held` keeps a
    validation split out and measures on it.
    """

    data: str
    energy: float | None = None
    pull: float = 1.0
    expand: float = 0.0
    until: float = 1.0
    balance: float = 0.05
    atoms: int | None = None
    longer: int = 1
    seed: int = 0
    held: bool = True

    def recipe(self) -> Recipe:
        base = BASES[self.data]
        epochs = self.longer * base.epochs
        settings = replace(
            base.vmcr2, energy=self.energy, pull=self.pull, expand=self.expand, expand_until=self.until,
            balance=self.balance, atoms_per_class=self.atoms,
        )  # fmt: skip
        data = replace(base.data, validation=0.2 if self.held else 0.0)
        return replace(base, seed=self.seed, epochs=epochs, evaluate_every=epochs, vmcr2=settings, data=data)


def grid(data: str) -> list[Setting]:
    """Returns what is compared on a data set; where a run takes minutes, what the others showed to matter."""
    if data == "cifar100-20":
        return [*(Setting(data, None, 0.3, expand) for expand in (0.0, 0.4, 0.8)), Setting(data, 1.0, 0.3)]
    if data == "omniglot200":
        some = [Setting(data, energy, 0.3) for energy in (None, 1.0)]
        some += [Setting(data, None, 0.3, expand) for expand in (0.2, 0.4, 0.6, 0.8, 1.0)]
        some += [Setting(data, None, 0.3, expand, 0.5) for expand in (0.8, 1.0)]
        longer = ((0.0, 1.0), (0.3, 0.5), (0.4, 0.5), (0.6, 0.5), (0.6, 0.75), (0.6, 1.0), (0.8, 1.0))
        some += [Setting(data, None, 0.3, expand, until, longer=4) for expand, until in longer]
        return [Setting(data), *some]
    once = [Setting(data, energy, pull) for energy in (None, 2.0, 1.0) for pull in (1.0, 0.3, 0.1)]
    expanding = [Setting(data, None, pull, expand) for pull in (1.0, 0.3) for expand in (0.2, 0.4, 0.6, 1.0)]
    others = [
        Setting(data, 1.0, 0.3, balance=0.01),
        Setting(data, 1.0, 0.3, balance=0.5),
        Setting(data, None, 0.3, atoms=1),
        Setting(data, None, 0.3, balance=0.5),
    ]
    longer = [Setting(data, None, 0.3, expand, longer=4) for expand in (0.0, 0.15, 0.2, 0.3, 0.4, 0.6)]
    ending = [
        Setting(data, None, 0.3, expand, until, longer=4) for expand, until in ((0.3, 0.25), (0.3, 0.5), (0.4, 0.5))
    ]
    return once + expanding + others + longer + ending


def trained(setting: Setting, root: Path | None) -> Line:
    """Trains one setting; a line of the file."""
    began = time.perf_counter()
    recipe = replace(setting.recipe(), data=sources.resolved(setting.recipe().data))
    with tempfile.TemporaryDirectory() as folder:
        try:
            summary = completed(Path(folder) / "run", recipe, root, Console(quiet=True)).summary()
        except NumericalError as error:
            return {**vars(setting), "failed": str(error)[:160], "seconds": round(time.perf_counter() - began, 1)}
    counts = sources.load(recipe.data, root).train_labels.bincount()
    wanted = ("train_expansion", "train_compression", "train_reduction", "test_accuracy", "class_rank")
    return {
        **vars(setting),
        **{name: summary[name] for name in (*wanted, "test_accuracy_one_component")},
        "share": summary["train_reduction"] / largest_reduction(recipe.feature_dim, counts.numpy(), recipe.eps_sq),
        "seconds": round(time.perf_counter() - began, 1),
    }


def accuracy(line: Line) -> float:
    """Returns the better of the two subspaces' accuracies."""
    return max(line["test_accuracy"], line["test_accuracy_one_component"])


def chosen(data: str, longer: int) -> list[Setting]:
    """Returns the most accurate setting of a length, and the most accurate with enough ΔR, or that with the most."""
    lines = {setting: RUNS.kept(vars(setting)) for setting in grid(data) if setting.longer == longer}
    lines = {setting: line for setting, line in lines.items() if "failed" not in line}
    varied = [setting for setting, line in lines.items() if line["share"] >= ENOUGH]
    if lines and not varied:
        varied = [max(lines, key=lambda setting: lines[setting]["share"])]
    best = [max(some, key=lambda setting: accuracy(lines[setting])) for some in (list(lines), varied) if some]
    return list(dict.fromkeys(best))


def run(data: list[str], root: Path | None) -> None:
    def complete(setting: Setting) -> None:
        RUNS.completed(vars(setting), lambda: trained(setting, root))

    for name in data:
        for setting in grid(name):
            complete(setting)
        for setting in [*chosen(name, 1), *chosen(name, 4)]:
            for seed in SEEDS[name]:
                complete(replace(setting, held=False, seed=seed))


def row(setting: Setting, lines: list[Line]) -> list[str]:
    def shown(name: str, digits: int) -> str:
        if any("failed" in line for line in lines):
            return "collapsed"
        return mean_and_spread([line[name] for line in lines], digits)

    return [
        "free" if setting.energy is None else f"{setting.energy:g}",
        f"{setting.pull:g}",
        f"{setting.expand:g}",
        f"{setting.until:g}",
        f"{setting.balance:g}",
        "⌊d/k⌋" if setting.atoms is None else str(setting.atoms),
        str(setting.recipe().epochs),
        shown("train_expansion", 1),
        shown("train_compression", 1),
        shown("train_reduction", 1),
        shown("share", 2),
        shown("class_rank", 1),
        shown("test_accuracy", 3),
        shown("test_accuracy_one_component", 3),
    ]


COLUMNS = (
    "energy",
    "pull",
    "expand",
    "until",
    "ρ",
    "s",
    "epochs",
    "R",
    "R_c",
    "ΔR",
    "of the most",
    "class rank",
    "accuracy",
    "one comp.",
)


def table() -> None:
    """Writes results/variety.md."""
    text = (
        f"# Variety within a class, and accuracy\n\nMade by `python benchmarks/variety.py`, {RUNS.where()}. `energy` "
        "is the sum of a class's codes. `expand` is the weight of R of the features, in the first share `until` of "
        "the epochs. `of the most` is ΔR as a share of the largest possible, that of orthogonal subspaces of d/k equal "
        "directions. Class rank is the effective rank of the median class. Accuracy is by subspaces of ⌊d/k⌋ "
        "components and of one. The first table of a data set is on a validation split, a fifth of the training set, "
        "with seed 0. The second is on the test set, with three seeds (on cifar100-20 one). It has, for each length, "
        "the most accurate setting and the most accurate with at least 0.8 (before rounding) of the largest ΔR (or, if "
        "none has so much, that with the most), both by the first table. variety.jsonl has a few runs on the test set "
        "that neither table shows.\n"
    )
    for data in DATA:
        rows, largest = [], 0.0
        for setting in grid(data):
            try:
                line = RUNS.kept(vars(setting))
            except MissingRunError:
                continue
            rows.append(row(setting, [line]))
            if "failed" not in line:
                largest = line["train_reduction"] / line["share"]
        if not rows:
            continue
        base = BASES[data]
        text += f"\n## {data}: {base.network}, d = {base.feature_dim}, ΔR at most {largest:.1f}\n\n" + markdown_table(
            COLUMNS, rows
        )
        finals = []
        for longer in (1, 4):
            try:
                finals += [
                    row(setting, [RUNS.kept(vars(replace(setting, held=False, seed=seed))) for seed in SEEDS[data]])
                    for setting in chosen(data, longer)
                ]
            except MissingRunError:
                continue  # runs of this length are still to be made
        if finals:
            text += f"\nOn the test set:\n\n{markdown_table(COLUMNS, finals)}"
    (RESULTS / "variety.md").write_text(text, encoding="utf-8")
    print(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("run", "table"))
    parser.add_argument("--data-root", type=Path)
    parser.add_argument("--only", nargs="*", choices=DATA, default=["digits", "omniglot100", "omniglot200"])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    if arguments.command == "run":
        run(arguments.only, arguments.data_root)
    table()


if __name__ == "__main__":
    main()
