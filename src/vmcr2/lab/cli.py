"""The command line: `vmcr2 COMMAND ...`."""

from __future__ import annotations

import dataclasses
import os
import re
import shlex
import sys
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import tyro
from rich.console import Console

from vmcr2.checks import did_you_mean
from vmcr2.distributed import world_size
from vmcr2.errors import InputError, NumericalError
from vmcr2.lab import processes
from vmcr2.lab.files import describe_refusal
from vmcr2.lab.recipes import OBJECTIVES, RECIPES, ObjectiveName, Recipe, find, is_data, named, to_json

if TYPE_CHECKING:
    from vmcr2.lab.run import RunFolder

USAGE = """\
vmcr2: maximal coding rate reduction by variational forms

  vmcr2 train RECIPE [flags]       train one objective into a run folder
  vmcr2 train --resume RUN         continue a run that was interrupted
                                   (both also by several processes: torchrun --nproc-per-node N -m vmcr2 train …)
  vmcr2 compare RECIPE [flags]     V-MCR², MCR² and cross-entropy side by side
  vmcr2 evaluate RUN               measure a trained run again, in more detail
  vmcr2 plot RUN                   draw the figures of a run or a comparison again
  vmcr2 predict RUN FILES          name the classes of images
  vmcr2 audit RUN                  list the training samples whose label looks wrong
  vmcr2 export RUN DIR             write the model as safetensors with a model card
  vmcr2 report FILE.npz            say what embeddings are like, by their coding rates
  vmcr2 reproduce TABLE [flags]    table1, table2, table3, figure1, figure2 of the paper, or noise
  vmcr2 bench                      time the objectives, as the paper's Table 1
  vmcr2 recipes [RECIPE]           list the recipes, or show one

RECIPE is a name from the list, a recipe.json, or data: a .npz file or a folder of images by class, for which one is
chosen (docs/data.md). Every field is a flag: vmcr2 train RECIPE --help shows them."""


_Given = TypeVar("_Given")
_READ_AT_ONCE = 256  # images
_GOING_ON = ("compare", "reproduce")  # the same command continues what exists
_FIELD_ENDS = re.compile(r"[\t\r\n]")
_Run = Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN")]


@dataclass(frozen=True)
class _Deciding:
    """Flags that decide what the others mean, and so are read first; their values are checked later."""

    resume: Path | None = None
    objective: str | None = None
    seed: str | None = None
    image_size: Annotated[str | None, tyro.conf.arg(name="data.image-size")] = None


@dataclass(frozen=True)
class _Options:
    """A command's options besides the recipe.

    Attributes:
        data_root: folder of named data sets; also $VMCR2_DATA_ROOT. By default ./data.
    """

    data_root: Path | None = None


@dataclass(frozen=True)
class _TrainOptions(_Options):
    """The options of train besides the recipe.

    Attributes:
        out: the run folder to write to; by default runs/<recipe>-<objective>-seed<seed>.
        resume: the run folder to continue. With it only --epochs may change, and --data.source if the data has moved.
    """

    out: Path | None = None
    resume: Path | None = None


@dataclass(frozen=True)
class _CompareOptions(_Options):
    """The options of compare besides the recipe.

    Attributes:
        out: the folder to write to; by default runs/<recipe>.
        objectives: which to run; --objective runs only that one.
        seeds: which to run each with; --seed runs only that one.
    """

    out: Path | None = None
    objectives: tuple[ObjectiveName, ...] = tuple(OBJECTIVES)
    seeds: tuple[int, ...] = (0,)


def _train(arguments: list[str]) -> None:
    from vmcr2.lab import train

    run, recipe, options = processes.first(lambda: _to_train(arguments))
    if run is not None:
        train.resume(run, recipe, options.data_root, _console())
    else:
        assert options.out is not None
        run = train.start(recipe, options.out, options.data_root, _console())
    if processes.is_first():
        from vmcr2.lab import figures

        try:
            figures.draw_run(run)
        except KeyboardInterrupt:
            _say(f"{run.path} is complete but for its figures: vmcr2 plot {run.path}")
            raise
        summary = run.summary()
        _show(f"{summary['recipe']}, {summary['epochs']} epochs", [summary])
        _say(f"run folder: {run.path}")


def _to_train(arguments: list[str]) -> tuple[RunFolder | None, Recipe, _TrainOptions]:
    """Returns the run to continue, or None for a new one, with the recipe and the other options."""
    from vmcr2.lab.run import RunFolder

    name, flags, deciding = _split(arguments)
    if deciding.resume is not None:
        run = RunFolder.open(deciding.resume)
        if name is not None and find(name).name != run.recipe().name:
            raise InputError(f"{run.path} is a run of the recipe {run.recipe().name}, got {name}")
        recipe, options = _parse("train", run.recipe(), _TrainOptions, flags)
        if options.out is not None:
            raise InputError(f"out cannot be combined with --resume, got {options.out}")
        return run, recipe, options
    chosen = _recipe(name, "train", flags, deciding)
    recipe, options = _parse(f"train {name or chosen.name}", chosen, _TrainOptions, flags)
    _say_what_was_chosen(name, recipe)
    out = options.out or Path("runs") / f"{recipe.name}-{recipe.objective}-seed{recipe.seed}"
    # torchrun --max-restarts starts the same command again, which then finds the run that it began.
    again = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0" and RunFolder(out).is_begun()
    return RunFolder.open(out) if again else None, recipe, dataclasses.replace(options, out=out)


def _compare(arguments: list[str]) -> None:
    from vmcr2.lab.sweep import compare, heading

    name, flags, deciding = _split(arguments)
    chosen = _recipe(name, "compare", flags, deciding)
    recipe, options = _parse(f"compare {name or chosen.name}", chosen, _CompareOptions, flags)
    _say_what_was_chosen(name, recipe)
    objectives = options.objectives if deciding.objective is None else (recipe.objective,)
    seeds = options.seeds if deciding.seed is None else (recipe.seed,)
    out = options.out or Path("runs") / recipe.name
    runs = compare(recipe, objectives, seeds, out, options.data_root, _console())
    summaries = [run.summary() for run in runs]
    _show(heading(summaries), summaries)
    _say(f"table, figures and runs: {out}")


def evaluate(run: _Run, data_root: Path | None = None, components: tuple[int, ...] = ()) -> None:
    """Measures a trained run again, in more detail.

    Args:
        run: the run folder.
        data_root: folder of named data sets; also $VMCR2_DATA_ROOT. By default ./data.
        components: dimensions of the subspaces to try; by default 1, 2, 4, … and ⌊d/k⌋.
    """
    from vmcr2.checks import check_count
    from vmcr2.lab.evaluate import accuracy_by_components, measure, training_bases
    from vmcr2.lab.files import write_json
    from vmcr2.lab.sweep import held_out
    from vmcr2.lab.terminal import table
    from vmcr2.lab.trained import Checkpoint
    from vmcr2.subspaces import default_components

    checkpoint = Checkpoint.open(run)
    recipe = checkpoint.recipe
    for r in components:
        check_count("components", r, at_most=recipe.feature_dim, limit="feature_dim")
    dataset, features = checkpoint.features(data_root)
    predict = checkpoint.objective().predict
    measured = asdict(measure(features, dataset, training_bases(features, dataset), recipe.eps_sq, predict))
    usual = default_components(recipe.feature_dim, dataset.num_classes)
    tried = components or tuple(sorted({r for r in (1, 2, 4, 8) if r <= recipe.feature_dim} | {usual}))
    by_components = accuracy_by_components(features, dataset, list(tried))
    shown = [(key, "–" if value is None else f"{value:.4f}") for key, value in measured.items()]
    names = {r: f"test_accuracy, {r} component{'s' * (r > 1)}" for r in by_components}
    shown += [(names[r], f"{value:.4f}") for r, value in by_components.items()]
    _console().print(table(f"{run}{held_out(recipe.evaluated_on)}", ("measure", "value"), shown))
    about = {"evaluated_on": recipe.evaluated_on, "accuracy_by_components": by_components}
    write_json(checkpoint.run.evaluation_file, measured | about)


def plot(run: _Run) -> None:
    """Draws the figures of a run or a comparison again.

    Args:
        run: a run folder, or the folder of a comparison.
    """
    from vmcr2.lab import figures
    from vmcr2.lab.run import RunFolder

    if (run / "comparison.json").is_file():
        from vmcr2.lab.sweep import compared

        drawn = figures.draw_comparison(compared(run), run / "figures")
    else:
        drawn = figures.draw_run(RunFolder.open(run))
    for path in drawn:
        _say(str(path))


def predict(
    run: _Run,
    files: tyro.conf.Positional[tuple[Path, ...]],
    out: Path | None = None,
    components: int | None = None,
) -> None:
    """Names the classes of samples: a line for each, with its class and the margin to the next one.

    The margin, from 0 to 1, is how much more of the sample's energy lies in its class's subspace than in the next one.
    Images that cannot be read have no line, and are named at the end; the exit code is then 2.

    Args:
        run: a run folder, or a folder that export wrote.
        files: images, or folders of them; or .npy files, each an array of embeddings or images like those in training,
            whose samples are named FILE[0], FILE[1], ….
        out: a .csv file to write the same lines to.
        components: how many directions of each class to use, strongest first; by default all that the run has, ⌊d/k⌋.
    """
    import torch

    from vmcr2.lab.files import check_file, write_csv
    from vmcr2.lab.sources import refuse_unreadable
    from vmcr2.lab.trained import load

    samples, batches = _samples_of(files)
    if out is not None:
        check_file("out", out)
    trained = load(run, components)

    scores = [one for batch in batches for one in _scored(trained, batch)]
    unreadable = [str(one) for one in scores if isinstance(one, InputError)]
    if len(unreadable) == len(scores):
        refuse_unreadable(unreadable)
    samples = [sample for sample, one in zip(samples, scores, strict=True) if not isinstance(one, InputError)]
    best = torch.stack([one for one in scores if not isinstance(one, InputError)]).topk(min(2, len(trained.classes)))
    margins = (best.values[:, 0] - best.values[:, -1]).tolist()
    names = [trained.classes[j] for j in best.indices[:, 0].tolist()]
    rows = [(sample, name, f"{gap:.3g}") for sample, name, gap in zip(samples, names, margins, strict=True)]
    if out is not None:
        write_csv(out, [("file", "class", "margin"), *rows])
    for row in rows:
        print("\t".join(_FIELD_ENDS.sub(" ", field) for field in row))
    for each in unreadable[:-1]:
        print(f"vmcr2: {each}", file=sys.stderr)
    refuse_unreadable(unreadable[-1:])


def _samples_of(files: Sequence[Path]) -> tuple[list[str], list[Any]]:
    """Returns the names of samples, and the samples: arrays, and lists of images that come one after the other.

    Raises:
        InputError: there is none, or a file of an array is damaged (a ValueError).
    """
    from vmcr2.lab.sources import image_files, read_npy

    samples: list[str] = []
    batches: list[Any] = []
    for given in files:
        if given.suffix.lower() == ".npy":
            batches.append(read_npy(given))
            samples += [f"{given}[{i}]" for i in range(len(batches[-1]))]
            continue
        found = image_files(given) if given.is_dir() else [given]
        if not found:
            raise InputError(
                f"files must name at least one image each, got the folder {given}, which contains none directly"
            )
        samples += map(str, found)
        if batches and isinstance(batches[-1], list):
            batches[-1] += found
        else:
            batches.append(found)
    if not files:
        raise InputError("files must name at least one image or .npy file, got none")
    return samples, batches


def _scored(trained: Any, batch: Any) -> list[Any]:
    """Returns the scores of each sample of a batch, or the error of an image that cannot be read."""
    if isinstance(batch, list) and len(batch) > _READ_AT_ONCE:
        parts = [batch[i : i + _READ_AT_ONCE] for i in range(0, len(batch), _READ_AT_ONCE)]
        return [one for part in parts for one in _scored(trained, part)]
    try:
        return list(trained.scores(batch))
    except InputError as error:
        if not isinstance(batch, list) or len(trained.image_shape) == 1:  # no file is to blame
            raise
        return [error] if len(batch) == 1 else [one for image in batch for one in _scored(trained, [image])]


def audit(run: _Run, data_root: Path | None = None, top: int = 20) -> None:
    """Lists the training samples whose label looks wrong, and writes them all, with a contact sheet, to the run folder.

    Args:
        run: the run folder.
        data_root: folder of named data sets; also $VMCR2_DATA_ROOT. By default ./data.
        top: how many to print, the most suspect first.
    """
    from vmcr2.checks import check_count
    from vmcr2.lab import audit
    from vmcr2.lab.run import RunFolder
    from vmcr2.lab.terminal import table

    check_count("top", top)
    found = audit.audit(RunFolder.open(run), data_root)
    if found.suspects:
        rows = [(one.sample, one.given, one.suggested, f"{one.score:.3f}") for one in found.suspects[:top]]
        of = f"{len(found.suspects)} suspects among {found.judged} training samples"
        _console().print(
            table(f"{len(rows)} of {of}, most suspect first", ("sample", "given label", "suggested", "score"), rows)
        )
    else:
        _say(f"no suspects among {found.judged} training samples: every label fits its sample best")
    if found.alone:
        _say(f"not judged, each the only training sample of its class: {found.alone}")
    for path in found.written:
        _say(str(path))
    if found.aside is not None:
        _say(f"{found.aside}: the suspects.csv that was there before, which differs")


def export(
    run: _Run,
    folder: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="DIR")],
    components: int | None = None,
) -> None:
    """Writes a trained run as config.json, model.safetensors and a model card, to load or to share.

    Args:
        run: the run folder.
        folder: the folder to write to, new or empty.
        components: how many directions of each class to keep, strongest first; by default all that the run has, ⌊d/k⌋.
    """
    from vmcr2.lab import trained

    trained.export(trained.load(run, components), folder)
    _say(f"{folder}: vmcr2.load({str(folder)!r}) loads it")


def report(
    file: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="FILE.npz")], out: Path | None = None
) -> None:
    """Describes embeddings by their coding rates, and writes the report as JSON and as a figure.

    Args:
        file: a .npz with features (m, d) and labels (m,), or with x_train and y_train; optionally with class_names.
        out: the folder to write to; by default the file's.
    """
    import vmcr2
    from vmcr2.lab.files import check_folder, replacing, write_json
    from vmcr2.lab.sources import read_npz

    if out is not None:
        check_folder("out", out)
    dataset = read_npz(file, needs_test=False)
    if dataset.train_inputs.ndim != 2:
        raise InputError(f"{file} must hold embeddings (m, d), got images of shape {tuple(dataset.train_inputs.shape)}")
    made = vmcr2.report(dataset.train_inputs, dataset.train_labels, class_names=dataset.class_names)
    print(made)
    stem = (file.parent if out is None else out) / f"{file.stem}.report"
    stem.parent.mkdir(parents=True, exist_ok=True)
    write_json(stem.with_name(f"{stem.name}.json"), made.as_dict())
    with replacing(stem.with_name(f"{stem.name}.png")) as picture:
        made.figure().savefig(picture, dpi=150, format="png")
    _say(f"written: {stem}.json, {stem}.png")


def bench(
    rows: tuple[Literal["mnist", "cifar10", "cifar100", "tiny-imagenet"], ...] = (),
    device: Literal["auto", "cpu", "cuda"] = "auto",
    seconds: float = 1.0,
    out: Path | None = None,
) -> None:
    """Times the objectives on random images, as in the paper's Table 1.

    Args:
        rows: which to time; all by default.
        device: cpu, cuda or auto.
        seconds: the least time for each measurement.
        out: a .json file to write the measurements to.
    """
    from vmcr2.checks import check_number
    from vmcr2.lab import bench
    from vmcr2.lab.files import check_file, write_json
    from vmcr2.lab.processes import chosen_device
    from vmcr2.lab.terminal import describe_device, table

    check_number("seconds", seconds)
    if out is not None:
        check_file("out", out)
    used = chosen_device(device)
    costs = {name: bench.epoch_cost(bench.WORKLOADS[name], used, seconds) for name in rows or bench.WORKLOADS}
    where = describe_device(used)
    title = f"Random images of the right size; ms per step, median ± quartile distance; {where}"
    _console().print(table(title, bench.COLUMNS, bench.rows(costs)))
    if out is not None:
        write_json(out, {"where": where, "rows": {name: asdict(cost) for name, cost in costs.items()}})


def recipes(recipe: tyro.conf.Positional[str | None] = None) -> None:
    """Lists the recipes, or shows one as JSON.

    Args:
        recipe: the one to show.
    """
    from vmcr2.lab.terminal import table

    if recipe is not None:
        print(to_json(find(recipe)), end="")
        return
    rows = [
        (r.name, r.network, str(r.feature_dim), str(r.batch_size), str(r.epochs), r.about) for r in named().values()
    ]
    _console().print(table("Recipes", ("name", "network", "d", "batch", "epochs", "about"), rows))


def _reproduce(arguments: list[str]) -> None:
    from vmcr2.lab import reproduce

    name, *flags = arguments or [""]
    if name in ("-h", "--help"):
        _say(f"TABLE is one of {', '.join(reproduce.TARGETS)}.\n")
        tyro.cli(reproduce.Request, args=["--help"], prog="vmcr2 reproduce TABLE")
    if name not in reproduce.TARGETS:
        hint = did_you_mean(name, reproduce.TARGETS)
        raise InputError(f"reproduce takes one of {', '.join(reproduce.TARGETS)}, got {name or 'nothing'}{hint}")
    request = tyro.cli(reproduce.Request, args=flags, prog=f"vmcr2 reproduce {name}")
    for path in reproduce.TARGETS[name](request, _console()):
        _say(str(path))


def _typed(command: Callable[..., None]) -> Callable[[list[str]], None]:
    """Returns a command whose flags are a function's arguments."""
    return lambda arguments: tyro.cli(command, args=arguments, prog=f"vmcr2 {command.__name__}")


_COMMANDS: dict[str, Callable[[list[str]], None]] = {
    "train": _train,
    "compare": _compare,
    "evaluate": _typed(evaluate),
    "plot": _typed(plot),
    "predict": _typed(predict),
    "audit": _typed(audit),
    "export": _typed(export),
    "report": _typed(report),
    "reproduce": _reproduce,
    "bench": _typed(bench),
    "recipes": _typed(recipes),
}


def _split(arguments: list[str]) -> tuple[str | None, list[str], _Deciding]:
    """Returns the recipe's name, which comes first, the flags after it, and those that decide what others mean."""
    named_first = bool(arguments) and not arguments[0].startswith("-")
    name, flags = (arguments[0], arguments[1:]) if named_first else (None, arguments)
    deciding, _ = tyro.cli(_Deciding, args=flags, prog="vmcr2", return_unknown_args=True, add_help=False)
    return name, flags, deciding


def _recipe(name: str | None, command: str, flags: list[str], deciding: _Deciding) -> Recipe:
    if name is not None:
        size = deciding.image_size or ""
        return find(name, int(size) if size.isdecimal() else None)
    if {"-h", "--help"} & set(flags):
        return RECIPES["digits"]
    raise InputError(
        f"vmcr2 {command} must be followed by a recipe ({', '.join(named())}, or a .json file) or your data, "
        "before any flag"
    )


def _parse(command: str, default: Recipe, kind: type[_Given], flags: list[str]) -> tuple[Recipe, _Given]:
    """Returns the recipe with the flags applied, and the command's other options."""
    # Both are shown without a prefix: --epochs, --vmcr2.mu, --out.
    fields = [
        ("recipe", Annotated[Recipe, tyro.conf.arg(name="")], dataclasses.field(default=default)),
        ("options", Annotated[kind, tyro.conf.arg(name="")], dataclasses.field(default=kind())),
    ]
    both = dataclasses.make_dataclass("both", fields)
    parsed = tyro.cli(both, args=flags, prog=f"vmcr2 {command}")
    return parsed.recipe, parsed.options


def _say_what_was_chosen(name: str | None, recipe: Recipe) -> None:
    if name is None or not is_data(name):
        return
    split = f", {recipe.data.validation:.0%} of each class held out" if recipe.data.validation else ""
    size = "" if recipe.data.image_size is None else f", images scaled to {recipe.data.image_size} a side"
    _say(f"{recipe.about}{split}; network {recipe.network}, feature_dim {recipe.feature_dim}{size}")


def _show(title: str, summaries: Sequence[dict]) -> None:
    from vmcr2.lab.sweep import COLUMNS, measured_on, rows
    from vmcr2.lab.terminal import table

    _console().print(table(f"{title}, {measured_on(summaries[0])}", COLUMNS, rows(summaries)))


def _drop_output() -> None:
    """Discards further output once the reader, such as `| head`, has closed the pipe."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Continues without output, so that a run is trained to its end."""
        _drop_output()


def _console() -> Console:
    return _Console(width=None if sys.stdout.isatty() else 120, markup=False, emoji=False)


def _say(text: str) -> None:
    _console().print(text, highlight=False, soft_wrap=True)


def _warner() -> Callable[..., None]:
    """Returns a replacement for `warnings.showwarning` that prints each warning once, on a line."""
    said: set[str] = set()

    def warn(message: Warning | str, *_: Any, **__: Any) -> None:
        if processes.is_first() and str(message) not in said:
            said.add(str(message))
            with suppress(BrokenPipeError):
                print(f"vmcr2: {message}", file=sys.stderr)

    return warn


def _how_to_continue(error: BaseException, given: list[str]) -> str:
    """Returns the command that continues what Ctrl-C, a full disk or the loss of a process ended."""
    if given[0] in _GOING_ON:
        return shlex.join(["vmcr2", *given])
    run = getattr(error, "run", None)
    if run is None:
        return ""
    root = tyro.cli(_Options, args=given[1:], return_unknown_args=True, add_help=False)[0].data_root
    local = os.environ.get("LOCAL_WORLD_SIZE")
    several = ["torchrun", "--nproc-per-node", local, "-m"] if local is not None and world_size() > 1 else []
    rest = ["--resume", str(run), *([] if root is None else ["--data-root", str(root)])]
    return shlex.join([*several, "vmcr2", "train", *rest])


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit code.

    The code is 0, or 2 for wrong input or a full disk, 3 for diverged training (in a comparison, of all runs), 130 for
    Ctrl-C, 1 if another process was lost.

    Under torchrun the first process reads and writes for all, and the first one to fail says why.
    """
    given = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # a service may have closed it
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 (for as long as the process lives)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a Windows code page may have no Δ
            stream.reconfigure(errors="replace")
    launch = processes.Launch()
    with warnings.catch_warnings():
        try:
            with launch:
                warnings.showwarning = _warner()
                if given[0] in ("-h", "--help"):
                    print(USAGE)
                elif given[0] == "--version":
                    from vmcr2 import __version__

                    print(__version__)
                elif given[0] not in _COMMANDS:
                    hint = did_you_mean(given[0], _COMMANDS)
                    raise InputError(f"command must be one of {', '.join(_COMMANDS)}, got {given[0]!r}{hint}")
                elif given[0] != "train" and world_size() > 1:
                    raise InputError(
                        f"vmcr2 {given[0]} runs in one process, got {world_size()}: start it without torchrun, "
                        "which is for vmcr2 train"
                    )
                else:
                    processes.keep_freed_memory()
                    _COMMANDS[given[0]](given[1:])
                sys.stdout.flush()
        except BrokenPipeError:
            _drop_output()
        except (InputError, OSError) as error:
            text = describe_refusal(error) if isinstance(error, OSError) else str(error)
            goes_on = hasattr(error, "run") or (isinstance(error, OSError) and given[0] in _GOING_ON)
            command = _how_to_continue(error, given) if goes_on else ""
            launch.last_words(f"vmcr2: {text}{f'; to continue: {command}' if command else ''}")
            return 2
        except NumericalError as error:
            launch.last_words(f"vmcr2: {error}")
            return 3
        except KeyboardInterrupt as error:
            command = _how_to_continue(error, given)
            launch.last_words(f"vmcr2: interrupted{f'; to continue: {command}' if command else ''}")
            return 130
        except (RuntimeError, processes.Terminated) as error:
            if not processes.is_loss(error):
                raise
            command = _how_to_continue(error, given)
            why = "stopped, since another process of the run has ended"
            launch.last_words(f"vmcr2: {why}{f'; to continue: {command}' if command else ''}")
            return 1
    return 0
