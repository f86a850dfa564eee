"""The shape annotations hold along the whole path of a run: it runs once with them checked by beartype."""

import subprocess
import sys

PROGRAM = """
import sys
from dataclasses import replace
from pathlib import Path
from jaxtyping import install_import_hook

with install_import_hook("vmcr2", "beartype.beartype"):
    from vmcr2.lab import evaluate, sources, train, trained
    from vmcr2.lab.sources import DataSettings
    from vmcr2.lab.recipes import OBJECTIVES, RECIPES, VMCR2Settings

small = replace(RECIPES["digits"], epochs=1, data=DataSettings(train_size=200), vmcr2=VMCR2Settings(atoms_per_class=2))
for objective in OBJECTIVES:
    run = train.start(replace(small, objective=objective), Path(sys.argv[1]) / objective)
    loaded = trained.load(run)
    dataset = sources.load(small.data)
    features = evaluate.extract(loaded.model, dataset, small.augmentation, 100)
    loaded.scores(dataset.test_inputs[:5])
    evaluate.accuracy_by_components(features, dataset, [1, 2])
print("done")
"""


def test_annotated_shapes_hold_in_a_run(tmp_path):
    done = subprocess.run([sys.executable, "-c", PROGRAM, tmp_path], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "done"
