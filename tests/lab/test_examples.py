"""The examples run as they are, at the size of a test; those whose package is missing are skipped by its name."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import needs

import vmcr2
from vmcr2.lab._torchvision import import_torchvision

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(autouse=True)
def beside_the_examples(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.chdir(tmp_path)
    import_torchvision()  # Lightning and transformers import it, and may meet a torch it was not built for


def test_the_plain_loop_learns(capsys):
    import plain_loop

    assert plain_loop.main(epochs=12) > 0.95
    assert "= ΔR" in capsys.readouterr().out


def test_the_loop_on_two_processes_learns():
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run([*launcher, EXAMPLES / "ddp.py"], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    assert float(re.search(r"test accuracy ([\d.]+) on 2 processes", line)[1]) > 0.95


def test_lightning_passes_its_sanity_check_before_any_latch_and_learns():
    needs("lightning")
    import lightning_module

    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    figures = lightning_module.main(epochs=6, num_sanity_val_steps=2, **quiet)
    assert figures["ΔR"] > 5
    assert "residual" in figures


def test_a_validation_before_any_latch_says_what_to_do(monkeypatch):
    needs("lightning")
    import lightning_module

    class Careless(lightning_module.Digits):
        def validation_step(self, batch, _):
            self.loss(self.model(batch[0]), batch[1])

    monkeypatch.setattr(lightning_module, "Digits", Careless)
    with pytest.raises(vmcr2.NotLatchedError, match=r"Lightning's sanity check.*num_sanity_val_steps=0"):
        lightning_module.main(epochs=1, logger=False, enable_checkpointing=False, accelerator="cpu")


def test_batches_that_are_dicts_are_refused_with_what_to_make_of_them():
    loss = vmcr2.VMCR2Loss(2, 4)
    batch = {"pixel_values": torch.eye(4), "labels": torch.tensor([0, 1, 0, 1])}
    with pytest.raises(
        vmcr2.InputError, match=r"pairs \(inputs, membership\), got a dict of 'pixel_values', 'labels'; turn"
    ):
        loss.latch_from(torch.nn.Identity(), [batch])
    with pytest.raises(vmcr2.InputError, match=r"pairs \(inputs, membership\), got a Tensor"):
        loss.latch_from(torch.nn.Identity(), [torch.eye(4)])
    loss.latch_from(torch.nn.Identity(), ((one["pixel_values"], one["labels"]) for one in [batch]))


def test_hugging_faces_trainer_latches_and_learns():
    needs("transformers", "accelerate")
    import huggingface_trainer

    assert huggingface_trainer.main(epochs=6)["eval_reduction"] > 5


@pytest.mark.parametrize("service", ["tensorboard", "trackio", "wandb"])
def test_a_logger_gets_every_epoch(service, tmp_path, monkeypatch):
    needs(service)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    import logging_hooks

    run = logging_hooks.main(service, epochs=2, folder=str(tmp_path / "run"))
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 2
    assert sys.modules[service] is not None
