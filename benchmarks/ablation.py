"""What makes V-MCR² work, and what breaks it: one setting changed at a time, on several data sets and seeds.

    python benchmarks/ablation.py run STUDY ... [--data-root DIR]    runs what is missing, one JSON line a run
    python benchmarks/ablation.py tables                             results/ablation/README.md from the lines

A run that is in results/ablation/runs.jsonl is not run again, so this can be stopped at any time.
The rivals that are not part of the library live here, as objectives for its `fit`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from studies import BASES, STUDIES
from torch import Tensor, nn

import vmcr2
from vmcr2.errors import InputError, NumericalError
from vmcr2.lab import objectives, sources, train
from vmcr2.lab.augmentation import plain
from vmcr2.lab.evaluate import accuracy_by_components, extract, measure, subspaces
from vmcr2.lab.objectives import Objective, Variational
from vmcr2.lab.recipes import Recipe
from vmcr2.lab.sources import Dataset

HERE = Path(__file__).parent.parent / "results" / "ablation"
RUNS = HERE / "runs.jsonl"


@dataclass(frozen=True)
class Setting:
    """Everything a study may change; None keeps the base recipe's value."""

    base: str
    objective: str = "vmcr2"  # vmcr2, mcr2, ce, memory (MCR² on a moving average), target (a fixed random dictionary)
    seed: int = 0
    epochs: int | None = None
    batch_size: int | None = None
    lr: float | None = None
    momentum: float | None = None
    mu: float | None = None
    atoms: int | None = None
    step_atoms: float | None = None
    step_codes: float | None = None
    latch_every: int | None = None
    structure: str = "shared"
    reduction: str = "sum"  # or mean: the residual / (µ m)
    frozen: bool = False  # the dictionary moves by latching alone
    energy: float | None = None  # what the codes of a class are scaled to sum to
    balance: float | None = None  # ρ, from which µ follows at each batch size
    weight_decay: float = 0.0
    gradient_clip: float | None = None
    rate: float = 0.1  # of the moving average of objective memory
    imbalance: float = 1.0  # the largest class over the smallest


class Still(nn.Module):
    """A V-MCR² loss that takes no steps: its dictionary moves by latching alone."""

    def __init__(self, loss: vmcr2.VMCR2Loss) -> None:
        super().__init__()
        self.loss = loss

    def train(self, mode: bool = True) -> Still:
        return super().train(False)

    def forward(self, features: Tensor, labels: Tensor) -> Tensor:
        return self.loss(features, labels)


def moments_of(z: Tensor, labels: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The classes' second moments C_j, k×d×d, and their sizes n_j."""
    rows = nn.functional.one_hot(labels, k).to(z.dtype)
    counts = rows.sum(0)
    return torch.einsum("mk,md,me->kde", rows / counts.clamp_min(1), z, z), counts


class FixedTarget(nn.Module):
    """The residual of a random orthogonal dictionary with equal energies that never moves."""

    def __init__(self, k: int, d: int, s: int, mu: float) -> None:
        super().__init__()
        self.mu = mu
        columns = torch.linalg.qr(torch.randn(d, max(d, k * s)))[0]
        blocks = torch.stack([columns[:, [(j * s + i) % d for i in range(s)]] for j in range(k)])
        self.register_buffer("model", blocks @ blocks.mT / s)

    def forward(self, z: Tensor, labels: Tensor) -> Tensor:
        moments, counts = moments_of(z, labels, len(self.model))
        return 0.5 * self.mu * (counts[:, None, None] * (moments - self.model).square()).sum()


class MemoryMCR2(nn.Module):
    """−ΔR of a moving average of the classes' second moments: exact MCR² given the memory that a dictionary has."""

    def __init__(self, num_classes: int, dim: int, eps_sq: float, rate: float) -> None:
        super().__init__()
        self.eps_sq, self.rate = eps_sq, rate
        self.register_buffer("moments", torch.zeros(num_classes, dim, dim))
        self.register_buffer("seen", torch.zeros(num_classes, dtype=torch.bool))

    def forward(self, z: Tensor, labels: Tensor) -> Tensor:
        k, d, _ = self.moments.shape
        fresh, counts = moments_of(z, labels, k)
        rate = torch.where(counts > 0, torch.where(self.seen, self.rate, 1.0), 0.0)[:, None, None]
        moments = (1 - rate) * self.moments + rate * fresh
        self.moments.copy_(moments.detach())
        self.seen |= counts > 0
        weights = counts / counts.sum()

        def half_logdet(scaled: Tensor) -> Tensor:
            return torch.linalg.cholesky(torch.eye(d) + scaled).diagonal(dim1=-2, dim2=-1).log().sum(-1)

        beta = d / self.eps_sq
        whole = half_logdet(beta * torch.einsum("k,kde->de", weights, moments))
        return (weights * half_logdet(beta * moments)).sum() - whole


def recipe_of(setting: Setting) -> Recipe:
    base = BASES[setting.base]
    changes: dict[str, Any] = {
        name: getattr(setting, name)
        for name in ("epochs", "batch_size", "momentum")
        if getattr(setting, name) is not None
    }
    names = {"mu": "mu", "atoms": "atoms_per_class", "step_atoms": "step_atoms", "step_codes": "step_codes"}
    names |= {"latch_every": "latch_every", "energy": "energy"}
    inner = {to: getattr(setting, of) for of, to in names.items() if getattr(setting, of) is not None}
    if setting.balance is not None:
        inner |= {"balance": setting.balance, "mu": None}
    inner |= {name: getattr(setting, name) for name in ("structure", "reduction", "gradient_clip")}
    if setting.objective in ("mcr2", "ce"):
        changes["objective"] = setting.objective
    return replace(
        base, seed=setting.seed, weight_decay=setting.weight_decay, vmcr2=replace(base.vmcr2, **inner), **changes
    )


def objective_of(setting: Setting, recipe: Recipe, k: int) -> Objective:
    d, chosen = recipe.feature_dim, recipe.vmcr2
    if setting.objective == "memory":
        return Objective(MemoryMCR2(k, d, recipe.eps_sq, setting.rate), k, eps_sq=recipe.eps_sq)
    if setting.objective == "target":
        assert chosen.mu is not None
        target = FixedTarget(k, d, chosen.atoms_per_class or max(1, d // k), chosen.mu)
        return Objective(target, k, eps_sq=recipe.eps_sq)
    objective = objectives.build(recipe, k)
    if setting.frozen and isinstance(objective, Variational):
        objective.criterion = Still(objective.loss)
    return objective


def lr_of(setting: Setting, recipe: Recipe) -> float:
    if setting.lr is not None:
        return setting.lr
    return recipe.mcr2.lr if setting.objective == "memory" else recipe.lr


def unbalanced(dataset: Dataset, ratio: float) -> Dataset:
    """Thins the classes out geometrically, the first kept whole, the last by the ratio."""
    if ratio == 1:
        return dataset
    k = dataset.num_classes
    kept = []
    for j in range(k):
        rows = (dataset.train_labels == j).nonzero()[:, 0]
        kept.append(rows[: max(1, round(len(rows) * ratio ** (-j / (k - 1))))])
    chosen = torch.cat(kept)
    return replace(dataset, train_inputs=dataset.train_inputs[chosen], train_labels=dataset.train_labels[chosen])


def overlap(bases: Tensor) -> float:
    """The mean over pairs of classes of ‖V_iᵀ V_j‖²_F / r: 0 where subspaces are orthogonal, 1 where they coincide."""
    k, d, r = bases.shape
    flat = bases.permute(1, 0, 2).reshape(d, k * r)
    squares = (flat.T @ flat).square().view(k, r, k, r).sum((1, 3)) / r
    return float((squares.sum() - squares.diagonal().sum()) / (k * (k - 1)))


def run(setting: Setting, root: Path | None) -> dict[str, Any]:
    """Trains one setting and returns its line."""
    recipe = recipe_of(setting)
    dataset = unbalanced(sources.load(recipe.data, root), setting.imbalance)
    shape = plain(dataset.train_inputs[:1], recipe.augmentation).shape[1:]
    model, _ = train.build(recipe, tuple(shape), dataset.num_classes)
    objective = objective_of(setting, recipe, dataset.num_classes)
    parameters = [*model.parameters(), *objective.criterion.parameters()]
    optimizer = torch.optim.SGD(
        parameters, lr_of(setting, recipe), momentum=recipe.momentum, weight_decay=recipe.weight_decay
    )
    line: dict[str, Any] = {"setting": asdict(setting), "history": [], "failed": None}
    every = max(recipe.evaluate_every, recipe.epochs // 12)

    def after(epoch: dict[str, Any]) -> None:
        number = epoch["epoch"]
        if number % every == 0 or number == recipe.epochs:
            line["history"].append({"epoch": number} | state(recipe, dataset, model, objective))

    began = time.perf_counter()
    try:
        train.fit(
            model,
            objective,
            lambda epoch: train.EpochBatches(dataset, recipe, epoch),
            optimizer,
            recipe.epochs,
            latch_on=lambda epoch: train.EpochBatches(dataset, recipe, epoch, augment=False),
            on_epoch=after,
        )
    except (InputError, NumericalError) as error:
        line["failed"] = str(error)[:200]
    line["seconds"] = time.perf_counter() - began
    return line


@torch.no_grad()
def state(recipe: Recipe, dataset: Dataset, model: nn.Module, objective: Objective) -> dict[str, Any]:
    """The figures of one moment: rates of train and test, accuracies, and how far the subspaces overlap."""
    features, k = extract(model, dataset, recipe.augmentation, recipe.batch_size), dataset.num_classes
    bases = subspaces(features, dataset)
    measured = asdict(measure(features, dataset, bases, recipe.eps_sq, objective.predict))
    found = {name: value for name, value in measured.items() if value is not None}
    found["accuracy_of_one"] = accuracy_by_components(features, dataset, [1])[1]
    test = vmcr2.rate_reduction(features.test, dataset.test_labels, num_classes=k, eps_sq=recipe.eps_sq)
    found["test_reduction"] = float(test.reduction)
    found["overlap_features"] = overlap(bases)
    if isinstance(objective, Variational):
        dictionary, d = objective.loss.dictionary, recipe.feature_dim
        found["overlap_dictionary"] = overlap(dictionary.atoms.view(d, k, -1).permute(1, 0, 2))
        found["energy_of_codes"] = float(dictionary.codes.sum(0).mean())
    return {name: round(value, 5) for name, value in found.items()}


def changed(setting: dict[str, Any]) -> dict[str, Any]:
    """The options that are not at their standard; those added later do not make earlier runs unknown."""
    standard = asdict(Setting(base=""))
    return {name: value for name, value in sorted(setting.items()) if value != standard.get(name)}


def key(setting: dict[str, Any]) -> str:
    return json.dumps(changed(setting))


def packed(line: dict[str, Any]) -> str:
    """A run as a line of the file: what was changed, and the history by columns, a fifth of its size by rows."""
    history = line["history"]
    columns = {name: [point[name] for point in history] for name in history[0]} if history else {}
    kept = line | {"setting": changed(line["setting"]), "history": columns}
    return json.dumps(kept, separators=(",", ":")) + "\n"


def done() -> dict[str, dict[str, Any]]:
    if not RUNS.exists():
        return {}
    lines = [json.loads(line) for line in RUNS.read_text().split("\n")[:-1]]
    for line in lines:
        columns = line["history"]
        line["history"] = [dict(zip(columns, point, strict=True)) for point in zip(*columns.values(), strict=True)]
    return {key(line["setting"]): line for line in lines}


def settings_of(study: str) -> list[Setting]:
    base = {name: value for name, value in STUDIES[study].items() if name not in ("about", "rows", "seeds")}
    return [
        Setting(**(base | row | {"seed": seed})) for row in STUDIES[study]["rows"] for seed in STUDIES[study]["seeds"]
    ]


def summarise(lines: list[dict[str, Any]]) -> dict[str, Any]:
    """Means and spreads over seeds of the final figures."""
    ends = [line["history"][-1] for line in lines if not line["failed"] and line["history"]]
    found: dict[str, Any] = {"n": len(lines), "failed": sum(bool(line["failed"]) for line in lines)}
    for name in sorted({name for end in ends for name in end} - {"epoch"}):
        values = [end[name] for end in ends if name in end]
        found[name] = (statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0)
    return found


def cell(summary: dict[str, Any], name: str, digits: int) -> str:
    if name not in summary:
        return "–"
    mean, spread = summary[name]
    return f"{mean:.{digits}f}" + (f" ± {spread:.{digits}f}" if summary["n"] > 1 else "")


def tables() -> str:
    """Every study's table in Markdown."""
    known = done()
    parts = [
        "# Ablation\n\nMade by `python benchmarks/ablation.py tables` from runs.jsonl; each run's command is "
        "`python benchmarks/ablation.py run STUDY`. Mean ± standard deviation over seeds. ΔR and overlap are "
        "those of the whole training set; overlap is the mean over pairs of classes of ‖VᵢᵀVⱼ‖²/r.\n"
    ]
    columns = [
        ("R", "train_expansion", 1), ("R_c", "train_compression", 1), ("ΔR", "train_reduction", 2),
        ("ΔR test", "test_reduction", 1), ("accuracy", "test_accuracy", 4),
        ("1 component", "accuracy_of_one", 4), ("own head", "head_accuracy", 4),
        ("overlap", "overlap_features", 3), ("of Γ", "overlap_dictionary", 3), ("Σ codes", "energy_of_codes", 2),
    ]  # fmt: skip
    for study, spec in STUDIES.items():
        rows = []
        for row in spec["rows"]:
            base = {name: value for name, value in spec.items() if name not in ("about", "rows", "seeds")}
            found = [known[key(asdict(Setting(**(base | row | {"seed": seed}))))] for seed in spec["seeds"]
                     if key(asdict(Setting(**(base | row | {"seed": seed})))) in known]  # fmt: skip
            if found:
                summary = summarise(found)
                label = ", ".join(f"{name} {value}" for name, value in row.items()) or "as it is"
                stopped = f"{summary['failed']} of {summary['n']}" if summary["failed"] else ""
                rows.append(
                    [label, str(summary["n"]), *(cell(summary, name, digits) for _, name, digits in columns), stopped]
                )
        if rows:
            head = ["changed", "seeds", *(title for title, *_ in columns), "stopped"]
            used = [i for i in range(len(head)) if i < 2 or any(line[i] not in ("", "–") for line in rows)]
            lines = [[line[i] for i in used] for line in [head, ["---"] * len(head), *rows]]
            parts.append(
                f"\n## {study}\n\n{spec['about']}\n\n" + "".join(f"| {' | '.join(line)} |\n" for line in lines)
            )
    return "".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["run", "tables"])
    parser.add_argument("studies", nargs="*", help=f"some of {', '.join(STUDIES)}; none means all")
    parser.add_argument("--data-root", type=Path)
    parser.add_argument("--threads", type=int, default=0, help="torch threads; 0 leaves torch's choice")
    given = parser.parse_args()
    HERE.mkdir(parents=True, exist_ok=True)
    if given.threads:
        torch.set_num_threads(given.threads)
    if given.command == "tables":
        (HERE / "README.md").write_text(tables())
        print(HERE / "README.md")
        return
    for study in given.studies or STUDIES:
        for setting in settings_of(study):
            if key(asdict(setting)) in done():
                continue
            line = run(setting, given.data_root)
            line |= {"torch": torch.__version__, "threads": torch.get_num_threads()}
            with RUNS.open("a") as file:
                file.write(packed(line))
            end = line["history"][-1] if line["history"] else {}
            shown = {name: end.get(name) for name in ("train_reduction", "test_accuracy", "head_accuracy")}
            print(study, key(line["setting"]), shown, line["failed"], f"{line['seconds']:.0f} s", flush=True)


if __name__ == "__main__":
    main()
