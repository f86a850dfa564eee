"""The shape annotations hold along the whole path: everything runs once with jaxtyping checked by beartype."""

import subprocess
import sys

PROGRAM = """
import sys
from dataclasses import replace
from pathlib import Path
from jaxtyping import install_import_hook

with install_import_hook("vmcr2", "beartype.beartype"):
    import torch
    import vmcr2
    from vmcr2 import embeddings, sklearn
    from vmcr2.lab import evaluate, sources, train, trained
    from vmcr2.lab.recipes import OBJECTIVES, RECIPES, VMCR2Settings
    from vmcr2.lab.sources import DataSettings

z = torch.nn.functional.normalize(torch.randn(30, 8), dim=1)
labels = torch.arange(30) % 3
for membership in (labels, torch.nn.functional.one_hot(labels, 3), torch.full((30, 3), 1 / 3)):
    vmcr2.rate_reduction(z, membership)
    vmcr2.MCR2Loss(3)(z.clone().requires_grad_(), membership).backward()
    for structure in ("shared", "block"):
        for step, energy in (("ascent", None), ("ascent", 1.0), ("paper", None), ("simultaneous", 1.0)):
            loss = vmcr2.VMCR2Loss(3, 8, atoms_per_class=2, structure=structure, step=step, energy=energy)
            loss(z.clone().requires_grad_(), membership).backward()
            loss.latch_from(torch.nn.Identity(), zip(z.split(6), membership.split(6)))
            loss.rates(z, membership)
            loss.eval()(z, membership)
    loss = vmcr2.VMCR2Loss(3, 8, atoms_per_class=2, structure="block", sharded=True)
    loss.latch_from(torch.nn.Identity(), zip(z.split(6), membership.split(6)))
    loss(z.clone().requires_grad_(), membership).backward()
    loss.rates(z, membership)
    loss.nearest_class(z)
for views in (z, z.view(3, 10, 8), [z, z[:7]]):
    vmcr2.TotalCodingRateLoss()(views)
vmcr2.coding_rate(z), vmcr2.coding_rate(z.view(3, 10, 8))
vmcr2.variational_logdet(torch.randn(2, 5, 3))

str(vmcr2.report(z, labels)), str(vmcr2.label_quality(z, labels)), vmcr2.transrate(z, labels)
rows, given = z.numpy(), labels.numpy()
classifier = vmcr2.CodingRateClassifier(epochs=2, hidden=8).fit(rows, given)
classifier.predict_proba(rows), classifier.label_quality(rows, given), classifier.partial_fit(rows, given)
nearest = vmcr2.NearestSubspaceClassifier().fit(rows, given)
nearest.predict(rows)
nearest.partial_fit(rows, given, classes=[0, 1, 2]).score_samples(rows)

small = replace(RECIPES["digits"], epochs=1, data=DataSettings(train_size=200), vmcr2=VMCR2Settings(atoms_per_class=2))
for objective in OBJECTIVES:
    run = train.start(replace(small, objective=objective), Path(sys.argv[1]) / objective)
    loaded = trained.load(run)
    dataset = sources.load(small.data)
    features = evaluate.extract(loaded.model, dataset, small.augmentation, 100)
    loaded.scores(dataset.test_inputs[:5])
    evaluate.accuracy_by_components(features, dataset, [1, 2])

try:
    vmcr2.rates.expansion_rate(z[0], 0.5)
except Exception as error:
    assert "jaxtyping" in type(error).__module__
    print("checked")
"""


def test_annotated_shapes_hold(tmp_path):
    done = subprocess.run([sys.executable, "-c", PROGRAM, tmp_path], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "checked"
