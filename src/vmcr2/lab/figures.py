"""Figures from run folders alone. A `draw_*` given Axes returns them; any other saves its figures, returning paths."""

from __future__ import annotations

import textwrap
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis, XAxis
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from vmcr2.dictionary import Structure
from vmcr2.embeddings import LabelQuality
from vmcr2.lab.files import replacing
from vmcr2.lab.recipes import OBJECTIVES, ObjectiveName
from vmcr2.lab.run import RunFolder
from vmcr2.lab.sources import Dataset
from vmcr2.subspaces import default_components

_NAMED_CLASSES = 20  # at most this many are named on an axis
_SHEET_ROWS, _SHEET_COLUMNS = 10, 8  # of a contact sheet
_SIMILARITY_NOTE = (
    "Good: light except for the diagonal blocks, the classes. Dark elsewhere: classes share directions. A block "
    "that is dark all over: its class has lost its variety."
)
_CODES_NOTES: dict[Structure, str] = {
    "shared": "Good: each class has atoms of its own. An atom dark in many classes is a direction that they share.",
    "block": "A column shows a class's own atoms. Several dark: the class keeps its variety. One of several: it is "
    "pressed into one direction.",
}
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
    styles: tuple[tuple[str, str, dict[str, Any]], ...] = (
        ("train_expansion", "expansion R", {"color": "#3a7d44", "linestyle": "--"}),
        ("train_compression", "compression $R_c$", {"color": "#d1495b", "linestyle": ":"}),
        ("train_reduction", "reduction ΔR = R − $R_c$", {"color": "#0b6e99", "linewidth": 2.2}),
    )
    _draw_over_epochs(axes, metrics, styles)
    axes.set(ylabel="rate of the training set (nats)")
    axes.set_ylim(bottom=0, top=1.3 * axes.get_ylim()[1])  # room for the legend
    axes.legend(loc="upper left", ncols=3, fontsize=7, columnspacing=1, handlelength=1.5)
    return axes


def draw_accuracy(axes: Axes, metrics: Sequence[dict[str, Any]], part: str) -> Axes:
    """Draws the accuracy of nearest subspaces over epochs, and that of cross-entropy's own head if there is one."""
    styles: tuple[tuple[str, str, dict[str, Any]], ...] = (
        ("test_accuracy", "nearest subspace (eq. 8)", {"color": "#0b6e99", "linewidth": 2.2}),
        ("head_accuracy", "own linear head", {"color": "#7a7a7a", "linestyle": "--"}),
    )
    _draw_over_epochs(axes, metrics, styles)
    axes.set(ylabel=f"{part} accuracy")
    axes.set_ylim(top=1)
    if len(axes.lines) > 1:
        axes.legend(loc="best")
    return axes


def _draw_over_epochs(
    axes: Axes, metrics: Sequence[dict[str, Any]], styles: Sequence[tuple[str, str, dict[str, Any]]]
) -> None:
    for key, label, style in styles:
        points = [(line["epoch"], line[key]) for line in metrics if line.get(key) is not None]
        if points:
            marker = "o" if len(points) < 2 else None
            axes.plot(*zip(*points, strict=True), label=label, marker=marker, clip_on=False, **style)
    _count_epochs(axes)


def _count_epochs(axes: Axes) -> None:
    axes.set(xlabel="epoch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def draw_similarity(axes: Axes, features: np.ndarray, labels: np.ndarray, names: np.ndarray) -> Axes:
    """Draws |z_i · z_i'| between training samples sorted by class (the paper's Figure 2); returns the Axes."""
    z = features.astype(np.float32)
    # Steps of 1/20 are as fine as the colours can show, in a file a tenth of the size.
    axes.imshow(np.round(20 * np.abs(z @ z.T)) / 20, vmin=0, vmax=1, cmap="magma_r", interpolation="nearest")
    edges = np.flatnonzero(np.diff(labels)) + 0.5
    bounds = np.concatenate([[-0.5], edges, [len(labels) - 0.5]])
    shown = [_readable(names[j]) for j in labels[np.concatenate([[0], (edges + 0.5).astype(int)])]]
    middles = (bounds[1:] + bounds[:-1]) / 2
    axes.set_xticks(middles, shown if max(map(len, shown)) <= 2 else [""] * len(shown))
    axes.set_yticks(middles, shown, fontsize=6.5 if any("\n" in name for name in shown) else None)
    axes.tick_params(length=0)
    for edge in edges:
        axes.axhline(edge, color="white", linewidth=0.5)
        axes.axvline(edge, color="white", linewidth=0.5)
    for side in axes.spines.values():
        side.set_visible(False)
    return axes


def _readable(name: str, width: int = 32) -> str:
    """Returns a class name for a figure: words separated, on at most two lines."""
    whole = str(name).encode("utf-8", "replace").decode()  # the name of a folder may not be valid text
    words = whole.replace("/character", " ").replace("_", " ")
    lines = textwrap.wrap(words, width)
    if len(lines) > 2:  # names may differ only at their end
        lines = [lines[0], f"…{words[1 - width :]}"]
    return "\n".join(lines).replace("$", r"\$")


def draw_spectra(axes: Axes, spectra: np.ndarray, components: int) -> Axes:
    """Draws the eigenvalues of every class's second moment C_j, which sum to 1 for features of norm 1."""
    shown = min(spectra.shape[1], max(4 * components, 20))
    ranks = np.arange(1, shown + 1)
    floor = 1e-5
    clipped = np.maximum(spectra[:, :shown], floor)
    lines = axes.plot(ranks, clipped.T, color="#0b6e99", alpha=max(0.08, min(0.5, 5 / len(spectra))), linewidth=0.8)
    lines[0].set_label("one line per class")
    axes.plot(ranks, np.exp(np.log(clipped).mean(0)), color="black", label="geometric mean over classes")
    axes.axvline(components + 0.5, color="#d1495b", linestyle="--", linewidth=1, label=f"⌊d/k⌋ = {components}")
    axes.set(yscale="log", xlabel="component, the strongest first", ylabel="share of the class's energy")
    axes.set_ylim(floor, 1.3)
    axes.set_xlim(left=1)
    axes.legend(loc="upper right")
    return axes


def draw_codes(axes: Axes, codes: np.ndarray, names: np.ndarray, structure: Structure) -> Axes:
    """Draws the codes Ã, atoms down and classes across; names are shown if there are few.

    Args:
        axes: to draw into.
        codes: (q, k) of shared structure, or (s, k) of block structure, where a column holds a class's own atoms.
        names: of the k classes.
        structure: of the dictionary.
    """
    shown = np.sqrt(codes)
    image = axes.imshow(shown, aspect="auto", cmap="magma_r", interpolation="nearest", vmin=0)
    axes.set(xlabel=f"class (all {codes.shape[1]}, in the order of their labels)")
    axes.set_ylabel("atom" if structure == "shared" else "atom of the class")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True))
    if len(names) <= _NAMED_CLASSES:
        _name(axes.xaxis, names)
    figure = axes.get_figure()
    assert figure is not None
    figure.colorbar(image, ax=axes, label="√(energy of the atom in the class)", shrink=0.8)
    return axes


def draw_confusion(axes: Axes, counts: np.ndarray, names: np.ndarray) -> Axes:
    """Draws how often each class was taken for each other, with the counts in the cells.

    If there are many classes, those with the most errors are shown, and the others together as one more column.

    Args:
        axes: to draw into.
        counts: (k, k), true classes down, predicted ones across.
        names: of the k classes.
    """
    k = len(names)
    wrong = counts * (1 - np.eye(k, dtype=int))
    chosen = np.arange(k)
    if k > _NAMED_CLASSES:
        errors = wrong.sum(0) + wrong.sum(1)
        chosen = np.sort(np.argsort(-errors, kind="stable")[:_NAMED_CLASSES])
    shown = counts[np.ix_(chosen, chosen)]
    labels = names[chosen]
    if len(chosen) < k:
        shown = np.column_stack([shown, counts[chosen].sum(1) - shown.sum(1)])
        labels = np.append(labels, "any other")
    shares = shown / np.maximum(1, counts[chosen].sum(1, keepdims=True))
    axes.imshow(shares, vmin=0, vmax=1, cmap="Blues", interpolation="nearest")
    for i, j in zip(*shown.nonzero(), strict=True):
        colour = "white" if shares[i, j] > 0.6 else "black"
        axes.text(j, i, str(shown[i, j]), ha="center", va="center", fontsize=6.5, color=colour)
    _name(axes.yaxis, names[chosen])
    _name(axes.xaxis, labels)
    axes.set(xlabel="predicted class", ylabel="true class")
    axes.tick_params(length=0)
    return axes


def _name(axis: Axis, names: Sequence[str] | np.ndarray) -> None:
    """Writes class names along an axis, vertically if they are long."""
    shown = [_readable(name) for name in names]
    axis.set_ticks(range(len(shown)), shown, fontsize=7 if len(shown) <= 12 else 6)
    if isinstance(axis, XAxis) and max(map(len, shown)) > 2:
        axis.set_tick_params(labelrotation=90)


def draw_run(run: RunFolder) -> list[Path]:
    """Draws the figures of one run into its folder and returns their paths.

    Raises:
        InputError: the run is not complete (a ValueError).
    """
    recipe, arrays, metrics = run.recipe(), run.features(), run.metrics()
    name = f"{recipe.name}, {OBJECTIVES[recipe.objective]}, seed {recipe.seed}"
    names, part = arrays["class_names"], recipe.evaluated_on
    k = len(names)
    drawn = []
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(8, 3.6))
        left, right = figure.subplots(1, 2)
        draw_rates(left, metrics).set_title(f"Coding rates\n{name}", loc="left")
        draw_accuracy(right, metrics, part).set_title("Accuracy of nearest subspaces (eq. 8)", loc="left")
        note = (
            "Good: ΔR rises and levels off, and $R_c$ stays far below R. ΔR near 0 means that the features collapsed."
        )
        drawn.append(_save(figure, run.figures / "rates.png", note))
        figure, axes = _figure(5.4, 4.5)
        draw_similarity(axes, arrays["features"], arrays["labels"], names)
        of = _shown_classes(arrays)
        _title(figure, f"|cosine| between training samples, {of}\n{name}")
        figure.colorbar(axes.images[0], ax=axes, shrink=0.7)
        drawn.append(_save(figure, run.figures / "similarity.png", _SIMILARITY_NOTE))
        figure, axes = _figure(5.4, 3.8)
        draw_spectra(axes, arrays["spectra"], default_components(recipe.feature_dim, k))
        _title(figure, f"Spectrum of each class's features, all {k} classes\n{name}")
        note = (
            "Good: several strong components, then a fall: classes keep their variety. A fall after the first: each "
            "class is pressed to one direction."
        )
        drawn.append(_save(figure, run.figures / "spectra.png", note))
        if "confusion" in arrays:
            figure, axes = _figure(5.4, 5.4)
            counts = arrays["confusion"]
            draw_confusion(axes, counts, names)
            of = f"the {_NAMED_CLASSES} of {k} classes with the most errors" if k > _NAMED_CLASSES else of
            right = f"{np.trace(counts)} of {counts.sum()} {part} samples right"
            _title(figure, f"Confusion, {of}\n{name}: {right}")
            note = "Good: all on the diagonal. Numbers are samples, shades the share of the true class."
            drawn.append(_save(figure, run.figures / "confusion.png", note))
        if "codes" in arrays:
            figure, axes = _figure(5.4, 4.6)
            draw_codes(axes, arrays["codes"], names, recipe.vmcr2.structure)
            _title(figure, f"Codes of the dictionary\n{name}")
            drawn.append(_save(figure, run.figures / "codes.png", _CODES_NOTES[recipe.vmcr2.structure]))
    return drawn


def _shown_classes(arrays: dict[str, np.ndarray]) -> str:
    """Returns, in words, how many of the classes the similarity figure shows."""
    k, shown = len(arrays["class_names"]), len(np.unique(arrays["labels"]))
    return f"{shown} of {k} classes" if shown < k else f"all {k} classes"


def draw_suspects(dataset: Dataset, judged: LabelQuality, path: Path, title: str) -> Path:
    """Draws a contact sheet of samples whose label looks wrong, a row for each given label.

    Args:
        dataset: with images.
        judged: its training labels, at least one of them suspect.
        path: where to save.
        title: the name of the data.
    """
    labels, names, scores, order = judged.labels, dataset.class_names, judged.scores, judged.suspects
    counts = np.bincount(labels[order], minlength=len(names))
    classes = np.argsort(-counts, kind="stable")[: min(_SHEET_ROWS, int((counts > 0).sum()))]
    width = 1 + min(_SHEET_COLUMNS, int(counts.max()))
    images = dataset.train_inputs.permute(0, 2, 3, 1).numpy()
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(max(6.5, 0.95 * width + 2.0), 1.15 * len(classes) + 0.9))
        for cells, j in zip(figure.subplots(len(classes), width, squeeze=False), classes, strict=True):
            members = order[labels[order] == j][: width - 1]
            own = np.flatnonzero(labels == j)
            for axes, sample in zip(cells, [own[scores[own].argmax()], *members], strict=False):
                shown = images[sample][..., 0] if images.shape[3] == 1 else images[sample]
                axes.imshow(shown, cmap="gray" if images.shape[3] == 1 else None)
                wrapped = _readable(names[judged.suggested[sample]], 16)
                said = "fits best" if axes is cells[0] else f"{wrapped}?\n{scores[sample]:.2f}"
                axes.set_title(said, fontsize=6.5)
            for axes in cells:
                axes.set(xticks=[], yticks=[])
                axes.set_frame_on(False)
            label = f"labelled\n{_readable(names[j])}\n({counts[j]} suspects)"
            cells[0].set_ylabel(label, rotation=0, ha="right", va="center", fontsize=7)
        of = f"; shown: the {len(classes)} labels with the most" if len(classes) < (counts > 0).sum() else ""
        _title(figure, f"{title}: {len(order)} labels that look wrong{of}")
        note = (
            "First in each row: the sample that fits its label best, for comparison. Then the suspects, most suspect "
            "first: the label suggested instead, and the score (0: surely wrong)."
        )
        return _save(figure, path, note)


def draw_comparison(runs: Sequence[RunFolder], folder: Path) -> list[Path]:
    """Draws objectives side by side into a folder and returns the paths.

    Args:
        runs: complete runs of one recipe; for several seeds the mean is drawn, in a band of one standard deviation.
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
            (panels[1], "test_accuracy", f"{runs[0].recipe().evaluated_on} accuracy, nearest subspace"),
        ):
            for objective, members in by_objective.items():
                _draw_seeds(axes, [run.metrics() for run in members], key, objective)
            axes.set(ylabel=label)
            _count_epochs(axes)
            if key == "test_accuracy":
                axes.set_ylim(top=1)
            else:
                axes.set_ylim(bottom=0)
        panels[0].set_title(f"{title}: same network and data", loc="left")
        panels[1].legend(loc="best")
        several = max(len(members) for members in by_objective.values()) > 1
        note = (
            "Good: both rise and level off. A high ΔR beside a low accuracy: the features expand and never compress."
            + (" Bands: one standard deviation between seeds." if several else "")
        )
        drawn.append(_save(figure, folder / "curves.png", note))
        figure = Figure(figsize=(3.1 * len(by_objective), 3.3))
        panels = figure.subplots(1, len(by_objective), squeeze=False)[0]
        for axes, (objective, members) in zip(panels, by_objective.items(), strict=True):
            arrays = members[0].features()
            draw_similarity(axes, arrays["features"], arrays["labels"], arrays["class_names"])
            axes.set_title(OBJECTIVES[objective], loc="left")
            if axes is not panels[0]:
                axes.set_yticklabels([])
        _title(figure, f"{title}: |cosine| between training samples by class, {_shown_classes(runs[0].features())}")
        figure.colorbar(panels[0].images[0], ax=list(panels), shrink=0.6)
        drawn.append(_save(figure, folder / "similarity.png", _SIMILARITY_NOTE))
    return drawn


def draw_convergence(runs: Mapping[tuple[str, ObjectiveName], RunFolder], path: Path, title: str) -> Path:
    """Draws ΔR over epochs, a panel per data set and a line per objective, with R and R_c (the paper's Figure 1).

    Args:
        runs: complete runs by (row, objective).
        path: where to save.
        title: of the figure.
    """
    names = list(dict.fromkeys(row for row, _ in runs))
    lines = -(-len(names) // 3)
    columns = -(-len(names) // lines)
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(max(5.0, 3.1 * columns), 2.6 * lines + 0.5))
        panels = figure.subplots(lines, columns, squeeze=False).flatten()
        for axes, name in zip(panels, names, strict=False):
            for (row, objective), run in runs.items():
                if row != name:
                    continue
                measured = [line for line in run.metrics() if "train_reduction" in line]
                epochs, colour = [line["epoch"] for line in measured], _COLOURS[objective]
                lone = len(epochs) < 2  # a single measurement makes no line
                reduction = [line["train_reduction"] for line in measured]
                label = f"ΔR, {OBJECTIVES[objective]}"
                axes.plot(epochs, reduction, color=colour, label=label, marker="o" if lone else None)
                for key, style, letter in (("train_expansion", "--", "$R$"), ("train_compression", ":", "$R_c$")):
                    values, marker = [line[key] for line in measured], letter if lone else None
                    axes.plot(epochs, values, style, color=colour, linewidth=0.8, marker=marker, markersize=9)
            axes.set_title(name, loc="left")
            _count_epochs(axes)
            axes.set_ylim(0, axes.get_ylim()[1] * (1.3 if axes is panels[0] else 1))  # room for the legend
        for axes in panels[len(names) :]:
            axes.set_visible(False)
        panels[0].set_ylabel("nats")
        panels[0].plot([], [], "--", color="black", linewidth=0.8, label="R")
        panels[0].plot([], [], ":", color="black", linewidth=0.8, label="$R_c$")
        panels[0].legend(loc="upper right", fontsize=7, ncols=2)
        _title(figure, title)
        return _save(figure, path, "Good: ΔR rises and levels off, and $R_c$ stays far below R.")


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
        # Noise does not compress: at a higher resolution the file would be a megabyte.
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
                epochs = f"{runs[name, objective].recipe().epochs} epochs"
                axes.set_title(f"{name}, {_shown_classes(arrays)}\n{epochs}" if i == 0 else epochs)
                if j == 0:
                    axes.set_ylabel(OBJECTIVES[objective])
        shown = next(axes for line in panels for axes in line if axes.images)
        figure.colorbar(shown.images[0], ax=list(panels.flatten()), shrink=0.7)
        _title(figure, title)
        return _save(figure, path, _SIMILARITY_NOTE)


def draw_noise(records: Sequence[dict[str, Any]], path: Path, title: str) -> Path:
    """Draws test accuracy over the share of wrong training labels, a panel per data set.

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
                        axes.set_xticks(shares)
            axes.set_title(name, loc="left")
            axes.set(xlabel="wrong training labels (%)", ylabel="test accuracy")
        panels[0].legend(loc="best")
        _title(figure, title)
        return _save(figure, path, "Good: a line that stays high as labels get worse.")


def _draw_seeds(axes: Axes, seeds: list[list[dict[str, Any]]], key: str, objective: ObjectiveName) -> None:
    curves = [[(line["epoch"], line[key]) for line in metrics if key in line] for metrics in seeds]
    epochs = [epoch for epoch, _ in curves[0] if all(epoch in dict(curve) for curve in curves)]
    values = np.array([[dict(curve)[epoch] for epoch in epochs] for curve in curves])
    mean, colour = values.mean(0), _COLOURS[objective]
    spread = values.std(0, ddof=1) if len(values) > 1 else 0 * mean
    axes.fill_between(epochs, mean - spread, mean + spread, color=colour, alpha=0.2, linewidth=0)
    axes.plot(epochs, mean, color=colour, label=OBJECTIVES[objective], clip_on=False)


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height))
    return figure, figure.subplots()


def _title(figure: Figure, title: str) -> None:
    figure.suptitle(title, x=0.01, ha="left", fontsize=10)


def _save(figure: Figure, path: Path, note: str) -> Path:
    """Saves a figure with a note under it that says what is good."""
    wide = int(figure.get_figwidth() * 17)
    figure.supxlabel(textwrap.fill(note, wide), x=0.01, ha="left", fontsize=7.5, color="#555555")
    path.parent.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings(record=True) as caught, replacing(path) as file:
        warnings.simplefilter("always")
        figure.savefig(file, format=path.suffix[1:])
    glyphs = [one for one in caught if "missing from font" in str(one.message)]
    for one in caught:
        if one not in glyphs:
            warnings.warn(one.message, stacklevel=2)
    if glyphs:  # Matplotlib warns about each
        warnings.warn("the font of the figures lacks characters of some class names: boxes replace them", stacklevel=1)
    return path
