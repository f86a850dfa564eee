"""What makes V-MCR² work, and what breaks it: one setting changed at a time, on several data sets and seeds.

    python benchmarks/ablation.py run STUDY ... [--data-root DIR]    runs what is missing, one JSON line a run
    python benchmarks/ablation.py tables                             results/ablation/README.md from the lines

A run that is in results/ablation/runs.jsonl is not run again, so this can be broken off at any time.
The variants that did not become part of the library live here, as subclasses of its losses.
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
from torch import Tensor

import vmcr2
from vmcr2.errors import InputError, NumericalError
from vmcr2.lab import networks as featurizers
from vmcr2.lab import sources as data
from vmcr2.lab.evaluate import accuracy_by_components, extract, measure
from vmcr2.lab.networks import CrossEntropyHead
from vmcr2.lab.recipes import Recipe
from vmcr2.lab.sources import Dataset
from vmcr2.lab.train import batches, epoch_generator
from vmcr2.linalg import half_logdet
from vmcr2.membership import Membership
from vmcr2.subspaces import class_subspaces
from vmcr2.variational import (
    ascent_direction,
    atom_overlap,
    class_moments,
    lipschitz_atoms,
    lipschitz_codes,
    residual,
)

HERE = Path(__file__).parent.parent / "results" / "ablation"
RUNS = HERE / "runs.jsonl"


@dataclass(frozen=True)
class Setting:
    """Everything a study may change; None keeps the base recipe's value."""

    base: str
    objective: str = (
        "vmcr2"  # vmcr2, mcr2, ce, memory (MCR² on a moving average), target (a fixed random dictionary), alm
    )
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
    latch_mode: str = "training"  # or eval: BatchNorm's running statistics
    reduction: str = "sum"  # or mean: the residual / (µ m)
    bounds: str = "global"  # or diagonal: one an atom, and an atom and class
    order: str = "together"  # or atoms_first: the codes step at the moved atoms
    inner_steps: int = 1
    codes_at: str = "class"  # or batch: A itself is stored, at the scale of the batch
    frozen: bool = False  # the dictionary moves by latching alone
    unit_codes: bool = False  # codes scaled to sum to 1 a class after each step, as those of unit features do
    energy: float | None = None  # or to another sum
    balance: float | None = None  # ρ, from which µ follows at each batch size
    weight_decay: float = 0.0
    gradient_clip: float | None = None
    rate: float = 0.1  # of the moving average of objective memory
    imbalance: float = 1.0  # the largest class over the smallest


class Variant(vmcr2.VMCR2Loss):
    """V-MCR² with the options that the library does not have."""

    def __init__(self, setting: Setting, **given: Any) -> None:
        super().__init__(**given)
        self.setting = setting

    def forward(self, features: Tensor, membership: Tensor) -> Tensor:
        z, checked = self._checked(features, membership)
        if self.training and not self.setting.frozen:
            for _ in range(self.setting.inner_steps):
                self._step(z.detach(), checked)
        atoms, codes = self.dictionary.atoms.clone(), self._class_scale(checked)
        value = residual(z, checked, atoms, codes, self.mu)
        return value / (self.mu * len(z)) if self.setting.reduction == "mean" else value

    def _scale(self, checked: Membership) -> Tensor:
        """What stored codes are divided by to give Ã: at batch scale n_j against the n_j of an average batch."""
        if self.setting.codes_at == "class":
            return torch.ones_like(checked.counts)
        return checked.counts.clamp_min(1e-8) / (checked.num_samples / self.num_classes)

    def _class_scale(self, checked: Membership) -> Tensor:
        return self.dictionary.codes / self._scale(checked)

    def _step(self, z: Tensor, checked: Membership) -> None:
        atoms, codes = self.dictionary.atoms, self._class_scale(checked)
        grad_atoms, grad_codes = ascent_direction(z, checked, atoms, codes, self.mu, self.eps_sq)
        moved = atoms + self.step_atoms * safe(grad_atoms, self._bound_atoms(z, checked, codes))
        moved = torch.nn.functional.normalize(moved, dim=0)
        if self.setting.order == "atoms_first":
            grad_codes = ascent_direction(z, checked, moved, codes, self.mu, self.eps_sq)[1]
        codes = (codes + self.step_codes * safe(grad_codes, self._bound_codes(atoms, codes, checked))).clamp_min(0)
        if self.energy is not None:
            codes = codes * (self.energy / codes.sum(0).clamp_min(1e-8))
        self.dictionary.atoms.copy_(moved)
        self.dictionary.codes.copy_(codes * self._scale(checked))

    def _bound_atoms(self, z: Tensor, checked: Membership, codes: Tensor) -> Tensor:
        if self.setting.bounds == "global":
            return lipschitz_atoms(class_moments(z, checked).norms_sq, checked.counts, codes, self.mu)
        norms = class_moments(z, checked).norms_sq.sqrt().float()
        if self.setting.structure == "block":
            return (2 * self.mu * checked.counts * (norms * codes + codes.square())).T.reshape(-1)
        return 2 * self.mu * (codes * norms + codes.square()) @ checked.counts

    def _bound_codes(self, atoms: Tensor, codes: Tensor, checked: Membership) -> Tensor:
        if self.setting.bounds == "global":
            return lipschitz_codes(atom_overlap(atoms, codes), checked.counts, self.mu, self.num_classes)
        if self.setting.structure == "block":
            blocks = atoms.view(atoms.shape[0], codes.shape[1], -1).permute(1, 0, 2)
            return self.mu * checked.counts * (blocks.mT @ blocks).square().sum(2).T
        return self.mu * (atoms.T @ atoms).square().sum(1)[:, None] * checked.counts


def safe(gradient: Tensor, bound: Tensor) -> Tensor:
    return torch.where(bound > 0, gradient / torch.where(bound > 0, bound, 1), 0)


class FixedTarget(Variant):
    """A random orthogonal dictionary with equal energies that never moves: regression on a frozen target."""

    def latch_from(self, *_: Any) -> None:
        k, s, d = self.num_classes, self.atoms_per_class, self.feature_dim
        if self.dictionary.num_latched():
            return
        columns = torch.linalg.qr(torch.randn(d, max(d, k * s)))[0]
        blocks = torch.stack([columns[:, [(j * s + i) % d for i in range(s)]] for j in range(k)])
        self.dictionary.write(blocks, torch.full((k, s), 1 / s), torch.ones(k, dtype=torch.bool))

    def _step(self, *_: Any) -> None:
        return None


class MemoryMCR2(torch.nn.Module):
    """−ΔR of a moving average of the classes' second moments: exact MCR² given the memory that a dictionary has."""

    def __init__(self, num_classes: int, dim: int, eps_sq: float, rate: float) -> None:
        super().__init__()
        self.eps_sq, self.rate = eps_sq, rate
        self.register_buffer("moments", torch.zeros(num_classes, dim, dim))
        self.register_buffer("seen", torch.zeros(num_classes, dtype=torch.bool))

    def forward(self, z: Tensor, labels: Tensor) -> Tensor:
        k, d, _ = self.moments.shape
        rows = torch.nn.functional.one_hot(labels, k).to(z.dtype)
        counts = rows.sum(0)
        fresh = torch.einsum("mk,md,me->kde", rows / counts.clamp_min(1), z, z)
        rate = torch.where(counts > 0, torch.where(self.seen, self.rate, 1.0), 0.0)[:, None, None]
        moments = (1 - rate) * self.moments + rate * fresh
        self.moments.copy_(moments.detach())
        self.seen |= counts > 0
        weights = counts / counts.sum()
        beta = d / self.eps_sq
        whole = half_logdet(beta * torch.einsum("k,kde->de", weights, moments))
        return (weights * half_logdet(beta * moments)).sum() - whole


class AugmentedLagrangian(torch.nn.Module):
    """Eq. (6) by multipliers: Γ and Ã by gradient steps, Λ_j ← Λ_j + µ (C_j − Γ Diag(Ã_j) Γᵀ) once a batch."""

    def __init__(self, inner: Variant) -> None:
        super().__init__()
        self.inner = inner
        k, d = inner.num_classes, inner.feature_dim
        self.register_buffer("multipliers", torch.zeros(k, d, d))

    def latch_from(self, *given: Any) -> None:
        self.inner.latch_from(*given)

    def forward(self, z: Tensor, labels: Tensor) -> Tensor:
        inner = self.inner
        rows = torch.nn.functional.one_hot(labels, inner.num_classes).to(z.dtype)
        counts = rows.sum(0)
        moments = torch.einsum("mk,md,me->kde", rows / counts.clamp_min(1), z, z)
        checked = Membership(labels, None, counts)
        atoms, codes = (t.clone().requires_grad_() for t in (inner.dictionary.atoms, inner.dictionary.codes))

        def gap(c: Tensor) -> Tensor:
            return c - torch.einsum("dq,qk,eq->kde", atoms, codes, atoms)

        difference = gap(moments.detach())
        # ⟨Λ, C − B⟩ enters the dictionary's gradient beside the penalty.
        extra = (counts[:, None, None] * self.multipliers * difference).sum()
        pull = torch.autograd.grad(-extra, (atoms, codes))
        with torch.no_grad():
            ascent = ascent_direction(
                z.detach(), checked, inner.dictionary.atoms, inner.dictionary.codes, inner.mu, inner.eps_sq
            )
            norms_sq = class_moments(z.detach(), checked).norms_sq
            bound = lipschitz_atoms(norms_sq, counts, inner.dictionary.codes, inner.mu)
            overlap_now = atom_overlap(inner.dictionary.atoms, inner.dictionary.codes)
            bound_codes = lipschitz_codes(overlap_now, counts, inner.mu, inner.num_classes)
            moved = inner.dictionary.atoms + inner.step_atoms * safe(ascent[0] + pull[0], bound)
            new_codes = inner.dictionary.codes + inner.step_codes * safe(ascent[1] + pull[1], bound_codes)
            inner.dictionary.atoms.copy_(torch.nn.functional.normalize(moved, dim=0))
            inner.dictionary.codes.copy_(new_codes.clamp_min(0))
            atoms, codes = inner.dictionary.atoms, inner.dictionary.codes
            self.multipliers += 0.1 * inner.mu * (counts > 0)[:, None, None] * gap(moments)
        linear = (counts[:, None, None] * self.multipliers * moments).sum()
        return residual(z, checked, atoms.clone(), codes.clone(), inner.mu) + linear


def recipe_of(setting: Setting) -> Recipe:
    base = BASES[setting.base]
    changes = {
        name: getattr(setting, name)
        for name in ("epochs", "batch_size", "momentum")
        if getattr(setting, name) is not None
    }
    names = {"mu": "mu", "atoms": "atoms_per_class", "step_atoms": "step_atoms", "step_codes": "step_codes"}
    inner = {to: getattr(setting, of) for of, to in names.items() if getattr(setting, of) is not None}
    if setting.latch_every is not None:
        inner["latch_every"] = setting.latch_every
    if setting.balance is not None:
        inner |= {"balance": setting.balance, "mu": None}
    if setting.unit_codes or setting.energy is not None:
        inner["energy"] = setting.energy or 1.0
    return replace(base, seed=setting.seed, vmcr2=replace(base.vmcr2, structure=setting.structure, **inner), **changes)


def criterion_of(setting: Setting, recipe: Recipe, k: int, m: int) -> torch.nn.Module:
    d = recipe.feature_dim
    batch = -(-m // -(-m // recipe.batch_size))
    if setting.objective == "ce":
        return CrossEntropyHead(d, k)
    if setting.objective == "mcr2":
        return vmcr2.MCR2Loss(k, eps_sq=recipe.eps_sq)
    if setting.objective == "memory":
        return MemoryMCR2(k, d, recipe.eps_sq, setting.rate)
    chosen = recipe.vmcr2
    given = {"num_classes": k, "feature_dim": d, "eps_sq": recipe.eps_sq, "structure": chosen.structure}
    given |= {name: getattr(chosen, name) for name in ("step_atoms", "step_codes", "energy")}
    given["atoms_per_class"] = chosen.atoms_per_class or max(1, d // k)
    given["mu"] = chosen.mu or vmcr2.balanced_mu(d, batch, eps_sq=recipe.eps_sq, balance=chosen.balance)
    if setting.objective == "target":
        return FixedTarget(setting, **given)
    variant = Variant(setting, **given)
    return AugmentedLagrangian(variant) if setting.objective == "alm" else variant


def lr_of(setting: Setting, recipe: Recipe) -> float:
    if setting.lr is not None:
        return setting.lr
    return {"ce": recipe.ce.lr, "mcr2": recipe.mcr2.lr, "memory": recipe.mcr2.lr}.get(
        setting.objective, recipe.vmcr2.lr
    )


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
    dataset = unbalanced(data.load(recipe.data, root), setting.imbalance)
    torch.manual_seed(recipe.seed)
    example = data.plain(dataset.train_inputs[:1], recipe.augmentation)
    model = featurizers.build(recipe.network, tuple(example.shape[1:]), recipe.feature_dim)
    criterion = criterion_of(setting, recipe, dataset.num_classes, len(dataset.train_labels))
    optimizer = torch.optim.SGD(
        [*model.parameters(), *criterion.parameters()],
        lr_of(setting, recipe),
        momentum=recipe.momentum,
        weight_decay=setting.weight_decay,
    )
    line: dict[str, Any] = {"setting": asdict(setting), "history": [], "failed": None}
    began = time.perf_counter()
    every = max(recipe.evaluate_every, recipe.epochs // 12)
    try:
        for epoch in range(1, recipe.epochs + 1):
            generator = epoch_generator(recipe, epoch, torch.device("cpu"))
            if hasattr(criterion, "latch_from") and (epoch - 1) % recipe.vmcr2.latch_every == 0:
                latch(setting, recipe, dataset, model, criterion, generator)
            model.train()
            criterion.train()
            for rows in batches(dataset, recipe, generator):
                features = model(data.augmented(dataset.train_inputs[rows], recipe.augmentation, generator))
                loss = criterion(features, dataset.train_labels[rows])
                optimizer.zero_grad()
                loss.backward()
                if setting.gradient_clip is not None:
                    torch.nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], setting.gradient_clip)
                optimizer.step()
            if epoch % every == 0 or epoch == recipe.epochs:
                line["history"].append({"epoch": epoch} | state(recipe, dataset, model, criterion))
    except (InputError, NumericalError) as error:
        line["failed"] = str(error)[:200]
    line["seconds"] = time.perf_counter() - began
    return line


def latch(
    setting: Setting,
    recipe: Recipe,
    dataset: Dataset,
    model: torch.nn.Module,
    criterion: Any,
    generator: torch.Generator,
) -> None:
    pairs = (
        (data.plain(dataset.train_inputs[rows], recipe.augmentation), dataset.train_labels[rows])
        for rows in batches(dataset, recipe, generator)
    )
    if setting.latch_mode == "training":
        criterion.latch_from(model, pairs)
    else:
        features = extract(model, dataset, recipe.augmentation, recipe.batch_size).train
        criterion.latch(features, dataset.train_labels)


@torch.no_grad()
def state(recipe: Recipe, dataset: Dataset, model: torch.nn.Module, criterion: torch.nn.Module) -> dict[str, Any]:
    """The figures of one moment: rates of train and test, accuracies, and how far the subspaces overlap."""
    features = extract(model, dataset, recipe.augmentation, recipe.batch_size)
    head = criterion if isinstance(criterion, CrossEntropyHead) else None
    k = dataset.num_classes
    found = {
        name: value
        for name, value in asdict(measure(features, dataset, recipe.eps_sq, head)).items()
        if value is not None
    }
    found["accuracy_of_one"] = accuracy_by_components(features, dataset, [1])[1]
    test = vmcr2.rate_reduction(features.test, dataset.test_labels, num_classes=k, eps_sq=recipe.eps_sq)
    found["test_reduction"] = float(test.reduction)
    r = max(1, recipe.feature_dim // k)
    found["overlap_features"] = overlap(class_subspaces(features.train, dataset.train_labels, k, r))
    inner = getattr(criterion, "inner", criterion)
    if isinstance(inner, vmcr2.VMCR2Loss):
        d, s = recipe.feature_dim, inner.atoms_per_class
        found["overlap_dictionary"] = overlap(inner.dictionary.atoms.view(d, k, s).permute(1, 0, 2))
        found["energy_of_codes"] = float(inner.dictionary.codes.sum(0).mean())
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
