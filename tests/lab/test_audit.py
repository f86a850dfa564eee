"""Wrong labels in a run's training set are found, named and shown."""

import csv
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from small import SMALL

from vmcr2.errors import InputError
from vmcr2.lab import sources, train
from vmcr2.lab.audit import audit
from vmcr2.lab.augmentation import Augmentation
from vmcr2.lab.recipes import RECIPES
from vmcr2.lab.sources import DataSettings


def test_labels_broken_on_purpose_are_found_and_mended(tmp_path):
    broken = DataSettings(label_noise=0.1)
    run = train.start(replace(RECIPES["digits"], epochs=8, data=broken, device="cpu"), tmp_path / "run")
    suspects, written, judged, alone, aside = audit(run)
    assert (alone, aside) == (0, None)
    right = sources.load(DataSettings()).train_labels
    wrong = {i for i, label in enumerate(sources.load(broken).train_labels) if label != right[i]}
    assert judged == len(right)
    first = suspects[: len(wrong)]
    assert [one.score for one in suspects] == sorted(one.score for one in suspects)
    assert sum(int(one.sample) in wrong for one in first) >= 0.9 * len(wrong)
    mended = [one for one in first if int(one.sample) in wrong]
    assert sum(int(one.suggested) == right[int(one.sample)] for one in mended) >= 0.95 * len(mended)
    assert written == [run.path / "suspects.csv", run.figures / "suspects.png"]
    with written[0].open(encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["sample", "given", "suggested", "score"]
    assert [row[0] for row in rows[1:]] == [one.sample for one in suspects]
    assert written[1].stat().st_size > 10_000


def test_suspects_of_a_folder_are_files_whatever_part_of_it_is_trained_on(tmp_path):
    for j, (name, colour) in enumerate((("ash", (250, 0, 0)), ("oak", (0, 0, 250)))):
        (tmp_path / "leaves" / "train" / name).mkdir(parents=True)
        for i in range(12):
            shown = (0, 0, 250) if (name, i) == ("ash", 7) else colour
            image = Image.new("RGB", (8, 8), tuple(max(0, part - 5 * i - j) for part in shown))
            image.save(tmp_path / "leaves" / "train" / name / f"{i}.png")
    data = DataSettings(source=str(tmp_path / "leaves"), validation=0.2)
    dataset = sources.load(data)
    names = [dataset.train_name(i) for i in range(len(dataset.train_labels))]
    assert len(set(names)) == 20
    for name, label in zip(names, dataset.train_labels.tolist(), strict=True):
        assert name.startswith(f"train/{dataset.class_names[label]}/")
    recipe = replace(SMALL, network="mlp", epochs=4, data=data, batch_size=10)
    suspects, *_ = audit(train.start(recipe, tmp_path / "run"))
    assert "train/ash/7.png" in names
    assert suspects[0].sample == "train/ash/7.png"
    assert (suspects[0].given, suspects[0].suggested) == ("ash", "oak")


def test_data_that_changed_is_refused(tmp_path):
    def written(k):
        read = sources.load(DataSettings(classes=k))
        arrays = {"x_train": read.train_inputs, "y_train": read.train_labels}
        arrays |= {"x_test": read.test_inputs, "y_test": read.test_labels}
        np.savez(tmp_path / "data.npz", **{name: tensor.numpy() for name, tensor in arrays.items()})
        return DataSettings(source=str(tmp_path / "data.npz"))

    run = train.start(replace(SMALL, epochs=1, data=written(3)), tmp_path / "run")
    written(4)
    with pytest.raises(InputError, match=r"data\.npz has other classes or sizes than"):
        audit(run)
    assert not (run.path / "suspects.csv").exists()


def test_images_one_pixel_high_are_shown(tmp_path):
    images = np.random.default_rng(0).integers(0, 255, (60, 1, 8), dtype=np.uint8)
    labels = np.arange(60) % 3
    np.savez(tmp_path / "thin.npz", x_train=images, y_train=labels, x_test=images, y_test=labels)
    data = DataSettings(source=str(tmp_path / "thin.npz"))
    recipe = replace(SMALL, epochs=1, data=data, network="mlp", augmentation=Augmentation())
    suspects, written, judged, *_ = audit(train.start(recipe, tmp_path / "run"))
    assert suspects
    assert judged == 60
    assert written[1].stat().st_size > 5000


def test_an_audit_leaves_somebodys_notes(tmp_path):
    run = train.start(replace(SMALL, epochs=1), tmp_path / "run")
    assert audit(run).aside is None
    assert audit(run).aside is None  # the same again
    for number, name in enumerate(("suspects.previous.csv", "suspects.previous-2.csv")):
        run.suspects_file.write_text(f"note {number}")
        assert audit(run).aside == run.path / name
        assert (run.path / name).read_text() == f"note {number}"
    assert (run.path / "suspects.previous.csv").read_text() == "note 0"


def test_the_only_samples_of_their_classes_do_not_count_as_judged(tmp_path):
    images = np.random.default_rng(0).integers(0, 255, (33, 8, 8), dtype=np.uint8)
    labels = np.concatenate([np.arange(30) % 3, [3, 4, 5]])
    np.savez(tmp_path / "few.npz", x_train=images, y_train=labels, x_test=images, y_test=labels)
    recipe = replace(SMALL, epochs=1, data=DataSettings(source=str(tmp_path / "few.npz")))
    found = audit(train.start(recipe, tmp_path / "run"))
    assert (found.judged, found.alone) == (30, 3)
