"""Two ranks give the losses, the dictionary and the gradients of one process."""

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from conftest import random_labels, unit_rows

import vmcr2


def setup():
    torch.manual_seed(0)
    model = torch.nn.Linear(6, 8).double()
    losses = [
        vmcr2.VMCR2Loss(3, 8, atoms_per_class=2, structure=structure).double() for structure in ("shared", "block")
    ]
    return model, [*losses, vmcr2.MCR2Loss(3)]


def steps(model, losses, inputs, labels):
    """Latches and runs two steps of each loss; returns everything that must agree."""
    results = []
    for loss in losses:
        if isinstance(loss, vmcr2.VMCR2Loss):
            loss.latch(torch.nn.functional.normalize(model(inputs).detach(), dim=1), labels)
        for _ in range(2):
            model.zero_grad()
            value = loss(torch.nn.functional.normalize(model(inputs), dim=1), labels)
            value.backward()
        results += [value.detach(), *(p.grad.clone() for p in model.parameters()), *loss.state_dict().values()]
    return results


def worker(rank, rendezvous, out):
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    model, losses = setup()
    wrapped = torch.nn.parallel.DistributedDataParallel(model)
    inputs, labels = unit_rows(31, 6), random_labels(31, 3)
    mine = slice(0, 20) if rank == 0 else slice(20, 31)  # unequal shares
    results = steps(wrapped, losses, inputs[mine], labels[mine])
    torch.save(results, f"{out}.{rank}")
    dist.destroy_process_group()


def test_two_ranks_equal_one(tmp_path):
    mp.spawn(worker, (tmp_path / "rendezvous", tmp_path / "out"), nprocs=2)
    expected = steps(*setup(), unit_rows(31, 6), random_labels(31, 3))
    for rank in range(2):
        got = torch.load(tmp_path / f"out.{rank}", weights_only=True)
        assert len(got) == len(expected)
        for ours, theirs in zip(got, expected, strict=True):
            torch.testing.assert_close(ours, theirs)
