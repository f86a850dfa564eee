"""Fixtures: features and memberships, and the real data sets where they are present."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import settings

settings.register_profile("vmcr2", deadline=None, max_examples=25, derandomize=True)
settings.load_profile("vmcr2")

REPOSITORY = Path(__file__).parents[1]


def unit_rows(m, d, *, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(torch.randn(m, d, generator=generator, dtype=torch.float64), dim=1).to(dtype)


def random_labels(m, k, *, seed=0):
    return torch.randint(k, (m,), generator=torch.Generator().manual_seed(seed))


def random_rows(m, k, *, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.softmax(2 * torch.randn(m, k, generator=generator, dtype=torch.float64), dim=1)


@pytest.fixture(scope="session")
def data_root(tmp_path_factory):
    """Returns a folder with MNIST, CIFAR-100 and Omniglot in torchvision's layout, or skips naming what is missing."""
    named = os.environ.get("VMCR2_DATA_ROOT")
    if named:
        return Path(named)
    unpack = REPOSITORY.parent / "shared" / "data" / "unpack.py"
    if not unpack.is_file():
        pytest.skip("needs mnist, cifar100 and omniglot: set VMCR2_DATA_ROOT to a folder that holds them")
    root = tmp_path_factory.mktemp("data")
    subprocess.run([sys.executable, unpack, root, "mnist", "cifar100", "omniglot"], check=True, capture_output=True)
    return root
