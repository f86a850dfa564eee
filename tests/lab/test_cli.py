"""The command line, end to end."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pytest
from PIL import Image
from small import SMALL, without_times

import vmcr2
from vmcr2 import __version__
from vmcr2.embeddings import LabelQuality
from vmcr2.lab import bench, figures, recipes, sources, sweep
from vmcr2.lab.cli import main
from vmcr2.lab.run import RunFolder

QUICK = ["--epochs", "2", "--data.train-size", "200", "--feature-dim", "24", "--device", "cpu"]
QUICK += ["--vmcr2.atoms-per-class", "2"]


@pytest.fixture
def drawn():
    """Asked for by the tests that look for a run's figures."""


@pytest.fixture(autouse=True)
def undrawn(request, monkeypatch):
    """Notes the runs whose figures would be drawn, which takes longer than the runs."""
    noted = []
    if "drawn" not in request.fixturenames:
        monkeypatch.setattr(figures, "draw_run", lambda run: noted.append(run.path.name) or [])
    return noted


# The command in a process of its own, without figures.
COMMANDS = """
import sys
from vmcr2.lab import figures
from vmcr2.lab.cli import main
figures.draw_run = lambda run: []
sys.exit(sum(main(each.split()) for each in sys.argv[1:]))
"""


def test_train_evaluate_plot(drawn, tmp_path, capsys):
    out = str(tmp_path / "run")
    assert main(["train", "digits", *QUICK, "--objective", "ce", "--seed", "3", "--out", out]) == 0
    printed = capsys.readouterr().out
    assert "epoch 2/2" in printed
    assert "ΔR" in printed
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["objective"], summary["seed"], summary["epochs"]) == ("ce", 3, 2)
    assert main(["evaluate", out, "--components", "25"]) == 2
    assert "components must be at most 24 (feature_dim), got 25" in capsys.readouterr().err
    assert main(["evaluate", out, "--components", "1", "2"]) == 0
    evaluation = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert evaluation["test_accuracy"] == summary["test_accuracy"]
    assert evaluation["accuracy_by_components"]["2"] == summary["test_accuracy"]
    for figure in (tmp_path / "run" / "figures").iterdir():
        figure.unlink()
    assert main(["plot", out]) == 0
    assert {path.name for path in (tmp_path / "run" / "figures").iterdir()} == {
        "confusion.png",
        "rates.png",
        "similarity.png",
        "spectra.png",
    }
    assert main(["train", "--resume", out, "--epochs", "3"]) == 0
    assert "nothing to do" not in capsys.readouterr().out
    assert main(["train", "--resume", out]) == 0
    assert "is complete at 3 epochs: nothing to do" in " ".join(capsys.readouterr().out.split())
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["epochs"] == 3


def test_compare_goes_on_where_it_was(undrawn, tmp_path, capsys):
    command = ["compare", "digits", *QUICK, "--objectives", "vmcr2", "ce", "--seeds", "0", "1", "--out", str(tmp_path)]
    assert main(command) == 0
    folders = {f"{objective}-seed{seed}" for objective in ("vmcr2", "ce") for seed in (0, 1)}
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == folders | {"figures"}
    assert set(undrawn) == folders
    assert len(json.loads((tmp_path / "comparison.json").read_text())) == 4
    assert "V-MCR²" in (tmp_path / "comparison.md").read_text()
    assert (tmp_path / "figures" / "curves.png").stat().st_size > 10_000
    stamps = {name: (tmp_path / name / "summary.json").stat().st_mtime_ns for name in folders}
    (tmp_path / "ce-seed1" / "summary.json").unlink()
    assert main(command) == 0
    later = {name: (tmp_path / name / "summary.json").stat().st_mtime_ns for name in folders}
    assert {name for name in folders if later[name] != stamps[name]} == {"ce-seed1"}
    capsys.readouterr()
    # One run of the folder, longer than the others, and once although it is named twice.
    assert main([*command, "--epochs", "3", "--objectives", "ce", "--seeds", "0", "0"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "digits, 3 epochs, seed 0, " in said
    assert "±" not in said
    assert [run.path.name for run in sweep.compared(tmp_path)] == ["ce-seed0"]
    both = [RunFolder.open(tmp_path / f"ce-seed{seed}") for seed in (0, 1)]
    assert sweep.heading([run.summary() for run in both]) == "digits, 3 and 2 epochs, seeds 0, 1"
    assert figures.draw_comparison(both, tmp_path / "figures")
    assert main(["plot", str(tmp_path)]) == 0
    assert main([*command[:-1], str(tmp_path / "ce-seed0")]) == 2
    assert f"out must be a folder to hold runs, got {tmp_path / 'ce-seed0'}" in capsys.readouterr().err
    assert main([*command, "--momentum", "0.5"]) == 2
    assert "belongs to another recipe (there, here): momentum: 0.9, 0.5" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["trian"],
            "command must be one of train, compare, evaluate, plot, predict, audit, export, report, reproduce, bench, "
            "recipes, got 'trian'; did you mean train?",
        ),
        (["train"], "must be followed by a recipe"),
        (["train", "digit"], "did you mean digits?"),
        (["train", "--resume", "nowhere"], "there is no run folder nowhere"),
        (["evaluate", "nowhere"], "there is no run folder nowhere"),
        (["train", "digits", "--data.source", "nothing"], "data.source must be one of"),
        (["train", "omniglot100", "--data-root", "nowhere.zip/x"], "omniglot is not under the data root"),
        (["train", "no/such/folder"], "recipe or data must be a file or folder that exists, got 'no/such/folder'"),
        (["recipes", "digit"], "did you mean digits?"),
        (["reproduce", "tabel2"], "did you mean table2?"),
    ],
)
def test_wrong_commands(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("urllib.request.urlopen", lambda *_, **__: (_ for _ in ()).throw(OSError("no network")))
    assert main(arguments) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("flag", ["--vmcr2.mu=-1", "--epochs=many", "--no-such-flag=1", "--objective=mse", "--seed=x"])
def test_wrong_flags(tmp_path, monkeypatch, capsys, flag):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        main(["train", "digits", flag])
    assert stopped.value.code == 2
    said = "".join(capsys.readouterr())
    assert flag.split("=")[0].lstrip("-").split(".")[-1] in said
    assert "None" not in said  # which is no choice
    assert not (tmp_path / "runs").exists()


def test_resume_of_another_recipe(tmp_path, capsys):
    out = str(tmp_path / "run")
    assert main(["train", "digits", *QUICK, "--out", out]) == 0
    assert main(["train", "omniglot100", "--resume", out]) == 2
    assert "is a run of the recipe digits, got omniglot100" in capsys.readouterr().err
    assert main(["train", "--resume", out, "--batch-size", "7"]) == 2
    assert "batch_size: 500, 7" in capsys.readouterr().err
    assert main(["train", "digits", *QUICK, "--out", out]) == 2
    assert "continue it with --resume" in capsys.readouterr().err


def test_help_and_lists(capsys):
    assert main([]) == 0
    assert "vmcr2 compare RECIPE" in capsys.readouterr().out
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == __version__
    assert main(["recipes"]) == 0
    assert "omniglot100" in capsys.readouterr().out
    assert main(["recipes", "omniglot100"]) == 0
    assert json.loads(capsys.readouterr().out)["feature_dim"] == 200
    with pytest.raises(SystemExit) as stopped:
        main(["train", "digits", "--help"])
    assert stopped.value.code == 0
    printed = capsys.readouterr().out
    for flag in ("--objective", "--seed", "--epochs", "--data-root", "--out", "--resume", "--vmcr2.mu", "--ce.lr"):
        assert flag in printed


@pytest.mark.parametrize(
    ("error", "code", "said"), [(OSError(28, "disk full"), 2, "disk full"), (KeyboardInterrupt(), 130, "interrupted")]
)
def test_usage_that_cannot_be_written_says_why(error, code, said, monkeypatch, capsys):
    def fails(*_: object) -> None:
        raise error

    monkeypatch.setattr(sys.stdout, "write", fails)
    assert main([]) == code
    assert said in capsys.readouterr().err


def test_resume_without_a_folder_says_so(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["train", "--resume"])
    assert stopped.value.code == 2
    assert "--resume" in "".join(capsys.readouterr())
    assert main(["reproduce"]) == 2
    assert "got nothing" in capsys.readouterr().err


def test_a_recipe_file_is_a_recipe(tmp_path, capsys):
    assert main(["recipes", "digits"]) == 0
    file = tmp_path / "mine.json"
    file.write_text(capsys.readouterr().out.replace('"name": "digits"', '"name": "mine"'))
    assert main(["train", str(file), *QUICK, "--out", str(tmp_path / "run")]) == 0
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["recipe"] == "mine"


def test_output_fits_a_pipe_of_any_code_page(leaves, tmp_path):
    train = f"train {leaves / 'leaves'} --epochs 1 --device cpu --out {tmp_path / 'run'}"
    command = [sys.executable, "-c", COMMANDS, train]
    environment = os.environ | {"PYTHONIOENCODING": "cp1252", "PYTHONUTF8": "0"}
    done = subprocess.run(command, capture_output=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert b"?R" in done.stdout


def test_training_that_diverges_ends_with_code_3_and_says_what_to_change(tmp_path, capsys):
    given = ["--objective", "mcr2", "--mcr2.lr", "1e30", "--out", str(tmp_path / "run")]
    assert main(["train", "digits", *QUICK, *given]) == 3
    said = capsys.readouterr().err
    assert "Lower mcr2.lr" in said
    assert "Traceback" not in said


def test_bench_prints_and_writes_what_a_step_costs(tmp_path, monkeypatch, capsys):
    tiny = bench.Workload(replace(SMALL, batch_size=50), 100, (1, 8, 8), 4)
    monkeypatch.setattr(bench, "WORKLOADS", {"mnist": tiny})
    assert main(["bench", "--rows", "mnist", "--seconds", "0.01", "--out", str(tmp_path / "bench.json")]) == 0
    assert "mnist, vmcr2" in capsys.readouterr().out
    assert json.loads((tmp_path / "bench.json").read_text())["rows"]["mnist"]["objectives"].keys() >= {"vmcr2", "mcr2"}
    assert main(["bench", "--seconds", "0"]) == 2
    assert "seconds must be" in capsys.readouterr().err
    monkeypatch.setattr(bench, "epoch_cost", None)  # it is not come to
    assert main(["bench", "--out", str(tmp_path / "gone" / "bench.json")]) == 2
    assert "out must lie in a folder that exists, got" in capsys.readouterr().err
    assert main(["bench", "--out", str(tmp_path)]) == 2
    assert "out must be a file, got the folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    "command", [["train", "digits"], ["compare", "digits"], ["reproduce", "table2", "--rows", "mnist"]]
)
def test_a_folder_that_cannot_be_is_refused_before_anything_is_read(command, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sources, "load", None)
    (tmp_path / "file").write_text("")
    assert main([*command, "--out", str(tmp_path / "file" / "run")]) == 2
    said = capsys.readouterr()
    assert f"got {tmp_path / 'file' / 'run'}" in said.err
    assert f"{tmp_path / 'file'} is a file" in said.err
    assert "training" not in said.out


def test_an_eps_sq_beyond_float64_leaves_no_run_folder(tmp_path, capsys):
    assert main(["train", "digits", *QUICK, "--eps-sq", "1e-30", "--out", str(tmp_path / "run")]) == 2
    assert "eps_sq must be from" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_warnings_are_one_line(tmp_path, capsys):
    assert main(["train", "digits", *QUICK, "--augmentation.crop", "6", "--out", str(tmp_path / "run")]) == 0
    assert "vmcr2: augmentation.crop 6 is smaller than the images of 8×8 pixels" in capsys.readouterr().err


@pytest.fixture(scope="module")
def leaves(tmp_path_factory):
    """A folder of images, and a run on it by the recipe chosen for it."""
    root = tmp_path_factory.mktemp("cli")
    for part, count in (("train", 8), ("test", 3)):
        for name, colour in (("ash", (250, 0, 0)), ("oak", (0, 0, 250))):
            (root / "leaves" / part / name).mkdir(parents=True)
            for i in range(count):
                shade = tuple(max(0, value - 9 * i) for value in colour)
                Image.new("RGB", (10 + i, 10), shade).save(root / "leaves" / part / name / f"{i}.png")
    command = ["train", str(root / "leaves"), "--epochs", "3", "--device", "cpu", "--out", str(root / "run")]
    assert main(command) == 0
    return root


def with_ash_renamed(leaves, folder, name):
    """Copies the images to a folder, where a class has another name."""
    shutil.copytree(leaves / "leaves", folder)
    for part in ("train", "test"):
        (folder / part / "ash").rename(folder / part / name)
    return folder


def test_a_folder_is_trained_on_by_itself(leaves, capsys):
    out = str(leaves / "again")
    assert main(["train", str(leaves / "leaves"), "--epochs", "1", "--feature-dim", "16", "--out", out]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "chosen for leaves: 2 classes, 16 training samples, the smallest image train/ash/0.png; network mlp" in said
    assert "feature_dim 16, images scaled to 10" in said
    assert main(["train", "--resume", out]) == 0
    said = capsys.readouterr().out
    assert "nothing to do" in said
    assert "chosen for" not in said  # nothing was


def test_a_folder_without_letters_is_called_data(leaves, tmp_path):
    shutil.copytree(leaves / "leaves", tmp_path / "_")
    assert recipes.find(str(tmp_path / "_")).name == "data"


def test_what_is_measured_on_held_out_samples_says_so(leaves, tmp_path, monkeypatch, capsys):
    shutil.copytree(leaves / "leaves" / "train", tmp_path / "leaves" / "train")
    out = str(tmp_path / "runs")
    given = ["--epochs", "1", "--device", "cpu", "--seeds", "0", "--objectives", "ce", "--out", out]
    assert main(["compare", str(tmp_path / "leaves"), *given]) == 0
    run = tmp_path / "runs" / "ce-seed0"
    capsys.readouterr()
    for evaluated in (run, leaves / "run"):
        assert main(["evaluate", str(evaluated)]) == 0
        held_out = evaluated == run
        assert ("measured on a validation share" in " ".join(capsys.readouterr().out.split())) == held_out
        written = json.loads((evaluated / "evaluation.json").read_text())
        assert written["evaluated_on"] == ("validation" if held_out else "test")
    saved = []
    monkeypatch.setattr(figures, "_save", lambda figure, path, note: saved.append(figure) or path)
    figures.draw_comparison([RunFolder.open(run)], tmp_path)
    assert saved[0].axes[1].get_ylabel() == "validation accuracy, nearest subspace"


def test_versions_of_a_folder_are_recipes_of_their_own(leaves, tmp_path):
    for name in ("leaves.v1", "leaves.v2"):
        shutil.copytree(leaves / "leaves", tmp_path / name)
        assert recipes.find(str(tmp_path / name)).name == name


def test_a_folder_named_as_a_data_set_is_the_users_own(leaves, tmp_path, monkeypatch):
    shutil.copytree(leaves / "leaves", tmp_path / "digits")
    monkeypatch.chdir(tmp_path)
    assert main(["train", "./digits", "--epochs", "1", "--device", "cpu", "--out", "run"]) == 0
    assert vmcr2.load("run").classes == ("ash", "oak")
    with pytest.warns(UserWarning, match=r"digits is the recipe of that name, not the folder here: .* write \./digits"):
        assert recipes.find("digits") == recipes.RECIPES["digits"]


def test_a_size_for_the_images_decides_the_crop_and_the_network(leaves, tmp_path):
    given = ["--data.image-size", "20", "--epochs", "1", "--device", "cpu", "--out", str(tmp_path / "run")]
    assert main(["train", str(leaves / "leaves"), *given]) == 0
    recipe = json.loads((tmp_path / "run" / "recipe.json").read_text())
    assert (recipe["data"]["image_size"], recipe["augmentation"]["crop"], recipe["network"]) == (20, 20, "conv4")


def test_changed_data_is_said_and_other_classes_are_refused(leaves, tmp_path, capsys):
    shutil.copytree(leaves / "leaves", tmp_path / "leaves")
    out = str(tmp_path / "run")
    assert main(["train", str(tmp_path / "leaves"), "--epochs", "1", "--device", "cpu", "--out", out]) == 0
    Image.new("RGB", (12, 12), (0, 255, 0)).save(tmp_path / "leaves" / "test" / "ash" / "0.png")
    assert main(["evaluate", out]) == 0
    assert "leaves has changed since" in " ".join(capsys.readouterr().err.split())
    shutil.copytree(tmp_path / "leaves" / "train" / "ash", tmp_path / "leaves" / "train" / "aaa")
    for command in ("evaluate", "audit"):
        assert main([command, out]) == 2
        assert "leaves has other classes or sizes than" in capsys.readouterr().err


def test_a_run_goes_on_where_its_data_has_moved_to(leaves, tmp_path, capsys):
    shutil.copytree(leaves / "leaves", tmp_path / "here")
    out = str(tmp_path / "run")
    assert main(["train", str(tmp_path / "here"), "--epochs", "2", "--device", "cpu", "--out", out]) == 0
    before = json.loads((tmp_path / "run" / "summary.json").read_text())
    (tmp_path / "here").rename(tmp_path / "there")
    assert main(["evaluate", out]) == 2
    said = capsys.readouterr().err
    assert f"got no file or folder {tmp_path / 'here'}; if it has moved, say so once: vmcr2 train --resume" in said
    assert main(["train", "--resume", out, "--epochs", "3"]) == 2
    assert "if it has moved, say so once: vmcr2 train --resume" in capsys.readouterr().err
    moved = ["train", "--resume", out, "--data.source", str(tmp_path / "there")]
    assert main(moved) == 0
    after = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert without_times([after]) == without_times([before])
    assert main([*moved, "--epochs", "3"]) == 0
    assert main(["evaluate", out]) == 0
    shutil.copytree(leaves / "leaves", tmp_path / "other")
    shutil.rmtree(tmp_path / "there")
    Image.new("RGB", (12, 12), (0, 255, 0)).save(tmp_path / "other" / "train" / "ash" / "0.png")
    for folder in (tmp_path / "other", with_ash_renamed(leaves, tmp_path / "named", "beech")):
        assert main([*moved[:-1], str(folder)]) == 2
        assert "was trained on data that differs" in capsys.readouterr().err


def test_names_in_brackets_are_no_markup(leaves, tmp_path, capsys):
    with_ash_renamed(leaves, tmp_path / "data", "[red]ash")
    out = str(tmp_path / "[old]")
    assert main(["train", str(tmp_path / "data"), "--epochs", "1", "--device", "cpu", "--out", out]) == 0
    assert f"run folder: {out}" in capsys.readouterr().out
    assert main(["predict", out, str(tmp_path / "data" / "test" / "[red]ash")]) == 0
    assert main(["evaluate", out]) == 0
    assert "[old]" in capsys.readouterr().out


@pytest.mark.skipif(os.name == "nt" or sys.platform == "darwin", reason="needs a system with file names of any bytes")
def test_names_that_are_no_text_are_written_as_they_are(leaves, tmp_path):
    odd = os.fsdecode(b"\xff\xfe")
    with_ash_renamed(leaves, tmp_path / "data", odd)
    out, table = str(tmp_path / "run"), tmp_path / "p.csv"
    assert main(["train", str(tmp_path / "data"), "--epochs", "1", "--device", "cpu", "--out", out]) == 0
    assert main(["predict", out, str(tmp_path / "data" / "test" / odd), "--out", str(table)]) == 0
    assert os.fsencode(odd) in table.read_bytes()
    assert main(["export", out, str(tmp_path / "model")]) == 0
    assert vmcr2.load(tmp_path / "model").classes == vmcr2.load(out).classes


def test_characters_that_figures_cannot_show_are_said_once(drawn, leaves, tmp_path, capsys):
    with_ash_renamed(leaves, tmp_path / "data", "\u65e5\u672c")
    out = str(tmp_path / "run")
    assert main(["train", str(tmp_path / "data"), "--epochs", "1", "--device", "cpu", "--out", out]) == 0
    assert capsys.readouterr().err.count("font") == 1


def test_a_pipe_that_is_closed_early_is_no_error(leaves, tmp_path):
    predict = f"predict {leaves / 'run'} {leaves / 'leaves' / 'test' / 'ash'} --out {tmp_path / 'p.csv'}"
    train = f"train {leaves / 'leaves'} --epochs 2 --device cpu --out {tmp_path / 'run'}"
    command = [sys.executable, "-u", "-c", COMMANDS, "--help", predict, train]
    shut = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    shut.stdout.close()
    assert shut.stderr.read() == b""
    assert shut.wait() == 0
    assert len((tmp_path / "p.csv").read_text().splitlines()) == 4
    assert RunFolder.open(tmp_path / "run").is_complete()


def test_closed_output_is_no_error(leaves, tmp_path):
    train = f"train {leaves / 'leaves'} --epochs 1 --device cpu --out {tmp_path / 'run'}"
    command = "import os, sys; os.close(1); sys.stdout = None\n" + COMMANDS
    done = subprocess.run([sys.executable, "-c", command, train], check=False, stderr=subprocess.PIPE)
    assert done.returncode == 0, done.stderr
    assert b"Traceback" not in done.stderr
    assert RunFolder.open(tmp_path / "run").is_complete()


def test_a_run_that_diverges_is_left_out_of_a_comparison(tmp_path, capsys):
    out = tmp_path / "all"
    command = ["compare", "digits", *QUICK, "--objectives", "vmcr2", "ce", "--vmcr2.lr", "1e20", "--out", str(out)]
    assert main(command) == 0
    said = capsys.readouterr()
    assert f"{out / 'vmcr2-seed0'} is left out: training diverged in epoch 1" in said.err
    assert "cross-entropy" in said.out
    assert "Left out, since they diverged: vmcr2-seed0." in (out / "comparison.md").read_text()
    assert [each["objective"] for each in json.loads((out / "comparison.json").read_text())] == ["ce"]
    right = [flag for flag in command if flag not in ("--vmcr2.lr", "1e20")]
    assert main(right) == 2
    assert "start a run in a folder of its own; this one has no checkpoint yet" in capsys.readouterr().err
    assert main(["compare", "digits", *QUICK, "--vmcr2.lr", "1e20", "--objective", "vmcr2", "--out", str(out)]) == 3
    assert "every run asked for diverged" in capsys.readouterr().err


def test_runs_of_different_length_are_marked_in_a_comparison():
    summaries = [{"objective": name, "epochs": epochs} for name, epochs in (("ce", 3), ("ce", 3), ("mcr2", 4))]
    keys = ("train_expansion", "train_compression", "train_reduction", "test_accuracy", "head_accuracy")
    summaries = [one | dict.fromkeys((*keys, "seconds_per_epoch"), 1.0) for one in summaries]
    assert [row[0] for row in sweep.rows(summaries)] == ["cross-entropy, 3 epochs", "MCR², 4 epochs"]
    assert [row[0] for row in sweep.rows(summaries[:2])] == ["cross-entropy"]


def test_a_name_with_a_tab_is_one_field(leaves, tmp_path, capsys):
    shutil.copy(leaves / "leaves" / "test" / "ash" / "0.png", tmp_path / "a\tb\n.png")
    assert main(["predict", str(leaves / "run"), str(tmp_path / "a\tb\n.png")]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert line.split("\t")[0] == str(tmp_path / "a b .png")


def test_a_run_that_cannot_be_written_to_is_refused_before_it_is_audited(leaves, monkeypatch, capsys):
    monkeypatch.setattr(os, "access", lambda *_, **__: False)
    assert main(["audit", str(leaves / "run")]) == 2
    assert "must be a folder that can be written to" in capsys.readouterr().err


def test_predict_with_fewer_components_is_what_evaluate_measured(leaves, tmp_path, capsys):
    run, test = leaves / "run", leaves / "leaves" / "test"
    assert main(["evaluate", str(run), "--components", "1"]) == 0
    expected = json.loads((run / "evaluation.json").read_text())["accuracy_by_components"]["1"]
    assert main(["export", str(run), str(tmp_path / "model"), "--components", "1"]) == 0
    for model in ([str(run), "--components", "1"], [str(tmp_path / "model")]):
        capsys.readouterr()
        assert main(["predict", model[0], str(test / "ash"), str(test / "oak"), *model[1:]]) == 0
        lines = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
        assert sum(Path(file).parent.name == name for file, name, _ in lines) / len(lines) == expected
    assert main(["predict", str(tmp_path / "model"), str(test / "ash"), "--components", "2"]) == 2
    assert "components must be at most 1" in capsys.readouterr().err


def test_what_is_no_run_folder_is_named(leaves, tmp_path, capsys):
    assert main(["export", str(leaves / "run"), str(tmp_path / "model")]) == 0
    (tmp_path / "both" / "ce-seed0").mkdir(parents=True)
    (tmp_path / "both" / "ce-seed0" / "recipe.json").touch()
    (tmp_path / "both" / "comparison.json").touch()
    for folder, message in (
        (leaves / "leaves", "is not a run folder: it has no recipe.json"),
        (tmp_path / "model", "is not a run folder: it is an exported model, which vmcr2.load and vmcr2 predict take"),
        (tmp_path / "both", "is not a run folder: it is a comparison; its runs are ce-seed0"),
    ):
        assert main(["evaluate", str(folder)]) == 2
        assert message in capsys.readouterr().err


def test_predict_names_files_and_folders(leaves, tmp_path, capsys):
    test = leaves / "leaves" / "test"
    given = [str(test / "ash"), str(test / "oak" / "0.png")]
    assert main(["predict", str(leaves / "run"), *given, "--out", str(tmp_path / "p.csv")]) == 0
    lines = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert [(Path(file).name, name) for file, name, _ in lines] == [
        ("0.png", "ash"),
        ("1.png", "ash"),
        ("2.png", "ash"),
        ("0.png", "oak"),
    ]
    assert all(0 <= float(margin) <= 1 for *_, margin in lines)
    rows = (tmp_path / "p.csv").read_text().splitlines()
    assert rows[0] == "file,class,margin"
    assert len(rows) == 5
    assert main(["predict", str(leaves / "run"), given[1], "--out", str(tmp_path / "no" / "p.csv")]) == 2
    assert "out must lie in a folder that exists" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert main(["predict", str(leaves / "run"), str(tmp_path / "empty")]) == 2
    assert "files must name at least one image" in capsys.readouterr().err


def test_predict_passes_over_images_that_cannot_be_read_and_names_them(leaves, tmp_path, capsys):
    folder = tmp_path / "mixed"
    shutil.copytree(leaves / "leaves" / "test" / "ash", folder)
    for name in ("0a.png", "1a.png"):
        (folder / name).write_bytes((folder / "0.png").read_bytes()[:40])
    command = ["predict", str(leaves / "run"), str(folder), "--out", str(tmp_path / "p.csv")]
    assert main(command) == 2
    said = capsys.readouterr()
    lines = [line.split("\t") for line in said.out.splitlines()]
    assert [(Path(file).name, name) for file, name, _ in lines] == [(f"{i}.png", "ash") for i in range(3)]
    assert len((tmp_path / "p.csv").read_text().splitlines()) == 4
    for name in ("0a.png", "1a.png"):
        assert f"{name} is not a readable image" in said.err
    for file in folder.glob("?.png"):
        file.unlink()
    (tmp_path / "p.csv").unlink()
    assert main(command) == 2
    assert "0a.png is not a readable image" in capsys.readouterr().err
    assert not (tmp_path / "p.csv").exists()


def test_predict_names_the_rows_of_arrays(tmp_path, capsys):
    y = np.arange(60) % 3
    x = np.eye(3)[y] + 0.1 * np.random.default_rng(0).normal(size=(60, 3))
    np.savez(tmp_path / "e.npz", features=x, labels=y, class_names=["a", "b", "c"])
    run, new = str(tmp_path / "run"), tmp_path / "new.npy"
    train = f"train {tmp_path / 'e.npz'} --data.validation 0.2 --epochs 20 --device cpu --out {run}"
    assert main(train.split()) == 0
    np.save(new, x[:4])
    capsys.readouterr()
    assert main(["predict", run, str(new), str(new)]) == 0
    lines = [line.split("\t")[:2] for line in capsys.readouterr().out.splitlines()]
    assert lines == 2 * [[f"{new}[{i}]", name] for i, name in enumerate("abca")]
    for wrong, message in (
        (x[0], "or float embeddings (n, d), got float64 (3,)"),
        (x[:0], "must hold at least one sample, got shape (0, 3)"),
        (x[:, :2], "must be floats (m, 3) as in training, got float32 (4, 2)"),
        (x * np.nan, f"{new} must be finite in float32"),
        (np.array([[object()]]), "is not a readable .npy file"),
    ):
        np.save(new, wrong[:4] if len(wrong) > 4 else wrong)
        assert main(["predict", run, str(new)]) == 2
        assert message in capsys.readouterr().err
    assert main(["predict", run, str(tmp_path / "gone.npy")]) == 2
    assert "is not a readable .npy file: [Errno 2] No such file" in capsys.readouterr().err


def test_predict_takes_arrays_of_images_among_files_in_the_order_given(leaves, tmp_path, capsys):
    test = leaves / "leaves" / "test"
    files = [test / "ash" / "0.png", test / "oak" / "0.png"]
    np.save(tmp_path / "two.npy", np.stack([np.asarray(Image.open(file).convert("RGB")) for file in files]))
    given = [files[0], tmp_path / "two.npy", files[1]]
    assert main(["predict", str(leaves / "run"), *map(str, given)]) == 0
    lines = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert [name for name, *_ in lines] == [str(files[0]), f"{given[1]}[0]", f"{given[1]}[1]", str(files[1])]
    assert [lines[0][1:], lines[3][1:]] == [lines[1][1:], lines[2][1:]]


def test_export_predicts_as_the_run_does(leaves, tmp_path, capsys):
    assert main(["export", str(leaves / "run"), str(tmp_path / "model")]) == 0
    assert "loads it" in capsys.readouterr().out
    file = str(leaves / "leaves" / "test" / "oak" / "1.png")
    assert main(["predict", str(tmp_path / "model"), file]) == 0
    exported = capsys.readouterr().out
    assert main(["predict", str(leaves / "run"), file]) == 0
    assert capsys.readouterr().out == exported
    assert main(["export", str(leaves / "run"), str(tmp_path / "model")]) == 2
    assert "must be new or empty" in capsys.readouterr().err


def test_audit_lists_suspects(leaves, monkeypatch, capsys):
    def label_quality(features, labels):
        suggested = labels.numpy().copy()
        suggested[[-3, -1]] = 0
        return LabelQuality(np.linspace(1, 0, len(labels)), suggested, labels.numpy())

    monkeypatch.setattr(vmcr2, "label_quality", label_quality)
    assert main(["audit", str(leaves / "run"), "--top", "1"]) == 0
    said = capsys.readouterr().out
    assert "1 of 2 suspects among 16 training samples" in " ".join(said.split())
    assert "train/oak/7.png" in said
    rows = (leaves / "run" / "suspects.csv").read_text().splitlines()
    assert rows[1:] == ["train/oak/7.png,oak,ash,0.0000", "train/oak/6.png,oak,ash,0.1333"]
    assert (leaves / "run" / "figures" / "suspects.png").is_file()
    monkeypatch.setattr(vmcr2, "label_quality", lambda z, y: LabelQuality(np.ones(len(y)), y.numpy(), y.numpy()))
    assert main(["audit", str(leaves / "run")]) == 0
    assert "no suspects" in capsys.readouterr().out


def test_report_prints_and_writes_what_embeddings_are_like(tmp_path, capsys):
    z = np.random.default_rng(0).normal(size=(60, 8))
    np.savez(
        tmp_path / "mine.npz", features=z / np.linalg.norm(z, axis=1, keepdims=True), labels=100 + np.arange(60) % 3
    )
    with mpl.rc_context({"savefig.format": "pdf"}):  # as a user may have set
        assert main(["report", str(tmp_path / "mine.npz")]) == 0
    assert len(capsys.readouterr().out.splitlines()) >= 2
    assert json.loads((tmp_path / "mine.report.json").read_text())
    assert (tmp_path / "mine.report.png").read_bytes().startswith(b"\x89PNG")
    assert main(["report", str(tmp_path / "mine.npz"), "--out", str(tmp_path / "there")]) == 0
    assert (tmp_path / "there" / "mine.report.png").is_file()
    capsys.readouterr()
    assert main(["report", str(tmp_path / "mine.npz"), "--out", str(tmp_path / "mine.npz")]) == 2
    said = capsys.readouterr()
    assert "out must be a folder, there already or new" in said.err
    assert not said.out
    np.savez(tmp_path / "images.npz", x_train=np.zeros((4, 8, 8), np.uint8), y_train=np.arange(4))
    assert main(["report", str(tmp_path / "images.npz")]) == 2
    assert "must hold embeddings (m, d), got images" in capsys.readouterr().err
    assert main(["report", str(tmp_path / "gone.npz")]) == 2
    assert "there is no file" in capsys.readouterr().err
    for given, message in (
        ({"features": np.full((4, 8), np.nan), "labels": np.arange(4)}, "features must be finite"),
        (
            {"features": z[:4], "labels": np.ones(4)},
            "labels must hold one integer or text label per sample of features (4, 8)",
        ),
        ({"features": z[:4]}, "must hold features and labels, or x_train and y_train; it lacks y_train\n"),
    ):
        np.savez(tmp_path / "wrong.npz", **given)
        assert main(["report", str(tmp_path / "wrong.npz")]) == 2
        assert message in capsys.readouterr().err
