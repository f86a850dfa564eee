"""A dictionary of a million classes on four processes: memory, bytes, times.

    python benchmarks/distributed.py          results/distributed.md

1. k = 1,000,000, d = 128, s = 1, batches of 4096, on 4 gloo ranks of one thread each: latch from a stream, train, save
   by torch.distributed.checkpoint, load, predict. The memory of each rank in each phase, beside k s d / 4 floats.
2. What is sent in a step, counted from the tensors given to torch.distributed, beside what Partial FC sends.
3. The time of a step at k = 100,000: sharded, unsharded, and unsharded in one process.
4. What k = 10⁷ on 64 GPUs would take, from the counted bytes and FLOPs.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp
from torch import Tensor
from torch.nn.functional import normalize
from torch.nn.parallel import DistributedDataParallel
from torch.utils.flop_counter import FlopCounterMode

import vmcr2
from vmcr2.lab.terminal import device_name, markdown_table

RESULTS = Path(__file__).parent.parent / "results"
WORLD, K, D, S, M = 4, 1_000_000, 128, 1, 4096
K_TIMED = 100_000
MIB = 2**20
_M_MMAP_THRESHOLD = -3  # of glibc's mallopt


def inputs_of(labels: Tensor, seed: int) -> Tensor:
    """Returns a noisy sample of each label's class; a class has a direction of its own, and none is stored."""
    generator = torch.Generator().manual_seed(7)
    frequencies = 100 * torch.rand(D, generator=generator, dtype=torch.float64)
    clean = (labels[:, None].double() * frequencies).cos().float()
    return clean + 0.3 * torch.randn(len(labels), D, generator=torch.Generator().manual_seed(seed))


class Network(torch.nn.Module):
    """A linear map whose outputs have norm 1."""

    def __init__(self) -> None:
        super().__init__()
        self.map = torch.nn.Linear(D, D, bias=False)
        with torch.no_grad():
            self.map.weight += 2 * torch.eye(D)

    def forward(self, inputs: Tensor) -> Tensor:
        return normalize(self.map(inputs), dim=1)


class Phases:
    """Runs what a rank does, phase by phase, and notes the growth of its resident memory in MiB, and the seconds."""

    def __init__(self) -> None:
        self.noted: list[tuple[str, float, float, float]] = []  # name, left behind, at most, seconds

    def __call__(self, name: str, run: Callable[[], Any]) -> Any:
        dist.barrier()
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # memory that an earlier phase has freed would hide what this one takes
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
        before, start = resident("VmRSS"), time.perf_counter()
        result = run()
        seconds, peak = time.perf_counter() - start, resident("VmHWM") - before
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        self.noted.append((name, resident("VmRSS") - before, peak, seconds))
        return result


def resident(name: str) -> float:
    """Returns this process's resident memory in MiB: VmRSS now, VmHWM the most there was."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(name))


@contextmanager
def counted() -> Iterator[list[tuple[str, int]]]:
    """Notes every collective and the bytes of the whole tensor that is gathered, summed or summed and scattered."""
    notes: list[tuple[str, int]] = []
    kept = {name: getattr(dist, name) for name in ("all_gather", "all_reduce", "reduce_scatter")}

    def noting(name: str, place: int) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            whole = arguments[place]
            notes.append((name, sum(each.nbytes for each in ([whole] if isinstance(whole, Tensor) else whole))))
            return kept[name](*arguments, **options)

        return call

    for name, place in (("all_gather", 0), ("all_reduce", 0), ("reduce_scatter", 1)):
        setattr(dist, name, noting(name, place))
    try:
        yield notes
    finally:
        for name, function in kept.items():
            setattr(dist, name, function)


def sent(notes: list[tuple[str, int]], world: int) -> float:
    """Returns how many bytes a rank sends for collectives that go round a ring."""
    return sum(n * (world - 1) / world * (2 if name == "all_reduce" else 1) for name, n in notes)


def labels_at(step: int, rank: int, k: int) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * step + rank)
    return torch.randint(k, (M // WORLD,), generator=generator)


def a_step(model: Any, loss: Any, optimizer: Any, step: int, rank: int, k: int) -> Tensor:
    labels = labels_at(step, rank, k)
    value = loss(model(inputs_of(labels, 1000 * step + rank)), labels)
    optimizer.zero_grad()
    value.backward()
    optimizer.step()
    return value.detach()


def million(rank: int, folder: str) -> dict[str, Any]:
    """Latches, trains, saves, loads and predicts with a million classes; returns what each took."""
    # Tensors that are freed go back to the system at once: what is resident is then what is in use.
    ctypes.CDLL("libc.so.6").mallopt(_M_MMAP_THRESHOLD, 2**17)
    phase = Phases()
    torch.manual_seed(0)
    model = DistributedDataParallel(Network())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def make(k: int = K) -> vmcr2.VMCR2Loss:
        return vmcr2.VMCR2Loss(k, D, atoms_per_class=S, structure="block", sharded=True)

    def latch() -> None:
        own = torch.arange(rank, K, WORLD)  # one sample of every class, dealt to the ranks
        loss.latch_from(model, ((inputs_of(part, 5), part) for part in own.split(M // WORLD)))

    def load(other: vmcr2.VMCR2Loss) -> bool:
        state = {"loss": other.state_dict()}
        dcp.load(state, checkpoint_id=folder)
        other.load_state_dict(state["loss"])
        return all(torch.equal(a, b) for a, b in zip(loss.buffers(), other.buffers(), strict=True))

    def predict() -> float:
        labels = labels_at(999, rank, K)
        with torch.no_grad():
            features = model.module(inputs_of(labels, 999 + rank))
        return (loss.nearest_class(features) == labels).double().mean().item()

    # What torch and gloo take themselves on their first calls.
    phase("first, a step with 100 classes", lambda: a_step(model, make(100), optimizer, 0, rank, 100))
    loss = phase("constructing the loss", make)
    phase(f"`latch_from` {K:,} samples", latch)
    values = phase(
        "25 training steps", lambda: [a_step(model, loss, optimizer, 1 + i, rank, K).item() for i in range(25)]
    )
    with counted() as notes, FlopCounterMode(display=False) as flops:
        a_step(model, loss, optimizer, 30, rank, K)
    phase("`dcp.save`", lambda: dcp.save({"loss": loss.state_dict()}, checkpoint_id=folder))
    equal = phase("constructing another, `dcp.load`", lambda: load(make()))
    accuracy = phase(f"`nearest_class` of {M} samples", predict)
    buffers = sum(buffer.nbytes for buffer in loss.buffers()) / MIB
    return {
        "phases": phase.noted,
        "values": values,
        "notes": notes,
        "flops": flops.get_total_flops(),
        "equal": equal,
        "accuracy": accuracy,
        "buffers": buffers,
    }


def timed(rank: int, sharded: bool) -> dict[str, Any]:
    """Returns the median time of a step at k = 100,000 and the losses' values."""
    torch.manual_seed(0)
    model: Any = Network()
    if dist.is_initialized():
        model = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loss = vmcr2.VMCR2Loss(K_TIMED, D, atoms_per_class=S, structure="block", sharded=sharded)
    ranks = [rank] if dist.is_initialized() else list(range(WORLD))
    parts = [part for each in ranks for part in torch.arange(each, K_TIMED, WORLD).split(M)]
    loss.latch_from(model, ((inputs_of(part, 5), part) for part in parts))
    times, values = [], []
    for step in range(30):
        labels = torch.cat([labels_at(step, each, K_TIMED) for each in ranks])
        inputs = torch.cat([inputs_of(labels_at(step, each, K_TIMED), 1000 * step + each) for each in ranks])
        start = time.perf_counter()
        value = loss(model(inputs), labels)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        times.append(time.perf_counter() - start)
        values.append(value.item())
    # The first step latches nothing but warms up; the 1st and 21st look at ΔR for the warning of a collapse.
    usual = sorted(each for step, each in enumerate(times) if step % 20)
    return {"time": usual[len(usual) // 2], "values": values}


def worker(rank: int, folder: str, world: int, name: str, arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    if world > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world)
    result = globals()[name](rank, *arguments)
    torch.save(result, f"{folder}/{rank}.pt")
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()


def on_ranks(world: int, name: str, *arguments: Any) -> list[Any]:
    """Runs a function of this file on so many processes; returns what each of them returned."""
    folder = tempfile.mkdtemp(prefix="vmcr2-")
    try:
        given = (f"{folder}/checkpoint",) if name == "million" else arguments
        mp.spawn(worker, (folder, world, name, given), nprocs=world)
        return [torch.load(f"{folder}/{rank}.pt", weights_only=False) for rank in range(world)]
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def kib(n: float) -> str:
    return f"{n / 1024:,.1f}"


def memory_table(found: list[dict[str, Any]], bound: float) -> str:
    rows = []
    for phases in zip(*(each["phases"] for each in found), strict=True):
        left, peak, seconds = (max(each[place] for each in phases) for place in (1, 2, 3))
        rows.append([phases[0][0], f"{left:.0f}", f"{peak:.0f}", f"{peak / bound:.2f}", f"{seconds:.1f}"])
    return markdown_table(["phase", "left behind, MiB", "at most, MiB", "at most / bound", "seconds"], rows)


def sent_table(notes: list[tuple[str, str, int]]) -> str:
    """Returns the table of collectives: (what they carry, which they are, bytes of the whole)."""
    rows: dict[tuple[str, str], list[float]] = {}
    for what, name, n in notes:
        row = rows.setdefault((what, name), [0, 0, 0])
        for place, value in enumerate((1, n, sent([(name, n)], WORLD))):
            row[place] += value
    return markdown_table(
        ["what", "collective", "times", "KiB, whole", "KiB, sent"],
        [
            [what, name.replace("_", "-"), f"{int(times)}", kib(whole), kib(ring)]
            for (what, name), (times, whole, ring) in rows.items()
        ],
    )


def named(notes: list[tuple[str, int]]) -> list[tuple[str, str, int]]:
    """Returns what the collectives of a step carry, known by their size."""
    names = {
        ("all_gather", M * D * 4): "features, m × d",
        ("all_gather", M * 8): "labels, m",
        ("all_gather", WORLD * 16 * 8): "what each rank brings, 16 integers",
        ("all_reduce", D * D * 4): "S of R^v, d × d",
        ("reduce_scatter", M * D * 4): "the features' gradient, m × d",
    }
    return [(names.get(note, "terms of the mismatch, flags: scalars"), *note) for note in notes]


# For the same m and d, in float32, all classes sampled: its softmax needs three numbers per sample from all ranks.
PARTIAL_FC = [
    ("features, m × d", "all_gather", M * D * 4),
    ("labels, m", "all_gather", M * 8),
    ("the largest logit, m", "all_reduce", M * 4),
    ("the sum of exponentials, m", "all_reduce", M * 4),
    ("the logit of the label, m", "all_reduce", M * 4),
    ("the features' gradient, m × d", "reduce_scatter", M * D * 4),
]
THREE_TERMS = [("all_gather", M * D * 4), ("all_reduce", D * D * 4), ("all_reduce", M * D * 4)]


def table_of_64(flops: float) -> str:
    """Returns what k = 10⁷ takes on 64 GPUs: FLOPs scale with a rank's share of the batch, the rest is counted anew."""
    world, k = 64, 10_000_000
    rows = []
    for m in (4096, 65536):
        gathered = [("all_gather", m * D * 4), ("all_gather", m * 8), ("all_gather", world * 16 * 8)]
        bytes_sent = sent([*gathered, *2 * [("all_reduce", D * D * 4)], ("reduce_scatter", m * D * 4)], world)
        # Two factorisations and inverses of S, which every rank does and torch does not count.
        work = flops * (m / world) / (M / WORLD) + 2 * (4 / 3) * D**3
        rows.append(
            [
                f"{m:,}",
                f"{k * S * D * 4 / MIB:,.0f}",
                f"{k * S * D * 4 / world / MIB:.0f} + {m * D * 4 / MIB:.0f}",
                f"{bytes_sent / MIB:.1f}",
                f"{1000 * bytes_sent / 50e9:.2f}",
                f"{work / 1e9:.2f}",
                f"{1000 * work / 10e12:.3f}",
            ]
        )
    of_a_step = ["sent, MiB", "that at 50 GB/s, ms", "GFLOP", "that at 10 TFLOP/s, ms"]
    return markdown_table(["m", "unsharded, MiB", "atoms and batch a GPU, MiB", *of_a_step], rows)


def text_of(found: list[dict[str, Any]], alone: dict[str, Any], whole: list[Any], sharded: list[Any]) -> str:
    first, batch = found[0], M * D * 4 / MIB
    bound = K * S * D * 4 / WORLD / MIB + batch
    training = first["buffers"] + max(each["phases"][3][2] for each in found)
    ours, theirs = sent(first["notes"], WORLD), sent([note for _, *note in PARTIAL_FC], WORLD)
    difference = max(
        abs(a / b - 1) for each in (*whole, *sharded) for a, b in zip(each["values"], alone["values"], strict=True)
    )
    times = [
        ("unsharded, one process", alone["time"]),
        (f"unsharded, {WORLD} ranks", max(each["time"] for each in whole)),
        (f"sharded, {WORLD} ranks", max(each["time"] for each in sharded)),
    ]
    time_rows = [[name, f"{1000 * seconds:.0f}"] for name, seconds in times]
    accuracy = 100 * sum(each["accuracy"] for each in found) / WORLD
    device = f"{device_name(torch.device('cpu'))}, {os.cpu_count()} cores"
    versions = f"torch {torch.__version__}, Python {platform.python_version()}"
    loss_from, loss_to = first["values"][0], first["values"][-1]
    bound_parts = f"{bound - batch:.0f} + {batch:.0f}"
    equal, three_terms = all(each["equal"] for each in found), kib(sent(THREE_TERMS, WORLD))
    flops = f"{first['flops'] / 1e9:.2f} GFLOP for {M // WORLD} samples per rank"
    return f"""# A dictionary sharded by class

Made by `python benchmarks/distributed.py`; {device}, {versions}, gloo,
one thread per rank. {WORLD} ranks share the {os.cpu_count()} cores, so the times show how the variants compare, not
what a cluster reaches.

## A million classes on {WORLD} ranks

k = {K:,}, d = {D}, s = {S}, batches of m = {M} ({M // WORLD} per rank), float32, a linear network. The bound is
k s d / {WORLD} floats and the batch of all ranks: {bound_parts} = **{bound:.0f} MiB** per rank. The loss's buffers
(atoms, codes, flags) take {first["buffers"]:.0f} MiB. With everything else that 25 training steps need, gradients and
optimiser included, the total is at most **{training:.0f} MiB, {training / bound:.2f} of the bound**.

Growth of resident memory in each phase, the largest over the ranks:

{memory_table(found, bound)}
Besides the dictionary, latching holds the samples (here one of each class, so as much again) and their singular vectors
(as much again). The loss went from {loss_from:.4f} to {loss_to:.4f} in 25 steps: it rises as the dictionary's
codes grow and run ahead of the features (docs/choosing.md, "How trouble shows"). What was loaded equals what was
saved, bit by bit: {equal}. `nearest_class` is right for {accuracy:.1f} % of {M} fresh samples.

## What is sent in a step

Counted from the tensors given to torch.distributed in one step on rank 0. "Sent" is what a rank sends if collectives go
round a ring, as NCCL's do: (W−1)/W of what is gathered or scattered, and twice that of what is summed everywhere; gloo
may send more. The mean of the network's own gradients, which DistributedDataParallel takes, is not included.

{sent_table(named(first["notes"]))}
The total is **{kib(ours)} KiB**. The three terms (gather m × d, sum d × d, sum m × d) would be {three_terms} KiB. The
features' gradient is scattered rather than summed everywhere; S is summed twice, as the codes move at atoms that have
moved. The 16 integers and the scalars cost latency, not bytes.

Partial FC (An et al., CVPR 2022, [arXiv 2203.15565](https://arxiv.org/abs/2203.15565)) for the same m, d and k,
computed, with all classes sampled:

{sent_table(PARTIAL_FC)}
The total is {kib(theirs)} KiB: ours is **{ours / theirs:.2f}** times that. Neither grows with k.

## Time of a step at k = {K_TIMED:,}

Forward, backward and the network's step, median of 28 steps, with the same batches of m = {M} in all three variants.

{markdown_table(["", "ms per step"], time_rows)}
The values of all 30 steps, on every rank and in all three variants, agree to {difference:.0e} (float32).

## k = 10⁷ on 64 GPUs, computed

d = {D}, s = {S}, float32. No run of that size was made. Bytes are those above at W = 64. FLOPs are those of the matrix
products that torch counted in one step on rank 0 ({flops}, the network's included), scaled
to a rank's share of the batch, and those of the two factorisations of S. The two rates are round numbers to divide by.
Every twentieth step looks at ΔR of the whole batch on every rank, which is not included.

{table_of_64(first["flops"])}"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS / "distributed.md")
    out = parser.parse_args().out
    found = on_ranks(WORLD, "million")
    (alone,) = on_ranks(1, "timed", False)
    text = text_of(found, alone, on_ranks(WORLD, "timed", False), on_ranks(WORLD, "timed", True))
    out.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
