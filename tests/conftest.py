"""Features, memberships and dictionaries to test with, and the real data sets where they are present."""

import multiprocessing
import multiprocessing.connection
import os
import pickle
import subprocess
import sys
import tempfile
import time
import traceback
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import settings
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import vmcr2
from vmcr2.membership import as_membership
from vmcr2.mismatch import BlockCodes, SharedCodes

settings.register_profile("vmcr2", deadline=None, max_examples=25, derandomize=True)
settings.load_profile("vmcr2")
os.environ["SCIPY_ARRAY_API"] = "1"  # without it scikit-learn skips some of its checks; read when SciPy is imported

# pytest-xdist's workers share the cores, and so do the processes that tests start.
if "PYTEST_XDIST_WORKER_COUNT" in os.environ:
    torch.set_num_threads(max(1, torch.get_num_threads() // int(os.environ["PYTEST_XDIST_WORKER_COUNT"])))
    os.environ["OMP_NUM_THREADS"] = str(torch.get_num_threads())

REPOSITORY = Path(__file__).parents[1]
STRUCTURES = ["shared", "block"]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


def unit_rows(m, d, *, seed=0, dtype=torch.float64):
    return torch.nn.functional.normalize(normal(m, d, seed=seed), dim=1).to(dtype)


def random_rotation(d, *, seed=0):
    return torch.linalg.qr(normal(d, d, seed=seed))[0]


def random_labels(m, k, *, seed=0):
    return torch.randint(k, (m,), generator=generator(seed))


def random_rows(m, k, *, seed=0):
    return torch.softmax(2 * normal(m, k, seed=seed), dim=1)


def random_membership(m, k, kind, *, seed=0):
    """Returns a membership of one of the kinds that need care: balanced, labels (the last class absent), soft."""
    if kind == "balanced":
        return torch.arange(m) % k
    return random_rows(m, k, seed=seed) if kind == "soft" else random_labels(m, max(1, k - 1), seed=seed)


def rows_of(membership, k):
    """Returns Π as rows, float64."""
    return membership.double() if membership.ndim == 2 else torch.nn.functional.one_hot(membership, k).double()


def checked(z, membership, k):
    return as_membership(z, membership, k)


def random_dictionary(d, k, s, structure="shared", *, seed=0):
    atoms = unit_rows(k * s, d, seed=seed)
    codes = torch.rand(k, s if structure == "block" else k * s, generator=generator(seed), dtype=torch.float64)
    return (BlockCodes if structure == "block" else SharedCodes)(atoms, codes)


def as_shared(dictionary):
    """Returns the same dictionary in shared structure."""
    if isinstance(dictionary, SharedCodes):
        return dictionary
    return SharedCodes(dictionary.atoms, torch.block_diag(*dictionary.codes[:, None]))


def at_batch_scale(dictionary, pi):
    """Returns the paper's Γ (d, q) and A = Ã Diag(n) (q, k) as NumPy arrays."""
    shared = as_shared(dictionary)
    return shared.atoms.T.detach().numpy(), shared.codes.T.detach().numpy() * np.asarray(pi).sum(0)


def loss_at(z, membership, k, s, **settings):
    """Returns a V-MCR² loss latched onto a batch, in the features' dtype."""
    loss = vmcr2.VMCR2Loss(k, z.shape[1], atoms_per_class=s, **settings).to(z.dtype)
    loss.latch(z, membership)
    return loss


def snapshot(loss):
    return {name: tensor.clone() for name, tensor in loss.state_dict().items()}


def assert_unchanged(loss, before):
    after = loss.state_dict()
    assert after.keys() == before.keys()
    for name, tensor in after.items():
        assert torch.equal(tensor, before[name]), name


class LargestTensor(TorchDispatchMode):
    """Notes how many entries the largest tensor has that is made while it is active; views do not count."""

    def __init__(self):
        super().__init__()
        self.numel = 0
        self.shape = ()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        held = {tensor.untyped_storage().data_ptr() for tensor in tree_leaves(args) if isinstance(tensor, torch.Tensor)}
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in held:
                written = tensor.untyped_storage().nbytes() // tensor.element_size()
                if written > self.numel:
                    self.numel, self.shape = written, tuple(tensor.shape)
        return result


def _serve(connection):
    """Runs what `Ranks` asks of a process: each call as one rank of a fresh group."""
    torch.set_num_threads(1)
    while True:
        rank, world, rendezvous, timeout, call = pickle.loads(connection.recv_bytes())
        try:
            wait = timedelta(seconds=timeout)
            dist.init_process_group(
                "gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world, timeout=wait
            )
            dist.barrier()  # a rank that is done at once would take the file away from one that has still to join
            function, arguments = pickle.loads(call)
            torch.manual_seed(0)
            said = pickle.dumps((True, function(rank, *arguments)))
        except BaseException:
            said = pickle.dumps((False, traceback.format_exc()))
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()
        connection.send_bytes(said)


class Ranks:
    """Processes that run functions as ranks of torch.distributed, started once for all tests.

    `ranks(world, function, *arguments)` runs a function of a test module, `function(rank, *arguments)`, on the first
    `world` of them and returns the list of what each returned. A rank that raises, ends or hangs fails the test with
    what every rank said; after one that ended or hangs, the processes are replaced.
    """

    def __init__(self, largest=4, deadline=60.0):
        self.largest, self.deadline = largest, deadline
        self.processes, self.connections = [], []

    def __call__(self, world, function, *arguments, deadline=None):
        if not self.processes:
            self._start()
        deadline = self.deadline if deadline is None else deadline
        call = pickle.dumps((function, arguments))
        # gloo waits a little less, so that a rank that waits in vain says in which call.
        timeout = max(1.0, 0.8 * deadline)
        with tempfile.TemporaryDirectory() as folder:
            for rank, connection in enumerate(self.connections[:world]):
                connection.send_bytes(pickle.dumps((rank, world, f"{folder}/rendezvous", timeout, call)))
            said = self._heard(world, time.monotonic() + deadline)
        if len(said) == world and all(good for good, _ in said.values()):
            return [said[rank][1] for rank in range(world)]
        if len(said) < world or "the process has ended" in [each for _, each in said.values()]:
            self.end()
        lines = [f"rank {rank}: {said[rank][1] if rank in said else 'nothing was heard'}" for rank in range(world)]
        pytest.fail(f"{function.__name__} failed under {world} ranks\n" + "\n".join(lines))

    def _heard(self, world, until):
        said, waiting = {}, dict(zip(self.connections[:world], range(world), strict=True))
        while waiting and (left := until - time.monotonic()) > 0:
            for connection in multiprocessing.connection.wait(list(waiting), left):
                rank = waiting.pop(connection)
                try:
                    said[rank] = pickle.loads(connection.recv_bytes())
                except EOFError:
                    said[rank] = (False, "the process has ended")
                if not said[rank][0]:
                    until = min(until, time.monotonic() + 5)  # the others may be waiting for this one
        return said

    def _start(self):
        # Forked from a process that has imported all of this and run nothing, they need not import it each.
        forked = "forkserver" in multiprocessing.get_all_start_methods()
        context = multiprocessing.get_context("forkserver" if forked else "spawn")
        if forked:
            context.set_forkserver_preload(["sklearn.datasets", "torch._dynamo", "vmcr2.lab.train"])
        for _ in range(self.largest):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs,), daemon=True)
            process.start()
            theirs.close()
            self.processes.append(process)
            self.connections.append(ours)

    def end(self):
        for process in self.processes:
            process.kill()
            process.join()
        self.processes, self.connections = [], []


@pytest.fixture(scope="session")
def ranks():
    pool = Ranks()
    yield pool
    pool.end()


def needs(*packages):
    """Skips a test of packages that the development extra leaves out as heavy, naming the one that is missing."""
    for package in packages:
        pytest.importorskip(package, reason=f"needs {package}: pip install '.[examples]'")


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
