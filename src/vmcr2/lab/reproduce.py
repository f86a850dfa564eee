"""The paper's tables and figures: starts or resumes the runs they need, then writes them beside the paper's numbers."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from vmcr2.errors import InputError, NumericalError
from vmcr2.lab import bench, figures, processes, recipes
from vmcr2.lab.files import write_atomically, write_json
from vmcr2.lab.paper import FIGURE1, FIGURE2, TABLE2, TABLE3, Printed
from vmcr2.lab.recipes import OBJECTIVES, ObjectiveName, Recipe
from vmcr2.lab.run import RunFolder
from vmcr2.lab.sources import load, resolved
from vmcr2.lab.sweep import completed, measured_on, refuse_conflicts, refuse_run
from vmcr2.lab.terminal import describe_device, markdown_table

Rows = dict[str, dict[ObjectiveName, Printed]]

# Not in the paper: the effect of wrong labels, a property that MCR² is known for. The first two data sets are for those
# without a GPU; rivals other than cross-entropy are in benchmarks/noise.py.
_NOISE: Rows = {
    f"{name}-noise{percent}": {"mcr2": Printed(), "vmcr2": Printed(), "ce": Printed()}
    for name in ("digits", "omniglot100", "mnist", "cifar10", "cifar100")
    for percent in (0, 10, 20, 30, 40, 50)
}


@dataclass(frozen=True)
class Request:
    """Makes the runs that a table or figure of the paper needs, and writes it beside the paper's numbers.

    Existing runs are shown, or continued if more epochs are requested. Those whose learning rate depends on the total
    number of epochs, as in our own recipes, cannot be continued: choose another `out`. A figure shows complete runs at
    the length they have, unless `epochs` or `evaluate_every` is given.

    Attributes:
        rows: which rows of the table, or data sets of the figure; all by default.
        objectives: which to run; all of the table's by default.
        seeds: which to run each with.
        epochs: instead of the recipe's.
        train_size: train on this many samples only, the first ones. The title says so.
        test_size: test on this many samples only, the first ones. The title says so.
        evaluate_every: epochs between measurements, the points of figure1; by default the recipe's.
        ours: our own recipes instead of the paper's settings.
        out: the folder for runs, tables and figures.
        data_root: folder of named data sets; also $VMCR2_DATA_ROOT. By default ./data.
    """

    rows: tuple[str, ...] = ()
    objectives: tuple[ObjectiveName, ...] = ()
    seeds: tuple[int, ...] = (0,)
    epochs: int | None = None
    train_size: int | None = None
    test_size: int | None = None
    evaluate_every: int | None = None
    ours: bool = False
    out: Path = Path("runs/paper")
    data_root: Path | None = None

    def chosen(self, rows: dict[str, Any], name: str) -> list[str]:
        """Returns the requested rows.

        Raises:
            InputError: one of them is not in the table (a ValueError).
        """
        unknown = [row for row in self.rows if row not in rows]
        if unknown:
            raise InputError(f"rows of {name} must be among {', '.join(rows)}, got {', '.join(unknown)}")
        return [row for row in rows if not self.rows or row in self.rows]

    def recipe(self, row: str, objective: ObjectiveName, seed: int) -> Recipe:
        """Returns the recipe of one run."""
        recipe = replace(_base(row, self.ours), objective=objective, seed=seed)
        if self.epochs is not None:
            recipe = replace(recipe, epochs=self.epochs)
        if self.evaluate_every is not None:
            recipe = replace(recipe, evaluate_every=self.evaluate_every)
        return replace(
            recipe, data=resolved(replace(recipe.data, train_size=self.train_size, test_size=self.test_size))
        )

    def drawn(self, recipe: Recipe) -> Recipe:
        """Returns a recipe at the length of its run, if that is complete and no other length is requested.

        So a figure can show the runs of a table that was made with fewer epochs.
        """
        run = RunFolder(self.folder(recipe))
        asked = self.epochs is not None or self.evaluate_every is not None
        if asked or not run.is_complete():
            return recipe
        made = run.recipe()
        return replace(recipe, epochs=made.epochs, evaluate_every=made.evaluate_every)

    def folder(self, recipe: Recipe) -> Path:
        """Returns the folder of a run; runs on part of the data are separate from those on all of it."""
        return self.out / f"{recipe.name}{self.suffix()}" / f"{recipe.objective}-seed{recipe.seed}"

    def suffix(self) -> str:
        """Returns the suffix that distinguishes files for part of the data from those for all of it."""
        parts = [("first", self.train_size), ("test", self.test_size)]
        return "".join(f"-{name}{size}" for name, size in parts if size is not None)

    def path(self, name: str, ending: str) -> Path:
        """Returns the path of a table or figure."""
        return self.out / f"{name}{'-ours' if self.ours else ''}{self.suffix()}.{ending}"


def _base(row: str, ours: bool) -> Recipe:
    """Returns the recipe that a row stands for, at its full length."""
    base, _, percent = row.partition("-noise")
    recipe = recipes.named()[f"{base}-ours" if ours else base]
    if not percent:
        return recipe
    noisy = replace(recipe.data, label_noise=int(percent) / 100)
    return replace(recipe, name=f"{recipe.name}-noise{percent}", data=noisy)


def _runs(
    request: Request, rows: Rows, name: str, console: Console, *, drawn: bool = False
) -> Iterator[tuple[str, ObjectiveName, list[RunFolder]]]:
    """Yields the complete runs of every row and objective; the whole request is checked before anything runs."""
    if not request.seeds:
        raise InputError("seeds must name at least one")
    refuse_run(request.out)
    if request.ours:
        rows = {row: cells for row, cells in rows.items() if f"{row.partition('-noise')[0]}-ours" in recipes.named()}
        name += " --ours"
        if not rows:
            raise InputError(f"ours must be off for {name.split()[0]}, which has no recipes of our own")
    planned = [
        (row, objective, [request.recipe(row, objective, seed) for seed in request.seeds])
        for row in request.chosen(rows, name)
        for objective in rows[row]
        if not request.objectives or objective in request.objectives
    ]
    if not planned:
        raise InputError(f"objectives must be among those of {name}, got {', '.join(request.objectives)}")
    if drawn:
        planned = [(row, objective, [request.drawn(one) for one in members]) for row, objective, members in planned]
    everything = [recipe for *_, members in planned for recipe in members]
    refuse_conflicts([(request.folder(recipe), recipe) for recipe in everything])
    for settings in dict.fromkeys(recipe.data for recipe in everything):
        load(settings, request.data_root)
    _announce([recipe for recipe in everything if not _is_complete(request.folder(recipe), recipe)], console)
    for row, objective, members in planned:
        done = []
        for recipe in members:
            try:
                done.append(completed(request.folder(recipe), recipe, request.data_root, console))
            except NumericalError as error:  # the other cells do not depend on this one
                console.print(f"{row}, {objective}, seed {recipe.seed} is left out: {error}", soft_wrap=True)
        if done:
            yield row, objective, done


def _is_complete(folder: Path, recipe: Recipe) -> bool:
    run = RunFolder(folder)
    return run.is_complete() and run.recipe().epochs >= recipe.epochs


def _announce(missing: list[Recipe], console: Console) -> None:
    """Announces what will be trained, since that may take days."""
    if missing:
        runs = ", ".join(f"{one.name} {one.objective} seed {one.seed} to {one.epochs} epochs" for one in missing)
        console.print(f"training {runs}; --ours and --epochs make it shorter", highlight=False, soft_wrap=True)


def _beside(value: float | None, printed: float | None, digits: int) -> str:
    if value is None:
        return "–"
    return f"{value:.{digits}f}" + ("" if printed is None else f" ({printed:.{digits}f})")


def _mean(summaries: list[dict[str, Any]], key: str) -> float | None:
    values: list[Any] = [summary.get(key) for summary in summaries]  # runs of earlier versions lack a measure
    return None if None in values else sum(values) / len(values)


def _table(request: Request, rows: Rows, name: str, console: Console) -> list[Path]:
    """Runs what is requested and writes the table of everything that this and earlier calls have run."""
    text, record = request.path(name, "md"), request.path(name, "json")
    diverged = True
    for row, _, runs in _runs(request, rows, name, console):
        diverged = False
        # After every run, so that an interruption loses nothing.
        sizes = {"train_size": request.train_size, "test_size": request.test_size}
        fresh = [{"row": row} | sizes | run.summary() for run in runs]
        place = {cell: number for number, cell in enumerate(_cells(rows))}
        earlier = [line for line in _records(record) if _identity(line)[:2] in place]
        known = {_identity(line): line for line in [*earlier, *fresh]}
        lines = sorted(known.values(), key=lambda line: (place[_identity(line)[:2]], line["seed"]))
        write_json(record, lines)
        write_atomically(text, _rendered(lines, rows, name, request.ours).encode())
    if diverged:
        raise NumericalError(f"every run of {name} diverged, there is nothing to show")
    console.print(text.read_text(encoding="utf-8"), highlight=False, soft_wrap=True)
    return [text, record]


def _cells(rows: Rows) -> list[tuple[str, ObjectiveName]]:
    return [(row, objective) for row, cells in rows.items() for objective in cells]


def _identity(record: dict[str, Any]) -> tuple[str, ObjectiveName, int]:
    return record["row"], record["objective"], record["seed"]


def _records(path: Path, names: tuple[str, ...] = ("row", "objective", "seed")) -> list[dict[str, Any]]:
    """Returns the records in a file, or none if it does not exist; each has at least the named fields."""
    if not path.is_file():
        return []
    try:
        records = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(records, list) or any(not set(names) <= set(record) for record in records):
            raise ValueError(f"it must hold a list of objects with {', '.join(names)}")
    except (ValueError, TypeError, RecursionError) as error:
        raise InputError(f"{path} is damaged ({error}); delete it, the runs beside it are kept") from error
    return records


def _rendered(records: list[dict[str, Any]], rows: Rows, name: str, ours: bool) -> str:
    """Returns the table in Markdown; the title says what is smaller than in the full table."""
    lines, sizes = [], []
    for row, objective in _cells(rows):
        members = [record for record in records if (record["row"], record["objective"]) == (row, objective)]
        if not members:
            continue
        full = _base(row, ours).epochs
        sizes += [f"{member['epochs']} of {full} epochs" for member in members if member["epochs"] < full]
        printed = rows[row][objective]
        lines.append(
            [
                f"{row}, {OBJECTIVES[objective]}",
                ", ".join(str(member["seed"]) for member in members),
                ", ".join(map(str, sorted({member["epochs"] for member in members}))),
                _beside(_mean(members, "train_expansion"), None, 2),
                _beside(_mean(members, "train_compression"), None, 2),
                _beside(_mean(members, "train_reduction"), printed.reduction, 2),
                _beside(_mean(members, "test_accuracy"), None if objective == "ce" else printed.accuracy, 4),
                _beside(_mean(members, "test_accuracy_one_component"), None, 4),
                _beside(_mean(members, "head_accuracy"), printed.accuracy, 4),
                _beside(_mean(members, "class_rank"), None, 1),
                _beside(_mean(members, "seconds_per_epoch"), None, 2),
            ]
        )
    sizes = list(dict.fromkeys(sizes))
    sizes += _parts(records[0]["train_size"], records[0]["test_size"])  # a file's records all have the same
    settings = "our settings" if ours else ("the recipes' settings" if name == "noise" else "the paper's settings")
    where = "; ".join(dict.fromkeys(measured_on(record) for record in records))
    columns = ["row", "seeds", "epochs", "R", "R_c", "ΔR", "test accuracy", "one component", "own head"]
    columns += ["class rank", "s/epoch"]
    notes = " ".join([_LEGEND, *_NOTES.get(name, ())])
    title = f"{name}, {settings}" + (f" ({', '.join(sizes)})" if sizes else "")
    return f"## {title}\n\n{notes} {where}.\n\n{markdown_table(columns, lines)}"


_LEGEND = (
    "The paper's numbers, where it has some, in brackets. Test accuracy: nearest subspace of ⌊d/k⌋ components, "
    "beside it of one. Class rank: the effective rank of the median class (of two, the lower)."
)
_NOTES: dict[str, tuple[str, ...]] = {
    "table2": ("The paper's MCR² on Tiny ImageNet had 200 epochs.",),
    "table3": (
        "The paper gives cross-entropy's best epoch on the test set; here it is the last. Tiny ImageNet is mirrored, "
        "but not cropped from its 64×64 images.",
    ),
    "noise": ("R_c and ΔR are those of the labels trained on, wrong ones included; test labels are right.",),
}


def table1(request: Request, console: Console) -> list[Path]:
    """Times an epoch of every row, once per device and version of torch."""
    unused = [
        each.name
        for each in fields(request)
        if each.name not in ("rows", "out", "data_root") and getattr(request, each.name) != each.default
    ]
    if unused:
        raise InputError(f"{', '.join(unused)} must be left out for table1, which times steps")
    refuse_run(request.out)
    rows = request.chosen(dict.fromkeys(bench.WORKLOADS), "table1")
    device = processes.chosen_device("auto")
    where = describe_device(device)
    stored = request.out / "table1.json"
    everywhere = {record["where"]: record["rows"] for record in _records(stored, ("where", "rows"))}
    known: dict[str, Any] = everywhere.setdefault(where, {})
    request.out.mkdir(parents=True, exist_ok=True)
    for row in rows:
        if row not in known:
            console.print(f"timing {row}", highlight=False)
            known[row] = asdict(bench.epoch_cost(bench.WORKLOADS[row], device))
            records = [{"where": place, "rows": timed} for place, timed in everywhere.items()]
            write_json(stored, records)
    text = "## table1\n\nSeconds per epoch on random images of the right size.\n"
    for place, timed in everywhere.items():
        costs = {row: bench.EpochCost.from_record(timed[row]) for row in bench.WORKLOADS if row in timed}
        text += f"\n{place}:\n\n{markdown_table(bench.COLUMNS, bench.rows(costs))}"
    path = request.out / "table1.md"
    write_atomically(path, text.encode())
    console.print(text, highlight=False, soft_wrap=True)
    return [path, stored]


def table2(request: Request, console: Console) -> list[Path]:
    """Trains MCR², V-MCR² and CE on every data set and writes ΔR and test accuracy."""
    return _table(request, TABLE2, "table2", console)


def table3(request: Request, console: Console) -> list[Path]:
    """Does the same as `table2` with the strong recipe of Section 7.4, V-MCR² and CE."""
    return _table(request, TABLE3, "table3", console)


def noise(request: Request, console: Console) -> list[Path]:
    """Trains the three objectives with wrong labels, tests them with correct ones, and draws the accuracies."""
    text, record = _table(request, _NOISE, "noise", console)
    title = "Wrong training labels" + _part_of(request)
    return [text, record, figures.draw_noise(_records(record), request.path("noise", "png"), title)]


def figure1(request: Request, console: Console) -> list[Path]:
    """Draws ΔR, R and R_c of the training set over epochs, from the runs of table 2 and of other feature dimensions."""
    return _figure(
        request, FIGURE1, "figure1", "ΔR, R and $R_c$ of the training set", figures.draw_convergence, console
    )


def figure2(request: Request, console: Console) -> list[Path]:
    """Draws |ZᵀZ| of training samples sorted by class, from the runs of table 2."""
    title = "|cosine| between training samples, by class"
    return _figure(request, FIGURE2, "figure2", title, figures.draw_similarities, console)


def _figure(
    request: Request,
    rows: Rows,
    name: str,
    title: str,
    draw: Callable[[dict[tuple[str, ObjectiveName], RunFolder], Path, str], Path],
    console: Console,
) -> list[Path]:
    if len(request.seeds) > 1:
        raise InputError(
            f"seeds must name exactly one for {name}, which shows one run per data set and objective, "
            f"got {len(request.seeds)}"
        )
    runs = {(row, objective): run for row, objective, (run,) in _runs(request, rows, name, console, drawn=True)}
    if not runs:
        raise NumericalError(f"every run of {name} diverged, there is nothing to draw")
    return [draw(runs, request.path(name, "png"), title + _part_of(request))]


def _part_of(request: Request) -> str:
    parts = _parts(request.train_size, request.test_size)
    return "\n" + ", ".join(parts) if parts else ""


def _parts(train_size: int | None, test_size: int | None) -> list[str]:
    sizes = (("training", train_size), ("test", test_size))
    return [f"the first {size} {part} images only" for part, size in sizes if size is not None]


TARGETS: dict[str, Callable[[Request, Console], list[Path]]] = {
    "table1": table1,
    "table2": table2,
    "table3": table3,
    "noise": noise,
    "figure1": figure1,
    "figure2": figure2,
}
