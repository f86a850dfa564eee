"""The run folder: what is left after a kill, and what is said of damage."""

import io
import json
import os
import pickle
import shlex
import signal
import subprocess
import sys
import time
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from small import SMALL, from_file, without_times

from vmcr2.errors import InputError
from vmcr2.lab import figures, files, recipes, train
from vmcr2.lab import run as run_module
from vmcr2.lab.cli import main
from vmcr2.lab.run import RunFolder


def launch(*arguments):
    return subprocess.Popen(
        [sys.executable, "-m", "vmcr2", *arguments],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def until(broken, lines, process):
    """Waits for a run's log to have so many lines."""
    deadline = time.monotonic() + 120
    while len(broken.metrics()) < lines and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)


def test_kill_and_resume_equal_an_unbroken_run(tmp_path):
    recipe = from_file(replace(SMALL, lr_drops=(0.6,)), tmp_path / "data.npz")
    unbroken = train.start(recipe, tmp_path / "unbroken")
    broken = RunFolder(tmp_path / "broken")
    recipe_file = tmp_path / "recipe.json"
    recipe_file.write_text(recipes.to_json(recipe))
    process = launch("train", str(recipe_file), "--out", str(broken.path))
    until(broken, 2, process)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not broken.is_complete(), process.stderr.read()
    assert len(broken.metrics()) >= 2
    train.resume(RunFolder.open(broken.path))
    assert without_times([broken.summary()]) == without_times([unbroken.summary()])
    assert without_times(broken.metrics()) == without_times(unbroken.metrics())
    first, second = (torch.load(run.checkpoint_file, weights_only=True) for run in (unbroken, broken))
    for part in ("model", "criterion"):
        for name, tensor in first[part].items():
            assert torch.equal(tensor, second[part][name]), name


def test_ctrl_c_saves_the_epoch_and_names_the_command_that_continues(tmp_path, monkeypatch):
    # AdamW, unlike SGD elsewhere: its moments and its count of steps must come back too.
    settings = replace(SMALL.vmcr2, lr=1e-3)
    recipe = replace(SMALL, checkpoint_seconds=1e6, epochs=16, optimizer="adamw", weight_decay=0.02, vmcr2=settings)
    recipe = from_file(recipe, tmp_path / "data.npz")
    unbroken = train.start(recipe, tmp_path / "unbroken")
    broken = RunFolder(tmp_path / "a b")
    recipe_file = tmp_path / "recipe.json"
    recipe_file.write_text(recipes.to_json(recipe))
    process = launch("train", str(recipe_file), "--out", str(broken.path), "--data-root", str(tmp_path))
    until(broken, 2, process)
    process.send_signal(signal.SIGINT)
    assert process.wait() == 130
    said = process.stderr.read()
    assert f"vmcr2 train --resume '{broken.path}' --data-root {tmp_path}\n" in said
    checkpoint = broken.load_checkpoint()
    done, optimizer = checkpoint["epoch"], checkpoint["optimizer"]
    assert 2 <= done < 16
    assert {(group["lr"], group["weight_decay"]) for group in optimizer["param_groups"]} == {(1e-3, 0.02)}
    assert all({"step", "exp_avg", "exp_avg_sq"} <= set(each) for each in optimizer["state"].values())
    assert len(broken.metrics()) == done
    monkeypatch.setattr(figures, "draw_run", lambda run: [])  # which take longer than the run
    assert main(shlex.split(said.strip().rpartition("continue: ")[2])[1:]) == 0
    assert without_times(broken.metrics()) == without_times(unbroken.metrics())
    assert without_times([broken.summary()]) == without_times([unbroken.summary()])


class Killed(BaseException):
    pass


@pytest.mark.parametrize(
    "moment", ["before_recipe", "within_recipe", "torch_save", "link", "replace_previous", "replace_latest", "metrics"]
)
def test_a_kill_at_any_moment_of_writing(tmp_path, monkeypatch, moment):
    """The process dies in the midst of writing in epoch 4; what is on the disk can be resumed."""
    unbroken = train.start(SMALL, tmp_path / "unbroken")
    run = RunFolder(tmp_path / "run")
    with monkeypatch.context() as patched:
        if moment == "before_recipe":
            patched.setattr(RunFolder, "write_recipe", raising)
        elif moment == "within_recipe":
            patched.setattr(Path, "replace", raising)
        elif moment == "metrics":
            patched.setattr(RunFolder, "add_metrics", half_a_line)
        else:
            patched.setattr(RunFolder, "save_checkpoint", dying(moment, RunFolder.save_checkpoint, patched))
        with pytest.raises(Killed):
            train.start(SMALL, run.path)
    if moment.endswith("recipe"):
        with pytest.raises(InputError, match=r"has no recipe\.json"):
            RunFolder.open(run.path)
        train.start(SMALL, run.path)
    else:
        assert len(run.metrics()) >= 3
        train.resume(RunFolder.open(run.path))
    assert without_times([run.summary()]) == without_times([unbroken.summary()])
    assert without_times(run.metrics()) == without_times(unbroken.metrics())


def raising(*_):
    raise Killed


def half_a_line(run, line):
    text = json.dumps(line) + "\n"
    with run.metrics_file.open("a") as file:
        file.write(text if line["epoch"] < 4 else text[: len(text) // 2])
    if line["epoch"] == 4:
        raise Killed


def dying(moment, save, patched):
    def save_or_die(run, state):
        if state["epoch"] == 4:
            if moment == "torch_save":
                patched.setattr(torch, "save", lambda _, file: (file.write(b"half a checkpoint"), raising()))
            elif moment == "link":
                patched.setattr(os, "link", raising)
            else:
                last = "checkpoint.previous.pt" if moment == "replace_previous" else "checkpoint.pt"
                replace_file = Path.replace

                def replaced(path, target):
                    if Path(target).name == last:
                        raise Killed
                    return replace_file(path, target)

                patched.setattr(Path, "replace", replaced)
        save(run, state)

    return save_or_die


def test_a_damaged_checkpoint_is_refused(tmp_path):
    run = train.start(replace(SMALL, epochs=3), tmp_path / "run")
    longer = replace(SMALL, epochs=5)
    good = run.checkpoint_file.read_bytes()
    with zipfile.ZipFile(run.checkpoint_file) as archive:
        largest = max(archive.infolist(), key=lambda entry: entry.file_size)
    header = largest.header_offset
    begin = header + 30 + sum(int.from_bytes(good[header + at : header + at + 2], "little") for at in (26, 28))
    flipped = bytearray(good)
    flipped[begin + largest.file_size // 2] ^= 1  # one bit within a tensor
    for damaged in (good[: len(good) // 2], bytes(flipped), b""):
        run.checkpoint_file.write_bytes(damaged)
        before = {path.name: path.read_bytes() for path in run.path.iterdir() if path.is_file()}
        with pytest.raises(
            InputError, match=r"checkpoint\.pt is damaged .*move checkpoint\.previous\.pt over checkpoint\.pt"
        ):
            train.resume(run, longer)
        assert before == {path.name: path.read_bytes() for path in run.path.iterdir() if path.is_file()}
    run.previous_checkpoint_file.replace(run.checkpoint_file)
    assert run.load_checkpoint()["epoch"] == 2
    train.resume(run, longer)
    unbroken = train.start(longer, tmp_path / "unbroken")
    assert without_times([run.summary()]) == without_times([unbroken.summary()])


def test_a_run_from_before_a_setting_was_there_goes_on_with_its_default(tmp_path):
    run, other = (train.start(replace(SMALL, epochs=2), tmp_path / name) for name in ("run", "other"))
    state = torch.load(run.checkpoint_file, weights_only=True)
    for text, write in (
        (run.recipe_file.read_text(), run.recipe_file.write_text),
        (state["recipe"], lambda text: torch.save(state | {"recipe": text}, run.checkpoint_file)),
    ):
        fields = json.loads(text)
        del fields["vmcr2"]["expand_until"]
        write(json.dumps(fields))
    for each in (run, other):
        train.resume(each, replace(SMALL, epochs=3))
    assert without_times([run.summary()]) == without_times([other.summary()])


@pytest.mark.parametrize("part", ["model", "criterion", "optimizer"])
def test_a_checkpoint_that_does_not_fit_leaves_a_complete_run_as_it_was(tmp_path, part):
    run = train.start(replace(SMALL, epochs=2), tmp_path / "run")
    torch.save(run.load_checkpoint() | {part: {"hello": 1}}, run.checkpoint_file)
    before = {path.name: path.read_bytes() for path in run.path.iterdir() if path.is_file()}
    with pytest.raises(InputError, match=r"checkpoint\.pt does not fit the network and optimizer that"):
        train.resume(run, replace(SMALL, epochs=3))
    assert before == {path.name: path.read_bytes() for path in run.path.iterdir() if path.is_file()}


def test_files_that_hold_something_else_are_said_to_be_damaged(tmp_path):
    run = train.start(replace(SMALL, epochs=1), tmp_path / "run")
    for text in ("null", "[]", "{}", "3", "[" * 100_000):
        run.summary_file.write_text(text)
        with pytest.raises(InputError, match=r"summary\.json is damaged"):
            run.summary()
        run.metrics_file.write_text(f"{text}\n")
        with pytest.raises(InputError, match=r"metrics\.jsonl is damaged"):
            run.metrics()
        run.recipe_file.write_text(text if text != "{}" else "[]")
        with pytest.raises(InputError, match=r"recipe\.json is not a"):
            run.recipe()
    run.metrics_file.write_bytes(b"\xff\n")
    with pytest.raises(InputError, match=r"metrics\.jsonl is damaged"):
        run.metrics()


def test_a_run_with_damaged_metrics_is_not_extended_and_stays_as_it_is(tmp_path):
    run = train.start(replace(SMALL, epochs=2), tmp_path / "run")
    whole = run.metrics_file.read_bytes()
    run.metrics_file.write_bytes(whole + b"{bad\n")
    before = {path.name: path.read_bytes() for path in run.path.iterdir() if path.is_file()}
    with pytest.raises(InputError, match=r"metrics\.jsonl is damaged in line 3 .*delete that line"):
        train.resume(run, replace(SMALL, epochs=3))
    assert before == {path.name: path.read_bytes() for path in run.path.iterdir() if path.is_file()}
    run.metrics_file.write_bytes(whole)
    assert train.resume(run, replace(SMALL, epochs=3)).summary()["epochs"] == 3


def test_lost_metrics_are_said(tmp_path):
    run = train.start(replace(SMALL, epochs=2), tmp_path / "run")
    run.metrics_file.unlink()
    with pytest.warns(UserWarning, match=r"metrics\.jsonl lacks 2 of 2 epochs"):
        train.resume(run, replace(SMALL, epochs=3))
    assert [line["epoch"] for line in run.metrics()] == [3]


def test_checkpoints_that_do_not_belong(tmp_path):
    run = train.start(replace(SMALL, epochs=2), tmp_path / "run")
    longer = replace(SMALL, epochs=4)
    good = run.checkpoint_file.read_bytes()
    torch.save({"hello": 1}, run.checkpoint_file)
    with pytest.raises(InputError, match="is not a checkpoint of this program"):
        train.resume(run, longer)
    torch.save(torch.load(io.BytesIO(good), weights_only=True) | {"recipe": "{}"}, run.checkpoint_file)
    with pytest.raises(InputError, match="belongs to a different recipe from"):
        train.resume(run, longer)
    torch.save(torch.load(io.BytesIO(good), weights_only=True) | {"recipe": "{"}, run.checkpoint_file)
    with pytest.raises(InputError, match=r"checkpoint\.pt is not a readable recipe"):
        train.resume(run, longer)
    torch.save(torch.load(io.BytesIO(good), weights_only=True) | {"data": "other"}, run.checkpoint_file)
    with pytest.raises(InputError, match="was trained on data that differs"):
        train.resume(run, longer)
    run.checkpoint_file.unlink()
    with pytest.raises(InputError, match=r"checkpoint\.pt is missing; to continue .*checkpoint\.previous\.pt"):
        train.resume(run, longer)
    assert run.is_complete()
    run.checkpoint_file.write_bytes(good)
    assert train.resume(run, longer).summary()["epochs"] == 4


def test_one_process_at_a_time(tmp_path):
    run = train.start(replace(SMALL, epochs=1), tmp_path / "run")
    with run.held(), pytest.raises(InputError, match="is in use by another process"):
        train.resume(run, replace(SMALL, epochs=2))
    assert train.resume(run, replace(SMALL, epochs=2)).summary()["epochs"] == 2


def test_damaged_run_folders_are_named(tmp_path):
    run = train.start(replace(SMALL, epochs=2), tmp_path / "run")
    files = (run.features_file, run.summary_file, run.metrics_file)
    for file, read in zip(files, (run.features, run.summary, run.metrics), strict=True):
        whole = file.read_bytes()
        file.write_bytes(b"{damaged" + whole[: len(whole) // 2] + b"\n")
        with pytest.raises(InputError, match=f"{file.name} is damaged"):
            read()
        file.write_bytes(whole)


def test_folders_that_are_taken(tmp_path):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thesis.txt").write_text("years of work")
    with pytest.raises(InputError, match=r"out must be a new or empty folder, got .*holds other files"):
        train.start(SMALL, tmp_path / "taken")
    assert [path.name for path in (tmp_path / "taken").iterdir()] == ["thesis.txt"]
    with pytest.raises(InputError, match="there is no run folder"):
        RunFolder.open(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"no recipe\.json"):
        RunFolder.open(tmp_path / "taken")
    with RunFolder.created(tmp_path / "run", SMALL):
        pass
    with pytest.raises(InputError, match="a run is there already; continue it with --resume"):
        train.start(SMALL, tmp_path / "run")
    with pytest.raises(InputError, match=r"run is not complete; finish it with vmcr2 train --resume .*run"):
        RunFolder.open(tmp_path / "run").summary()


def test_resuming_with_more_epochs_and_with_another_recipe(tmp_path):
    run = train.start(replace(SMALL, epochs=2), tmp_path / "run")
    before = run.summary_file.read_bytes()
    assert train.resume(run).summary_file.read_bytes() == before  # a complete run is left alone
    with pytest.raises(InputError, match=r"belongs to another recipe \(there, here\): vmcr2.mu: None, 0.5"):
        train.resume(run, replace(SMALL, vmcr2=replace(SMALL.vmcr2, mu=0.5)))
    assert run.summary_file.read_bytes() == before
    train.resume(run, replace(SMALL, epochs=3))
    assert run.recipe().epochs == run.summary()["epochs"] == 3


def test_a_run_is_not_shortened_nor_its_schedule_stretched(tmp_path):
    run = train.start(replace(SMALL, objective="ce", epochs=4, lr_drops=(0.5,)), tmp_path / "run")
    with pytest.raises(InputError, match="epochs must stay 4 .* got 8: its learning rate depends"):
        train.resume(run, replace(run.recipe(), epochs=8))
    run.summary_file.unlink()
    with pytest.raises(InputError, match="epochs must be at least the 4 .* got 2"):
        train.resume(run, replace(run.recipe(), epochs=2))


def test_a_second_run_in_a_folder_leaves_the_recipe_of_the_first(tmp_path, monkeypatch):
    """It looks at the folder while that is free, and comes to write when the first has begun."""
    other, free = replace(SMALL, seed=5), run_module.is_free
    with RunFolder.created(tmp_path / "run", SMALL) as run:
        monkeypatch.setattr(run_module, "is_free", lambda path: True)
        with pytest.raises(InputError, match="in use by another process"), RunFolder.created(run.path, other):
            pass
    answers = iter([True])
    monkeypatch.setattr(run_module, "is_free", lambda path: next(answers, free(path)))
    with pytest.raises(InputError, match="a run is there already"), RunFolder.created(run.path, other):
        pass
    assert run.recipe().seed == SMALL.seed


def test_a_run_that_goes_on_drops_what_was_measured_of_the_shorter_one(tmp_path):
    run = train.start(replace(SMALL, epochs=2), tmp_path / "run")
    run.figures.mkdir()
    measured = (run.evaluation_file, run.suspects_file, run.suspects_figure)
    previous = run.path / "suspects.previous.csv"
    for file in measured:
        file.write_text("of two epochs")

    def interrupt(_):
        raise KeyboardInterrupt

    train.resume(run)  # a run that is left alone keeps them
    assert all(file.exists() for file in measured)
    with pytest.raises(KeyboardInterrupt):
        train.resume(run, replace(SMALL, epochs=4), on_epoch=interrupt)
    assert not any(file.exists() for file in measured)
    assert previous.read_text() == "of two epochs"  # perhaps somebody's notes
    run.evaluation_file.write_text("of three epochs")
    with pytest.raises(InputError, match="is not complete; finish it with vmcr2 train --resume"):
        figures.draw_run(run)  # with the features of one length and the rates of another
    train.resume(run)
    assert figures.draw_run(run)
    assert not run.evaluation_file.exists()


def test_features_that_are_lost_or_damaged_can_be_had_again_as_the_message_says(tmp_path):
    run = train.start(replace(SMALL, epochs=2), tmp_path / "run")
    before = run.features()
    for spoil in (run.features_file.unlink, lambda: run.features_file.write_bytes(b"PK")):
        spoil()
        with pytest.raises(InputError, match=r"features\.npz is .*delete .*summary\.json and run vmcr2 train --resume"):
            figures.draw_run(run)
        run.summary_file.unlink()
        train.resume(run)
        assert all((run.features()[name] == before[name]).all() for name in before)


def test_ctrl_c_while_an_epoch_is_measured_keeps_that_epoch(tmp_path, monkeypatch):
    recipe = replace(SMALL, checkpoint_seconds=0.0)  # so that every epoch before is on disk
    real = train.extract

    def measured(*given):
        if len(RunFolder(tmp_path / "run").metrics()) == 1:
            signal.raise_signal(signal.SIGINT)
        return real(*given)

    with monkeypatch.context() as patched:
        patched.setattr(train, "extract", measured)
        with pytest.raises(train.Interrupted):
            train.start(recipe, tmp_path / "run")
    run = RunFolder(tmp_path / "run")
    assert run.load_checkpoint()["epoch"] == 2
    unbroken = train.start(recipe, tmp_path / "unbroken")
    assert without_times([train.resume(run).summary()]) == without_times([unbroken.summary()])


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs the device /dev/full, of Linux")
def test_a_full_disk_ends_a_run_that_can_be_resumed(tmp_path, monkeypatch, capsys):
    recipe = from_file(SMALL, tmp_path / "data.npz")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".checkpoint.part").symlink_to("/dev/full")
    recipe_file = tmp_path / "recipe.json"
    recipe_file.write_text(recipes.to_json(recipe))
    assert main(["train", str(recipe_file), "--out", str(tmp_path / "run")]) == 2
    said = capsys.readouterr().err
    assert "run/checkpoint.pt: cannot be written: No space left on device; to continue: vmcr2 train --resume" in said
    monkeypatch.setattr(figures, "draw_run", lambda run: [])
    assert main(shlex.split(said.strip().rpartition("continue: ")[2])[1:]) == 0
    unbroken = train.start(recipe, tmp_path / "unbroken")
    assert without_times([RunFolder(tmp_path / "run").summary()]) == without_times([unbroken.summary()])


def test_halves_that_killed_processes_left_are_swept_by_the_next_to_write_the_file(tmp_path):
    abandoned, current, another = (tmp_path / f".file[1].{part}.part" for part in ("77", "78", "csv.77"))
    for part in (abandoned, current, another):
        part.touch()
    for part in (abandoned, another):
        os.utime(part, (time.time() - 7 * 24 * 3600,) * 2)
    files.write_atomically(tmp_path / "file[1]", b"new")
    assert {each.name for each in tmp_path.iterdir()} == {"file[1]", current.name, another.name}


def test_a_file_that_cannot_be_written_leaves_the_old_one_and_no_half(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def write():
        with files.replacing(path) as file:
            file.write(b"ne")
            raise OSError("the disk is full")

    with pytest.raises(OSError, match="full"):
        write()
    assert [each.name for each in tmp_path.iterdir()] == ["file"]
    assert path.read_bytes() == b"old"


def test_what_the_system_refuses_is_told_from_other_errors(tmp_path):
    def write(error):
        with files.replacing(tmp_path / "file"):
            try:
                raise error
            except OSError:
                raise RuntimeError("unexpected pos") from None  # as torch.save does

    with pytest.raises(OSError, match="cannot be written: No space left on device") as caught:
        write(OSError(28, "No space left on device"))
    assert (caught.value.errno, caught.value.filename) == (28, str(tmp_path / "file"))
    with pytest.raises(RuntimeError, match="unexpected pos"):
        write(FileNotFoundError(2, "No such file", "another"))
    stopped = train.StoppedError(tmp_path, 28, "No space left on device", "file")
    copied = pickle.loads(pickle.dumps(stopped))  # as between processes
    assert (copied.run, copied.errno, str(copied)) == (tmp_path, 28, str(stopped))


@pytest.mark.parametrize("kind", [train.Interrupted, train.LostProcessError])
def test_what_ends_a_run_is_the_same_in_another_process(kind, tmp_path):
    error = kind(tmp_path)
    copied = pickle.loads(pickle.dumps(error))
    assert (copied.run, str(copied)) == (tmp_path, str(error))


def test_ctrl_c_is_pythons_own_again_where_its_handler_was_not_set_from_python(tmp_path, monkeypatch):
    set_to = []
    monkeypatch.setattr(signal, "signal", lambda number, handler: set_to.append(handler))  # which returns None then
    with train._Interrupt(RunFolder(tmp_path), 0, None):
        pass
    assert set_to[1] is signal.default_int_handler


def test_a_console_that_cannot_be_written_is_not_taken_for_the_run_folder(tmp_path):
    class Full(io.StringIO):
        def write(self, text):
            raise OSError(28, "No space left on device")

    with pytest.raises(train.StoppedError, match="'the console'") as caught:
        train.start(replace(SMALL, epochs=1), tmp_path / "run", console=Console(file=Full()))
    assert caught.value.run == tmp_path / "run"
    assert train.resume(tmp_path / "run").is_complete()


def test_an_error_of_a_callers_own_is_not_taken_for_ours(tmp_path):
    def report(_):
        raise ConnectionResetError(104, "reset by peer")

    with pytest.raises(ConnectionResetError):
        train.start(SMALL, tmp_path / "run", on_epoch=report)


def test_a_folder_without_the_right_to_write_is_named(tmp_path, monkeypatch):
    def refused(path, mode):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "open", refused)
    with pytest.raises(InputError, match=r"summary\.json cannot be written: you have no right to write in "):
        files.write_json(tmp_path / "summary.json", {})
