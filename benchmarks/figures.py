"""Draws the ablation's figures from results/ablation/runs.jsonl.

python benchmarks/figures.py
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import matplotlib as mpl
import numpy as np
from ablation import HERE, Setting, done, key
from matplotlib.figure import Figure
from studies import STUDIES

mpl.rcParams.update(
    {
        "figure.dpi": 130,
        "figure.constrained_layout.use": True,
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.titlesize": 10,
        "legend.frameon": False,
    }
)
KNOWN = done()
BLUE, RED, GREEN, GREY = "#0b6e99", "#d1495b", "#3a7d44", "#7a7a7a"


def lines_of(study: str, **changed: Any) -> list[dict[str, Any]]:
    """The runs of a study's base with some settings changed, one a seed."""
    spec = STUDIES[study]
    base = {name: value for name, value in spec.items() if name not in ("about", "rows", "seeds")}
    wanted = [key(asdict(Setting(**(base | changed | {"seed": seed})))) for seed in spec["seeds"]]
    return [KNOWN[name] for name in wanted if name in KNOWN]


def end(lines: list[dict[str, Any]], name: str) -> tuple[float, float]:
    """Mean and spread over seeds of a final figure; a run that stopped counts with its last."""
    values = [line["history"][-1][name] for line in lines if line["history"]]
    return (float(np.mean(values)), float(np.std(values))) if values else (np.nan, np.nan)


def balance() -> None:
    figure = Figure(figsize=(8, 3.1))
    left, right = figure.subplots(1, 2)
    for base, label, colour, limit in (
        ("digits-now", "digits", BLUE, 24.1),
        ("omniglot100-now", "omniglot100", RED, 80.1),
    ):
        rows = [row for row in STUDIES["balance"]["rows"] if row.get("base", "digits-now") == base]
        found = {row["balance"]: lines_of("balance", **row) for row in rows}
        found[0.05] = lines_of("energy", base=base, **({"energy": 1.6} if base == "digits-now" else {}))
        shares = sorted(found)
        for axes, name, scale in ((left, "train_reduction", limit), (right, "test_accuracy", 1.0)):
            means, spreads = zip(*(end(found[share], name) for share in shares), strict=True)
            axes.errorbar(
                shares, np.array(means) / scale, np.array(spreads) / scale, color=colour, marker="o", label=label
            )
    left.set_title("ΔR as a share of exact MCR²'s", loc="left")
    right.set_title("test accuracy", loc="left")
    for axes in (left, right):
        axes.set(xscale="log", xlabel="ρ = µ m ε² / d   (lr · ρ kept)")
        axes.axvline(0.05, color=GREY, linestyle=":", linewidth=1)
    left.set_ylim(bottom=0)
    right.set_ylim(0.8, 1.0)
    left.legend()
    figure.savefig(HERE / "balance.png")


def collapse() -> None:
    """Before: the paper's free codes at fixed µ. After: µ from ρ. Architecture 1, ΔR of the training set."""
    figure = Figure(figsize=(8.4, 3.6))
    left, right = figure.subplots(1, 2)
    rates, cells, labels = (1e-4, 1e-3, 1e-2), [], []
    for mu in (0.03, 0.3, 1.0):
        for batch in (100, 1437):
            row = []
            for lr in rates:
                found = lines_of("collapse", energy=None, reduction="sum", mu=mu, batch_size=batch, lr=lr)
                row.append(end(found, "train_reduction")[0])
            cells.append(row)
            labels.append(f"µ {mu:g}, batch {batch} (ρ {mu * batch * 0.5 / 128:.2g})")
    draw_cells(left, cells, labels, rates, "before: µ fixed, no momentum")
    rates, cells, labels = (1e-3, 1e-2, 1e-1), [], []
    for clip in (None, 0.1):
        for batch in (100, 500, 1437):
            found = [lines_of("no-collapse", batch_size=batch, lr=lr, gradient_clip=clip) for lr in rates]
            cells.append([end(lines, "train_reduction")[0] for lines in found])
            labels.append(f"batch {batch}{'' if clip is None else ', gradients clipped to 0.1'}")
    draw_cells(right, cells, labels, rates, "after: µ from ρ = 0.05")
    figure.suptitle(
        "ΔR after 30 epochs, network without BatchNorm (batches of 500: 3 steps an epoch)", x=0.01, ha="left"
    )
    figure.savefig(HERE / "collapse.png")


def draw_cells(axes: Any, cells: list[list[float]], labels: list[str], rates: tuple[float, ...], title: str) -> None:
    axes.imshow(np.array(cells), cmap="viridis", vmin=0, vmax=15, aspect="auto")
    for i, row in enumerate(cells):
        for j, value in enumerate(row):
            axes.text(j, i, f"{value:.1f}", ha="center", va="center", color="white" if value < 9 else "black")
    axes.set_xticks(range(len(rates)), [f"{lr:g}" for lr in rates])
    axes.set_yticks(range(len(labels)), labels)
    axes.set(xlabel="learning rate")
    axes.set_title(title, loc="left")
    axes.tick_params(length=0)


def energy() -> None:
    figure = Figure(figsize=(8, 3.1))
    left, right = figure.subplots(1, 2)
    for base, free, label, colour, values, limit in (
        ("digits-now", "digits-free", "digits", BLUE, (1.0, 1.3, 1.6, 2.0), 24.1),
        ("omniglot100-now", "omniglot100-now", "omniglot100", RED, (1.0, 1.6, 3.0), 80.1),
    ):
        found = {value: lines_of("energy", base=base, energy=value) for value in values}
        open_end = lines_of("energy", base=free)
        for axes, name, scale in ((left, "train_reduction", limit), (right, "test_accuracy", 1.0)):
            means = [end(found[value], name)[0] / scale for value in values]
            axes.plot(values, means, color=colour, marker="o", label=f"{label}, energy set")
            ran_to = end(open_end, "energy_of_codes")[0]
            axes.plot(
                ran_to, end(open_end, name)[0] / scale, color=colour, marker="*", markersize=11, linestyle="none",
                label=f"{label}, codes free",
            )  # fmt: skip
    left.set_title("ΔR as a share of exact MCR²'s", loc="left")
    right.set_title("test accuracy, nearest subspace", loc="left")
    for axes in (left, right):
        axes.set(xlabel="Σ codes of a class")
    left.legend(fontsize=7)
    figure.savefig(HERE / "energy.png")


def why() -> None:
    figure = Figure(figsize=(9, 3.2))
    panels = figure.subplots(1, 3)
    rivals = (
        ({}, "V-MCR², codes free", BLUE, "-"),
        ({"energy": 1.0, "lr": 0.2}, "V-MCR², Σ codes = 1", BLUE, "--"),
        ({"objective": "mcr2"}, "exact MCR²", RED, "-"),
        ({"objective": "memory", "rate": 0.3}, "MCR² on a moving average", RED, "--"),
        ({"objective": "target", "atoms": 1}, "fixed random target", GREEN, "-"),
        ({"frozen": True, "latch_every": 5}, "latched every 5 epochs, no steps", GREEN, "--"),
    )
    for row, label, colour, style in rivals:
        lines = lines_of("why", **row)
        if not lines:
            continue
        epochs = [point["epoch"] for point in lines[0]["history"]]
        for axes, name in zip(panels, ("train_compression", "overlap_features", "test_accuracy"), strict=True):
            means = np.mean([[point[name] for point in line["history"]] for line in lines], axis=0)
            axes.plot(epochs, means, style, color=colour, label=label)
        if "overlap_dictionary" in lines[0]["history"][0] and not row:
            means = np.mean([[point["overlap_dictionary"] for point in line["history"]] for line in lines], axis=0)
            panels[1].plot(epochs, means, ":", color="black", label="… its dictionary")
    panels[0].set_title("R_c (lower: classes compressed)", loc="left")
    panels[1].set_title("overlap of the classes' subspaces", loc="left")
    panels[1].annotate("latched again", (55, 1.3e-2), (28, 2e-1), fontsize=7, arrowprops={"arrowstyle": "-", "lw": 0.5})
    panels[2].set_title("test accuracy", loc="left")
    panels[1].set(yscale="log")
    for axes in panels:
        axes.set(xlabel="epoch")
    handles, labels = panels[1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=7)
    figure.savefig(HERE / "why.png")


if __name__ == "__main__":
    for draw in (balance, collapse, energy, why):
        draw()
        print(HERE / f"{draw.__name__}.png")
