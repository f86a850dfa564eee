"""The one training loop, for V-MCR² (Algorithms 1 and 2), exact MCR² and cross-entropy on the same network and data."""

from __future__ import annotations

import math
import platform
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from torch import Tensor, nn

from vmcr2.errors import InputError, NumericalError
from vmcr2.lab import networks as featurizers
from vmcr2.lab import recipes
from vmcr2.lab import sources as data
from vmcr2.lab.evaluate import Features, Measures, extract, for_figures, measure
from vmcr2.lab.networks import CrossEntropyHead
from vmcr2.lab.recipes import Recipe
from vmcr2.lab.report import EpochProgress, device_name
from vmcr2.lab.run import RunFolder
from vmcr2.lab.sources import Dataset
from vmcr2.losses import MCR2Loss, VMCR2Loss, balanced_mu
from vmcr2.rates import rate_reduction

if TYPE_CHECKING:
    from lightning_fabric import Fabric

_CHECKED_ATOMS = 5000  # of more the check of block structure would cost more than the epoch

Criterion = VMCR2Loss | MCR2Loss | CrossEntropyHead


def start(recipe: Recipe, out: Path, data_root: Path | None = None, console: Console | None = None) -> RunFolder:
    """Trains a recipe into a new run folder.

    Args:
        recipe: what to do.
        out: the run folder, new or empty.
        data_root: where named data sets lie.
        console: where progress is shown.

    Returns:
        The run folder, complete.

    Raises:
        InputError: the data or the folder is not as it must be; nothing was written (a ValueError).
        NumericalError: training diverged; the checkpoints before are there.
    """
    recipe = replace(recipe, data=data.resolved(recipe.data))
    prepared = _prepare(recipe, data_root)
    run = RunFolder.create(out, recipe)
    with run.held():
        _train(prepared, run, console)
    return run


def resume(
    run: RunFolder, recipe: Recipe | None = None, data_root: Path | None = None, console: Console | None = None
) -> RunFolder:
    """Goes on with a run from its last checkpoint, or from its beginning where it has none; a complete run is left.

    On one machine's CPU the result is, bit for bit, that of a run that was never broken off.

    Args:
        run: the run folder.
        recipe: must be the run's own but for `epochs`, which may be more than the run has; None takes the run's own.
        data_root: where named data sets lie.
        console: where progress is shown.

    Raises:
        InputError: the folder belongs to another recipe, or its checkpoint is damaged (a ValueError).
        NumericalError: training diverged; the checkpoints before are there.
    """
    stored = run.recipe()
    recipe = stored if recipe is None else replace(recipe, data=data.resolved(recipe.data))
    differing = recipes.differences(stored, replace(recipe, epochs=stored.epochs))
    if differing:
        raise InputError(
            f"{run.path} belongs to another recipe (there, here): {'; '.join(differing)}. "
            "Take another --out, or leave these flags away"
        )
    if run.is_complete() and recipe.epochs <= stored.epochs:
        return run
    refuse_epochs(run, stored, recipe)
    prepared = _prepare(recipe, data_root)
    with run.held():
        state = run.load_checkpoint()
        if state is not None:
            _check_state(run, state, prepared)
        if recipe != stored:
            run.summary_file.unlink(missing_ok=True)
            run.write_recipe(recipe)
        _train(prepared, run, console, state)
    return run


def refuse_epochs(run: RunFolder, stored: Recipe, recipe: Recipe) -> None:
    """Raises InputError where a run cannot be given other epochs: fewer before it is done, or more with `lr_drops`."""
    if recipe.epochs < stored.epochs and not run.is_complete():
        raise InputError(f"epochs must be at least the {stored.epochs} that {run.path} is to have, got {recipe.epochs}")
    if recipe.epochs > stored.epochs and recipe.lr_drops:
        raise InputError(
            f"epochs must stay {stored.epochs} for {run.path}, got {recipe.epochs}: its lr_drops are shares of the "
            "epochs, so a longer run is another one from the first drop on; start it in a folder of its own"
        )


@dataclass(frozen=True)
class _Prepared:
    """All that a run needs, made and tried out before anything is written."""

    recipe: Recipe
    dataset: Dataset
    fingerprint: str
    fabric: Fabric
    model: nn.Module
    criterion: Criterion


def chosen_device(name: str) -> str:
    """Returns cuda or cpu for auto, cuda or cpu; auto passes over accelerators without float64.

    Raises:
        InputError: cuda is asked for and there is none (a ValueError).
    """
    there = torch.cuda.is_available()
    if name == "cuda" and not there:
        raise InputError("device must be cpu or auto here, got cuda: torch sees no CUDA device")
    return "cuda" if name == "cuda" or (name == "auto" and there) else "cpu"


def _prepare(recipe: Recipe, data_root: Path | None) -> _Prepared:
    """Loads the data and builds the network, and sends a few samples through it, so that what is wrong shows now."""
    from lightning_fabric import Fabric

    dataset = _load(recipe, data_root)
    digest = data.fingerprint(dataset)
    fabric = Fabric(accelerator=chosen_device(recipe.device), devices=1, precision=recipe.precision)
    model, criterion = build_model(recipe, dataset)
    try:
        with torch.no_grad():
            model.eval()(data.plain(dataset.train_inputs[:2], recipe.augmentation))
    except RuntimeError as error:
        shape = tuple(dataset.train_inputs.shape[1:])
        raise InputError(f"network {recipe.network} cannot take inputs of shape {shape}: {error}") from error
    return _Prepared(recipe, dataset.to(fabric.device), digest, fabric, model.train(), criterion)


def _check_state(run: RunFolder, state: Any, prepared: _Prepared) -> None:
    """Raises InputError unless a checkpoint has what it must, of this recipe and this data."""
    wanted = {"epoch", "seconds", "model", "criterion", "optimizer", "rng", "recipe", "data"}
    if not isinstance(state, dict) or not wanted <= state.keys():
        raise InputError(f"{run.checkpoint_file} is no checkpoint of this program: it must hold {sorted(wanted)}")
    if state["epoch"] > prepared.recipe.epochs:
        got = prepared.recipe.epochs
        raise InputError(f"epochs must be at least the {state['epoch']} that {run.path} has, got {got}")
    if state["recipe"] != _identity(prepared.recipe):
        raise InputError(f"{run.checkpoint_file} belongs to another recipe than {run.recipe_file}")
    if state["data"] != prepared.fingerprint:
        raise InputError(f"{run.checkpoint_file} was trained on other data than is found now")


def _identity(recipe: Recipe) -> str:
    """Returns the recipe as text, but for the number of epochs, which may grow."""
    return recipes.to_json(replace(recipe, epochs=1))


def _load(recipe: Recipe, data_root: Path | None) -> Dataset:
    """Returns the recipe's data, after everything that can be wrong with the two together was checked."""
    dataset = data.load(recipe.data, data_root)
    m = len(dataset.train_labels)
    if m < 2:
        raise InputError(f"data must have at least 2 training samples, got {m}")
    data.plain(dataset.train_inputs[:1], recipe.augmentation)
    return dataset


def epoch_generator(recipe: Recipe, epoch: int, device: torch.device) -> torch.Generator:
    """Returns the source of data order and augmentation of one epoch: no state to save between epochs."""
    return torch.Generator(device).manual_seed(recipe.seed * 1_000_003 + epoch)


def batches(dataset: Dataset, recipe: Recipe, generator: torch.Generator) -> Iterator[Tensor]:
    """Yields the indices of one epoch's batches, as equal as can be and of two samples at least, as BatchNorm needs."""
    m = len(dataset.train_labels)
    order = torch.randperm(m, generator=generator, device=generator.device)
    yield from order.tensor_split(_num_batches(m, recipe.batch_size))


def _num_batches(m: int, batch_size: int) -> int:
    return min(-(-m // batch_size), m // 2)


def build_model(recipe: Recipe, dataset: Dataset) -> tuple[nn.Module, Criterion]:
    """Returns the featurizer and the criterion of a recipe, initialised from its seed."""
    torch.manual_seed(recipe.seed)
    example = data.plain(dataset.train_inputs[:1], recipe.augmentation)
    model = featurizers.build(recipe.network, tuple(example.shape[1:]), recipe.feature_dim)
    k, d = dataset.num_classes, recipe.feature_dim
    match recipe.objective:
        case "ce":
            return model, CrossEntropyHead(d, k)
        case "mcr2":
            return model, MCR2Loss(k, eps_sq=recipe.eps_sq)
        case "vmcr2":
            chosen = recipe.vmcr2
            m = len(dataset.train_labels)
            batch = math.ceil(m / _num_batches(m, recipe.batch_size))
            return model, VMCR2Loss(
                k,
                d,
                atoms_per_class=chosen.atoms_per_class or max(1, d // k),
                mu=chosen.mu or balanced_mu(d, batch, eps_sq=recipe.eps_sq, balance=chosen.balance),
                eps_sq=recipe.eps_sq,
                step_atoms=chosen.step_atoms,
                step_codes=chosen.step_codes,
                energy=chosen.energy,
                structure=chosen.structure,
            )


def _train(prepared: _Prepared, run: RunFolder, console: Console | None, state: dict[str, Any] | None = None) -> None:
    recipe, dataset, fabric, criterion = prepared.recipe, prepared.dataset, prepared.fabric, prepared.criterion
    torch.manual_seed(recipe.seed)
    parameters = [*prepared.model.parameters(), *criterion.parameters()]
    optimizer = torch.optim.SGD(parameters, recipe.lr, momentum=recipe.momentum, weight_decay=recipe.weight_decay)
    criterion.to(fabric.device)
    if recipe.channels_last:
        for parameter in prepared.model.parameters():
            if parameter.ndim == 4:  # the layout of the weights is what convolutions go by
                parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
    model, optimizer = fabric.setup(prepared.model, optimizer)
    done, seconds = 0, 0.0
    if state is not None:
        done, seconds = state["epoch"], state["seconds"]
        model.load_state_dict(state["model"])
        criterion.load_state_dict(state["criterion"])
        optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["rng"].cpu())
        if fabric.device.type == "cuda" and "cuda_rng" in state:
            torch.cuda.set_rng_state(state["cuda_rng"].cpu(), fabric.device)
    run.truncate_metrics(done)
    history = run.metrics()
    saved = time.monotonic()
    title = f"{recipe.name} {recipe.objective} seed {recipe.seed}"
    features = measures = None
    with EpochProgress(title, recipe.epochs, done, console) as progress:
        for epoch in range(done + 1, recipe.epochs + 1):
            began = time.perf_counter()
            for group in optimizer.param_groups:
                group["lr"] = recipe.lr_at(epoch)
            try:
                line = {"epoch": epoch} | _train_epoch(recipe, dataset, fabric, model, criterion, optimizer, epoch)
                line["seconds"] = time.perf_counter() - began
                seconds += line["seconds"]
                if epoch % recipe.evaluate_every == 0 or epoch == recipe.epochs:
                    features = extract(model, dataset, recipe.augmentation, recipe.batch_size)
                    measures = measure(features, dataset, recipe.eps_sq, _head(criterion))
                    line |= asdict(measures)
            except (InputError, NumericalError) as error:
                raise _diverged(recipe, epoch, str(error)) from error
            run.add_metrics(line)
            history.append(line)
            if isinstance(criterion, VMCR2Loss) and recipe.vmcr2.stop_on_collapse:
                _check_progress(recipe, dataset, criterion, history)
            if epoch == recipe.epochs or time.monotonic() - saved >= recipe.checkpoint_seconds:
                run.save_checkpoint(_state(epoch, seconds, prepared, model, optimizer))
                saved = time.monotonic()
            progress.update(epoch, _figures(line))
    if features is None or measures is None:  # the run was broken off after its last epoch
        features = extract(model, dataset, recipe.augmentation, recipe.batch_size)
        measures = measure(features, dataset, recipe.eps_sq, _head(criterion))
    _finish(recipe, dataset, run, features, measures, criterion, seconds, fabric)


def _state(epoch: int, seconds: float, prepared: _Prepared, model: nn.Module, optimizer: Any) -> dict[str, Any]:
    state = {
        "epoch": epoch,
        "seconds": seconds,
        "model": model.state_dict(),
        "criterion": prepared.criterion.state_dict(),
        "optimizer": optimizer.state_dict(),
        "rng": torch.get_rng_state(),
        "recipe": _identity(prepared.recipe),
        "data": prepared.fingerprint,
    }
    if prepared.fabric.device.type == "cuda":
        state["cuda_rng"] = torch.cuda.get_rng_state(prepared.fabric.device)
    return state


def _train_epoch(
    recipe: Recipe, dataset: Dataset, fabric: Fabric, model: nn.Module, criterion: Criterion, optimizer: Any, epoch: int
) -> dict[str, float]:
    """Runs one epoch, latching first where it is due, and returns the figures of its batches."""
    generator = epoch_generator(recipe, epoch, fabric.device)
    if isinstance(criterion, VMCR2Loss) and (epoch - 1) % recipe.vmcr2.latch_every == 0:
        criterion.latch_from(
            model,
            (
                (data.plain(dataset.train_inputs[rows], recipe.augmentation), dataset.train_labels[rows])
                for rows in batches(dataset, recipe, generator)
            ),
        )
    model.train()
    criterion.train()
    total = torch.zeros((), device=fabric.device, dtype=torch.float64)
    steps, features, labels = 0, None, None
    for rows in batches(dataset, recipe, generator):
        labels = dataset.train_labels[rows]
        features = model(data.augmented(dataset.train_inputs[rows], recipe.augmentation, generator))
        loss = criterion(features, labels)
        optimizer.zero_grad()
        fabric.backward(loss)
        if isinstance(criterion, VMCR2Loss) and recipe.vmcr2.gradient_clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), recipe.vmcr2.gradient_clip)
        optimizer.step()
        total += loss.detach()
        steps += 1
    if isinstance(criterion, VMCR2Loss):
        criterion.check()
    mean = float(total / steps)
    if not math.isfinite(mean):
        raise NumericalError(f"the mean loss is {mean}")
    # The last step may have spoilt the weights without a loss to show it; such a state must not be saved.
    if not torch.stack([parameter.isfinite().all() for parameter in model.parameters()]).all():
        raise NumericalError("the network's weights are no longer finite")
    assert features is not None
    assert labels is not None
    line = {"loss": mean}
    rates = rate_reduction(features.detach(), labels, num_classes=dataset.num_classes, eps_sq=recipe.eps_sq)
    line |= {"batch_expansion": float(rates.expansion), "batch_compression": float(rates.compression)}
    if isinstance(criterion, VMCR2Loss):
        variational = criterion.rates(features.detach(), labels)
        line |= {
            "residual": float(variational.residual),
            "variational_expansion": float(variational.expansion),
            "variational_compression": float(variational.compression),
        }
        if criterion.structure == "block" and criterion.dictionary.atoms.shape[1] <= _CHECKED_ATOMS:
            line["off_block"] = criterion.off_block(features.detach(), labels)
    return line


def _diverged(recipe: Recipe, epoch: int, why: str) -> NumericalError:
    cure = f"Lower {recipe.objective}.lr"
    if recipe.objective == "vmcr2":
        cure += " or vmcr2.mu" + ("" if recipe.vmcr2.gradient_clip else ", or set vmcr2.gradient_clip to 0.1")
    return NumericalError(f"training diverged in epoch {epoch}: {why}. {cure} (lr is {recipe.lr:g}).")


def _check_progress(recipe: Recipe, dataset: Dataset, criterion: VMCR2Loss, history: list[dict[str, Any]]) -> None:
    """Raises NumericalError once V-MCR² has collapsed: ΔR of the batches fell to a fifth, or of the set to a tenth.

    It happens where the penalty outweighs the rates, µ m ε²/d well above 1: the dictionary then follows the features
    instead of leading them. A healthy run may start with a dip, but not so deep nor so long.
    """
    if len(history) < 4:
        return
    reductions = [line["batch_expansion"] - line["batch_compression"] for line in history]
    # Dropout makes noise that passes for ΔR in a batch; the whole training set, where it was measured, has none.
    measured = [line["train_reduction"] for line in history if "train_reduction" in line]
    flat = len(measured) > 5 and max(measured[-5:]) < 0.1 * measured[0]
    if max(reductions[-3:]) >= 0.2 * reductions[0] and not flat:
        return
    m = min(recipe.batch_size, len(dataset.train_labels))
    balance = criterion.mu * m * recipe.eps_sq / recipe.feature_dim
    why = (
        f"the features have collapsed: ΔR of the {'training set' if flat else 'batch'} fell from "
        f"{(measured if flat else reductions)[0]:.3g} to {(measured if flat else reductions)[-1]:.3g} for good, "
        f"the residual is {history[-1]['residual']:.3g}. mu * batch_size * eps_sq / feature_dim is {balance:.2g}; "
        f"above about 1 (vmcr2.mu {criterion.mu / balance:.2g}) the dictionary cannot lead the features"
    )
    raise _diverged(recipe, history[-1]["epoch"], why)


def _head(criterion: Criterion) -> CrossEntropyHead | None:
    return criterion if isinstance(criterion, CrossEntropyHead) else None


def _figures(line: dict[str, Any]) -> dict[str, str]:
    """Returns what the progress bar shows of an epoch: ΔR of the training set where measured, else of the batch."""
    shown = {}
    if "train_reduction" in line:
        shown["ΔR"] = f"{line['train_reduction']:.2f}"
        shown["accuracy"] = f"{line['test_accuracy']:.4f}"
    if line.get("off_block"):
        shown["off-block"] = f"{line['off_block']:.2%}"
    if "residual" in line:
        shown["residual"] = f"{line['residual']:.3g}"
    else:
        shown["loss"] = f"{line['loss']:.3g}"
    return shown


def _finish(
    recipe: Recipe,
    dataset: Dataset,
    run: RunFolder,
    features: Features,
    measures: Measures,
    criterion: Criterion,
    seconds: float,
    fabric: Fabric,
) -> None:
    """Writes what the figures need and, last, the summary, whose presence says that the run is complete."""
    arrays = for_figures(features, dataset)
    if isinstance(criterion, VMCR2Loss):
        arrays["codes"] = criterion.dictionary.codes.float().cpu().numpy()
    run.save_features(arrays)
    device = fabric.device
    run.save_summary(
        {
            "recipe": recipe.name,
            "objective": recipe.objective,
            "seed": recipe.seed,
            "epochs": recipe.epochs,
            "mu": criterion.mu if isinstance(criterion, VMCR2Loss) else None,
            "atoms_per_class": criterion.atoms_per_class if isinstance(criterion, VMCR2Loss) else None,
            **asdict(measures),
            "seconds_per_epoch": seconds / recipe.epochs,
            "device": device_name(device),
            "threads": torch.get_num_threads(),
            "precision": recipe.precision,
            "torch": torch.__version__,
            "python": platform.python_version(),
        }
    )


def load_trained(run: RunFolder, data_root: Path | None = None) -> tuple[Recipe, Dataset, nn.Module, Criterion]:
    """Returns the recipe, data, featurizer and criterion of a run as its last checkpoint has them, on the CPU.

    Raises:
        InputError: the run has no checkpoint, or a damaged one; the data is missing (a ValueError).
    """
    recipe = run.recipe()
    state = run.load_checkpoint()
    if state is None:
        raise InputError(f"{run.path} has no checkpoint yet; go on with --resume")
    dataset = _load(recipe, data_root)
    model, criterion = build_model(recipe, dataset)
    model.load_state_dict(state["model"])
    criterion.load_state_dict(state["criterion"])
    return recipe, dataset, model.eval(), criterion.eval()
