"""The command line, end to end."""

import json
import os
import subprocess
import sys

import pytest

from vmcr2 import __main__, __version__
from vmcr2.lab.cli import main

QUICK = ["--epochs", "2", "--data.train-size", "200", "--feature-dim", "24", "--device", "cpu"]
QUICK += ["--vmcr2.atoms-per-class", "2"]


def test_train_evaluate_plot(tmp_path, capsys):
    out = str(tmp_path / "run")
    assert main(["train", "digits", *QUICK, "--objective", "ce", "--seed", "3", "--out", out]) == 0
    printed = capsys.readouterr().out
    assert "epoch 2/2" in printed
    assert "ΔR" in printed
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["objective"], summary["seed"], summary["epochs"]) == ("ce", 3, 2)
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


def test_compare_goes_on_where_it_was(tmp_path, capsys):
    command = ["compare", "digits", *QUICK, "--seeds", "0", "1", "--out", str(tmp_path)]
    assert main(command) == 0
    folders = {f"{objective}-seed{seed}" for objective in ("vmcr2", "mcr2", "ce") for seed in (0, 1)}
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == folders | {"figures"}
    assert len(json.loads((tmp_path / "comparison.json").read_text())) == 6
    assert "V-MCR²" in (tmp_path / "comparison.md").read_text()
    assert (tmp_path / "figures" / "curves.png").stat().st_size > 10_000
    stamps = {name: (tmp_path / name / "summary.json").stat().st_mtime_ns for name in folders}
    (tmp_path / "ce-seed1" / "summary.json").unlink()
    assert main(command) == 0
    later = {name: (tmp_path / name / "summary.json").stat().st_mtime_ns for name in folders}
    assert {name for name in folders if later[name] != stamps[name]} == {"ce-seed1"}
    capsys.readouterr()
    assert main(["plot", str(tmp_path)]) == 0
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
        (["train"], "takes a recipe first"),
        (["train", "digit"], "did you mean digits?"),
        (["train", "--resume", "nowhere"], "there is no run folder nowhere"),
        (["evaluate", "nowhere"], "there is no run folder nowhere"),
        (["train", "digits", "--data.source", "nothing"], "data.source must be one of"),
        (["train", "omniglot100", "--data-root", "nowhere.zip/x"], "omniglot is not under the data root"),
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


@pytest.mark.parametrize("flag", ["--vmcr2.mu=-1", "--epochs=many", "--no-such-flag=1", "--objective=mse"])
def test_wrong_flags(tmp_path, monkeypatch, capsys, flag):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        main(["train", "digits", flag])
    assert stopped.value.code == 2
    assert flag.split("=")[0].lstrip("-").split(".")[-1] in "".join(capsys.readouterr())
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


def test_output_fits_a_pipe_of_any_code_page(tmp_path):
    command = [sys.executable, "-m", "vmcr2", "train", "digits", *QUICK, "--out", str(tmp_path / "run")]
    environment = os.environ | {"PYTHONIOENCODING": "cp1252", "PYTHONUTF8": "0"}
    done = subprocess.run(command, capture_output=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert b"?R" in done.stdout


def test_a_missing_extra_is_named(monkeypatch, capsys):
    for name in [name for name in sys.modules if name.startswith("vmcr2.lab.cli")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "tyro", None)
    assert __main__.main() == 1
    assert "needs tyro, which is missing: pip install 'vmcr2[lab]'" in capsys.readouterr().err


def test_warnings_are_one_line(tmp_path, capsys):
    assert main(["train", "digits", *QUICK, "--augmentation.crop", "6", "--out", str(tmp_path / "run")]) == 0
    assert "vmcr2: augmentation.crop 6 is smaller than the images of 8×8 pixels" in capsys.readouterr().err
