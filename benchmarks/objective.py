"""What the objectives cost, against the formulas as they stand (see `baselines.py`): the tables in results/speed.md.

    python benchmarks/objective.py [--only PART ...]

One machine, threads fixed at the start; every figure is a median, with the distance between quartiles, after one call
to warm up, and every claim a ratio of two such figures from the same run. One "full step" of V-MCR² is the dictionary
step and the gradient in the features; of MCR², forward and backward.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any
from unittest.mock import patch

import baselines
import torch
from torch import Tensor

import vmcr2
from vmcr2 import linalg, rates
from vmcr2.dictionary import Dictionary
from vmcr2.lab.bench import Timing, timed
from vmcr2.lab.terminal import describe_device, markdown_table
from vmcr2.mismatch import Codes
from vmcr2.subspaces import class_subspaces, nearest_subspace
from vmcr2.variational import model_moment

CPU = torch.device("cpu")
RESULTS = Path(__file__).parent.parent / "results"
FIGURES = RESULTS / "speed.json"


class Memory:
    """The most memory this process held since the object was made, beyond what it held then (Linux)."""

    def __init__(self) -> None:
        Path("/proc/self/clear_refs").write_text("5")  # sets the peak back to what is held now
        self.before = self._read("VmRSS")

    @staticmethod
    def _read(field: str) -> float:
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith(field)).split()[1]) / 1024

    def peak_mib(self) -> float:
        return self._read("VmHWM") - self.before


def batch(m: int, d: int, k: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Unit features of k noisy 10-dimensional subspaces, and labels drawn at random."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(k, (m,), generator=generator)
    centres = torch.randn(min(k, 1000), 10, d, generator=generator)[labels % 1000]
    z = torch.einsum("ms,msd->md", torch.randn(m, 10, generator=generator), centres)
    z = z + 0.5 * torch.randn(m, d, generator=generator)
    return torch.nn.functional.normalize(z, dim=1), labels


def training_set(d: int, k: int, per_class: int = 20) -> tuple[Tensor, Tensor]:
    z, _ = batch(per_class * k, d, k, seed=1)
    return z, torch.arange(per_class * k) % k


def gradient_step(loss: Callable[[Tensor, Tensor], Tensor], z: Tensor, labels: Tensor) -> Callable[[], Tensor]:
    features = z.clone().requires_grad_()
    return lambda: torch.autograd.grad(loss(features, labels), features)[0]


def variational(d: int, k: int, s: int, structure: str) -> vmcr2.VMCR2Loss:
    loss = vmcr2.VMCR2Loss(k, d, atoms_per_class=s, structure=structure)
    loss.latch(*training_set(d, k))
    return loss


def steps() -> dict[str, Timing]:
    """The full step at (m, d, k, s) = (2000, 500, 200, 10)."""
    m, d, k, s = 2000, 500, 200, 10
    z, labels = batch(m, d, k)
    shared, block = variational(d, k, s, "shared"), variational(d, k, s, "block")
    dense = baselines.DenseVMCR2(shared.dictionary.atoms, shared.dictionary.codes, mu=1.0)
    found = {}
    calls: list[tuple[str, Callable[[Tensor, Tensor], Tensor]]] = [
        ("ours: MCR2Loss", vmcr2.MCR2Loss(k)),
        ("(d) MCR², smaller side", lambda x, y: baselines.mcr2_smaller_side(x, y, k)),
        ("ours: VMCR2Loss, block", block),
        ("ours: VMCR2Loss, shared", shared),
        ("(b) MCR², one logdet per class", lambda x, y: baselines.mcr2_logdet_per_class(x, y, k)),
        ("(c) V-MCR², dense d×d", dense),
        ("(a) MCR², dense Π", lambda x, y: baselines.mcr2_dense_membership(x, y, k)),
    ]
    for name, loss in calls:
        found[name] = timed(gradient_step(loss, z, labels))
    return found


def paths() -> dict[str, dict[str, float]]:
    """The full step, at (m, d, k, s) = (2000, 500, 200, 10) where none is named, with and without each short cut."""
    m, d, k, s = 2000, 500, 200, 10
    z, labels = batch(m, d, k)
    exact = gradient_step(vmcr2.MCR2Loss(k), z, labels)
    shared = gradient_step(variational(d, k, s, "shared"), z, labels)
    shared_small = gradient_step(variational(500, 100, 1, "shared"), *batch(250, 500, 100))
    block_small = gradient_step(variational(500, 100, 1, "block"), *batch(250, 500, 100))

    def two_products(rows: Tensor) -> Tensor:
        return linalg.product(rows, rows.mT)

    def cholesky_gradient(matrix: Tensor) -> Tensor:
        factor = torch.linalg.cholesky(matrix + torch.eye(matrix.shape[-1]))
        return factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)

    def on_the_side_of_dimensions(held: Codes, class_weights: Tensor, eps_sq: float) -> Tensor:
        return held.atoms @ linalg.inverse_shifted(model_moment(held, class_weights, eps_sq))

    without: dict[str, tuple[Callable[[], Tensor], Any]] = {
        "MCR2Loss: the gradient of X Xᵀ by one product": (exact, patch.object(rates, "gram", two_products)),
        "MCR2Loss: the gradient of logdet in closed form": (
            exact,
            patch.object(rates, "half_logdet", cholesky_gradient),
        ),
        "VMCR2Loss, shared: classes that keep to their own atoms step as blocks": (
            shared,
            patch.object(Dictionary, "confined", lambda self: torch.tensor(False)),
        ),
        "VMCR2Loss at (256, 512, 1000, 1), shared: the same where most classes are absent": (
            gradient_step(variational(512, 1000, 1, "shared"), *batch(256, 512, 1000)),
            patch.object(Dictionary, "confined", lambda self: torch.tensor(False)),
        ),
        "VMCR2Loss at (250, 500, 100, 1): of up to d/2 atoms a q×q matrix is factorised": (
            shared_small,
            patch("vmcr2.dictionary.solved_atoms", on_the_side_of_dimensions),
        ),
        "VMCR2Loss at (250, 500, 100, 1): all inner products of a small batch at once, for ‖C_j‖": (
            shared_small,
            patch("vmcr2.mismatch._FEW_PAIRS", 0),
        ),
        "VMCR2Loss at (250, 500, 100, 1), block: the classes of a small batch are one group": (
            block_small,
            patch("vmcr2.membership._MERGED", 0),
        ),
    }
    found = {}
    for name, (step, patched) in without.items():
        turns: dict[str, list[float]] = {"with": [], "without": []}
        for _ in range(5):  # in turn, since what else the machine does changes
            turns["with"].append(timed(step, 0.5).median)
            with patched:
                turns["without"].append(timed(step, 0.5).median)
        found[name] = {which: statistics.median(medians) for which, medians in turns.items()}
    return found


SMALL = {  # as our recipes for the paper's data have them
    "MNIST": (128, 10, {"atoms_per_class": 12, "pull": 0.3, "expand": 0.1}),
    "CIFAR-10": (128, 10, {"atoms_per_class": 1, "pull": 0.3}),
    "CIFAR-100": (500, 100, {"atoms_per_class": 1, "pull": 0.3}),
    "Tiny ImageNet": (500, 200, {"atoms_per_class": 1, "pull": 0.3}),
}


def small() -> dict[str, dict[str, float]]:
    """One full step of both objectives in batches of 250, in turn."""
    found = {}
    for name, (d, k, settings) in SMALL.items():
        loss = vmcr2.VMCR2Loss(k, d, **settings)
        loss.latch(*training_set(d, k))
        z, labels = batch(250, d, k)
        steps = {"vmcr2": gradient_step(loss, z, labels), "mcr2": gradient_step(vmcr2.MCR2Loss(k), z, labels)}
        turns = [{which: timed(step, 0.5).median for which, step in steps.items()} for _ in range(5)]
        found[name] = {which: statistics.median(turn[which] for turn in turns) for which in steps}
    return found


def soft() -> dict[str, float]:
    """One full step with a dense soft Π at (m, d, k) = (1000, 200, 500), beside labels, in both structures."""
    m, d, k = 1000, 200, 500
    z, labels = batch(m, d, k)
    rows = torch.softmax(torch.randn(m, k, generator=torch.Generator().manual_seed(0)), 1)
    found = {}
    for structure, (kind, membership) in itertools.product(("shared", "block"), (("soft", rows), ("labels", labels))):
        loss = vmcr2.VMCR2Loss(k, d, structure=structure)
        loss(z, membership)
        found[f"{structure}, {kind}"] = timed(gradient_step(loss, z, membership)).median
    return found


def classes(k: int) -> dict[str, float]:
    """Block codes at m = 4096, d = 512, s = 10: time of a step, and memory of the process beyond the imports."""
    d, s = 512, 10
    memory = Memory()
    loss = vmcr2.VMCR2Loss(k, d, atoms_per_class=s, structure="block")
    z, labels = batch(4096, d, k)
    loss(z, labels)  # latches the classes in the batch
    timing = timed(gradient_step(loss, z, labels))
    return asdict(timing) | {"peak_mib": memory.peak_mib(), "atoms_mib": d * k * s * 4 / 2**20}


def latching() -> dict[str, float]:
    """Latching onto 100,000 × 500 features of 200 classes, s = 10."""
    z, labels = batch(100_000, 500, 200)
    loss = vmcr2.VMCR2Loss(200, 500, atoms_per_class=10)
    small = batch(1000, 500, 200)
    loss.latch(*small)
    memory = Memory()
    timing = timed(lambda: loss.latch(z, labels))
    return asdict(timing) | {"peak_mib": memory.peak_mib()}


def subspaces() -> dict[str, float]:
    """Fitting on 100,000 × 500 of 200 classes; predicting 10,000 × 500, against one projector I − VVᵀ a class."""
    k = 200
    z, labels = batch(100_000, 500, k)
    test, _ = batch(10_000, 500, k, seed=2)
    fit = timed(lambda: class_subspaces(z, labels, k, 10))
    bases = class_subspaces(z, labels, k, 10).to(test.dtype)

    def projectors() -> Tensor:
        eye = torch.eye(500)
        return torch.stack([(test @ (eye - v @ v.T)).square().sum(1) for v in bases], 1).argmin(1)

    same = bool((projectors() == nearest_subspace(test, bases)).all())
    ours = timed(lambda: nearest_subspace(test, bases))
    theirs = timed(projectors)
    return {"fit": fit.median, "predict": ours.median, "projectors": theirs.median, "same_labels": same}


def reduction() -> dict[str, float]:
    """Exact ΔR of a training set of 100,000 × 500, k = 200."""
    z, labels = batch(100_000, 500, 200)
    return asdict(timed(lambda: vmcr2.rate_reduction(z, labels, num_classes=200)))


def precision() -> dict[str, float]:
    """Relative errors of float32 against float64, at each size, also where the residual nearly vanishes."""
    worst = {}
    for m, d, k, s in ((1000, 128, 10, 20), (2000, 500, 100, 10), (2000, 500, 200, 10)):
        z, labels = batch(m, d, k)
        narrow = vmcr2.rate_reduction(z, labels, num_classes=k)
        wide = vmcr2.rate_reduction(z.double(), labels, num_classes=k)
        for name, ours, exact in zip(("R", "R_c"), narrow, wide, strict=True):
            worst[f"{name} {m, d, k}"] = abs(float(ours / exact) - 1)
        for structure in ("shared", "block"):
            loss = variational(d, k, s, structure)
            tight = vmcr2.VMCR2Loss(k, d, atoms_per_class=min(d, 40), structure=structure)
            tight.latch(z, labels)
            for kind, chosen in (("latched on other data", loss), ("latched on the batch", tight)):
                chosen.eval()
                exact = chosen.double()(z.double(), labels)
                ours = chosen.float()(z, labels)
                worst[f"mismatch {m, d, k}, {structure}, {kind} ({float(exact):.2g})"] = abs(float(ours / exact) - 1)
    return worst


def picture() -> dict[str, dict[str, float]]:
    """Seconds of a step against the number of classes: m = 2000, d = 256, s = 10."""
    m, d, s = 2000, 256, 10
    found: dict[str, dict[str, float]] = {}
    for k in (10, 30, 100, 300, 1000):
        z, labels = batch(m, d, k)
        shared = variational(d, k, s, "shared") if k <= 300 else None
        losses: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
            "(b) MCR², one logdet per class": lambda x, y, k=k: baselines.mcr2_logdet_per_class(x, y, k),
            "(d) MCR², smaller side": lambda x, y, k=k: baselines.mcr2_smaller_side(x, y, k),
            "ours: MCR2Loss": vmcr2.MCR2Loss(k),
            "ours: VMCR2Loss, block": variational(d, k, s, "block"),
        }
        if shared is not None:
            dense = baselines.DenseVMCR2(shared.dictionary.atoms, shared.dictionary.codes, mu=1.0)
            losses["ours: VMCR2Loss, shared"] = shared
            losses["(c) V-MCR², dense d×d"] = dense
        for name, loss in losses.items():
            found.setdefault(name, {})[str(k)] = timed(gradient_step(loss, z, labels)).median
    return found


def draw(found: dict[str, dict[str, float]], where: str, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.8), dpi=150, layout="constrained")
    axes = figure.subplots()
    for name, curve in found.items():
        ours = name.startswith("ours")
        axes.plot(
            [int(k) for k in curve], list(curve.values()), "-o" if ours else "--s",
            label=name.partition(") ")[2] or name,
            color={"(b)": "#d1495b", "(c)": "#7a7a7a", "(d)": "#edae49"}.get(name[:3]), lw=2 if ours else 1.2, ms=4,
        )  # fmt: skip
    axes.set(xscale="log", yscale="log", xlabel="classes k", ylabel="seconds of one full step")
    axes.set_title(
        f"batches of m = 2000 features of dimension 256, 10 atoms per class, shared codes up to 300 classes\n{where}",
        loc="left", fontsize=7,
    )  # fmt: skip
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=7)
    figure.savefig(path)


def apart(part: str) -> dict[str, float]:
    """Runs a part in a process of its own, so that its peak of memory is its own."""
    done = subprocess.run([sys.executable, __file__, "--apart", part], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{part} failed: {done.stderr[-2000:]}")
    return json.loads(done.stdout)


def ratio(found: dict[str, dict[str, float]], slow: str, fast: str) -> str:
    return f"{found[slow]['median'] / found[fast]['median']:.1f}×"


def write(known: dict) -> None:
    """Writes results/speed.md from the figures."""
    parts = [
        f"# Speed\n\nMade by `python benchmarks/objective.py`; {known['where']}. Times are median ± "
        "interquartile range, in seconds, after one warm-up call. The absolute times are this machine's; the claims "
        "are the ratios.\n"
    ]
    if "steps" in known:
        found = known["steps"]
        rows = [[name, f"{t['median']:.4f}", f"{t['spread']:.4f}"] for name, t in found.items()]
        parts.append(
            "\n## One full step at (m, d, k, s) = (2000, 500, 200, 10)\n\n"
            + markdown_table(["what", "median", "±"], rows)
        )
        exact, block, shared = "ours: MCR2Loss", "ours: VMCR2Loss, block", "ours: VMCR2Loss, shared"
        a, b, c, d = (
            "(a) MCR², dense Π",
            "(b) MCR², one logdet per class",
            "(c) V-MCR², dense d×d",
            "(d) MCR², smaller side",
        )
        claims = [
            ["exact MCR² against (b)", ratio(found, b, exact), "30×"],
            ["exact MCR² against (a)", ratio(found, a, exact), "500×"],
            ["V-MCR², shared, against (c)", ratio(found, c, shared), "25×"],
            ["V-MCR², block, against (c)", ratio(found, c, block), "100×"],
            ["time of V-MCR², block, over that of (d)", ratio(found, block, d), "at most 2×"],
            ["time of V-MCR², block, over that of our own MCR2Loss", ratio(found, block, exact), "–"],
            ["time of V-MCR², shared, over that of our own MCR2Loss", ratio(found, shared, exact), "–"],
        ]
        parts.append("\n" + markdown_table(["claim", "measured", "bar"], claims))
    if "paths" in known:
        rows = [
            [name, f"{t['with']:.4f}", f"{t['without']:.4f}", f"{t['without'] / t['with']:.2f}×"]
            for name, t in known["paths"].items()
        ]
        parts.append(
            "\n## What each short cut of a step saves\n\n"
            + markdown_table(["short cut", "with it", "without", "ratio"], rows)
        )
    if "small" in known:
        rows = [
            [name, f"{t['vmcr2']:.4f}", f"{t['mcr2']:.4f}", f"{t['vmcr2'] / t['mcr2']:.1f}×"]
            for name, t in known["small"].items()
        ]
        parts.append(
            "\n## One full step in batches of 250, as our recipes for the paper's data have it\n\n"
            + markdown_table(["settings for", "VMCR2Loss", "MCR2Loss", "ratio"], rows)
        )
    if "soft" in known:
        rows = [[name, f"{seconds:.3f}"] for name, seconds in known["soft"].items()]
        parts.append(
            "\n## A dense soft Π: one full step at (m, d, k) = (1000, 200, 500) (bar: 0.3 s)\n\n"
            + markdown_table(["structure, Π", "seconds"], rows)
        )
    rows = []
    for k in ("200", "10000", "100000"):
        if f"classes {k}" in known:
            f = known[f"classes {k}"]
            what = f"block step, m = 4096, d = 512, s = 10, k = {k}"
            text = f"{f['median']:.2f} s, {f['peak_mib']:.0f} MiB, of which atoms {f['atoms_mib']:.0f} MiB"
            rows.append([what, text, {"200": "–", "10000": "1 s, 2 GiB, 12 times the step at k = 200"}.get(k, "runs")])
    if "latching" in known:
        f = known["latching"]
        text = f"{f['median']:.2f} s, {f['peak_mib']:.0f} MiB beyond the features"
        rows.append(["latching, 100,000 × 500, k = 200, s = 10", text, "10 s, 1 GiB"])
    if "subspaces" in known:
        f = known["subspaces"]
        rows.append(["nearest subspace, fit 100,000 × 500, k = 200", f"{f['fit']:.2f} s", "–"])
        text = f"{f['projectors'] / f['predict']:.0f}×, same labels: {f['same_labels']}"
        rows.append(["predict 10,000 × 500 against one projector per class", text, "50×"])
    if "reduction" in known:
        rows.append(["exact ΔR of 100,000 × 500, k = 200", f"{known['reduction']['median']:.2f} s", "5 s"])
    if rows:
        parts.append("\n## Whole data sets and many classes\n\n" + markdown_table(["what", "measured", "bar"], rows))
        over = known.get("classes 10000", {"median": 0.0})["median"] - 1
        if over > 0:
            parts.append(f"\nMissed by {over:.0%}: the bar of 1 s for the step with 10,000 classes.\n")
    if "precision" in known:
        rows = [[name, f"{error:.1e}"] for name, error in known["precision"].items()]
        parts.append(
            "\n## Precision of float32 against float64 (bar: 1e-5)\n\n" + markdown_table(["what", "error"], rows)
        )
    (RESULTS / "speed.md").write_text("".join(parts), encoding="utf-8")


def main() -> None:
    names = ["steps", "paths", "small", "soft", "classes", "latching", "subspaces", "reduction", "precision", "picture"]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=names, default=names)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--apart", help=argparse.SUPPRESS)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    if given.apart:
        name, _, k = given.apart.partition(" ")
        calls = {"latching": latching, "subspaces": subspaces, "reduction": reduction}
        print(json.dumps(classes(int(k)) if name == "classes" else calls[name]()))
        return
    known = json.loads(FIGURES.read_text()) if FIGURES.exists() else {}
    where = describe_device(CPU)
    if known.get("where") != where:
        known = {"where": where}  # ratios hold within one machine
    for name in given.only:
        if name == "steps":
            known[name] = {what: asdict(timing) for what, timing in steps().items()}
        elif name == "classes":
            known |= {f"classes {k}": apart(f"classes {k}") for k in (200, 10_000, 100_000)}
        elif name in ("paths", "small", "soft", "precision"):
            known[name] = {"paths": paths, "small": small, "soft": soft, "precision": precision}[name]()
        elif name == "picture":
            known[name] = picture()
            draw(known[name], known["where"], RESULTS / "speed.png")
        else:
            known[name] = apart(name)
        FIGURES.write_text(json.dumps(known, indent=1) + "\n")
        write(known)
        print(name, "done", flush=True)


if __name__ == "__main__":
    main()
