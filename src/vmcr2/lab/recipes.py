"""Recipes: everything that decides what a run computes, as frozen dataclasses that check themselves.

`RECIPES` holds the named ones. A recipe is written to recipe.json in its run folder and read back strictly.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from vmcr2.checks import check_count, check_number
from vmcr2.errors import InputError
from vmcr2.lab.networks import NETWORKS
from vmcr2.lab.sources import Augmentation, DataSettings

Objective = Literal["vmcr2", "mcr2", "ce"]
OBJECTIVES: tuple[Objective, ...] = ("vmcr2", "mcr2", "ce")


@dataclass(frozen=True)
class VMCR2Settings:
    """Settings of the V-MCR² objective.

    Attributes:
        lr: learning rate of the network.
        mu: penalty weight µ > 0; None takes the one of `balance`.
        balance: ρ = µ m ε² / d at batch size m, what the residual weighs in the dictionary's step against the rates.
            Below 1 the dictionary leads the features; above they may collapse. Used where mu is None.
        atoms_per_class: s = q/k, at most the feature dimension; None takes ⌊d/k⌋, and 1 at least.
        step_atoms: ν_Γ, in units of the inverse Lipschitz bound.
        step_codes: ν_A, likewise.
        energy: what every class's codes are scaled to sum to after each step; None lets them run free.
        structure: shared: every class may use every atom; block: its own s only.
        latch_every: epochs between latchings; the first is before the first epoch.
        gradient_clip: the largest norm a step's gradient may have, None for any. 0.1 keeps networks without BatchNorm,
            whose first gradients are long, from collapsing at a learning rate of 0.1.
        stop_on_collapse: stop, with a reason, once ΔR of the batches has fallen to nothing for three epochs. A later
            latching may bring it back, slowly.
    """

    lr: float = 1e-2
    mu: float | None = None
    balance: float = 0.05
    atoms_per_class: int | None = None
    step_atoms: float = 5.0
    step_codes: float = 5.0
    energy: float | None = None
    structure: Literal["shared", "block"] = "shared"
    latch_every: int = 50
    gradient_clip: float | None = None
    stop_on_collapse: bool = True

    def __post_init__(self) -> None:
        for name in ("lr", "balance", "step_atoms", "step_codes"):
            check_number(f"vmcr2.{name}", getattr(self, name))
        for name in ("mu", "energy", "gradient_clip"):
            if getattr(self, name) is not None:
                check_number(f"vmcr2.{name}", getattr(self, name))
        if self.atoms_per_class is not None:
            check_count("vmcr2.atoms_per_class", self.atoms_per_class)
        check_count("vmcr2.latch_every", self.latch_every)


@dataclass(frozen=True)
class MCR2Settings:
    """Settings of the exact MCR² objective.

    Attributes:
        lr: learning rate of the network.
    """

    lr: float = 1e-2

    def __post_init__(self) -> None:
        check_number("mcr2.lr", self.lr)


@dataclass(frozen=True)
class CESettings:
    """Settings of cross-entropy.

    Attributes:
        lr: learning rate of the network and its linear head.
    """

    lr: float = 1e-1

    def __post_init__(self) -> None:
        check_number("ce.lr", self.lr)


@dataclass(frozen=True)
class Recipe:
    """One training run, but for where its data and its results lie.

    Attributes:
        name: what the recipe is called.
        about: one line on what it is for.
        objective: vmcr2, mcr2 or ce.
        seed: of the initial weights, the order of the data, augmentation and dropout.
        epochs: passes over the training set.
        batch_size: at most so many samples a step; the batches of an epoch are as equal as can be.
        network: mlp, conv4, cnn, resnet18 or preact_resnet18.
        feature_dim: d.
        eps_sq: the squared precision ε² of the coding rates.
        momentum: of SGD.
        weight_decay: of SGD.
        lr_drops: shares of the epochs after each of which the learning rate is divided by ten. The epochs of a run
            with drops cannot be raised later.
        evaluate_every: epochs between evaluations on the whole training and test set.
        checkpoint_seconds: the least time between two checkpoints; the last epoch always writes one.
        device: auto (cuda where there is one, else cpu), cpu or cuda.
        precision: of the network, as Lightning Fabric names it (32-true, bf16-mixed); rates are float32 at least.
        channels_last: lay images and weights out with channels last, as GPUs convolve fastest.
        data: what to train on.
        augmentation: what is done to its images.
        vmcr2: settings of V-MCR².
        mcr2: settings of MCR².
        ce: settings of cross-entropy.
    """

    name: str = "digits"
    about: str = ""
    objective: Objective = "vmcr2"
    seed: int = 0
    epochs: int = 100
    batch_size: int = 500
    network: str = "mlp"
    feature_dim: int = 128
    eps_sq: float = 0.5
    momentum: float = 0.9
    weight_decay: float = 0.0
    lr_drops: tuple[float, ...] = ()
    evaluate_every: int = 1
    checkpoint_seconds: float = 10.0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["32-true", "bf16-mixed"] = "32-true"
    channels_last: bool = False
    data: DataSettings = field(default_factory=DataSettings)
    augmentation: Augmentation = field(default_factory=Augmentation)
    vmcr2: VMCR2Settings = field(default_factory=VMCR2Settings)
    mcr2: MCR2Settings = field(default_factory=MCR2Settings)
    ce: CESettings = field(default_factory=CESettings)

    def __post_init__(self) -> None:
        if self.objective not in OBJECTIVES:
            raise InputError(f"objective must be one of {', '.join(OBJECTIVES)}, got {self.objective!r}")
        if self.network not in NETWORKS:
            raise InputError(f"network must be one of {', '.join(NETWORKS)}, got {self.network!r}")
        check_count("seed", self.seed, at_least=0, at_most=2**40)
        if not self.name or not self.name.replace("-", "").replace("_", "").replace(".", "").isalnum():
            raise InputError(f"name must be letters, digits, '-', '_' and '.', got {self.name!r}")
        for name in ("epochs", "feature_dim", "evaluate_every"):
            check_count(name, getattr(self, name))
        check_count("batch_size", self.batch_size, at_least=2)
        check_number("eps_sq", self.eps_sq)
        for name in ("momentum", "weight_decay", "checkpoint_seconds"):
            check_number(name, getattr(self, name), positive=False)
        if self.momentum >= 1:
            raise InputError(f"momentum must be below 1, got {self.momentum}")
        for share in self.lr_drops:
            check_number("lr_drops", share)
            if share >= 1:
                raise InputError(f"lr_drops must be shares of the epochs, between 0 and 1, got {share}")
        atoms = self.vmcr2.atoms_per_class
        if self.objective == "vmcr2" and atoms is not None:
            check_count("vmcr2.atoms_per_class", atoms, at_most=self.feature_dim, limit="feature_dim")

    @property
    def lr(self) -> float:
        """The learning rate of this recipe's objective."""
        settings: VMCR2Settings | MCR2Settings | CESettings = getattr(self, self.objective)
        return settings.lr

    def lr_at(self, epoch: int) -> float:
        """Returns the learning rate of an epoch, the first of which is 1."""
        return self.lr / 10 ** sum(epoch > share * self.epochs for share in self.lr_drops)


# The paper's settings (Sections 4 and 7). Where it is silent or unclear this was chosen:
# - Momentum 0.9, as in the code of the MCR² paper, whose settings it otherwise keeps; no weight decay and no schedule
#   (Section 7.4 has its own).
# - Line 12 of Algorithm 1 steps along the gradient of (µ/2m) M, not of M, which is 2m times larger and diverges.
# - Latching sees un-augmented images and batch statistics (`VMCR2Loss.latch_from`), and A is held at the scale of one
#   sample, so that unbalanced batches do not move the target.
# - Transformations 1 hold for MNIST too, mirroring included; Transformations 2 draw no crops.
# - Training is not stopped when the features collapse: at µ = 1 they do at first on MNIST, and may come back.
# - The classifier's subspaces are those of un-augmented images in eval mode.
_CROPS = Augmentation(crop=32, padding=8, flip=True)
_PAPER = Recipe(
    name="mnist",
    about="the paper's Tables 1 and 2: Architecture 1, µ = 1, lr 1e-3 (CE 1e-2)",
    epochs=2000,
    batch_size=1000,
    network="cnn",
    feature_dim=128,
    evaluate_every=10,
    checkpoint_seconds=60.0,
    data=DataSettings(source="mnist"),
    augmentation=_CROPS,
    vmcr2=VMCR2Settings(lr=1e-3, mu=1.0, atoms_per_class=20, stop_on_collapse=False),
    mcr2=MCR2Settings(lr=1e-3),
    ce=CESettings(lr=1e-2),
)
_PAPER_CIFAR10 = replace(
    _PAPER,
    name="cifar10",
    about="the paper's Tables 1 and 2: Architecture 2, µ = 1, lr 1e-3 (CE 1e-2)",
    network="resnet18",
    data=DataSettings(source="cifar10"),
)
_PAPER_CIFAR100 = replace(
    _PAPER_CIFAR10,
    name="cifar100",
    batch_size=2000,
    feature_dim=500,
    data=DataSettings(source="cifar100"),
    vmcr2=replace(_PAPER.vmcr2, atoms_per_class=10),
)
_PAPER_TINY = replace(
    _PAPER_CIFAR100,
    name="tiny-imagenet",
    data=DataSettings(source="tiny-imagenet"),
    augmentation=Augmentation(flip=True),
)


def _strong(base: Recipe) -> Recipe:
    """Returns the recipe of Section 7.4 for a data set."""
    return replace(
        base,
        name=f"{base.name}-strong",
        about="the paper's Table 3: PreAct ResNet-18, weight decay, lr 0.1 and its two drops, µ = 0.1",
        network="preact_resnet18",
        # The recipe that Section 7.4 follows crops CIFAR by 4 pixels. For Tiny ImageNet "the same transformations"
        # would be random resized crops of the 64×64 images, which are not kept; there only mirroring is left.
        augmentation=replace(base.augmentation, padding=4 if base.augmentation.crop else 0),
        weight_decay=1e-4,
        lr_drops=(0.5, 0.75),
        vmcr2=replace(base.vmcr2, lr=1e-1, mu=0.1),
        mcr2=MCR2Settings(lr=1e-1),
        ce=CESettings(lr=1e-1),
    )


def _ours(base: Recipe) -> Recipe:
    """Returns our own settings for a data set of the paper: the same network, data, batches and dimension.

    The defaults of docs/choosing.md: µ by `balance`, ⌊d/k⌋ atoms a class, lr 5/d; for MNIST's network, which has no
    BatchNorm, clipped gradients and lr 0.1.
    """
    normalised = base.network != "cnn"
    return replace(
        base,
        name=f"{base.name}-ours",
        about="the paper's data, network and batches at our defaults (docs/choosing.md)",
        vmcr2=VMCR2Settings(lr=5 / base.feature_dim) if normalised else VMCR2Settings(lr=0.1, gradient_clip=0.1),
        mcr2=MCR2Settings(lr=1e-2),
        ce=CESettings(lr=1e-1),
    )


_ALL: tuple[Recipe, ...] = (
    Recipe(
        name="digits",
        about="8×8 handwritten digits from scikit-learn, seconds on a laptop",
        epochs=100,
        batch_size=500,
        network="mlp",
        feature_dim=128,
        augmentation=Augmentation(padding=1, crop=8),
        vmcr2=VMCR2Settings(lr=6e-2, energy=1.6),
        mcr2=MCR2Settings(lr=1e-2),
        ce=CESettings(lr=1e-1),
    ),
    Recipe(
        name="omniglot100",
        about="100 handwritten characters, 15 drawers for training and 5 for test",
        epochs=60,
        batch_size=500,
        network="conv4",
        feature_dim=200,
        evaluate_every=5,
        data=DataSettings(source="omniglot", classes=100),
        augmentation=Augmentation(padding=2, crop=28),
        vmcr2=VMCR2Settings(lr=2.5e-2),
        mcr2=MCR2Settings(lr=1e-2),
        ce=CESettings(lr=1.0),
    ),
    _PAPER,
    _PAPER_CIFAR10,
    _PAPER_CIFAR100,
    replace(_PAPER_CIFAR100, name="cifar100-d100", about="the paper's Figure 1b at d = 100", feature_dim=100),
    _PAPER_TINY,
    replace(_PAPER_TINY, name="tiny-imagenet-d200", about="the paper's Figure 1d at d = 200", feature_dim=200),
    _strong(_PAPER_CIFAR100),
    _strong(_PAPER_TINY),
    *(_ours(base) for base in (_PAPER, _PAPER_CIFAR10, _PAPER_CIFAR100, _PAPER_TINY)),
)
RECIPES: dict[str, Recipe] = {recipe.name: recipe for recipe in _ALL}


def find(name: str) -> Recipe:
    """Returns a recipe by name, or from a .json file such as a run folder's recipe.json.

    Raises:
        InputError: there is no such recipe, or the file is no recipe (a ValueError).
    """
    if name in RECIPES:
        return RECIPES[name]
    if name.endswith(".json"):
        return from_json(Path(name))
    near = difflib.get_close_matches(name, RECIPES, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise InputError(f"recipe must be one of {', '.join(RECIPES)} or a .json file, got {name!r}{hint}")


def to_json(recipe: Recipe) -> str:
    """Returns the recipe as JSON with all its fields."""
    import cattrs

    return json.dumps(cattrs.unstructure(recipe), indent=2, ensure_ascii=False) + "\n"


def from_json(file: Path) -> Recipe:
    """Returns the recipe in a file.

    Raises:
        InputError: the file is missing, is no JSON, or has an unknown key or a wrong value (a ValueError).
    """
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"there is no recipe file {file}") from error
    except (OSError, ValueError) as error:
        raise InputError(f"{file} is no readable recipe: {error}") from error
    return _structured(fields, str(file))


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
        raise InputError(f"{name} is no valid recipe: it must hold an object, got {fields!r}")
    converter = cattrs.Converter(forbid_extra_keys=True)
    for kind, accepted in ((int, (int,)), (float, (int, float)), (bool, (bool,)), (str, (str,))):
        converter.register_structure_hook(kind, exactly(*accepted))
    try:
        return converter.structure(fields, Recipe)
    except cattrs.BaseValidationError as error:
        lines = cattrs.transform_error(error, format_exception=say)
        raise InputError(f"{name} is no valid recipe: {'; '.join(lines)}") from error


def differences(one: Recipe, other: Recipe) -> list[str]:
    """Returns the fields in which two recipes differ, each as "name: this, that"."""
    import cattrs

    def walk(a: Any, b: Any, path: str) -> list[str]:
        if isinstance(a, dict) and isinstance(b, dict):
            return [line for key in a for line in walk(a[key], b.get(key), f"{path}.{key}" if path else key)]
        return [] if a == b else [f"{path}: {a!r}, {b!r}"]

    return walk(cattrs.unstructure(one), cattrs.unstructure(other), "")
