"""What the README shows runs as it stands."""

import re
from pathlib import Path

import torch
from torch import nn

import vmcr2

README = Path(__file__).parent.parent / "README.md"


def test_the_loop_of_the_readme_trains():
    (block,) = re.findall(r"```diff\n(.*?)```", README.read_text(), re.DOTALL)
    lines = [line[1:] for line in block.splitlines() if not line.startswith("-")]
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(30, 256), nn.BatchNorm1d(256), nn.ReLU(), nn.Linear(256, 200))
    inputs, labels = torch.randn(200, 30), torch.arange(200) % 100
    before = model[0].weight.detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    given = {"torch": torch, "vmcr2": vmcr2, "model": model, "batches": [(inputs, labels)], "optimizer": optimizer}
    given |= {"device": "cpu", "train_features": torch.randn(200, 30).numpy(), "train_labels": labels.numpy()}
    exec("\n".join(lines), given)
    assert bool(given["value"].isfinite())
    assert not torch.equal(before, model[0].weight)
