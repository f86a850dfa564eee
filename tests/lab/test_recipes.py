"""Recipes: how they are written, read and refused."""

import json
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from small import SMALL

from vmcr2.errors import InputError
from vmcr2.lab import recipes, sources
from vmcr2.lab.augmentation import Augmentation, augmented, warn_of_lost_borders
from vmcr2.lab.recipes import CESettings, Recipe, VMCR2Settings


@pytest.mark.parametrize(
    ("message", "change"),
    [
        (r"extra fields found \(momentun\)", {"momentun": 0.9}),
        (r"extra fields found \(nu\).*\$.vmcr2", {"vmcr2": {"nu": 5}}),
        ("vmcr2.mu must be a finite number > 0, got -1", {"vmcr2": {"mu": -1}}),
        ("epochs must be an integer >= 1, got 0", {"epochs": 0}),
        (r"must be of type int, got 5.7 @ \$.epochs", {"epochs": 5.7}),
        (r"must be of type bool, got 'false' @ \$.augmentation.flip", {"augmentation": {"flip": "false"}}),
        ("momentum must be below 1, got 5", {"momentum": 5}),
        ("seed must be at most", {"seed": 10**15}),
        ("name must be letters, digits", {"name": "../escape"}),
        ("batch_size must be an integer >= 2", {"batch_size": 1}),
        ("network must be one of mlp", {"network": "transformer"}),
        (r"step not in literal.*\$\.schedule", {"schedule": "step"}),
        (r"vmcr2.lr must be at most 0.05 with optimizer adamw \(begin with 1e-3\), got 0.5", {"optimizer": "adamw"}),
        ("lr_drops must be empty with schedule cosine", {"schedule": "cosine", "lr_drops": [0.5]}),
        (r"warmup_epochs must be at most 100 \(epochs\), got 200", {"warmup_epochs": 200}),
        ("data.test_size must be left out with data.validation", {"data": {"validation": 0.2, "test_size": 9}}),
        (r"mse not in literal.*\$\.objective", {"objective": "mse"}),
        ("vmcr2.pull must be a finite number > 0 and at most 1, got 2", {"vmcr2": {"pull": 2}}),
        ("vmcr2.expand must be a finite number >= 0, got -1", {"vmcr2": {"expand": -1}}),
        ("vmcr2.expand_until must be a finite number > 0 and at most 1, got 0", {"vmcr2": {"expand_until": 0}}),
        ("ce.scale must be a finite number > 0, got -1", {"ce": {"scale": -1}}),
        ("feature_dim must be an integer >= 2, got 1", {"feature_dim": 1}),
        (r"vmcr2.atoms_per_class must be at most 128 \(feature_dim\), got 500", {"vmcr2": {"atoms_per_class": 500}}),
    ],
)
def test_wrong_recipes(tmp_path, message, change):
    fields = json.loads(recipes.to_json(Recipe()))
    for name, value in change.items():
        if isinstance(value, dict):
            fields[name] |= value
        else:
            fields[name] = value
    file = tmp_path / "recipe.json"
    file.write_text(json.dumps(fields))
    with pytest.raises(InputError, match=message):
        recipes.from_json(file)


def test_recipes_survive_json(tmp_path):
    for recipe in recipes.named().values():
        file = tmp_path / f"{recipe.name}.json"
        file.write_text(recipes.to_json(recipe))
        assert recipes.find(str(file)) == recipe
        assert recipes.differences(recipe, replace(recipe, seed=3)) == ["seed: 0, 3"]
    (tmp_path / "cut.json").write_text("{")
    with pytest.raises(InputError, match="is not a readable recipe"):
        recipes.find(str(tmp_path / "cut.json"))
    with pytest.raises(InputError, match="did you mean omniglot100"):
        recipes.find("omniglot10")


def test_choices_are_checked_without_json_too():
    for change in ({"schedule": "step"}, {"precision": "16-mixed"}, {"objective": "mse"}):
        (name,) = change
        with pytest.raises(InputError, match=f"{name} must be one of"):
            replace(SMALL, **change)
    with pytest.raises(InputError, match="vmcr2.reduction must be one of 'mean', 'sum', got 'none'"):
        replace(SMALL.vmcr2, reduction="none")


@pytest.mark.parametrize(
    ("message", "make"),
    [
        ("sync_batchnorm must be True or False, got 'no'", lambda: replace(SMALL, sync_batchnorm="no")),
        ("sync_batchnorm must be True or False, got 3", lambda: replace(SMALL, sync_batchnorm=3)),
        ("vmcr2.stop_on_collapse must be True or False", lambda: replace(SMALL.vmcr2, stop_on_collapse="no")),
        ("augmentation.flip must be True or False, got 'no'", lambda: Augmentation(flip="no")),
    ],
)
def test_flags_are_checked_without_json_too(message, make):
    with pytest.raises(InputError, match=message):
        make()


def test_a_recipe_of_an_earlier_version_is_read():
    fields = json.loads(recipes.to_json(SMALL)) | {"channels_last": True}
    assert recipes.from_text(json.dumps(fields), "recipe.json") == SMALL


def test_numbers_from_numpy_are_written_as_json():
    seed, number = np.arange(4)[3], np.float32(0.5)
    recipe = replace(
        SMALL,
        seed=seed,
        eps_sq=number,
        lr_drops=np.array([0.5, 0.75]),
        sync_batchnorm=np.bool_(True),
        vmcr2=replace(SMALL.vmcr2, pull=number),
        data=replace(SMALL.data, train_size=np.int64(50)),
    )
    assert json.loads(recipes.to_json(recipe))["seed"] == 3
    assert recipe == replace(
        SMALL,
        seed=3,
        eps_sq=0.5,
        lr_drops=(0.5, 0.75),
        sync_batchnorm=True,
        vmcr2=replace(SMALL.vmcr2, pull=0.5),
        data=replace(SMALL.data, train_size=50),
    )


def test_the_learning_rate_at_every_moment():
    drops = replace(SMALL, objective="ce", epochs=4, lr_drops=(0.5, 0.75), ce=CESettings(lr=0.1))
    assert [drops.lr_at(epoch) for epoch in (0.5, 2, 2.5, 4)] == pytest.approx([0.1, 0.1, 0.01, 0.001])
    cosine = replace(drops, lr_drops=(), schedule="cosine", warmup_epochs=2)
    assert [cosine.lr_at(epoch) for epoch in (0.5, 1, 2, 3, 4)] == pytest.approx([0.025, 0.05, 0.1, 0.05, 0])
    warm = replace(cosine, schedule="constant")
    assert [warm.lr_at(epoch) for epoch in (1, 2, 4)] == pytest.approx([0.05, 0.1, 0.1])
    with pytest.raises(InputError, match="lr_drops must be shares of the epochs, between 0 and 1, got 100"):
        replace(drops, lr_drops=(100.0,))
    with pytest.raises(InputError, match="lr_drops must be a tuple of shares of the epochs, got float"):
        replace(drops, lr_drops=0.5)


def write_images(root, sizes, parts=("train", "test")):
    for part in parts:
        for name in ("ash", "oak"):
            (root / part / name).mkdir(parents=True)
            for i, size in enumerate(sizes):
                Image.new("RGB", size, (9 * i, 0, 0)).save(root / part / name / f"{i}.png")
    return root


@pytest.mark.parametrize(
    ("sizes", "network", "image_size", "crop"),
    [
        ([(8, 8)] * 3, "mlp", None, 8),
        ([(32, 32)] * 3, "conv4", None, 32),
        ([(32, 20)] * 3, "conv4", None, None),  # a square crop would lose borders
        ([(300, 200), (50, 90)], "resnet18", 50, 50),
        ([(300, 200)] * 2, "resnet18", 64, 64),
    ],
)
def test_a_recipe_is_chosen_for_a_folder(tmp_path, sizes, network, image_size, crop):
    recipe = recipes.find(str(write_images(tmp_path / "my leaves", sizes)))
    assert (recipe.name, recipe.network, recipe.data.image_size) == ("my-leaves", network, image_size)
    assert (recipe.augmentation.crop, recipe.data.validation) == (crop, 0)
    dataset = sources.load(recipe.data)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_lost_borders(tuple(dataset.train_inputs.shape[2:]), recipe.augmentation)
    assert augmented(dataset.train_inputs, recipe.augmentation, torch.Generator()).shape == dataset.train_inputs.shape


def test_a_recipe_is_chosen_for_a_file(tmp_path):
    labels = np.arange(900) // 3 + 100
    np.savez(tmp_path / "e.npz", features=np.ones((900, 5)), labels=labels)
    recipe = recipes.find(str(tmp_path / "e.npz"))
    assert (recipe.network, recipe.feature_dim, recipe.data.validation) == ("mlp", 600, 0.2)
    assert "300 classes, 900 training samples" in recipe.about
    assert recipe.augmentation == Augmentation()
    assert recipe.vmcr2 == VMCR2Settings(structure="block")
    np.savez(tmp_path / "few.npz", features=np.ones((900, 5)), labels=labels % 199)
    assert recipes.find(str(tmp_path / "few.npz")).vmcr2 == VMCR2Settings()
    with pytest.raises(InputError, match="there is no file"):
        recipes.find("gone.npz")
    with pytest.raises(InputError, match="it has no train/"):
        recipes.find(str(tmp_path))
