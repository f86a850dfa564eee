"""The one training loop, `fit`, and the runs of recipes around it: V-MCR² (Algorithms 1 and 2), MCR², cross-entropy."""

from __future__ import annotations

import math
import platform
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from vmcr2.checks import check_count, pair_of
from vmcr2.distributed import process_rank, world_size
from vmcr2.errors import InputError, NumericalError
from vmcr2.lab import networks, objectives, processes, recipes, sources, trained
from vmcr2.lab.augmentation import augmented, plain, warn_of_lost_borders
from vmcr2.lab.evaluate import Features, Measures, accuracy, extract, for_figures, measure, training_bases
from vmcr2.lab.files import check_folder
from vmcr2.lab.objectives import Objective
from vmcr2.lab.recipes import OBJECTIVES, Recipe
from vmcr2.lab.run import RunFolder
from vmcr2.lab.sources import Dataset
from vmcr2.lab.terminal import EpochProgress, device_name
from vmcr2.linalg import wide_dtype
from vmcr2.rates import effective_rank, reduction_of_lines
from vmcr2.sampling import batch_count, epoch_generator
from vmcr2.subspaces import default_components, nearest_subspace, warn_of_small_classes

Batches = Iterable[tuple[Tensor, Tensor]]
OnEpoch = Callable[[dict[str, Any]], None]

_LITTLE = 0.02  # share of the ΔR of classes on orthogonal lines; below this, classes are not separated


def fit(
    model: nn.Module,
    objective: Objective,
    batches: Batches | Callable[[int], Batches],
    optimizer: torch.optim.Optimizer,
    epochs: int,
    *,
    latch_on: Batches | Callable[[int], Batches] | None = None,
    lr_at: Callable[[float], float] | None = None,
    precision: str = "float32",
    on_epoch: OnEpoch | None = None,
    done: int = 0,
    history: Sequence[dict[str, Any]] = (),
) -> None:
    """Trains a network on an objective.

    Args:
        model: maps inputs to features (m, d). It and the criterion are on the device to train on. With several
            processes it must be wrapped in DistributedDataParallel, and each process has its share of every batch.
        objective: what to train on; anything with the interface of `Objective`.
        batches: any iterable of pairs (inputs, labels), such as a DataLoader with workers, read once per epoch; or a
            function that returns those of an epoch (the first is 1), such as a generator function. If the batches or
            their sampler have `set_epoch`, it is called with the epoch, counted from 0 as samplers do.
        optimizer: of the parameters of the model and of `objective.criterion`.
        epochs: the last epoch.
        latch_on: what the objective may look at before an epoch, in the same form; best un-augmented. None means
            `batches`.
        lr_at: the learning rate at a moment (1.5 is halfway through the second epoch), set before every step; the
            batches must then have a length, which a generator lacks. None leaves the optimizer's.
        precision: of the network: "float32", or "bf16" by autocast.
        on_epoch: called after every epoch with its dict of figures, to which it may add.
        done: how many epochs have been trained before; training continues after them.
        history: the lines of those epochs.

    Raises:
        InputError: epochs is no integer >= 1, objective is not an Objective, there is no batch, one is not a pair, the
            batches have no length although lr_at is given, or the objective refuses the first one (a ValueError).
        NumericalError: training diverged, or the objective saw no point in continuing.
    """
    check_count("epochs", epochs)
    if not hasattr(objective, "criterion"):
        raise InputError(
            f"objective must be an Objective, got {type(objective).__name__}; a VMCR2Loss goes in "
            "vmcr2.lab.objectives.Variational(loss)"
        )
    lines = list(history)
    if lines:
        _check(objective, lines)
    for epoch in range(done + 1, epochs + 1):
        began = time.perf_counter()
        found = _fit_epoch(model, objective, batches, optimizer, epoch, latch_on, lr_at, precision)
        lines.append({"epoch": epoch} | found | {"seconds": time.perf_counter() - began})
        if on_epoch is not None:
            on_epoch(lines[-1])
        _check(objective, lines)


def _fit_epoch(
    model: nn.Module,
    objective: Objective,
    batches: Batches | Callable[[int], Batches],
    optimizer: torch.optim.Optimizer,
    epoch: int,
    latch_on: Batches | Callable[[int], Batches] | None,
    lr_at: Callable[[float], float] | None,
    precision: str,
) -> dict[str, float]:
    """Runs one epoch and returns the mean loss and the figures of the last batch."""
    device, criterion = next(model.parameters()).device, objective.criterion
    total = torch.zeros((), device=device, dtype=torch.float64)
    steps, features, labels = 0, None, None
    try:
        with networks.autocast(device, precision):
            objective.before_epoch(epoch, model, _of(epoch, batches if latch_on is None else latch_on))
        model.train()
        criterion.train()
        current = _of(epoch, batches)
        length = None if lr_at is None else _length(current)
        for inputs, given in (pair_of(batch, "labels") for batch in current):
            if lr_at is not None and length is not None:
                for group in optimizer.param_groups:
                    group["lr"] = lr_at(epoch - 1 + (steps + 0.5) / length)
            with networks.autocast(device, precision):
                features = model(inputs.to(device, non_blocking=True))
            features = features.to(wide_dtype(features))
            labels = given.to(device, non_blocking=True)
            loss = criterion(features, labels)
            optimizer.zero_grad()
            loss.backward()
            if objective.gradient_clip is not None:
                nn.utils.clip_grad_norm_(model.parameters(), objective.gradient_clip)
            optimizer.step()
            total += loss.detach()
            steps += 1
        if features is None or labels is None:
            raise InputError("batches must give at least one batch per epoch; a generator is used up after the first")
        mean = float(total / steps)
        if not math.isfinite(mean):
            raise NumericalError(f"the mean loss is {mean}")
        # The last step may have spoilt the weights with no loss after it to show that; such a state must not be saved.
        if not torch.stack([parameter.isfinite().all() for parameter in model.parameters()]).all():
            raise NumericalError("the network's weights are no longer finite")
        return {"loss": mean} | objective.log(features.detach(), labels)
    except (InputError, NumericalError) as error:
        fine = epoch == 1 if features is None else bool(features.isfinite().all())
        if isinstance(error, InputError) and fine:
            raise  # the input is wrong, not the training
        raise _diverged(objective, epoch, error) from error


def _of(epoch: int, batches: Batches | Callable[[int], Batches]) -> Batches:
    current = batches(epoch) if callable(batches) else batches
    for each in (current, getattr(current, "sampler", None), getattr(current, "batch_sampler", None)):
        if callable(set_epoch := getattr(each, "set_epoch", None)):
            set_epoch(epoch - 1)
    return current


def _length(batches: Any) -> int:
    try:
        return len(batches)
    except TypeError as error:  # a generator, or a DataLoader of an IterableDataset
        raise InputError(f"batches must have a length if lr_at is given, got a {type(batches).__name__}") from error


def _check(objective: Objective, lines: list[dict[str, Any]]) -> None:
    try:
        objective.check(lines)
    except NumericalError as error:
        raise _diverged(objective, lines[-1]["epoch"], error) from error


def _diverged(objective: Objective, epoch: int, why: Exception) -> NumericalError:
    return NumericalError(f"training diverged in epoch {epoch}: {why}. {objective.cure}.")


def start(
    recipe: Recipe,
    out: str | Path,
    data_root: str | Path | None = None,
    console: Console | None = None,
    on_epoch: OnEpoch | None = None,
) -> RunFolder:
    """Trains a recipe into a new run folder.

    Within a process group of torch.distributed all processes must call it. They share every batch, and the first one
    writes, shows progress and calls `on_epoch`.

    Args:
        recipe: the recipe to train.
        out: the run folder, new or empty.
        data_root: the folder of named data sets.
        console: where progress is shown.
        on_epoch: called with every epoch's line of metrics.jsonl, such as a logger's.

    Returns:
        The run folder, complete.

    Raises:
        InputError: the data or the folder is not as required; nothing was written (a ValueError).
        NumericalError: training diverged; earlier checkpoints are kept.
        Interrupted: Ctrl-C was pressed; the run can be resumed.
        StoppedError: results could not be written, as on a full disk; the run can be resumed (an OSError).
        LostProcessError: another process of the run has ended; the run can be resumed.
    """
    processes.first(lambda: check_folder("out", Path(out)))
    recipe = processes.first(lambda: replace(recipe, data=sources.resolved(recipe.data)))
    prepared = _prepare(recipe, data_root)
    with ExitStack() as stack:
        run = processes.first(lambda: stack.enter_context(RunFolder.created(out, recipe)))
        try:
            _Run(prepared, run).train(console, on_epoch)
        except KeyboardInterrupt as error:  # even before the first epoch there is a run to continue
            raise error if isinstance(error, Interrupted) else Interrupted(run.path) from error
    return run


def resume(
    run: RunFolder | str | Path,
    recipe: Recipe | None = None,
    data_root: str | Path | None = None,
    console: Console | None = None,
    on_epoch: OnEpoch | None = None,
) -> RunFolder:
    """Continues a run from its last checkpoint, or from its beginning if it has none; leaves a complete run as it is.

    On one machine's CPU, in one process, the result is bit for bit that of an uninterrupted run. The number of
    processes may differ from before.

    Args:
        run: the run folder, or its path.
        recipe: must be the run's own except for `epochs`, which may be more than the run has; None means the run's own.
        data_root: the folder of named data sets.
        console: where progress is shown.
        on_epoch: called with every further epoch's line of metrics.jsonl.

    Raises:
        InputError: the folder belongs to another recipe, or its checkpoint is damaged (a ValueError).
        NumericalError: training diverged; earlier checkpoints are kept.
        Interrupted: Ctrl-C was pressed; the run can be resumed.
        StoppedError: results could not be written, as on a full disk; the run can be resumed (an OSError).
        LostProcessError: another process of the run has ended; the run can be resumed.
    """
    folder = processes.first(lambda: run if isinstance(run, RunFolder) else RunFolder.open(run))
    stored, chosen = processes.first(lambda: _planned(folder, recipe, data_root, console))
    if chosen is None:
        return folder
    prepared = _prepare(chosen, data_root)

    def load() -> dict[str, Any] | None:
        state = folder.load_checkpoint()
        if state is not None:
            _check_state(folder, state, prepared)
        folder.metrics()  # refused if damaged, before anything is changed
        return state

    def reopen() -> None:
        if chosen != stored:
            folder.summary_file.unlink(missing_ok=True)
            folder.write_recipe(chosen)
        if ready.done < chosen.epochs:
            folder.drop_measured()

    with ExitStack() as stack:
        processes.first(lambda: stack.enter_context(folder.held()))
        ready = _Run(prepared, folder, processes.first(load))
        processes.first(reopen)  # only after the state has been loaded
        ready.train(console, on_epoch)
    return folder


def _planned(
    run: RunFolder, recipe: Recipe | None, data_root: str | Path | None, console: Console | None
) -> tuple[Recipe, Recipe | None]:
    """Returns the recipe of a folder, and the one to continue with, or None if there is nothing to do."""
    stored = run.recipe()
    chosen = stored if recipe is None else replace(recipe, data=sources.resolved(recipe.data))
    refuse_other_recipe(run, stored, chosen, data_root)
    chosen = _with_others(chosen, stored)
    moved = sources.has_moved(stored.data, chosen.data, data_root)
    if not run.is_complete() or chosen.epochs > stored.epochs or moved:
        sources.refuse_gone(chosen.data, data_root, run.path)
        return stored, chosen
    if console is not None:
        text = f"{run.path} is complete at {stored.epochs} epochs: nothing to do"
        console.print(text, highlight=False, soft_wrap=True)
    return stored, None


def refuse_other_recipe(run: RunFolder, stored: Recipe, recipe: Recipe, data_root: str | Path | None = None) -> None:
    """Raises InputError if a run cannot continue with a recipe: it is another one, or its `epochs` do not suit."""
    alike = replace(_with_others(recipe, stored), epochs=stored.epochs)
    if sources.has_moved(stored.data, recipe.data, data_root):  # the checkpoint will tell if the data is the same
        alike = replace(alike, data=replace(alike.data, source=stored.data.source))
    differing = recipes.differences(stored, alike)
    if differing:
        lost = "" if run.checkpoint_file.exists() else "; this one has no checkpoint yet: it can be deleted"
        raise InputError(
            f"{run.path} belongs to another recipe (there, here): {'; '.join(differing)}. "
            f"Drop these flags, or start a run in a folder of its own{lost}"
        )
    if recipe.epochs < stored.epochs and not run.is_complete():
        raise InputError(f"epochs must be at least the {stored.epochs} planned for {run.path}, got {recipe.epochs}")
    if recipe.epochs > stored.epochs and recipe.tied_to_epochs:
        raise InputError(
            f"epochs must stay {stored.epochs} for {run.path}, got {recipe.epochs}: its {recipe.tied_to_epochs} "
            "depends on the total number of epochs, so the run cannot be extended; start a longer one in a folder of "
            "its own"
        )


def _with_others(recipe: Recipe, stored: Recipe) -> Recipe:
    """Returns the recipe with a run's settings for the objectives that it does not train, which have no effect."""
    return replace(recipe, **{name: getattr(stored, name) for name in OBJECTIVES if name != recipe.objective})


class Interrupted(KeyboardInterrupt):
    """Ctrl-C ended a run that can be resumed.

    Attributes:
        run: its folder.
    """

    def __init__(self, run: Path) -> None:
        super().__init__(f"interrupted; {run} can be resumed")
        self.run = run

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.run,)


class StoppedError(OSError):
    """The system refused to write a run's results, as on a full disk; the run can be resumed.

    Attributes:
        run: its folder.
    """

    def __init__(self, run: Path, number: int | None, why: str, file: str) -> None:
        super().__init__(number, why, file)
        self.run = run

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.run, self.errno, self.strerror, self.filename)


@contextmanager
def _writing(run: RunFolder, what: str | None = None) -> Iterator[None]:
    """Turns an error of the system into a StoppedError; only around our own writing, not a caller's `on_epoch`.

    Args:
        run: what the error ends.
        what: is written, if the error names no file; the run folder by default.
    """
    try:
        yield
    except OSError as error:
        file = str(error.filename or what or run.path)
        raise StoppedError(run.path, error.errno, error.strerror or str(error), file) from error


class LostProcessError(processes.PeerError):
    """Another process ended, and so did this run, which can be resumed with any number of processes.

    Attributes:
        run: its folder.
    """

    def __init__(self, run: Path) -> None:
        super().__init__(f"stopped, since another process of the run has ended; {run} can be resumed")
        self.run = run

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.run,)


class _Interrupt:
    """Turns Ctrl-C into a stop that loses no epoch: after the current one if it or an earlier one is not on disk yet,
    otherwise immediately.

    Epochs shorter than `checkpoint_seconds` are finished and saved; before a longer one, the state is already on disk.
    A second Ctrl-C always stops at once. With several processes the first, which writes, decides.
    """

    def __init__(self, run: RunFolder, epoch: int, console: Console | None) -> None:
        self.run, self.console = run, console
        self.done = self.saved = epoch
        self.asked = False

    def __enter__(self) -> _Interrupt:
        if threading.current_thread() is threading.main_thread():
            self.before = signal.signal(signal.SIGINT, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, signal.default_int_handler if self.before is None else self.before)

    def _note(self, *_: object) -> None:
        if self.asked or (processes.is_first() and self.done == self.saved):
            raise Interrupted(self.run.path)
        self.asked = True
        if self.console is not None and processes.is_first():
            self.console.print("stopping after this epoch; Ctrl-C again stops at once", highlight=False)


@dataclass(frozen=True)
class _Prepared:
    """All that a run needs, made and tried before anything is written."""

    recipe: Recipe
    dataset: Dataset
    fingerprint: str
    device: torch.device
    model: nn.Module
    objective: Objective


def _prepare(recipe: Recipe, data_root: str | Path | None) -> _Prepared:
    """Prepares the run in every process; an error in one is an error in all."""
    dataset = processes.in_turns(lambda: sources.load(recipe.data, data_root))
    prepared = processes.everywhere(lambda: _prepared_here(recipe, dataset))
    digests = processes.gathered(prepared.fingerprint)
    others = [str(rank) for rank, digest in enumerate(digests) if digest != digests[0]]
    if others:
        raise InputError(
            f"data must be the same in all processes, got other data in process {', '.join(others)} than in process 0"
        )
    return prepared


def _prepared_here(recipe: Recipe, dataset: Dataset) -> _Prepared:
    """Builds the network and sends a few samples through it, so that errors show now."""
    digest = sources.fingerprint(dataset)
    m = len(dataset.train_labels)
    if m < 2:
        raise InputError(f"data must have at least 2 training samples, got {m}")
    example = plain(dataset.train_inputs[:2], recipe.augmentation)
    if example.ndim == 4:
        warn_of_lost_borders((dataset.train_inputs.shape[2], dataset.train_inputs.shape[3]), recipe.augmentation)
    device = processes.chosen_device(recipe.device)
    model, objective = build(recipe, tuple(example.shape[1:]), dataset.num_classes)
    try:
        with torch.no_grad():
            model.eval()(example)
    except RuntimeError as error:
        shape = tuple(example.shape[1:])
        raise InputError(f"network {recipe.network} cannot take inputs of shape {shape}: {error}") from error
    if world_size() > 1:
        if recipe.sync_batchnorm:
            model = networks.synchronise_batchnorm(model)
        networks.draw_dropout_for_all(model)
        _check_shares(recipe, m, 2 if networks.has_batchnorm(model) else 1)
        if device.type == "cuda":
            torch.cuda.set_device(device)
    networks.channels_last(model)
    objective.criterion.to(device)
    return _Prepared(recipe, dataset.to(device), digest, device, model.train().to(device), objective)


def _check_shares(recipe: Recipe, m: int, least: int) -> None:
    """Raises InputError if a process would get fewer than `least` samples of some batch."""
    smallest = m // batch_count(m, recipe.batch_size)
    most = smallest // least
    if world_size() > most:
        why = ", of which BatchNorm needs 2 a process (or sync_batchnorm)" if least == 2 else ""
        raise InputError(
            f"the processes must be at most {most} for batches of {smallest} samples{why}, got {world_size()}: start "
            f"fewer, or raise batch_size from {recipe.batch_size}"
        )


def build(recipe: Recipe, input_shape: tuple[int, ...], num_classes: int) -> tuple[nn.Module, Objective]:
    """Returns the network and the objective of a recipe, initialised from its seed.

    Args:
        recipe: the recipe.
        input_shape: of one input of the network, after augmentation.
        num_classes: k.

    Raises:
        InputError: the network does not accept such inputs (a ValueError).
    """
    torch.manual_seed(recipe.seed)
    model = networks.build(recipe.network, input_shape, recipe.feature_dim)
    return model, objectives.build(recipe, num_classes)


def _check_state(run: RunFolder, state: dict[str, Any], prepared: _Prepared) -> None:
    """Raises InputError unless a checkpoint belongs to this recipe and this data."""
    if state["epoch"] > prepared.recipe.epochs:
        got = prepared.recipe.epochs
        raise InputError(f"epochs must be at least the {state['epoch']} that {run.path} has, got {got}")
    run.check_recipe_of(state, prepared.recipe)
    classes = state["trained"].get("config", {}).get("classes")
    if state["data"] != prepared.fingerprint or classes != list(prepared.dataset.class_names):
        raise InputError(
            f"{run.checkpoint_file} was trained on data that differs from what {prepared.recipe.data.source} holds "
            "now: put it back as it was, or start a new run"
        )


@dataclass(frozen=True)
class EpochBatches:
    """One pass over a training set, in an order and with augmentation that depend only on the seed and epoch number.

    So there is no state to save between epochs. Several processes split each batch, as `tensor_split` does, and crops
    and flips are the same as with one.

    Attributes:
        dataset: on the device to train on.
        recipe: its seed, batch size and augmentation.
        epoch: the epoch's number.
        augment: whether crops and flips are drawn; otherwise images are cropped in the middle.
        rank: the process whose shares these are.
        world: how many processes share each batch.
    """

    dataset: Dataset
    recipe: Recipe
    epoch: int
    augment: bool = True
    rank: int = 0
    world: int = 1

    def __len__(self) -> int:
        return batch_count(len(self.dataset.train_labels), self.recipe.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        device = self.dataset.train_labels.device
        generator = epoch_generator(self.recipe.seed, self.epoch, device)
        order = torch.randperm(len(self.dataset.train_labels), generator=generator, device=device)
        for rows in order.tensor_split(len(self)):
            share = processes.share(len(rows), self.rank, self.world)
            images, settings = self.dataset.train_inputs[rows], self.recipe.augmentation
            inputs = augmented(images, settings, generator, share) if self.augment else plain(images[share], settings)
            yield inputs, self.dataset.train_labels[rows[share]]


def _optimizer(recipe: Recipe, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    decay = recipe.weight_decay
    if recipe.optimizer == "adamw":
        return torch.optim.AdamW(parameters, recipe.lr, weight_decay=decay)
    return torch.optim.SGD(parameters, recipe.lr, momentum=recipe.momentum, weight_decay=decay)


class _Run:
    """What one run keeps between epochs: its optimizer, the latest measures, what is on disk."""

    def __init__(self, prepared: _Prepared, folder: RunFolder, state: dict[str, Any] | None = None) -> None:
        recipe, model, criterion = prepared.recipe, prepared.model, prepared.objective.criterion
        self.prepared, self.folder = prepared, folder
        self.done = 0 if state is None else state["epoch"]
        self.measured: tuple[Features, Measures, Tensor] | None = None
        # What prediction needs without the training data.
        self.trained: dict[str, Any] = {"config": trained.config(recipe, prepared.dataset)}
        self.trained |= {"bases": None, "measured_at": 0}
        self.seconds = 0.0
        self.saved_at = time.monotonic()
        self.optimizer = _optimizer(recipe, [*model.parameters(), *criterion.parameters()])
        torch.manual_seed(recipe.seed)
        if state is not None:
            self.seconds = state["seconds"]
            self.trained |= {name: state["trained"].get(name) for name in ("bases", "measured_at")}
            with folder.fits("the network and optimizer that its recipe builds"):
                model.load_state_dict(state["model"])
                criterion.load_state_dict(state["criterion"])
                self.optimizer.load_state_dict(state["optimizer"])
                torch.set_rng_state(state["rng"])
            if prepared.device.type == "cuda" and "cuda_rng" in state:
                torch.cuda.set_rng_state(state["cuda_rng"], prepared.device)

    def train(self, console: Console | None, on_epoch: OnEpoch | None) -> None:
        """Trains to the recipe's end, or until interrupted, writing and showing the results of each epoch."""
        recipe, folder = self.prepared.recipe, self.folder
        title = f"{recipe.name} {recipe.objective} seed {recipe.seed}"
        if not processes.is_first():
            console = Console(quiet=True, force_terminal=False)
        with (
            EpochProgress(title, recipe.epochs, self.done, console) as progress,
            _Interrupt(folder, self.done, console) as interrupt,
        ):

            def note(line: dict[str, Any]) -> tuple[dict[str, Any], bool]:
                """Writes and shows the results of an epoch; returns them, and whether to stop."""
                with _writing(folder):
                    stop = self.record(line, interrupt)
                with _writing(folder, "the console"):
                    progress.update(line["epoch"], _figures(line))
                if on_epoch is not None:
                    on_epoch(line)
                return line, stop

            def after(line: dict[str, Any]) -> None:
                epoch = interrupt.done = line["epoch"]
                if epoch % recipe.evaluate_every == 0 or epoch == recipe.epochs:
                    try:
                        line |= asdict(self.measure(epoch))
                    except (InputError, NumericalError) as error:
                        raise _diverged(self.prepared.objective, epoch, error) from error
                    if epoch == recipe.epochs:
                        _warn_at_the_end(line["train_reduction"], self.prepared)
                interrupt.asked = processes.any_of(interrupt.asked)
                noted, stop = processes.first(lambda: note(line))
                line |= noted
                if stop and epoch < recipe.epochs:
                    raise Interrupted(folder.path)

            try:
                self._fit(after)
                self.finish()
                if processes.any_of(interrupt.asked):
                    raise Interrupted(folder.path)
            except BaseException as error:
                if not processes.is_loss(error):
                    raise
                if interrupt.asked:  # the first process stopped at once
                    raise Interrupted(folder.path) from None
                raise LostProcessError(folder.path) from error

    def _fit(self, after: OnEpoch) -> None:
        """Runs `fit` with the recipe's settings, starting after the epochs already done."""
        prepared, folder, done, recipe = self.prepared, self.folder, self.done, self.prepared.recipe

        def history() -> list[dict[str, Any]]:
            with _writing(folder):
                folder.truncate_metrics(done)
            lines = folder.metrics()
            if len(lines) < done:
                warnings.warn(
                    f"{folder.metrics_file} lacks {done - len(lines)} of {done} epochs, and curves will lack them too",
                    stacklevel=2,
                )
            return lines

        def batches(epoch: int, *, augment: bool) -> EpochBatches:
            return EpochBatches(prepared.dataset, recipe, epoch, augment, process_rank(), world_size())

        fit(
            networks.distributed(prepared.model),
            prepared.objective,
            lambda epoch: batches(epoch, augment=True),
            self.optimizer,
            recipe.epochs,
            latch_on=lambda epoch: batches(epoch, augment=False),
            lr_at=recipe.lr_at,
            precision=recipe.precision,
            on_epoch=after,
            done=done,
            history=processes.first(history),
        )

    def measure(self, epoch: int) -> Measures:
        """Measures the network on the whole data set, and keeps what the summary and a checkpoint need."""
        recipe, dataset, objective = self.prepared.recipe, self.prepared.dataset, self.prepared.objective
        networks.share_statistics(self.prepared.model)
        features = extract(self.prepared.model, dataset, recipe.augmentation, recipe.batch_size, recipe.precision)

        def judge() -> Measures:
            bases = training_bases(features, dataset)
            measures = measure(features, dataset, bases, recipe.eps_sq, objective.predict)
            self.measured = (features, measures, bases)
            self.trained |= {"bases": bases.cpu(), "measured_at": epoch}
            return measures

        return processes.first(judge)

    def save(self, epoch: int) -> None:
        """Writes a checkpoint: the state to continue from, and what prediction needs without the training data."""
        state = {
            "epoch": epoch,
            "seconds": self.seconds,
            "model": self.prepared.model.state_dict(),
            "criterion": self.prepared.objective.criterion.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "rng": torch.get_rng_state(),
            "recipe": recipes.to_json(recipes.comparable(self.prepared.recipe)),
            "data": self.prepared.fingerprint,
            "trained": self.trained,
        }
        if self.prepared.device.type == "cuda":
            state["cuda_rng"] = torch.cuda.get_rng_state(self.prepared.device)
        self.folder.save_checkpoint(state)

    def record(self, line: dict[str, Any], interrupt: _Interrupt) -> bool:
        """Writes the results of an epoch, and a checkpoint if one is due; returns whether to stop after it."""
        recipe, epoch = self.prepared.recipe, line["epoch"]
        self.seconds += line["seconds"]
        self.folder.add_metrics(line)
        due = time.monotonic() - self.saved_at >= recipe.checkpoint_seconds
        if epoch == recipe.epochs or interrupt.asked or due:
            self.save(epoch)
            interrupt.saved, self.saved_at = epoch, time.monotonic()
        return interrupt.asked and interrupt.saved == epoch  # not if asked too late for the above

    def finish(self) -> None:
        """Writes what the figures need and, last, the summary, whose presence means that the run is complete."""
        if processes.first(lambda: self.measured is None):  # the run was interrupted after its last epoch
            self.measure(self.prepared.recipe.epochs)
        processes.first(self._write_results)

    def _write_results(self) -> None:
        assert self.measured is not None
        (features, measures, bases), recipe = self.measured, self.prepared.recipe
        objective = self.prepared.objective
        dataset = self.prepared.dataset
        arrays = for_figures(features, dataset, bases)
        ranks = effective_rank(torch.from_numpy(arrays["spectra"]))
        first = nearest_subspace(features.test, bases[..., :1])  # bases start with the strongest direction
        summary = {
            "recipe": recipe.name,
            "objective": recipe.objective,
            "seed": recipe.seed,
            "epochs": recipe.epochs,
            **objective.describe(),
            **asdict(measures),
            "test_accuracy_one_component": accuracy(first, dataset.test_labels),
            "class_rank": float(ranks.nanmedian()),
            "evaluated_on": recipe.evaluated_on,
            "seconds_per_epoch": self.seconds / recipe.epochs,
            "device": device_name(self.prepared.device),
            "processes": world_size(),
            "threads": torch.get_num_threads(),
            "precision": recipe.precision,
            "torch": torch.__version__,
            "python": platform.python_version(),
        }
        with _writing(self.folder):
            self.folder.save_features(arrays | objective.arrays())
            self.folder.save_summary(summary)


def _warn_at_the_end(reduction: float, prepared: _Prepared) -> None:
    """Warns of a network that has learnt almost nothing, and of subspaces that do not suit classes of unequal size."""
    dataset, recipe = prepared.dataset, prepared.recipe
    sizes = dataset.train_labels.bincount(minlength=dataset.num_classes)
    usual = default_components(recipe.feature_dim, dataset.num_classes)
    cure = "vmcr2 evaluate shows the accuracy of subspaces of fewer dimensions"
    warn_of_small_classes(sizes, usual, cure, stacklevel=2)
    lines = reduction_of_lines(sizes, recipe.feature_dim, recipe.eps_sq)
    if recipe.objective != "ce" and reduction <= _LITTLE * lines:
        warnings.warn(
            f"the final ΔR of the training set is {reduction:.2g}, where classes on orthogonal lines would have "
            f"{lines:.3g}: the network has learnt almost nothing. Train for more epochs, or at a lower learning rate, "
            "and see that inputs differ and are not of extreme scale",
            stacklevel=2,
        )


def _figures(line: dict[str, Any]) -> dict[str, str]:
    """Returns what the progress bar shows for an epoch: ΔR of the training set if measured, and of the last batch."""
    shown = {}
    if "train_reduction" in line:
        shown["ΔR"] = f"{line['train_reduction']:.2f}"
        shown["accuracy"] = f"{line['test_accuracy']:.4f}"
    return shown | {"batch ΔR": f"{line['batch_expansion'] - line['batch_compression']:.2f}"}
