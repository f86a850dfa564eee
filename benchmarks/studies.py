"""The settings that `ablation.py` runs: data sets, and studies that change one thing at a time on them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from vmcr2.lab.augmentation import Augmentation
from vmcr2.lab.recipes import RECIPES, CESettings, MCR2Settings, Recipe, VMCR2Settings
from vmcr2.lab.sources import DataSettings

# The stored runs are of the residual's sum and of steps by the paper's bounds, both at the old point.
_SUM = VMCR2Settings(reduction="sum", step="simultaneous", stop_on_collapse=False)

_OMNIGLOT = replace(
    RECIPES["omniglot100"],
    vmcr2=replace(_SUM, lr=5e-2, mu=0.02, atoms_per_class=2),
    mcr2=MCR2Settings(lr=1e-2),
    ce=CESettings(lr=1.0),
)

BASES: dict[str, Recipe] = {
    "digits": replace(
        RECIPES["digits"],
        vmcr2=replace(_SUM, lr=3e-3, mu=1.0, atoms_per_class=20, step_atoms=20.0),
        mcr2=MCR2Settings(lr=1e-2),
        ce=CESettings(lr=1e-1),
    ),
    "omniglot100": _OMNIGLOT,
    "omniglot200": replace(
        _OMNIGLOT, name="omniglot200", feature_dim=400, data=DataSettings(source="omniglot", classes=200)
    ),
    # The recipes' defaults: µ by ρ = 0.05, ⌊d/k⌋ atoms a class.
    "digits-now": replace(
        RECIPES["digits"],
        vmcr2=replace(_SUM, lr=6e-2, energy=1.6),
        mcr2=MCR2Settings(lr=1e-2),
        ce=CESettings(lr=1e-1),
    ),
    "digits-free": replace(
        RECIPES["digits"], vmcr2=replace(_SUM, lr=6e-2), mcr2=MCR2Settings(lr=1e-2), ce=CESettings(lr=1e-1)
    ),
    "omniglot100-now": replace(_OMNIGLOT, vmcr2=replace(_SUM, lr=2.5e-2)),
    "omniglot200-now": replace(
        _OMNIGLOT,
        name="omniglot200",
        feature_dim=400,
        data=DataSettings(source="omniglot", classes=200),
        vmcr2=replace(_SUM, lr=1.25e-2),
    ),
    # Architecture 1: no BatchNorm, so all features start nearly parallel.
    "digits-cnn": replace(
        RECIPES["digits"],
        name="digits-cnn",
        network="cnn",
        epochs=30,
        momentum=0.0,
        vmcr2=replace(_SUM, lr=1e-3, mu=1.0, atoms_per_class=20),
    ),
    "digits-cnn-now": replace(
        RECIPES["digits"], name="digits-cnn", network="cnn", epochs=30, vmcr2=replace(_SUM, lr=1e-2, energy=1.6)
    ),
    "cifar100-20": Recipe(
        name="cifar100-20",
        epochs=15,
        evaluate_every=5,
        batch_size=500,
        network="resnet18",
        feature_dim=200,
        data=DataSettings(source="cifar100", classes=20, train_size=2000),
        augmentation=Augmentation(crop=32, padding=4, flip=True),
        vmcr2=replace(_SUM, lr=2.5e-2),
        mcr2=MCR2Settings(lr=1e-2),
        ce=CESettings(lr=1e-1),
    ),
    "mnist5000": Recipe(
        name="mnist5000",
        epochs=10,
        evaluate_every=5,
        batch_size=500,
        network="cnn",
        feature_dim=128,
        data=DataSettings(source="mnist", train_size=5000),
        augmentation=Augmentation(crop=32, padding=4),
        vmcr2=replace(_SUM, lr=3e-2),
        mcr2=MCR2Settings(lr=1e-2),
        ce=CESettings(lr=1e-1),
    ),
}

STUDIES: dict[str, dict[str, Any]] = {
    "ce-grid": {
        "about": "The baseline's learning rate: cross-entropy on omniglot100, its own head and nearest subspaces.",
        "base": "omniglot100",
        "objective": "ce",
        "seeds": [0, 1, 2],
        "rows": [{"lr": lr} for lr in (0.03, 0.1, 0.3, 0.6, 1.0, 2.0)],
    },
    "digits": {
        "about": "V-MCR² on digits; exact MCR² in the first row.",
        "base": "digits",
        "seeds": [0, 1, 2],
        "rows": [
            {"objective": "mcr2"},
            {},
            {"latch_every": 1000},
            {"latch_every": 10},
            {"step_atoms": 5.0},
            {"step_atoms": 10.0},
            {"step_atoms": 30.0},
            {"step_codes": 2.0},
            {"step_codes": 10.0},
            {"atoms": 6},
            {"atoms": 12},
            {"atoms": 40},
            {"mu": 0.3, "lr": 1e-2},
            {"mu": 2.0, "lr": 1.5e-3},
            {"mu": 3.0, "lr": 1e-3},
            {"structure": "block"},
            {"energy": 1.0},
            {"frozen": True, "latch_every": 1},
            {"batch_size": 100},
            {"batch_size": 1437},
        ],
    },
    "digits-unit": {
        "about": "The same with codes scaled to sum to 1 in every class, as the constraint of eq. (6) has it.",
        "base": "digits",
        "energy": 1.0,
        "seeds": [0, 1, 2],
        "rows": [
            {},
            {"latch_every": 1000},
            {"latch_every": 10},
            {"step_atoms": 5.0},
            {"step_atoms": 40.0},
            {"step_codes": 2.0},
            {"step_codes": 10.0},
            {"atoms": 6},
            {"atoms": 12},
            {"atoms": 40},
            {"lr": 1e-3},
            {"lr": 1e-2},
            {"mu": 0.1, "lr": 3e-2},
            {"mu": 0.3, "lr": 1e-2},
            {"mu": 3.0, "lr": 1e-3},
            {"mu": 10.0, "lr": 3e-4},
            {"structure": "block"},
            {"batch_size": 100, "lr": 1.5e-2},
            {"batch_size": 1437, "lr": 1e-3},
        ],
    },
    "omniglot100-unit": {
        "about": "omniglot100 with codes scaled to sum to 1 in every class.",
        "base": "omniglot100",
        "energy": 1.0,
        "seeds": [0, 1],
        "rows": [
            {},
            {"lr": 0.2},
            {"lr": 0.5},
            {"mu": 0.1, "lr": 0.05},
            {"mu": 0.5, "lr": 0.01},
            {"atoms": 1, "lr": 0.2},
            {"atoms": 4, "lr": 0.2},
            {"latch_every": 5, "lr": 0.2},
        ],
    },
    "why": {
        "about": "What V-MCR² owes to memory, to a moving target, to low rank: rivals on omniglot100.",
        "base": "omniglot100",
        "seeds": [0, 1],
        "rows": [
            {},
            {"objective": "mcr2"},
            {"objective": "mcr2", "batch_size": 100},
            {"objective": "mcr2", "batch_size": 1500},
            {"energy": 1.0, "lr": 0.2},
            {"objective": "memory", "rate": 0.3},
            {"objective": "memory", "rate": 0.1},
            {"objective": "memory", "rate": 0.03},
            {"objective": "target", "atoms": 1},
            {"objective": "target", "atoms": 2},
            {"frozen": True, "latch_every": 1000},
            {"frozen": True, "latch_every": 5},
        ],
    },
    "collapse": {
        "about": (
            "Architecture 1 on digits, 30 epochs: who makes progress? Exact MCR² first. Sum is the paper's scale; mean "
            "divides the residual by µ m, so that lr means the same at every µ and batch size."
        ),
        "base": "digits-cnn",
        "seeds": [0],
        "rows": [
            {"objective": "mcr2", "lr": 1e-2},
            *(
                {"energy": 1.0 if unit else None, "reduction": reduction, "mu": mu, "batch_size": batch, "lr": lr}
                for unit, reduction, lrs in (
                    (False, "sum", (1e-4, 1e-3, 1e-2)),
                    (True, "sum", (1e-4, 1e-3, 1e-2)),
                    (True, "mean", (0.1, 1.0, 10.0)),
                )
                for mu in (0.03, 0.3, 1.0)
                for batch in (100, 1437)
                for lr in lrs
            ),
        ],
    },
    "energy": {
        "about": (
            "One set of defaults (µ by ρ = 0.05, ⌊d/k⌋ atoms, ν = 5): what the codes of a class sum to. None: they run "
            "free. Exact MCR² and cross-entropy first."
        ),
        "base": "digits-now",
        "seeds": [0, 1, 2, 3, 4],
        "rows": [
            {"objective": "mcr2"},
            {"objective": "ce"},
            *({"energy": energy} for energy in (1.0, 1.3, 1.6, 2.0)),
            {"base": "digits-free"},
            {"base": "omniglot100-now", "objective": "ce"},
            *({"base": "omniglot100-now", "energy": energy} for energy in (1.0, 1.6, 3.0)),
            {"base": "omniglot100-now"},
        ],
    },
    "latching": {
        "about": "Epochs between latchings on digits at the defaults: codes free, and summing to 1.6.",
        "base": "digits-free",
        "seeds": [0, 1, 2],
        "rows": [
            *({"latch_every": every} for every in (2, 10, 50, 1000)),
            *({"base": "digits-now", "latch_every": every} for every in (2, 10, 50, 1000)),
        ],
    },
    "paper": {
        "about": "The paper's own settings (µ = 1, lr 1e-3, ν = 5, 20 or 10 atoms a class) on digits and omniglot100.",
        "base": "digits-free",
        "seeds": [0, 1, 2],
        "rows": [
            {"mu": 1.0, "lr": 1e-3, "atoms": 20},
            {"base": "omniglot100-now", "mu": 1.0, "lr": 1e-3, "atoms": 10},
        ],
    },
    "paper-patience": {
        "about": (
            "The paper's settings (µ = 1, lr 1e-3, no momentum) on digits with its MNIST network, 1000 epochs at "
            "batches of 500: after the collapse."
        ),
        "base": "digits-cnn",
        "seeds": [0],
        "rows": [{"batch_size": 500, "epochs": 1000}],
    },
    "omniglot200-now": {
        "about": "Twice the classes at the same defaults, against cross-entropy at its best learning rates.",
        "base": "omniglot200-now",
        "seeds": [0, 1, 2, 3, 4],
        "rows": [{}, {"objective": "ce", "lr": 1.0}],
    },
    "balance": {
        "about": "ρ = µ m ε²/d, with lr·ρ kept: digits and omniglot100.",
        "base": "digits-now",
        "seeds": [0, 1, 2],
        "rows": [
            *({"balance": rho, "lr": round(3e-3 / rho, 6)} for rho in (0.01, 0.02, 0.1, 0.2, 0.5, 1.0, 2.0, 4.0)),
            *(
                {"base": "omniglot100-now", "balance": rho, "lr": round(1.25e-3 / rho, 6)}
                for rho in (0.01, 0.02, 0.1, 0.5, 2.0)
            ),
        ],
    },
    "no-collapse": {
        "about": (
            "Architecture 1 on digits (no BatchNorm), 30 epochs, momentum 0.9, the defaults: learning rates over two "
            "decades, batches, and classes unbalanced 100 : 1; without and with gradients clipped to norm 0.1. Compare "
            "with `collapse`."
        ),
        "base": "digits-cnn-now",
        "seeds": [0],
        "rows": [
            {"objective": "mcr2", "lr": 1e-2},
            *(
                {"batch_size": batch, "lr": lr, "imbalance": ratio, "gradient_clip": clip}
                for clip in (None, 0.1)
                for batch in (100, 500, 1437)
                for lr in (1e-3, 1e-2, 1e-1)
                for ratio in (1.0, 100.0)
            ),
            {"objective": "mcr2", "lr": 1e-1, "epochs": 200},
            {"objective": "mcr2", "lr": 1e-2, "epochs": 200},
            *(
                {"batch_size": 500, "lr": lr, "gradient_clip": clip, "epochs": 200}
                for clip in (None, 0.1)
                for lr in (1e-2, 1e-1)
            ),
            *({"balance": rho, "lr": round(5e-4 / rho, 6)} for rho in (0.2, 0.5, 1.0, 2.0)),
        ],
    },
    "omniglot100-now": {
        "about": "The defaults on omniglot100, one thing changed at a time.",
        "base": "omniglot100-now",
        "seeds": [0],
        "rows": [
            {},
            {"momentum": 0.0},
            {"weight_decay": 2e-3},
            {"lr": 0.0125},
            {"lr": 0.05},
            {"latch_every": 5},
            {"latch_every": 20},
            {"latch_every": 1000},
            {"step_atoms": 1.0},
            {"step_atoms": 20.0},
            {"step_atoms": 50.0},
            {"step_codes": 1.0},
            {"step_codes": 20.0},
            {"structure": "block"},
            {"atoms": 1},
            {"atoms": 4},
            {"atoms": 15},
            {"batch_size": 100},
            {"batch_size": 1500},
        ],
    },
    "imbalance-now": {
        "about": "The largest class 100 times the smallest, digits with BatchNorm, the defaults.",
        "base": "digits-now",
        "imbalance": 100.0,
        "seeds": [0, 1, 2],
        "rows": [{"objective": "mcr2"}, {"objective": "ce"}, {}, {"base": "digits-free"}],
    },
    "mnist5000": {
        "about": "Architecture 1 on 5,000 MNIST images, 10 epochs: the paper's settings (first), and the defaults.",
        "base": "mnist5000",
        "seeds": [0],
        "rows": [
            {"mu": 1.0, "lr": 1e-3, "atoms": 20},
            {"mu": 1.0, "lr": 1e-3, "atoms": 20, "momentum": 0.0},
            {"objective": "mcr2"},
            {"objective": "ce"},
            {"energy": 1.6},
            {},
            {"lr": 0.1, "gradient_clip": 0.1},
            {"lr": 0.1, "gradient_clip": 0.1, "energy": 1.6},
        ],
    },
    "cifar100-20": {
        "about": "Architecture 2 (ResNet-18) on 2,000 images of the first 20 classes of CIFAR-100, 15 epochs.",
        "base": "cifar100-20",
        "seeds": [0],
        "rows": [
            {"mu": 1.0, "lr": 1e-3, "atoms": 10},
            {"objective": "mcr2"},
            {"objective": "ce"},
            {"energy": 1.6},
            {},
        ],
    },
    "omniglot200": {
        "about": "Twice the classes: V-MCR² as on omniglot100, against cross-entropy at its best learning rates.",
        "base": "omniglot200",
        "seeds": [0, 1],
        "rows": [{}, {"objective": "ce", "lr": 0.6}, {"objective": "ce", "lr": 1.0}, {"objective": "ce", "lr": 2.0}],
    },
}
