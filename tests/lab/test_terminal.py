"""What is shown of long work."""

import io

from rich.console import Console

from vmcr2.lab.terminal import EpochProgress, table


def test_figures_of_an_earlier_epoch_say_so():
    console = Console(file=io.StringIO(), width=80)
    with EpochProgress("digits", 6, 0, console) as progress:
        for epoch in range(1, 7):
            measured = {"ΔR": "7.1", "accuracy": "0.98"} if epoch == 5 else {}
            progress.update(epoch, measured | {"batch ΔR": f"0.{epoch}"})
    first, last = console.file.getvalue().splitlines()
    assert "epoch 1/6  batch ΔR 0.1 " in first
    assert "epoch 6/6  batch ΔR 0.6  ΔR 7.1  accuracy 0.98 (epoch 5)" in last


def test_nothing_is_cut_at_80_columns():
    console = Console(file=io.StringIO(), width=80, force_terminal=True)
    with EpochProgress("tiny-imagenet-strong vmcr2 seed 0", 2000, 0, console) as progress:
        progress.update(1, {"ΔR": "134.95", "accuracy": "0.4189"})
        progress.update(2, {"batch ΔR": "134.21"})
    shown = console.file.getvalue()
    assert "ΔR 134.95  accuracy 0.4189 (epoch 1)  batch ΔR 134.21" in shown
    console.print(table("Recipes", ("name", "about"), [("tiny-imagenet-strong", "word " * 30 + "last")]))
    assert "last" in console.file.getvalue()
    assert "…" not in console.file.getvalue()
