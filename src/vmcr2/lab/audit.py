"""Suspects in a run's training set: samples whose features lie in the subspace of a class other than their label's."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

import vmcr2
from vmcr2.lab import figures
from vmcr2.lab.files import as_csv, check_writable, replacing
from vmcr2.lab.run import RunFolder
from vmcr2.lab.trained import Checkpoint


@dataclass(frozen=True)
class Suspect:
    """A training sample with a label that does not fit.

    Attributes:
        sample: its file in the folder, or its index in the source's training part.
        given: the label it has.
        suggested: the label that fits.
        score: from 0 (certainly wrong) to 1.
    """

    sample: str
    given: str
    suggested: str
    score: float


class Audit(NamedTuple):
    """What was found in a training set.

    Attributes:
        suspects: the most suspect first.
        written: the files written.
        judged: how many samples were judged.
        alone: how many could not be, being their class's only sample.
        aside: where an earlier, different suspects.csv is now; None if there was none.
    """

    suspects: list[Suspect]
    written: list[Path]
    judged: int
    alone: int
    aside: Path | None


def audit(run: RunFolder, data_root: str | Path | None = None) -> Audit:
    """Finds the training samples that another label would suit better, according to `vmcr2.label_quality`.

    Writes all of them to suspects.csv in the run folder, most suspect first, and, for images, figures/suspects.png. An
    earlier suspects.csv that differs, such as by somebody's notes, gets another name. Samples that are held out for
    validation or test are not judged, nor is the only sample of a class.

    Args:
        run: with a checkpoint.
        data_root: the folder of named data sets.

    Raises:
        InputError: the run has no checkpoint, or its data is missing or has other classes (a ValueError).
    """
    checkpoint = Checkpoint.open(run)
    check_writable(run.path)
    dataset, features = checkpoint.features(data_root)
    judged = vmcr2.label_quality(features.train, dataset.train_labels)
    names = dataset.class_names
    suspects = [
        Suspect(dataset.train_name(i), names[judged.labels[i]], names[judged.suggested[i]], float(judged.scores[i]))
        for i in judged.suspects.tolist()
    ]
    written = [run.suspects_file]
    lines = [(one.sample, one.given, one.suggested, f"{one.score:.4f}") for one in suspects]
    content, aside = as_csv([("sample", "given", "suggested", "score"), *lines]), None
    if not run.suspects_file.exists() or run.suspects_file.read_bytes() != content:
        with replacing(run.suspects_file) as file:
            file.write(content)
            file.flush()  # so that a full disk is noticed before the earlier list is moved
            aside = run.put_suspects_aside()
    run.suspects_figure.unlink(missing_ok=True)  # of an earlier audit
    if suspects and dataset.train_inputs.ndim == 4:
        written.append(figures.draw_suspects(dataset, judged, run.suspects_figure, checkpoint.recipe.name))
    alone = int((np.bincount(judged.labels) == 1).sum())
    return Audit(suspects, written, len(judged.scores) - alone, alone, aside)
