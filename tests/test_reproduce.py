"""The paper's tables and figures from one command, at the size of a test: the digits stand in for MNIST."""

import json
from dataclasses import fields, replace

import pytest
from rich.console import Console

from vmcr2 import bench, cli, reproduce
from vmcr2.data import DataSettings
from vmcr2.errors import InputError
from vmcr2.recipes import RECIPES, VMCR2Settings
from vmcr2.reproduce import TABLE2, TABLE3, Request
from vmcr2.run import RunFolder

QUIET = Console(quiet=True)


@pytest.fixture
def small(monkeypatch):
    recipe = replace(
        RECIPES["digits"],
        name="mnist",
        epochs=2,
        feature_dim=32,
        checkpoint_seconds=0.0,
        device="cpu",
        vmcr2=VMCR2Settings(lr=1e-2, mu=0.1, atoms_per_class=3),
    )
    monkeypatch.setitem(reproduce.RECIPES, "mnist", recipe)
    monkeypatch.setitem(reproduce.RECIPES, "mnist-ours", replace(recipe, name="mnist-ours"))


def test_a_table_stands_beside_the_papers_and_goes_on(small, tmp_path):
    request = Request(rows=("mnist",), objectives=("vmcr2", "ce"), train_size=200, epochs=1, out=tmp_path)
    path, record = reproduce.table2(request, QUIET)
    text = path.read_text()
    assert "1 of 2000 epochs, the first 200 training images only" in text
    assert "(44.21)" in text
    assert "(0.9788)" in text
    assert "(0.9738)" in text
    run = RunFolder.open(tmp_path / "mnist-first200" / "vmcr2-seed0")
    before = run.checkpoint_file.stat().st_mtime_ns
    reproduce.table2(request, QUIET)
    assert run.checkpoint_file.stat().st_mtime_ns == before  # what is complete is not run again
    reproduce.table2(replace(request, epochs=3), QUIET)
    assert [line["epoch"] for line in run.metrics()] == [1, 2, 3]
    assert {line["epochs"] for line in json.loads(record.read_text())} == {3}


def test_seeds_are_averaged(small, tmp_path):
    request = Request(rows=("mnist",), objectives=("ce",), seeds=(0, 1), train_size=200, epochs=1, out=tmp_path)
    path, record = reproduce.table2(request, QUIET)
    heads = [line["head_accuracy"] for line in json.loads(record.read_text())]
    assert f"{sum(heads) / 2:.4f} (0.9738)" in path.read_text()


def test_figures_are_drawn_from_the_runs_of_the_table(small, tmp_path):
    request = Request(rows=("mnist",), train_size=200, epochs=2, evaluate_every=1, out=tmp_path)
    for figure in (reproduce.figure1, reproduce.figure2):
        (path,) = figure(request, QUIET)
        assert path.stat().st_size > 5000
    runs = tmp_path / "mnist-first200"
    times = {folder.name: (folder / "checkpoint.pt").stat().st_mtime_ns for folder in runs.iterdir()}
    assert times.keys() == {"mcr2-seed0", "vmcr2-seed0"}
    reproduce.table2(request, QUIET)
    for name, time in times.items():
        assert (runs / name / "checkpoint.pt").stat().st_mtime_ns == time


def test_wrong_labels_have_a_table_and_a_figure(small, tmp_path):
    request = Request(rows=("mnist-noise0", "mnist-noise50"), objectives=("ce",), epochs=1, out=tmp_path)
    text, record, figure = reproduce.noise(request, QUIET)
    assert figure.stat().st_size > 5000
    clean, noisy = json.loads(record.read_text())
    assert (clean["row"], noisy["row"]) == ("mnist-noise0", "mnist-noise50")
    assert noisy["head_accuracy"] < clean["head_accuracy"]
    assert RunFolder.open(tmp_path / "mnist-noise50" / "ce-seed0").recipe().data.label_noise == 0.5
    assert "mnist-noise50, cross-entropy" in text.read_text()


def test_our_own_recipes_are_kept_apart(small, tmp_path):
    request = Request(rows=("mnist",), objectives=("ce",), ours=True, train_size=200, epochs=1, out=tmp_path)
    path, _ = reproduce.table2(request, QUIET)
    assert path.name == "table2-ours-first200.md"
    assert "our settings" in path.read_text()
    assert (tmp_path / "mnist-ours-first200" / "ce-seed0").is_dir()


def test_timings_are_kept_row_by_row(monkeypatch, tmp_path):
    tiny = bench.Workload(100, (1, 8, 8), 4, "mlp", 16, 2, 50, 1.0, 0.5)
    monkeypatch.setattr(bench, "WORKLOADS", {"mnist": tiny, "cifar10": tiny})
    reproduce.table1(Request(rows=("mnist",), out=tmp_path), QUIET)
    kept = json.loads((tmp_path / "table1.json").read_text())
    path, stored = reproduce.table1(Request(out=tmp_path), QUIET)
    (where,) = kept
    after = json.loads(stored.read_text())[where]
    assert after["mnist"] == kept[where]["mnist"]
    assert after.keys() == {"mnist", "cifar10"}
    assert "cifar10, vmcr2 block" in path.read_text()


@pytest.mark.parametrize(
    ("target", "request_", "said"),
    [
        (reproduce.table2, Request(rows=("imagenet",)), "rows of table2 must be among mnist, .* got imagenet"),
        (reproduce.table3, Request(objectives=("mcr2",)), "objectives must be some that table3 has, got mcr2"),
        (reproduce.table3, Request(ours=True), "no recipe of our own for cifar100-strong"),
    ],
)
def test_what_the_paper_does_not_have_is_refused(tmp_path, target, request_, said):
    out = tmp_path / "out"
    with pytest.raises(InputError, match=said):
        target(replace(request_, out=out), QUIET)
    assert not out.exists()


def test_the_command_takes_a_target_and_every_field(capsys):
    assert cli.main(["reproduce", "table9"]) == 2
    assert "table1, table2, table3, noise, figure1, figure2" in capsys.readouterr().err
    assert [f.name for f in fields(Request)] == [f.name for f in fields(cli._ReproduceOptions)]


def test_every_row_has_its_recipe_with_the_papers_settings():
    for name in [*TABLE2, *TABLE3, *reproduce.FIGURE1]:
        recipe = RECIPES[name]
        assert recipe.epochs == 2000
        assert recipe.eps_sq == 0.5
        assert recipe.vmcr2.latch_every == 50
        assert (recipe.vmcr2.step_atoms, recipe.vmcr2.step_codes) == (5.0, 5.0)
        assert recipe.vmcr2.energy is None
        assert recipe.batch_size == (1000 if name in ("mnist", "cifar10") else 2000)
        strong = name.endswith("-strong")
        assert recipe.vmcr2.mu == (0.1 if strong else 1.0)
        assert (recipe.vmcr2.lr, recipe.mcr2.lr, recipe.ce.lr) == ((0.1, 0.1, 0.1) if strong else (1e-3, 1e-3, 1e-2))
    assert [RECIPES[name].feature_dim for name in TABLE2] == [128, 128, 500, 500]
    assert [RECIPES[name].vmcr2.atoms_per_class for name in TABLE2] == [20, 20, 10, 10]
    strong = RECIPES["cifar100-strong"]
    rates = [strong.lr_at(epoch) for epoch in (1, 1000, 1001, 1500, 1501, 2000)]
    assert rates == pytest.approx([0.1, 0.1, 0.01, 0.01, 0.001, 0.001])


def test_the_subset_is_what_is_trained_on(small, tmp_path):
    request = Request(rows=("mnist",), train_size=200, epochs=1, out=tmp_path)
    recipe = request.recipe("mnist", "ce", 0)
    assert recipe.data == DataSettings(train_size=200)
    assert recipe.epochs == 1
