"""The command line: `vmcr2 COMMAND ...`."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal, TypeVar

from rich.console import Console

from vmcr2.errors import InputError, NumericalError
from vmcr2.lab.recipes import OBJECTIVES, RECIPES, Objective, Recipe, find, to_json

USAGE = """\
vmcr2: maximal coding rate reduction by variational forms

  vmcr2 train RECIPE [flags]       train one objective into a run folder
  vmcr2 train --resume RUN         go on with a run that was broken off
  vmcr2 compare RECIPE [flags]     V-MCR², MCR² and cross-entropy side by side
  vmcr2 evaluate RUN               measure a trained run again, with more detail
  vmcr2 plot RUN                   draw a run's, or a comparison's, figures again
  vmcr2 reproduce TABLE [flags]    table1 … table3, figure1, figure2 of the paper, or label noise
  vmcr2 bench                      time the objectives, as the paper's Table 1
  vmcr2 split RUN                  write a run's checkpoint in small parts, to carry it to another machine
  vmcr2 recipes [RECIPE]           list the recipes, or show one

RECIPE is a name from the list or a recipe.json. Every field is a flag: vmcr2 train RECIPE --help shows them."""


_Given = TypeVar("_Given")


@dataclass(frozen=True)
class _Options:
    """What a command takes beside the recipe.

    Attributes:
        data_root: folder of named data sets; also $VMCR2_DATA_ROOT. By default ./data.
        out: the folder to write to; by default runs/<recipe>-<objective>-seed<seed>, for compare runs/<recipe>.
    """

    data_root: Path | None = None
    out: Path | None = None


@dataclass(frozen=True)
class _TrainOptions(_Options):
    """What train takes beside the recipe.

    Attributes:
        resume: the run folder to go on with. Beside it only --epochs may change.
    """

    resume: Path | None = None


@dataclass(frozen=True)
class _CompareOptions(_Options):
    """What compare takes beside the recipe.

    Attributes:
        objectives: which to run; --objective runs that one alone.
        seeds: which to run each with; --seed runs that one alone.
    """

    objectives: tuple[Objective, ...] = OBJECTIVES
    seeds: tuple[int, ...] = (0,)


def _train(arguments: list[str], console: Console) -> None:
    from vmcr2.lab import figures as plot
    from vmcr2.lab import train
    from vmcr2.lab.run import RunFolder

    name, flags = _recipe_name(arguments)
    resumed = _value_of("--resume", flags)
    if resumed is None and "--resume" in flags:
        raise InputError("resume takes the run folder to go on with, got nothing")
    if resumed is not None:
        run = RunFolder.open(Path(resumed))
        if name is not None and find(name).name != run.recipe().name:
            raise InputError(f"{resumed} is a run of the recipe {run.recipe().name}, got {name}")
        recipe, options = _parse("train", run.recipe(), _TrainOptions, flags)
        if options.out is not None:
            raise InputError(f"out has no meaning beside --resume, got {options.out}")
        train.resume(run, recipe, options.data_root, console)
    else:
        recipe, options = _parse("train", _needed(name, "train", flags), _TrainOptions, flags)
        out = options.out or Path("runs") / f"{recipe.name}-{recipe.objective}-seed{recipe.seed}"
        run = train.start(recipe, out, options.data_root, console)
    plot.draw_run(run)
    summary = run.summary()
    _show(console, f"{summary['recipe']}, {summary['epochs']} epochs", [summary])
    console.print(f"run folder: {run.path}", highlight=False, soft_wrap=True)


def _compare(arguments: list[str], console: Console) -> None:
    from vmcr2.lab.sweep import compare

    name, flags = _recipe_name(arguments)
    recipe, options = _parse("compare", _needed(name, "compare", flags), _CompareOptions, flags)
    objectives = options.objectives if _value_of("--objective", flags) is None else (recipe.objective,)
    seeds = options.seeds if _value_of("--seed", flags) is None else (recipe.seed,)
    out = options.out or Path("runs") / recipe.name
    runs = compare(recipe, objectives, seeds, out, options.data_root, console)
    _show(console, f"{recipe.name}, {recipe.epochs} epochs, seeds {seeds}", [run.summary() for run in runs])
    console.print(f"table, figures and runs: {out}", highlight=False, soft_wrap=True)


@dataclass(frozen=True)
class _EvaluateOptions:
    """What evaluate takes.

    Attributes:
        run: the run folder.
        data_root: folder of named data sets; also $VMCR2_DATA_ROOT. By default ./data.
        components: dimensions of the subspaces to try; by default 1, 2, 4, … and ⌊d/k⌋.
    """

    run: Path
    data_root: Path | None = None
    components: tuple[int, ...] = ()


def _evaluate(arguments: list[str], console: Console) -> None:
    import tyro

    from vmcr2.lab import train
    from vmcr2.lab.evaluate import accuracy_by_components, extract, measure
    from vmcr2.lab.networks import CrossEntropyHead
    from vmcr2.lab.report import table
    from vmcr2.lab.run import RunFolder, write_atomically
    from vmcr2.subspaces import default_components

    options = tyro.cli(
        _EvaluateOptions, args=arguments, prog="vmcr2 evaluate", config=(tyro.conf.PositionalRequiredArgs,)
    )
    run = RunFolder.open(options.run)
    recipe, dataset, model, criterion = train.load_trained(run, options.data_root)
    features = extract(model, dataset, recipe.augmentation, recipe.batch_size)
    head = criterion if isinstance(criterion, CrossEntropyHead) else None
    measured = asdict(measure(features, dataset, recipe.eps_sq, head))
    usual = default_components(recipe.feature_dim, dataset.num_classes)
    tried = options.components or tuple(sorted({r for r in (1, 2, 4, 8) if r <= recipe.feature_dim} | {usual}))
    by_components = accuracy_by_components(features, dataset, list(tried))
    write_atomically(
        run.path / "evaluation.json",
        (json.dumps(measured | {"accuracy_by_components": by_components}, indent=2) + "\n").encode(),
    )
    figures = [(key, "–" if value is None else f"{value:.4f}") for key, value in measured.items()]
    figures += [(f"test_accuracy, {r} components", f"{value:.4f}") for r, value in by_components.items()]
    console.print(table(f"{run.path}", ("measure", "value"), figures))


@dataclass(frozen=True)
class _PlotOptions:
    """What plot takes.

    Attributes:
        run: a run folder, or the folder of a comparison.
    """

    run: Path


def _plot(arguments: list[str], console: Console) -> None:
    import tyro

    from vmcr2.lab import figures as plot
    from vmcr2.lab.run import RunFolder

    folder = tyro.cli(_PlotOptions, args=arguments, prog="vmcr2 plot", config=(tyro.conf.PositionalRequiredArgs,)).run
    if (folder / "comparison.json").is_file():
        runs = [RunFolder.open(path.parent) for path in sorted(folder.glob("*/recipe.json"))]
        if not runs:
            raise InputError(f"{folder} has a comparison.json but no run folders beside it")
        order = {objective: place for place, objective in enumerate(OBJECTIVES)}
        runs.sort(key=lambda run: (order[run.recipe().objective], run.recipe().seed))
        drawn = plot.draw_comparison(runs, folder / "figures")
    else:
        drawn = plot.draw_run(RunFolder.open(folder))
    for path in drawn:
        console.print(str(path), highlight=False, soft_wrap=True)


@dataclass(frozen=True)
class _BenchOptions:
    """What bench takes.

    Attributes:
        rows: which of mnist, cifar10, cifar100, tiny-imagenet to time.
        device: cpu, cuda or auto.
        repeats: of every timing; the network is timed a third as often.
        out: a .json file for the figures.
    """

    rows: tuple[Literal["mnist", "cifar10", "cifar100", "tiny-imagenet"], ...] = (
        "mnist",
        "cifar10",
        "cifar100",
        "tiny-imagenet",
    )
    device: Literal["auto", "cpu", "cuda"] = "auto"
    repeats: int = 9
    out: Path | None = None


def _bench(arguments: list[str], console: Console) -> None:
    import torch
    import tyro

    from vmcr2.checks import check_count
    from vmcr2.lab import bench
    from vmcr2.lab.report import describe_device, table
    from vmcr2.lab.run import write_atomically
    from vmcr2.lab.train import chosen_device

    options = tyro.cli(_BenchOptions, args=arguments, prog="vmcr2 bench")
    check_count("repeats", options.repeats)
    device = torch.device(chosen_device(options.device))
    costs: dict[str, bench.EpochCost] = {
        name: bench.epoch_cost(bench.WORKLOADS[name], device, options.repeats) for name in options.rows
    }
    where = describe_device(device)
    title = f"Random images of the right size; ms a step, median ± quartile distance; {where}"
    console.print(table(title, bench.COLUMNS, bench.rows(costs)))
    if options.out is not None:
        record = {"where": where, "rows": {name: asdict(cost) for name, cost in costs.items()}}
        write_atomically(options.out, (json.dumps(record, indent=2) + "\n").encode())


@dataclass(frozen=True)
class _SplitOptions:
    """What split takes.

    Attributes:
        run: the run folder.
        megabytes: of the largest part.
    """

    run: Path
    megabytes: int = 16


def _split(arguments: list[str], console: Console) -> None:
    import tyro

    from vmcr2.checks import check_count
    from vmcr2.lab.run import RunFolder

    options = tyro.cli(_SplitOptions, args=arguments, prog="vmcr2 split", config=(tyro.conf.PositionalRequiredArgs,))
    check_count("megabytes", options.megabytes)
    run = RunFolder.open(options.run)
    with run.held():
        parts = run.split_checkpoint(options.megabytes * 1_000_000)
    console.print(
        f"{len(parts)} part{'s' * (len(parts) > 1)} in {run.parts_folder}; leave checkpoint.pt behind, "
        f"carry the rest of {run.path}, and go on with --resume",
        highlight=False,
        soft_wrap=True,
    )


def _reproduce(arguments: list[str], console: Console) -> None:
    import tyro

    from vmcr2.lab import reproduce

    name, flags = _recipe_name(arguments)
    asked_for_help = {"-h", "--help"} & set(flags)
    if name not in reproduce.TARGETS and not (name is None and asked_for_help):
        got = "nothing" if name is None else repr(name)
        raise InputError(f"reproduce takes one of {', '.join(reproduce.TARGETS)}, got {got}")
    request = tyro.cli(reproduce.Request, args=flags, prog=f"vmcr2 reproduce {name or 'TABLE'}")
    assert name is not None
    for path in reproduce.TARGETS[name](request, console):
        console.print(str(path), highlight=False, soft_wrap=True)


def _recipes(arguments: list[str], console: Console) -> None:
    from vmcr2.lab.report import table

    if arguments[:1] in (["-h"], ["--help"]):
        print(USAGE)
        return
    if len(arguments) > 1 or (arguments and arguments[0].startswith("-")):
        raise InputError(f"recipes takes at most one recipe, got {' '.join(arguments)}")
    if arguments:
        print(to_json(find(arguments[0])), end="")
        return
    rows = [
        (recipe.name, recipe.network, str(recipe.feature_dim), str(recipe.batch_size), str(recipe.epochs), recipe.about)
        for recipe in RECIPES.values()
    ]
    console.print(table("Recipes", ("name", "network", "d", "batch", "epochs", "about"), rows))


_COMMANDS: dict[str, Callable[[list[str], Console], None]] = {
    "train": _train,
    "compare": _compare,
    "evaluate": _evaluate,
    "plot": _plot,
    "reproduce": _reproduce,
    "bench": _bench,
    "split": _split,
    "recipes": _recipes,
}


def _recipe_name(arguments: list[str]) -> tuple[str | None, list[str]]:
    """Splits off the recipe, which is the first argument unless that is a flag."""
    if arguments and not arguments[0].startswith("-"):
        return arguments[0], arguments[1:]
    return None, arguments


def _needed(name: str | None, command: str, flags: list[str]) -> Recipe:
    if name is None:
        if {"-h", "--help"} & set(flags):
            return RECIPES["digits"]
        raise InputError(f"vmcr2 {command} takes a recipe first: one of {', '.join(RECIPES)} or a .json file")
    return find(name)


def _value_of(flag: str, flags: list[str]) -> str | None:
    """Returns a flag's value, so that what it decides can be known before the flags are parsed."""
    for place, word in enumerate(flags):
        if word == flag and place + 1 < len(flags):
            return flags[place + 1]
        if word.startswith(f"{flag}="):
            return word.partition("=")[2]
    return None


def _parse(command: str, default: Recipe, kind: type[_Given], flags: list[str]) -> tuple[Recipe, _Given]:
    """Returns the recipe with the flags applied, and the command's other options."""
    import tyro

    # Both are shown without a prefix: --epochs, --vmcr2.mu, --out.
    fields = [
        ("recipe", Annotated[Recipe, tyro.conf.arg(name="")], dataclasses.field(default=default)),
        ("options", Annotated[kind, tyro.conf.arg(name="")], dataclasses.field(default=kind())),
    ]
    both = dataclasses.make_dataclass("both", fields)
    parsed = tyro.cli(both, args=flags, prog=f"vmcr2 {command} {default.name}")
    return parsed.recipe, parsed.options


def _show(console: Console, title: str, summaries: Sequence[dict]) -> None:
    from vmcr2.lab.report import table
    from vmcr2.lab.sweep import COLUMNS, hardware, rows

    console.print(table(f"{title}, {hardware(summaries[0])}", COLUMNS, rows(summaries)))


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit code: 0, or 2 for wrong input, 3 for diverged training."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    console = Console(width=None if sys.stdout.isatty() else 120)
    if not given or given[0] in ("-h", "--help"):
        print(USAGE)
        return 0
    try:
        if given[0] == "--version":
            from vmcr2 import __version__

            print(__version__)
        elif given[0] in _COMMANDS:
            _COMMANDS[given[0]](given[1:], console)
        else:
            raise InputError(f"command must be one of {', '.join(_COMMANDS)}, got {given[0]!r}")
    except (InputError, OSError) as error:
        print(f"vmcr2: {error}", file=sys.stderr)
        return 2
    except NumericalError as error:
        print(f"vmcr2: {error}", file=sys.stderr)
        return 3
    except KeyboardInterrupt:
        print("vmcr2: interrupted; the run goes on with --resume", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
