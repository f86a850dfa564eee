"""Recipes: everything that determines what a run computes, as frozen dataclasses that check themselves.

`RECIPES` holds ours by name, `vmcr2.lab.paper` the paper's.
A recipe is written to recipe.json in its run folder and read back strictly.
"""

from __future__ import annotations

import json
import math
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from vmcr2.checks import check_count, check_fields, check_number, did_you_mean, iterator_of
from vmcr2.dictionary import Structure, default_structure
from vmcr2.errors import InputError
from vmcr2.lab import sources
from vmcr2.lab.augmentation import Augmentation
from vmcr2.lab.networks import check_network
from vmcr2.lab.sources import DataSettings
from vmcr2.linalg import check_eps_sq
from vmcr2.losses import SETTING_CHECKS, Reduction, Step

ObjectiveName = Literal["vmcr2", "mcr2", "ce"]
OBJECTIVES: dict[ObjectiveName, str] = {"vmcr2": "V-MCR²", "mcr2": "MCR²", "ce": "cross-entropy"}
_LARGEST_ADAMW_LR = 0.05  # each weight moves by about this much per step; the settings' defaults are for SGD


@dataclass(frozen=True)
class VMCR2Settings:
    """Settings of the V-MCR² objective.

    Attributes:
        lr: learning rate of the network.
        reduction: mean: ½ Σ γ_j ‖C_j − B_j‖², for which one lr suits all sizes; sum: the paper's (µ/2m) M, which is µ m
            times larger.
        mu: penalty weight µ > 0; None means the one that `balance` gives.
        balance: ρ = µ m ε² / d at batch size m, the residual's weight against the rates in the dictionary's step.
            Below 1 the dictionary leads the features; above, they may collapse. Used if mu is None.
        atoms_per_class: s = q/k, at most the feature dimension; None means ⌊d/k⌋, at least 1.
        structure: shared: every class may use every atom; block: its own s only.
        energy: what every class's codes sum to after each step; None leaves the sum free.
        pull: exponent in (0, 1]; a smaller one pulls distant samples harder: 1 resists wrong labels; 0.3 learns natural
            images faster.
        expand: λ ≥ 0, the weight of the features' own R beside the residual: 0.2 to 0.6, with `pull` 0.3, for more
            variety within a class.
        expand_until: `expand` is used only in this share of the epochs, in (0, 1], from the start; 1 means all. In a
            long run 0.5 (100 classes) or 0.75 (200) keeps most of the variety and is more accurate.
        step: how the dictionary moves: ascent needs no step size; paper uses the paper's bounds, the codes at the moved
            atoms; simultaneous takes both steps at the old point.
        step_atoms: ν_Γ, in units of the inverse Lipschitz bound. Not used by ascent.
        step_codes: ν_A, likewise.
        latch_every: epochs between latchings; the first is before the first epoch.
        gradient_clip: the largest norm a step's gradient may have, None for any. 0.02 keeps networks without BatchNorm,
            whose first gradients are large, from collapsing.
        stop_on_collapse: stop, with a reason, once ΔR of the batches has been below a fifth of its value after the
            first epoch for ten epochs, or that of the training set below a tenth of its first value in five
            measurements, but not before the eleventh epoch. Without this, a later latching may slowly restore ΔR.
    """

    lr: float = 0.5
    reduction: Reduction = "mean"
    mu: float | None = None
    balance: float = 0.05
    atoms_per_class: int | None = None
    structure: Structure = "shared"
    energy: float | None = None
    pull: float = 1.0
    expand: float = 0.0
    expand_until: float = 1.0
    step: Step = "ascent"
    step_atoms: float = 5.0
    step_codes: float = 5.0
    latch_every: int = 50
    gradient_clip: float | None = None
    stop_on_collapse: bool = True

    def __post_init__(self) -> None:
        check_fields(self, "vmcr2.")
        for name, value in vars(self).items():
            if name in SETTING_CHECKS:
                SETTING_CHECKS[name](f"vmcr2.{name}", value)
        check_number("vmcr2.lr", self.lr)
        if self.gradient_clip is not None:
            check_number("vmcr2.gradient_clip", self.gradient_clip)
        if self.atoms_per_class is not None:
            check_count("vmcr2.atoms_per_class", self.atoms_per_class)
        check_number("vmcr2.expand_until", self.expand_until, at_most=1.0)
        check_count("vmcr2.latch_every", self.latch_every)


@dataclass(frozen=True)
class MCR2Settings:
    """Settings of the exact MCR² objective.

    Attributes:
        lr: learning rate of the network.
    """

    lr: float = 1e-2

    def __post_init__(self) -> None:
        check_fields(self, "mcr2.")
        check_number("mcr2.lr", self.lr)


@dataclass(frozen=True)
class CESettings:
    """Settings of cross-entropy.

    Attributes:
        lr: learning rate of the network and its linear head.
        scale: multiplies the features before the head. The paper has 1, at which logits of features of norm 1 grow
            slowly.
    """

    lr: float = 1e-1
    scale: float = 1.0

    def __post_init__(self) -> None:
        check_fields(self, "ce.")
        check_number("ce.lr", self.lr)
        check_number("ce.scale", self.scale)


@dataclass(frozen=True)
class Recipe:
    """One training run, apart from the location of its data and results.

    Attributes:
        name: the recipe's name.
        about: what it is for, in one line.
        objective: vmcr2, mcr2 or ce.
        seed: for the initial weights, the order of the data, augmentation and dropout.
        epochs: passes over the training set. A run may be extended later, unless a schedule sets the learning rate or
            `vmcr2.expand_until` ends the expansion.
        batch_size: the largest number of samples per step, of all processes together; an epoch's batches are as equal
            as possible. With 2, and an odd number of samples, one batch has 3: BatchNorm does not accept a single one.
        network: mlp, conv4, cnn, resnet18, preact_resnet18, or timm:NAME for one from the package timm.
        feature_dim: d, the dimension of the features.
        eps_sq: the squared precision ε² of the coding rates.
        optimizer: sgd, for which the default learning rates below are meant, or adamw, which needs rates near 1e-3.
        momentum: of SGD.
        weight_decay: added to the gradient by SGD, subtracted from the weights themselves by AdamW.
        schedule: constant, or cosine, which falls to 0 over the epochs after the warm-up.
        warmup_epochs: epochs over which the learning rate rises step by step from 0.
        lr_drops: shares of the epochs after each of which a constant learning rate is divided by ten.
        evaluate_every: epochs between evaluations on the whole training and test set.
        checkpoint_seconds: the least time between two checkpoints; the last epoch always writes one.
        device: auto (cuda if there is a GPU, otherwise cpu), cpu or cuda.
        precision: of the network: float32, or bf16 by autocast; rates are at least float32.
        sync_batchnorm: with several processes, BatchNorm uses the statistics of the whole batch, as one process would,
            rather than those of each process's share.
        data: what to train on.
        augmentation: what is done to its images.
        vmcr2: settings of V-MCR².
        mcr2: settings of MCR².
        ce: settings of cross-entropy.
    """

    name: str = "digits"
    about: str = ""
    objective: ObjectiveName = "vmcr2"
    seed: int = 0
    epochs: int = 100
    batch_size: int = 500
    network: str = "mlp"
    feature_dim: int = 128
    eps_sq: float = 0.5
    optimizer: Literal["sgd", "adamw"] = "sgd"
    momentum: float = 0.9
    weight_decay: float = 0.0
    schedule: Literal["constant", "cosine"] = "constant"
    warmup_epochs: int = 0
    lr_drops: tuple[float, ...] = ()
    evaluate_every: int = 1
    checkpoint_seconds: float = 10.0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["float32", "bf16"] = "float32"
    sync_batchnorm: bool = False
    data: DataSettings = field(default_factory=DataSettings)
    augmentation: Augmentation = field(default_factory=Augmentation)
    vmcr2: VMCR2Settings = field(default_factory=VMCR2Settings)
    mcr2: MCR2Settings = field(default_factory=MCR2Settings)
    ce: CESettings = field(default_factory=CESettings)

    def __post_init__(self) -> None:
        check_fields(self)
        check_network(self.network)
        check_count("seed", self.seed, at_least=0, at_most=2**40)
        if not self.name or not self.name.replace("-", "").replace("_", "").replace(".", "").isalnum():
            raise InputError(f"name must be letters, digits, '-', '_' and '.', got {self.name!r}")
        check_count("feature_dim", self.feature_dim, at_least=2)  # on one line, classes cannot be orthogonal
        for name in ("epochs", "evaluate_every"):
            check_count(name, getattr(self, name))
        check_count("batch_size", self.batch_size, at_least=2)
        check_count("warmup_epochs", self.warmup_epochs, at_least=0, at_most=self.epochs, limit="epochs")
        check_eps_sq(self.feature_dim, check_number("eps_sq", self.eps_sq))
        for name in ("momentum", "weight_decay", "checkpoint_seconds"):
            check_number(name, getattr(self, name), positive=False)
        if self.momentum >= 1:
            raise InputError(f"momentum must be below 1, got {self.momentum}")
        shares = iterator_of("lr_drops", self.lr_drops, "a tuple of shares of the epochs")
        object.__setattr__(self, "lr_drops", tuple(check_number("lr_drops", share) for share in shares))
        for share in self.lr_drops:
            if share >= 1:
                raise InputError(f"lr_drops must be shares of the epochs, between 0 and 1, got {share}")
        if self.schedule == "cosine" and self.lr_drops:
            raise InputError("lr_drops must be empty with schedule cosine, which lowers the learning rate itself")
        if self.optimizer == "adamw" and self.lr > _LARGEST_ADAMW_LR:
            raise InputError(
                f"{self.objective}.lr must be at most {_LARGEST_ADAMW_LR:g} with optimizer adamw (begin with 1e-3), "
                f"got {self.lr:g}"
            )
        atoms = self.vmcr2.atoms_per_class
        if self.objective == "vmcr2" and atoms is not None:
            check_count("vmcr2.atoms_per_class", atoms, at_most=self.feature_dim, limit="feature_dim")

    @property
    def lr(self) -> float:
        """The highest learning rate of this recipe's objective."""
        settings: VMCR2Settings | MCR2Settings | CESettings = getattr(self, self.objective)
        return settings.lr

    @property
    def evaluated_on(self) -> Literal["validation", "test"]:
        """Which samples accuracy is measured on: those held out from training, or the data's own test set."""
        return "validation" if self.data.validation else "test"

    @property
    def expand_epochs(self) -> int | None:
        """Epochs in which `vmcr2.expand` is used; None for all, however many there are."""
        if self.vmcr2.expand == 0 or self.vmcr2.expand_until == 1:
            return None
        share = round(self.vmcr2.expand_until * self.epochs, 6)  # as 0.07 * 100 is slightly above 7
        return max(1, math.ceil(share))

    @property
    def tied_to_epochs(self) -> str | None:
        """What in an early epoch depends on how many will follow, in words; None if nothing does."""
        if self.schedule == "cosine" or self.lr_drops:
            return "learning rate"
        return "expansion" if self.objective == "vmcr2" and self.expand_epochs is not None else None

    def lr_at(self, epoch: float) -> float:
        """Returns the learning rate at a moment: 1.5 is halfway through the second epoch."""
        if epoch < self.warmup_epochs:
            return self.lr * epoch / self.warmup_epochs
        if self.schedule == "cosine":
            share = (epoch - self.warmup_epochs) / max(1, self.epochs - self.warmup_epochs)
            return self.lr * (1 + math.cos(math.pi * share)) / 2
        return self.lr / 10 ** sum(epoch > share * self.epochs for share in self.lr_drops)


_OURS = (
    Recipe(
        name="digits",
        about="8×8 handwritten digits from scikit-learn, seconds on a laptop",
        augmentation=Augmentation(padding=1, crop=8),
        ce=CESettings(lr=0.3),
    ),
    Recipe(
        name="omniglot100",
        about="100 handwritten characters, 15 drawers for training and 5 for test",
        epochs=60,
        network="conv4",
        feature_dim=200,
        evaluate_every=5,
        data=DataSettings(source="omniglot", classes=100),
        augmentation=Augmentation(padding=2, crop=28),
        ce=CESettings(lr=2.0),
    ),
)
_RETIRED = ("channels_last",)  # settings in the recipes of earlier versions, without which a run is the same
_LARGEST_SIDE = 64  # `for_data` scales a folder's images down to this
RECIPES: dict[str, Recipe] = {recipe.name: recipe for recipe in _OURS}


def named() -> dict[str, Recipe]:
    """Returns all recipes by name: ours, then the paper's."""
    from vmcr2.lab.paper import PAPER  # it uses what this module defines

    return RECIPES | PAPER


def find(name: str, image_size: int | None = None) -> Recipe:
    """Returns a recipe by name, from a .json file such as a run folder's recipe.json, or one chosen for data.

    Args:
        name: of a recipe, or a path.
        image_size: as for `for_data`; known recipes have their own.

    Raises:
        InputError: there is no such recipe, or the file is not a recipe (a ValueError).
    """
    known = named()
    if name in known:
        if (Path(name) / "train").is_dir():
            warnings.warn(
                f"{name} is the recipe of that name, not the folder here: for your data, write ./{name}", stacklevel=2
            )
        return known[name]
    if name.endswith(".json"):
        return from_json(Path(name))
    if is_data(name):
        return for_data(Path(name), image_size)
    if Path(name).name != name:
        raise InputError(f"recipe or data must be a file or folder that exists, got {name!r}")
    hint = did_you_mean(name, known)
    raise InputError(
        f"recipe must be one of {', '.join(known)}, a .json file, or data: a .npz file or a folder of images by class; "
        f"got {name!r}{hint}"
    )


def is_data(name: str) -> bool:
    """Whether `find` takes the name for data, for which it chooses a recipe."""
    return name not in named() and (name.endswith(".npz") or (not name.endswith(".json") and Path(name).is_dir()))


def for_data(path: Path, image_size: int | None = None) -> Recipe:
    """Returns a recipe to start from, for a .npz file or a folder of images by class (docs/data.md).

    Args:
        path: of the file or folder.
        image_size: the side to which a folder's images are scaled; by default as docs/data.md says.

    Raises:
        InputError: it does not have the right form (a ValueError).
    """
    found = sources.outline(path)
    k, shape = found.num_classes, found.shapes[0]
    about = f"chosen for {path.name}: {k} classes, {found.samples} training samples"
    if found.ignored:
        about += f" (ignored: {found.ignored})"
    if path.is_dir() and (len(found.shapes) > 1 or max(shape[1:]) > _LARGEST_SIDE) and image_size is None:
        image_size = min(min(one[1:]) for one in found.shapes)
        if image_size < _LARGEST_SIDE and len(found.shapes) > 1:
            about += f", the smallest image {found.smallest}"
        image_size = min(_LARGEST_SIDE, image_size)
    if path.is_dir() and image_size is not None:
        shape = (shape[0], image_size, image_size)
    # A crop of the images' own size; if they are not square, it would lose borders.
    crops = len(shape) == 3 and shape[1] == shape[2]
    side = min(shape[1:], default=0)
    network = "mlp" if side < 16 else "conv4" if side <= 48 else "resnet18"
    called = path.resolve().name if path.is_dir() else path.resolve().stem
    name = re.sub(r"[^\w.-]", "-", called, flags=re.ASCII).strip("-")
    if not re.search(r"[^\W_]", name):
        name = "data"
    return Recipe(
        name=name,
        about=about,
        network=network,
        feature_dim=max(128, 2 * k if k <= 500 else k),
        batch_size=min(500, max(2, found.samples // 3)),
        data=DataSettings(source=str(path.resolve()), image_size=image_size, validation=0.0 if found.has_test else 0.2),
        augmentation=Augmentation(crop=side, padding=max(1, side // 14)) if crops else Augmentation(),
        vmcr2=VMCR2Settings(structure=default_structure(k)),
    )


def to_json(recipe: Recipe) -> str:
    """Returns the recipe as JSON with all its fields."""
    import cattrs

    return json.dumps(cattrs.unstructure(recipe), indent=2, ensure_ascii=False) + "\n"


def from_json(file: Path) -> Recipe:
    """Returns the recipe in a file.

    Raises:
        InputError: the file is missing, is not JSON, or has an unknown key or a wrong value (a ValueError).
    """
    try:
        text = file.read_text(encoding="utf-8", errors="surrogateescape")
    except FileNotFoundError as error:
        raise InputError(f"there is no recipe file {file}") from error
    except (OSError, ValueError) as error:
        raise InputError(f"{file} is not a readable recipe: {error}") from error
    return from_text(text, str(file))


def from_text(text: str, name: str) -> Recipe:
    """Returns the recipe in a text, with defaults for settings that the text lacks.

    Args:
        text: what `to_json` returns, or part of it.
        name: of its origin, for error messages.

    Raises:
        InputError: it is not JSON, or has an unknown key or a wrong value (a ValueError).
    """
    try:
        fields = json.loads(text)
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(f"{name} is not a readable recipe: {error}") from error
    return _structured(fields, name)


def _structured(fields: Any, name: str) -> Recipe:
    import cattrs

    def say(error: BaseException, kind: type | None) -> str:
        return str(error) if isinstance(error, InputError) else cattrs.v.format_exception(error, kind)

    def exactly(*kinds: type) -> Callable[[Any, type], Any]:
        def check(value: Any, kind: type) -> Any:
            if type(value) not in kinds:
                raise InputError(f"must be of type {kind.__name__}, got {value!r}")
            return kind(value)

        return check

    if not isinstance(fields, dict):
        raise InputError(f"{name} is not a valid recipe: it must hold an object, got {fields!r}")
    fields = {key: value for key, value in fields.items() if key not in _RETIRED}
    converter = cattrs.Converter(forbid_extra_keys=True)
    for kind, accepted in ((int, (int,)), (float, (int, float)), (bool, (bool,)), (str, (str,))):
        converter.register_structure_hook(kind, exactly(*accepted))
    try:
        return converter.structure(fields, Recipe)
    except cattrs.BaseValidationError as error:
        lines = cattrs.transform_error(error, format_exception=say)
        raise InputError(f"{name} is not a valid recipe: {'; '.join(lines)}") from error


def comparable(recipe: Recipe) -> Recipe:
    """Returns the recipe without the number of epochs, which may grow, and the location of its data."""
    if not recipe.tied_to_epochs:
        recipe = replace(recipe, epochs=max(1, recipe.warmup_epochs))
    return replace(recipe, data=sources.without_place(recipe.data))


def differences(one: Recipe, other: Recipe) -> list[str]:
    """Returns the fields in which two recipes differ, each as "name: this, that"."""
    import cattrs

    def walk(a: Any, b: Any, path: str) -> list[str]:
        if isinstance(a, dict) and isinstance(b, dict):
            return [line for key in a for line in walk(a[key], b.get(key), f"{path}.{key}" if path else key)]
        return [] if a == b else [f"{path}: {a!r}, {b!r}"]

    return walk(cattrs.unstructure(one), cattrs.unstructure(other), "")
