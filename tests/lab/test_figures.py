"""Figures that a stranger can read: names in full, classes counted, errors shown."""

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.figure import Figure

from vmcr2.lab import figures


def texts(axis):
    return [label.get_text() for label in axis.get_ticklabels()]


def test_class_names_are_written_in_full():
    names = np.array(["Alphabet_of_the_Magi/character01", "Ge_ez/character20"])
    axes = Figure().subplots()
    figures.draw_similarity(axes, np.eye(4)[[0, 0, 1, 1]], np.array([0, 0, 1, 1]), names)
    assert texts(axes.yaxis) == ["Alphabet of the Magi 01", "Ge ez 20"]


def test_long_class_names_take_two_lines():
    name = figures._readable("a_class_with_a_name_" + "of_many_words_" * 6)
    assert name.count("\n") == 1
    first, second = (
        figures._readable(f"Animalia_Annelida_Clitellata_Haplotaxida_Lumbricidae_Lumbricus_{kind}")
        for kind in ("rubellus", "terrestris")
    )
    assert first.startswith("Animalia Annelida")
    assert first.endswith("Lumbricus rubellus")
    assert second.endswith("Lumbricus terrestris")
    assert max(map(len, f"{first}\n{second}".split("\n"))) <= 32
    assert figures._readable("$x$") == r"\$x\$"


@pytest.mark.parametrize(("structure", "rows", "said"), [("shared", 6, "atom"), ("block", 2, "atom of the class")])
def test_codes_of_either_structure_are_named(structure, rows, said):
    axes = Figure().subplots()
    figures.draw_codes(axes, np.eye(rows, 3), np.array(["ash", "elm", "oak"]), structure)
    assert axes.get_ylabel() == said


def test_the_confusion_matrix_holds_every_test_sample():
    counts = np.array([[5, 1, 0], [0, 4, 0], [0, 2, 3]])
    axes = Figure().subplots()
    figures.draw_confusion(axes, counts, np.array(["ash", "elm", "oak"]))
    assert texts(axes.xaxis) == texts(axes.yaxis) == ["ash", "elm", "oak"]
    assert sum(int(text.get_text()) for text in axes.texts) == counts.sum()


def test_of_many_classes_those_with_the_most_errors_are_named():
    k = 50
    counts = 3 * np.eye(k, dtype=int)
    counts[40, 7] = counts[7, 30] = counts[41, 2] = 9
    axes = Figure().subplots()
    figures.draw_confusion(axes, counts, np.array([f"class {j}" for j in range(k)]))
    named = texts(axes.yaxis)
    assert len(named) == 20
    assert {"class 2", "class 7", "class 30", "class 40", "class 41"} <= set(named)
    assert texts(axes.xaxis) == [*named, "any other"]


@pytest.mark.parametrize("last", [3, 5, 40])
def test_epochs_are_whole(last):
    metrics = [{"epoch": i, "test_accuracy": 0.5, "head_accuracy": None} for i in range(1, last + 1)]
    figure = Figure()
    axes = figures.draw_accuracy(figure.subplots(), metrics, "validation")
    figure.draw_without_rendering()
    assert all(tick == int(tick) for tick in axes.get_xticks())
    assert axes.get_ylabel() == "validation accuracy"
    assert len(axes.lines) == 1  # no head, no line for it


def test_a_run_measured_once_shows_all_its_rates_in_figure_1(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(figures, "_save", lambda figure, path, note: drawn.append(figure) or path)

    class Run:
        def __init__(self, epochs):
            self.epochs = epochs

        def metrics(self):
            rates = {"train_reduction": 2.0, "train_expansion": 9.0, "train_compression": 7.0}
            return [{"epoch": 1}] + [{"epoch": epoch, **rates} for epoch in self.epochs]

    runs = {("digits", "mcr2"): Run([5]), ("digits", "vmcr2"): Run([5, 10])}
    figures.draw_convergence(runs, tmp_path / "figure1.png", "ΔR")
    lines = [line for line in drawn[0].axes[0].lines if len(line.get_xdata())]
    assert [line.get_marker() for line in lines] == ["o", "$R$", "$R_c$", "None", "None", "None"]
    assert [list(line.get_ydata()) for line in lines[:3]] == [[2.0], [9.0], [7.0]]


def test_figures_are_png_whatever_the_users_matplotlib_saves(tmp_path):
    with mpl.rc_context({"savefig.format": "pdf"}):
        path = figures._save(Figure(), tmp_path / "a.png", "a note")
    assert path.read_bytes().startswith(b"\x89PNG")
