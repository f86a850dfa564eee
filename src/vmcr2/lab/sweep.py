"""Several objectives and seeds of one recipe side by side, as in the paper's Table 2."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from vmcr2.errors import InputError, NumericalError
from vmcr2.lab import figures, sources, terminal, train
from vmcr2.lab.files import check_folder, is_free, write_atomically, write_json
from vmcr2.lab.recipes import OBJECTIVES, ObjectiveName, Recipe
from vmcr2.lab.run import RunFolder
from vmcr2.lab.terminal import markdown_table, mean_and_spread

COLUMNS = ("objective", "R", "R_c", "ΔR", "test accuracy", "own head", "s/epoch")


def compare(
    recipe: Recipe,
    objectives: Sequence[ObjectiveName],
    seeds: Sequence[int],
    out: str | Path,
    data_root: str | Path | None = None,
    console: Console | None = None,
) -> list[RunFolder]:
    """Trains every objective with every seed, continuing existing runs, and writes the table and the figures.

    Args:
        recipe: the recipe; its own objective and seed are not used.
        objectives: which to run.
        seeds: which to run each with.
        out: a folder that holds one run folder for each.
        data_root: the folder of named data sets.
        console: where progress is shown.

    Returns:
        The run folders, complete; runs that diverged are left out.

    Raises:
        InputError: the folder holds runs of another recipe; nothing was changed (a ValueError).
        NumericalError: every run diverged.
    """
    for name, several in (("objectives", objectives), ("seeds", seeds)):
        if not several:
            raise InputError(f"{name} must name at least one, got none")
    out = Path(out)
    refuse_run(out)
    recipe = replace(recipe, data=sources.resolved(recipe.data))
    planned = [
        (out / f"{objective}-seed{seed}", replace(recipe, objective=objective, seed=seed))
        for seed in dict.fromkeys(seeds)
        for objective in dict.fromkeys(objectives)
    ]
    refuse_conflicts(planned, data_root)
    runs, diverged = [], []
    for path, one in planned:
        try:
            runs.append(completed(path, one, data_root, console))
        except NumericalError as error:  # the other runs do not depend on this one
            warnings.warn(f"{path} is left out: {error}", stacklevel=2)
            diverged.append(path.name)
            continue
        figures.draw_run(runs[-1])
    if not runs:
        raise NumericalError(f"every run asked for diverged, there is nothing to compare in {out}")
    summaries = [run.summary() for run in runs]
    write_json(out / "comparison.json", summaries)
    text = f"{heading(summaries)}, {measured_on(summaries[0])}\n\n{markdown_table(COLUMNS, rows(summaries))}"
    if diverged:
        text += f"\nLeft out, since they diverged: {', '.join(diverged)}.\n"
    write_atomically(out / "comparison.md", text.encode())
    figures.draw_comparison(runs, out / "figures")
    return runs


def refuse_run(out: Path) -> None:
    """Raises InputError if a folder that is to hold runs is one itself."""
    if RunFolder(out).is_begun():
        raise InputError(f"out must be a folder to hold runs, got {out}, which is a run itself")


def refuse_conflicts(planned: Sequence[tuple[Path, Recipe]], data_root: str | Path | None = None) -> None:
    """Raises InputError if the folder of a planned run holds something else, before any of them is run."""
    for path, recipe in planned:
        check_folder("out", path)
        if (run := RunFolder(path)).is_begun():
            train.refuse_other_recipe(run, run.recipe(), recipe, data_root)
        elif not is_free(path):
            raise InputError(f"{path} exists and is not a run folder; choose another --out")


def completed(path: Path, recipe: Recipe, data_root: str | Path | None, console: Console | None) -> RunFolder:
    """Returns the run of a recipe in a folder, after starting it, or continuing it as far as needed."""
    if (run := RunFolder(path)).is_begun():
        return train.resume(run, recipe, data_root, console)
    return train.start(recipe, path, data_root, console)


def compared(out: Path) -> list[RunFolder]:
    """Returns the runs of the comparison in a folder.

    Raises:
        InputError: there is none, or some of its runs are missing (a ValueError).
    """
    file = out / "comparison.json"
    try:
        names = [f"{summary['objective']}-seed{summary['seed']}" for summary in json.loads(file.read_text("utf-8"))]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise InputError(f"{file} is not a readable comparison: {error}") from error
    if not names:
        raise InputError(f"{file} is not a readable comparison: it names no run")
    return [RunFolder.open(out / name) for name in names]


def heading(summaries: Sequence[dict[str, Any]]) -> str:
    """Returns what was compared: the recipe, for how many epochs, with which seeds."""
    epochs, seeds = (dict.fromkeys(summary[key] for summary in summaries) for key in ("epochs", "seed"))
    counted = f"seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}"
    return f"{summaries[0]['recipe']}, {' and '.join(map(str, epochs))} epochs, {counted}"


def measured_on(summary: dict[str, Any]) -> str:
    """Returns what a run ran on, in words, and what it was measured on if not the test set."""
    hardware = terminal.hardware(summary["device"], summary["threads"], summary["torch"])
    return hardware + held_out(summary.get("evaluated_on", "test"))


def held_out(evaluated_on: str) -> str:
    """Returns words to add to the title of measures if these are not of the test set."""
    return ", measured on a validation share" if evaluated_on == "validation" else ""


def rows(summaries: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Returns the table's rows, one per objective: mean ± standard deviation over seeds; lengths if they differ."""
    table = []
    lengths = {summary["epochs"] for summary in summaries}
    for objective in dict.fromkeys(summary["objective"] for summary in summaries):
        members = [summary for summary in summaries if summary["objective"] == objective]
        epochs = " and ".join(map(str, dict.fromkeys(summary["epochs"] for summary in members)))
        row = [OBJECTIVES[objective] + (f", {epochs} epochs" if len(lengths) > 1 else "")]
        for key, digits in (
            ("train_expansion", 2),
            ("train_compression", 2),
            ("train_reduction", 2),
            ("test_accuracy", 4),
            ("head_accuracy", 4),
            ("seconds_per_epoch", 2),
        ):
            row.append(mean_and_spread([summary[key] for summary in members], digits))
        table.append(row)
    return table
