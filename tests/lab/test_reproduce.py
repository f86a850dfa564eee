"""The paper's tables and figures from one command, at the size of a test: the digits stand in for MNIST."""

import json
from dataclasses import replace

import pytest
from rich.console import Console
from small import SMALL

from vmcr2.errors import InputError, NumericalError
from vmcr2.lab import bench, cli, paper, reproduce
from vmcr2.lab.paper import TABLE2
from vmcr2.lab.recipes import RECIPES, VMCR2Settings
from vmcr2.lab.reproduce import Request
from vmcr2.lab.run import RunFolder
from vmcr2.lab.sources import DataSettings

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
        vmcr2=VMCR2Settings(lr=0.1, atoms_per_class=3),
    )
    monkeypatch.setitem(paper.PAPER, "mnist", recipe)
    monkeypatch.setitem(paper.PAPER, "mnist-ours", replace(recipe, name="mnist-ours"))


def cells(text):
    """The table of a Markdown text: row name to column to cell."""
    lines = [[cell.strip() for cell in line.strip("|\n").split("|")] for line in text.splitlines() if line[:1] == "|"]
    return {line[0]: dict(zip(lines[0], line, strict=True)) for line in lines[2:]}


def test_a_table_stands_beside_the_papers_and_goes_on(small, tmp_path):
    request = Request(rows=("mnist",), objectives=("vmcr2", "ce"), train_size=200, epochs=1, out=tmp_path)
    path, record = reproduce.table2(request, QUIET)
    assert "(1 of 2 epochs, the first 200 training images only)" in path.read_text()
    table = cells(path.read_text())
    variational, plain = table["mnist, V-MCR²"], table["mnist, cross-entropy"]
    assert variational["ΔR"].endswith(" (44.21)")
    assert variational["test accuracy"].endswith(" (0.9788)")
    assert variational["own head"] == "–"
    assert plain["own head"].endswith(" (0.9738)")
    assert "(" not in plain["test accuracy"] + plain["ΔR"]
    run = RunFolder.open(tmp_path / "mnist-first200" / "vmcr2-seed0")
    assert variational["ΔR"].startswith(f"{run.summary()['train_reduction']:.2f} ")
    before = run.checkpoint_file.stat().st_mtime_ns
    reproduce.table2(request, QUIET)
    assert run.checkpoint_file.stat().st_mtime_ns == before  # what is complete is not run again
    reproduce.table2(replace(request, epochs=3), QUIET)
    assert [line["epoch"] for line in run.metrics()] == [1, 2, 3]
    assert {line["epochs"] for line in json.loads(record.read_text())} == {3}
    # Asking for less afterwards shows what is there, under a title that says so.
    reproduce.table2(replace(request, objectives=("ce",), epochs=1), QUIET)
    assert "the first 200 training images only)" in path.read_text()
    assert " of 2 epochs" not in path.read_text()
    assert cells(path.read_text()).keys() == table.keys()  # the other row is still there


def test_everything_is_looked_at_before_anything_runs(small, monkeypatch, tmp_path):
    monkeypatch.setattr(reproduce, "TABLE2", {"mnist": TABLE2["mnist"], "tiny-imagenet": TABLE2["tiny-imagenet"]})
    out = tmp_path / "out"
    request = Request(epochs=1, train_size=200, out=out, data_root=tmp_path)
    with pytest.raises(InputError, match="tiny-imagenet: there is no folder"):
        reproduce.table2(request, QUIET)
    assert not out.exists()
    one = replace(request, rows=("mnist",), objectives=("ce",))
    reproduce.table2(one, QUIET)
    with pytest.raises(InputError, match="another recipe .*evaluate_every"):
        reproduce.table2(replace(one, objectives=("mcr2", "ce"), evaluate_every=2), QUIET)
    assert not (out / "mnist-first200" / "mcr2-seed0").exists()


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
    reproduce.figure2(replace(request, epochs=None, evaluate_every=None), QUIET)  # at the length that they have
    for name, time in times.items():
        assert (runs / name / "checkpoint.pt").stat().st_mtime_ns == time


def test_a_run_is_no_folder_for_tables(small, tmp_path):
    request = Request(rows=("mnist",), objectives=("ce",), train_size=200, epochs=1, out=tmp_path)
    reproduce.table2(request, QUIET)
    with pytest.raises(InputError, match="out must be a folder to hold runs, got .*which is a run itself"):
        reproduce.noise(replace(request, rows=(), out=tmp_path / "mnist-first200" / "ce-seed0"), QUIET)


def test_wrong_labels_have_a_table_and_a_figure(small, tmp_path):
    request = Request(rows=("mnist-noise0", "mnist-noise50"), objectives=("ce",), epochs=1, out=tmp_path)
    text, record, figure = reproduce.noise(request, QUIET)
    assert figure.stat().st_size > 5000
    clean, noisy = json.loads(record.read_text())
    assert (clean["row"], noisy["row"]) == ("mnist-noise0", "mnist-noise50")
    assert noisy["head_accuracy"] < clean["head_accuracy"]
    assert RunFolder.open(tmp_path / "mnist-noise50" / "ce-seed0").recipe().data.label_noise == 0.5
    assert "mnist-noise50, cross-entropy" in text.read_text()


def test_a_run_that_diverges_leaves_the_others(small, monkeypatch, tmp_path, capsys):
    recipe = paper.PAPER["mnist"]
    monkeypatch.setitem(paper.PAPER, "mnist", replace(recipe, vmcr2=replace(recipe.vmcr2, lr=1e30)))
    request = Request(rows=("mnist",), objectives=("vmcr2", "ce"), train_size=200, epochs=2, out=tmp_path)
    path, _ = reproduce.table2(request, Console())
    assert list(cells(path.read_text())) == ["mnist, cross-entropy"]
    assert "mnist, vmcr2, seed 0 is left out: training diverged" in capsys.readouterr().out
    with pytest.raises(NumericalError, match="every run of table2 diverged"):
        reproduce.table2(replace(request, objectives=("vmcr2",), out=tmp_path / "other"), QUIET)
    with pytest.raises(NumericalError, match="every run of table2 diverged"):  # though there is a table to show
        reproduce.table2(replace(request, objectives=("vmcr2",)), QUIET)


def test_a_run_stands_when_the_settings_of_another_objective_change(small, monkeypatch, tmp_path):
    request = Request(rows=("mnist",), objectives=("vmcr2", "ce"), train_size=200, epochs=1, out=tmp_path)
    reproduce.table2(request, QUIET)
    recipe = paper.PAPER["mnist"]
    monkeypatch.setitem(paper.PAPER, "mnist", replace(recipe, vmcr2=replace(recipe.vmcr2, pull=0.5)))
    reproduce.table2(replace(request, objectives=("ce",), epochs=2), QUIET)  # it goes on, from its checkpoint
    assert RunFolder.open(tmp_path / "mnist-first200" / "ce-seed0").summary()["epochs"] == 2
    with pytest.raises(InputError, match="another recipe .*vmcr2.pull: 1.0, 0.5"):
        reproduce.table2(request, QUIET)


def test_our_own_recipes_are_kept_apart(small, tmp_path):
    request = Request(rows=("mnist",), objectives=("ce",), ours=True, train_size=200, epochs=1, out=tmp_path)
    path, _ = reproduce.table2(request, QUIET)
    assert path.name == "table2-ours-first200.md"
    assert "our settings" in path.read_text()
    assert (tmp_path / "mnist-ours-first200" / "ce-seed0").is_dir()


def test_timings_are_kept_row_by_row(monkeypatch, tmp_path):
    tiny = bench.Workload(replace(SMALL, batch_size=50), 100, (1, 8, 8), 4)
    monkeypatch.setattr(bench, "WORKLOADS", {"mnist": tiny, "cifar10": tiny})
    epoch_cost = bench.epoch_cost
    monkeypatch.setattr(bench, "epoch_cost", lambda workload, device: epoch_cost(workload, device, 0.01))
    reproduce.table1(Request(rows=("mnist",), out=tmp_path), QUIET)
    (kept,) = json.loads((tmp_path / "table1.json").read_text())
    elsewhere = {"where": "another machine", "rows": kept["rows"]}
    (tmp_path / "table1.json").write_text(json.dumps([elsewhere, kept]))
    path, stored = reproduce.table1(Request(out=tmp_path), QUIET)
    first, after = json.loads(stored.read_text())
    assert first == elsewhere
    assert after["rows"]["mnist"] == kept["rows"]["mnist"]
    assert after["rows"].keys() == {"mnist", "cifar10"}
    assert "cifar10, vmcr2 block" in path.read_text()
    assert "another machine" in path.read_text()
    for text in ("[", "[{}]", "null", "3"):
        stored.write_text(text)
        with pytest.raises(InputError, match="table1.json is damaged"):
            reproduce.table1(Request(out=tmp_path), QUIET)


@pytest.mark.parametrize(
    ("target", "request_", "said"),
    [
        (reproduce.table2, Request(rows=("imagenet",)), "rows of table2 must be among mnist, .* got imagenet"),
        (reproduce.table3, Request(objectives=("mcr2",)), "objectives must be among those of table3, got mcr2"),
        (
            reproduce.table3,
            Request(ours=True),
            "ours must be off for table3, which has no recipes of our own",
        ),
        (reproduce.figure1, Request(ours=True, rows=("cifar100-d100",)), "rows of figure1 --ours must be among mnist"),
        (reproduce.table2, Request(seeds=()), "seeds must name at least one"),
        (reproduce.figure2, Request(seeds=(0, 1)), "seeds must name exactly one for figure2"),
        (reproduce.table1, Request(epochs=3, ours=True), "epochs, ours must be left out for table1"),
        (reproduce.table1, Request(seeds=(3,)), "seeds must be left out for table1"),
    ],
)
def test_what_the_paper_does_not_have_is_refused(tmp_path, target, request_, said):
    out = tmp_path / "out"
    with pytest.raises(InputError, match=said):
        target(replace(request_, out=out), QUIET)
    assert not out.exists()


def test_the_command_takes_a_target_and_its_flags(small, monkeypatch, capsys, tmp_path):
    assert cli.main(["reproduce", "table9"]) == 2
    assert "table1, table2, table3, noise, figure1, figure2" in capsys.readouterr().err
    given = [
        "--rows",
        "mnist",
        "--objectives",
        "ce",
        "--seeds",
        "1",
        "2",
        "--epochs",
        "1",
        "--train-size",
        "200",
        "--test-size",
        "50",
    ]
    seen = []
    monkeypatch.setitem(reproduce.TARGETS, "table2", lambda request, _: seen.append(request) or [])
    assert cli.main(["reproduce", "table2", *given, "--out", str(tmp_path), "--ours", "--evaluate-every", "3"]) == 0
    (request,) = seen
    assert request == Request(("mnist",), ("ce",), (1, 2), 1, 200, 50, 3, True, tmp_path, None)


def test_what_will_be_trained_is_said_before_it_is(small, capsys, tmp_path):
    given = ["reproduce", "table2", "--rows", "mnist", "--objectives", "ce", "--train-size", "200"]
    assert cli.main([*given, "--out", str(tmp_path)]) == 0
    assert capsys.readouterr().out.startswith("training mnist ce seed 0 to 2 epochs; --ours and --epochs make it")
    assert cli.main([*given, "--out", str(tmp_path)]) == 0
    assert "training" not in capsys.readouterr().out.partition("|")[0].replace("training images", "")


def test_the_subset_is_what_is_trained_on(small, tmp_path):
    request = Request(rows=("mnist",), objectives=("ce",), train_size=70, test_size=9, epochs=1, out=tmp_path)
    path, _ = reproduce.table2(request, QUIET)
    assert "the first 70 training images only, the first 9 test images only" in path.read_text()
    run = RunFolder.open(tmp_path / "mnist-first70-test9" / "ce-seed0")
    assert run.recipe().data == DataSettings(train_size=70, test_size=9)
    assert run.summary()["test_accuracy"] * 9 == pytest.approx(round(run.summary()["test_accuracy"] * 9))
    assert len(run.features()["labels"]) == 70  # the figures show up to 50 of each class: here all there are
