"""Figures from run folders alone. Each `draw_*` takes Axes and returns them; `draw_run` and `draw_comparison` save."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from vmcr2.lab.recipes import OBJECTIVES, ObjectiveName
from vmcr2.lab.run import RunFolder

_COLOURS = {"vmcr2": "#0b6e99", "mcr2": "#d1495b", "ce": "#7a7a7a"}
_STYLE: dict[str, Any] = {
    "figure.dpi": 150,
    "figure.constrained_layout.use": True,
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "axes.grid": False,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
}


def draw_rates(axes: Axes, metrics: Sequence[dict[str, Any]]) -> Axes:
    """Draws exact R, R_c and ΔR of the training set over epochs (the paper's Figure 1)."""
    measured = [line for line in metrics if "train_reduction" in line]
    epochs = [line["epoch"] for line in measured]
    marker = "o" if len(measured) < 2 else None
    styles: tuple[tuple[str, str, dict[str, Any]], ...] = (
        ("train_expansion", "expansion R", {"color": "#3a7d44", "linestyle": "--"}),
        ("train_compression", "compression $R_c$", {"color": "#d1495b", "linestyle": ":"}),
        ("train_reduction", "reduction ΔR = R − $R_c$", {"color": "#0b6e99", "linewidth": 2.2}),
    )
    for key, label, style in styles:
        axes.plot(epochs, [line[key] for line in measured], label=label, marker=marker, **style)
    axes.set(xlabel="epoch", ylabel="rate of the training set (nats)")
    axes.set_ylim(bottom=0)
    axes.legend(loc="best")
    return axes


def draw_similarity(axes: Axes, features: np.ndarray, labels: np.ndarray, names: np.ndarray) -> Axes:
    """Draws |z_i · z_i'| between training samples sorted by class (the paper's Figure 2); returns the Axes."""
    z = features.astype(np.float32)
    # Steps of 1/20 are as fine as the colours show, and a tenth of the file.
    axes.imshow(np.round(20 * np.abs(z @ z.T)) / 20, vmin=0, vmax=1, cmap="magma_r", interpolation="nearest")
    edges = np.flatnonzero(np.diff(labels)) + 0.5
    bounds = np.concatenate([[-0.5], edges, [len(labels) - 0.5]])
    shown = [_short(names[j]) for j in labels[np.concatenate([[0], (edges + 0.5).astype(int)])]]
    middles = (bounds[1:] + bounds[:-1]) / 2
    axes.set_xticks(middles, shown if max(map(len, shown)) <= 2 else [""] * len(shown))
    axes.set_yticks(middles, shown)
    axes.tick_params(length=0)
    for edge in edges:
        axes.axhline(edge, color="white", linewidth=0.5)
        axes.axvline(edge, color="white", linewidth=0.5)
    for side in axes.spines.values():
        side.set_visible(False)
    return axes


def _short(name: str) -> str:
    """Returns a class name that fits an axis: alphabets are cut to their first letters."""
    if len(name) <= 12:
        return name
    head, _, tail = name.rpartition("/")
    return f"{head[:6]}…{tail.removeprefix('character')}" if head else f"{name[:11]}…"


def draw_spectra(axes: Axes, spectra: np.ndarray, components: int) -> Axes:
    """Draws the eigenvalues of every class's second moment C_j, which sum to 1 for features of norm 1."""
    shown = min(spectra.shape[1], max(4 * components, 20))
    ranks = np.arange(1, shown + 1)
    floor = 1e-5
    clipped = np.maximum(spectra[:, :shown], floor)
    axes.plot(ranks, clipped.T, color="#0b6e99", alpha=max(0.08, min(0.5, 5 / len(spectra))), linewidth=0.8)
    axes.plot(ranks, np.exp(np.log(clipped).mean(0)), color="black", label="geometric mean over classes")
    axes.axvline(components + 0.5, color="#d1495b", linestyle="--", linewidth=1, label=f"⌊d/k⌋ = {components}")
    axes.set(yscale="log", xlabel="component", ylabel="share of the class's energy")
    axes.set_ylim(floor, 1.3)
    axes.legend(loc="upper right")
    return axes


def draw_codes(axes: Axes, codes: np.ndarray) -> Axes:
    """Draws the codes Ã, atoms down and classes across."""
    shown = np.sqrt(codes)
    image = axes.imshow(shown, aspect="auto", cmap="magma_r", interpolation="nearest", vmin=0)
    axes.set(xlabel="class", ylabel="atom")
    figure = axes.get_figure()
    assert figure is not None
    figure.colorbar(image, ax=axes, label="√(energy of the atom in the class)", shrink=0.8)
    return axes


def draw_run(run: RunFolder) -> list[Path]:
    """Draws the figures of one run into its folder and returns their paths.

    Raises:
        InputError: the run is not complete (a ValueError).
    """
    recipe, arrays, metrics = run.recipe(), run.features(), run.metrics()
    name = f"{recipe.name}, {OBJECTIVES[recipe.objective]}, seed {recipe.seed}"
    k = len(arrays["class_names"])
    drawn = []
    with mpl.rc_context(_STYLE):
        figure, axes = _figure(4.8, 3.4)
        draw_rates(axes, metrics).set_title(f"Coding rates\n{name}", loc="left")
        drawn.append(_save(figure, run.figures / "rates.png"))
        figure, axes = _figure(4.8, 4.6)
        draw_similarity(axes, arrays["features"], arrays["labels"], arrays["class_names"])
        axes.set_title(f"|cosine| between training samples, by class\n{name}", loc="left")
        figure.colorbar(axes.images[0], ax=axes, shrink=0.7)
        drawn.append(_save(figure, run.figures / "similarity.png"))
        figure, axes = _figure(4.8, 3.4)
        draw_spectra(axes, arrays["spectra"], max(1, recipe.feature_dim // k))
        axes.set_title(f"Spectrum of each class's features\n{name}", loc="left")
        drawn.append(_save(figure, run.figures / "spectra.png"))
        if "codes" in arrays:
            figure, axes = _figure(4.8, 4.2)
            draw_codes(axes, arrays["codes"]).set_title(f"Codes of the dictionary\n{name}", loc="left")
            drawn.append(_save(figure, run.figures / "codes.png"))
    return drawn


def draw_comparison(runs: Sequence[RunFolder], folder: Path) -> list[Path]:
    """Draws objectives side by side into a folder and returns the paths.

    Args:
        runs: complete runs of one recipe; several seeds of an objective become a band of thin lines.
        folder: where to save.

    Raises:
        InputError: a run is not complete (a ValueError).
    """
    by_objective: dict[ObjectiveName, list[RunFolder]] = {}
    for run in runs:
        by_objective.setdefault(run.recipe().objective, []).append(run)
    title = runs[0].recipe().name
    drawn = []
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(8, 3.2))
        panels = figure.subplots(1, 2)
        for axes, key, label in (
            (panels[0], "train_reduction", "ΔR of the training set (nats)"),
            (panels[1], "test_accuracy", "test accuracy, nearest subspace"),
        ):
            for objective, members in by_objective.items():
                _draw_seeds(axes, [run.metrics() for run in members], key, objective)
            axes.set(xlabel="epoch", ylabel=label)
            if key == "test_accuracy":
                axes.set_ylim(top=1.005)
            else:
                axes.set_ylim(bottom=0)
        panels[0].set_title(f"{title}: three objectives, same network and data", loc="left")
        panels[1].legend(loc="best")
        drawn.append(_save(figure, folder / "curves.png"))
        figure = Figure(figsize=(3.1 * len(by_objective), 3.3))
        panels = figure.subplots(1, len(by_objective), squeeze=False)[0]
        for axes, (objective, members) in zip(panels, by_objective.items(), strict=True):
            arrays = members[0].features()
            draw_similarity(axes, arrays["features"], arrays["labels"], arrays["class_names"])
            axes.set_title(OBJECTIVES[objective], loc="left")
            if axes is not panels[0]:
                axes.set_yticklabels([])
        figure.suptitle(f"{title}: |cosine| between training samples, sorted by class")
        figure.colorbar(panels[0].images[0], ax=list(panels), shrink=0.6)
        drawn.append(_save(figure, folder / "similarity.png"))
    return drawn


def draw_convergence(runs: Mapping[tuple[str, ObjectiveName], RunFolder], path: Path, title: str) -> Path:
    """Draws ΔR over epochs, a panel a data set and a line an objective, R and R_c beside it (the paper's Figure 1).

    Args:
        runs: complete runs by (row, objective).
        path: where to save.
        title: of the figure.
    """
    names = list(dict.fromkeys(row for row, _ in runs))
    columns = min(3, len(names))
    lines = -(-len(names) // columns)
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(max(5.0, 3.1 * columns), 2.6 * lines + 0.5))
        panels = figure.subplots(lines, columns, squeeze=False).flatten()
        for axes, name in zip(panels, names, strict=False):
            for (row, objective), run in runs.items():
                if row != name:
                    continue
                measured = [line for line in run.metrics() if "train_reduction" in line]
                epochs, colour = [line["epoch"] for line in measured], _COLOURS[objective]
                marker = "o" if len(epochs) < 2 else None
                reduction = [line["train_reduction"] for line in measured]
                axes.plot(epochs, reduction, color=colour, label=f"ΔR, {OBJECTIVES[objective]}", marker=marker)
                for key, style in (("train_expansion", "--"), ("train_compression", ":")):
                    axes.plot(epochs, [line[key] for line in measured], style, color=colour, linewidth=0.8)
            axes.set_title(name, loc="left")
            axes.set(xlabel="epoch")
            axes.set_ylim(bottom=0)
        for axes in panels[len(names) :]:
            axes.set_visible(False)
        panels[0].set_ylabel("nats")
        panels[0].plot([], [], "--", color="black", linewidth=0.8, label="R")
        panels[0].plot([], [], ":", color="black", linewidth=0.8, label="$R_c$")
        panels[0].legend(loc="best", fontsize=7)
        figure.suptitle(title, x=0.01, ha="left")
        return _save(figure, path)


def draw_similarities(runs: Mapping[tuple[str, ObjectiveName], RunFolder], path: Path, title: str) -> Path:
    """Draws |z_i · z_i'| of training samples by class, data sets across and objectives down (the paper's Figure 2).

    Args:
        runs: complete runs by (row, objective).
        path: where to save.
        title: of the figure.
    """
    names = list(dict.fromkeys(row for row, _ in runs))
    objectives = list(dict.fromkeys(objective for _, objective in runs))
    with mpl.rc_context(_STYLE):
        # Noise does not compress: at more dots an inch the file would be a megabyte.
        figure = Figure(figsize=(2.6 * len(names) + 0.9, 2.5 * len(objectives) + 0.4), dpi=90)
        panels = figure.subplots(len(objectives), len(names), squeeze=False)
        for i, objective in enumerate(objectives):
            for j, name in enumerate(names):
                axes = panels[i][j]
                if (name, objective) not in runs:
                    axes.set_visible(False)
                    continue
                arrays = runs[name, objective].features()
                draw_similarity(axes, arrays["features"], arrays["labels"], arrays["class_names"])
                axes.set_xticklabels([])
                axes.set_yticklabels([])
                if i == 0:
                    axes.set_title(f"{name}, {runs[name, objective].recipe().epochs} epochs")
                if j == 0:
                    axes.set_ylabel(OBJECTIVES[objective])
        shown = next(axes for line in panels for axes in line if axes.images)
        figure.colorbar(shown.images[0], ax=list(panels.flatten()), shrink=0.7)
        figure.suptitle(title, x=0.01, ha="left")
        return _save(figure, path)


def draw_noise(records: Sequence[dict[str, Any]], path: Path, title: str) -> Path:
    """Draws test accuracy over the share of wrong training labels, a panel a data set.

    Args:
        records: summaries of runs with their `row`, "<data set>-noise<percent>".
        path: where to save.
        title: of the figure.
    """
    names = list(dict.fromkeys(record["row"].partition("-noise")[0] for record in records))
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(max(4.6, 3.4 * len(names)), 3.2))
        panels = figure.subplots(1, len(names), squeeze=False)[0]
        for axes, name in zip(panels, names, strict=True):
            for objective, label in OBJECTIVES.items():
                for key, style in (("test_accuracy", "-"), ("head_accuracy", "--")):
                    by_share: dict[int, list[float]] = {}
                    for record in records:
                        of, _, percent = record["row"].partition("-noise")
                        if of == name and record["objective"] == objective and record[key] is not None:
                            by_share.setdefault(int(percent), []).append(record[key])
                    if by_share:
                        shares = sorted(by_share)
                        means = [float(np.mean(by_share[share])) for share in shares]
                        own = ", own head" if key == "head_accuracy" else ""
                        axes.plot(shares, means, style, color=_COLOURS[objective], marker="o", label=label + own)
            axes.set_title(name, loc="left")
            axes.set(xlabel="wrong training labels (%)", ylabel="test accuracy")
        panels[0].legend(loc="best")
        figure.suptitle(title, x=0.01, ha="left")
        return _save(figure, path)


def _draw_seeds(axes: Axes, seeds: list[list[dict[str, Any]]], key: str, objective: ObjectiveName) -> None:
    curves = [[(line["epoch"], line[key]) for line in metrics if key in line] for metrics in seeds]
    for curve in curves:
        axes.plot(*zip(*curve, strict=True), color=_COLOURS[objective], alpha=0.25, linewidth=0.8)
    epochs = [epoch for epoch, _ in curves[0]]
    mean = np.mean([[value for _, value in curve] for curve in curves], axis=0)
    axes.plot(epochs, mean, color=_COLOURS[objective], label=OBJECTIVES[objective])


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height))
    return figure, figure.subplots()


def _save(figure: Figure, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return path
