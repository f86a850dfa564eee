"""A trained run in use: loaded without its data, given images of all kinds, exported and read back."""

import json
import shutil
import subprocess
import sys
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from small import SMALL

import vmcr2
from vmcr2.errors import InputError
from vmcr2.lab import sources, train, trained
from vmcr2.lab.augmentation import Augmentation
from vmcr2.lab.run import RunFolder
from vmcr2.lab.sources import DataSettings


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run on digits whose labels are 100 to 109, and whose file is gone; padded, so that images grow."""
    folder = tmp_path_factory.mktemp("trained")
    digits = sources.load(DataSettings(train_size=300))
    arrays = {"x_train": digits.train_inputs[:, 0], "y_train": digits.train_labels + 100}
    arrays |= {"x_test": digits.test_inputs[:, 0], "y_test": digits.test_labels + 100}
    np.savez(folder / "data.npz", **{name: tensor.numpy() for name, tensor in arrays.items()})
    grown = Augmentation(crop=10, padding=1)
    data = DataSettings(source=str(folder / "data.npz"))
    made = train.start(replace(SMALL, epochs=3, evaluate_every=2, data=data, augmentation=grown), folder / "run")
    (folder / "data.npz").unlink()
    return made


def test_a_run_predicts_without_its_data_as_it_was_measured(run):
    digits = sources.load(DataSettings())
    loaded = vmcr2.load(str(run.path))
    assert not loaded.model.training
    assert loaded.classes == tuple(str(j) for j in range(100, 110))
    assert loaded.subspaces.shape == (10, 32, 3)
    features = loaded.embed(digits.test_inputs)
    assert torch.allclose(features.norm(dim=1), torch.ones(360))
    predicted = loaded.predict(digits.test_inputs.numpy())
    right = [name == str(100 + label) for name, label in zip(predicted, digits.test_labels.tolist(), strict=True)]
    assert sum(right) / 360 == run.summary()["test_accuracy"]
    scores = loaded.scores(digits.test_inputs)
    assert scores.min() >= 0
    assert scores.max() <= 1 + 1e-5
    assert [loaded.classes[j] for j in scores.argmax(1)] == predicted


def test_subspaces_that_hold_nearly_all_of_any_sample_still_tell_classes_apart(tmp_path):
    """Residuals below float32's precision of 1: a run of wide subspaces, each all but one direction of the space."""
    recipe = replace(SMALL, epochs=2, evaluate_every=2, feature_dim=4, data=DataSettings(classes=2, train_size=60))
    run = train.start(recipe, tmp_path / "run")
    loaded = vmcr2.load(run)
    missed = torch.nn.functional.normalize(torch.tensor([[1.0, 0.002, 0, 0], [1.0, -0.002, 0, 0]]), dim=1)
    bases = [torch.linalg.svd(line[None].double())[2][1:].T for line in missed]
    loaded.subspaces = torch.stack(bases).float()
    loaded.embed = lambda features: features
    far = 3e-4 * torch.tensor([[1.0, 1, 0, 0], [1.0, -1, 0, 0]]) + torch.tensor([0.0, 0, 1, 0])
    assert loaded.scores(far).argmax(1).tolist() == [1, 0]


def test_fewer_components_are_the_strongest(run):
    assert torch.equal(vmcr2.load(run, components=2).subspaces, vmcr2.load(run).subspaces[..., :2])


def test_images_that_are_not_square_are_read_as_the_arrays_are():
    shape = (1, 6, 10)
    made = trained.TrainedModel(
        network="mlp", feature_dim=4, input_shape=shape, image_shape=shape, classes=("ash", "elm"), components=1
    ).eval()
    pixels = torch.randint(256, (2, *shape[1:]), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    assert torch.equal(made.embed([Image.fromarray(image.numpy()) for image in pixels]), made.embed(pixels))


def test_files_and_images_are_read_as_the_arrays_are(run, tmp_path):
    digits, loaded = sources.load(DataSettings()), vmcr2.load(run)
    pixels = digits.test_inputs[:3, 0].numpy()
    images = [Image.fromarray(image) for image in pixels]
    for i, image in enumerate(images):
        image.convert("RGB").resize((32, 32), Image.Resampling.NEAREST).save(tmp_path / f"{i}.png")
    whole = loaded.embed(digits.test_inputs[:3])
    assert torch.equal(loaded.embed(pixels), whole)  # without the channel
    assert torch.allclose(loaded.embed(images), whole, atol=1e-6)
    assert loaded.embed(images[0]).shape == (1, 32)
    assert torch.equal(loaded.embed(pixels[..., ::-1]), loaded.embed(pixels[..., ::-1].copy()))  # of negative strides
    np.save(tmp_path / "pixels.npy", pixels)
    mapped = np.load(tmp_path / "pixels.npy", mmap_mode="r")
    torch.set_warn_always(True)  # else once a process
    try:
        with warnings.catch_warnings(action="error"):
            assert torch.equal(loaded.embed(mapped), whole)
            assert loaded._inputs(mapped).data_ptr() == mapped.ctypes.data  # of more than memory holds
    finally:
        torch.set_warn_always(False)
    files = np.array([str(tmp_path / f"{i}.png") for i in range(3)])
    for several in (files, files.astype(object)):
        assert torch.equal(loaded.embed(several), loaded.embed(files.tolist()))
    # Scaled down again; colour and size do not matter.
    assert torch.allclose(loaded.embed([str(tmp_path / f"{i}.png") for i in range(3)]), whole, atol=0.1)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(2, 1, 8, 8), r"must be uint8 images \(m, 1, 8, 8\) as in training, got float32 \(2, 1, 8, 8\)"),
        (np.zeros((2, 3, 8, 8), np.uint8), r"got uint8 \(2, 3, 8, 8\)"),
        ([], "images must be at least one image, got none"),
        ("nowhere.png", "nowhere.png is not a readable image"),
        (None, "images must be an array, a path, an image, .*got NoneType"),
        (3, "images must be an array, a path, an image, .*got int"),
        ([np.zeros((8, 8), np.uint8)] * 2, r"got a sequence of arrays: stack them \(numpy.stack, torch.stack\)$"),
        ([torch.zeros(8, 8)], r"got a sequence of arrays: stack them"),
        (np.array([object()]), "is not a readable image"),
        (np.zeros((2, 8, 8), object), "images must hold numbers of a dtype that torch supports, got object"),
        (np.ma.array(["a.png", "b.png"], mask=[0, 1]), "images must have no masked entries, got 1"),
        (np.zeros((2, 8, 8), ">f4"), "images must hold numbers of a dtype that torch supports, got >f4"),
    ],
)
def test_images_of_another_kind_are_refused(run, images, message):
    with pytest.raises(InputError, match=message):
        vmcr2.load(run).embed(images)


def test_a_run_on_embeddings_takes_embeddings(tmp_path):
    y = np.arange(60) % 3
    x = np.eye(3)[y] + 0.1 * np.random.default_rng(0).normal(size=(60, 3))
    np.savez(tmp_path / "e.npz", features=x, labels=y)
    data = DataSettings(source=str(tmp_path / "e.npz"), validation=0.2)
    loaded = vmcr2.load(train.start(replace(SMALL, network="mlp", epochs=2, data=data), tmp_path / "run"))
    assert loaded.embed(x).shape == (60, 32)
    with pytest.raises(InputError, match="an array of embeddings"):
        loaded.embed(["a.png"])
    with pytest.raises(InputError, match=r"must be floats \(m, 3\) as in training, got float64 \(60, 2\)"):
        loaded.embed(x[:, :2])
    with pytest.raises(InputError, match="got a sequence of arrays: stack them"):
        loaded.embed(list(x))
    for wrong in (np.nan, np.inf, 1e300):  # the last is finite in float64 alone
        spoilt = x.copy()
        spoilt[2, 1] = wrong
        for call in (loaded.embed, loaded.scores, loaded.predict):
            with pytest.raises(InputError, match="images must be finite in float32, got 1 NaN or infinite entries"):
                call(spoilt)


@pytest.mark.parametrize("path", [None, 3, b"run"])
def test_what_is_no_path_is_refused(path):
    for call in (vmcr2.load, trained.Checkpoint.open):
        with pytest.raises(InputError, match=f"path must be that of a run folder, got {type(path).__name__}"):
            call(path)


def test_an_export_is_the_same_model(run, tmp_path):
    loaded = vmcr2.load(run)
    trained.export(loaded, tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"config.json", "model.safetensors", "README.md"}
    assert len({path.stat().st_mode for path in (tmp_path / "out").iterdir()}) == 1  # as readable as each other
    card = (tmp_path / "out" / "README.md").read_text()
    for words in ("library_name: vmcr2", "Classes: 100, 101", "| test accuracy |", "Network: cnn"):
        assert words in card
    again, images = vmcr2.load(tmp_path / "out"), sources.load(DataSettings()).test_inputs
    assert torch.equal(again.embed(images), loaded.embed(images))
    assert again.predict(images) == loaded.predict(images)
    with pytest.raises(InputError, match="must be new or empty"):
        trained.export(loaded, tmp_path / "out")
    (tmp_path / "out" / "config.json").write_text("{}")
    with pytest.raises(InputError, match="holds no readable model"):
        vmcr2.load(tmp_path / "out")


@pytest.mark.parametrize("name", ["write_atomically", "write_json"])
def test_an_export_that_fails_can_be_made_again(run, tmp_path, monkeypatch, name):
    def full(*_):
        raise OSError("no space left on device")

    loaded = vmcr2.load(run)
    with monkeypatch.context() as patched:
        patched.setattr(trained, name, full)
        with pytest.raises(OSError, match="no space"):
            trained.export(loaded, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    trained.export(loaded, tmp_path / "out")
    vmcr2.load(tmp_path / "out")


def test_an_export_to_a_full_disk_says_so(run, tmp_path, monkeypatch):
    import safetensors.torch

    def full(*_):
        raise safetensors.SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(safetensors.torch, "save_model", full)
    with pytest.raises(OSError, match=r"out cannot be written: .*No space left on device"):
        trained.export(vmcr2.load(run), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_hubs_mixin_writes_and_reads_the_same_folder_offline(run, tmp_path):
    import huggingface_hub  # noqa: F401  of the dev extra: without it the mixin is a stand-in

    loaded, images = vmcr2.load(run), sources.load(DataSettings()).test_inputs
    loaded.save_pretrained(tmp_path / "hub")
    assert json.loads((tmp_path / "hub" / "config.json").read_text()) == loaded.config
    assert "Classes: 100, 101" in (tmp_path / "hub" / "README.md").read_text()
    trained.export(loaded, tmp_path / "ours")
    for folder in ("hub", "ours"):
        again = trained.TrainedModel.from_pretrained(str(tmp_path / folder), local_files_only=True)
        assert again.predict(images) == loaded.predict(images)
    assert vmcr2.load(tmp_path / "hub").about == loaded.about
    fewer = vmcr2.load(run, components=np.int64(2))
    fewer.save_pretrained(tmp_path / "fewer-hub")
    trained.export(fewer, tmp_path / "fewer-ours")
    for folder in ("fewer-hub", "fewer-ours"):
        again = trained.TrainedModel.from_pretrained(str(tmp_path / folder), local_files_only=True)
        assert again.subspaces.shape[2] == 2
        assert "test_accuracy" not in again.about
        assert again.predict(images) == vmcr2.load(tmp_path / folder).predict(images) == fewer.predict(images)


def test_what_is_not_installed_is_named():
    program = """
import sys
sys.modules["huggingface_hub"] = None
sys.modules["safetensors"] = None
from vmcr2.lab import trained
for call in (lambda: trained.TrainedModel.from_pretrained("x"), lambda: trained.export(None, "surely-new")):
    try:
        call()
    except ValueError as error:
        print(error)
for name in [name for name in sys.modules if name.startswith("vmcr2")]:
    del sys.modules[name]
sys.modules["filelock"] = None
try:
    import vmcr2
    vmcr2.load
except ModuleNotFoundError as error:
    print(error)
"""
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert said.splitlines() == [
        "from_pretrained needs huggingface_hub: pip install 'vmcr2[hub]'",
        "exported models need safetensors: pip install 'vmcr2[hub]'",
        "vmcr2.load needs filelock, which is missing: pip install 'vmcr2[lab]'",
    ]


def test_subspaces_older_than_the_network_are_said(run):
    state = run.load_checkpoint()
    changed = replace(run)
    for at, bases, error in ((2, state["trained"]["bases"], None), (0, None, "has not been measured yet")):
        kept = state["trained"] | {"measured_at": at, "bases": bases}
        object.__setattr__(changed, "load_checkpoint", lambda kept=kept: state | {"trained": kept})
        if error is None:
            with pytest.warns(UserWarning, match="has subspaces from epoch 2 but a network from epoch 3"):
                vmcr2.load(changed)
        else:
            with pytest.raises(InputError, match=error):
                vmcr2.load(changed)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        vmcr2.load(run)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": {}}, "does not fit the network of its recipe"),
        ({"trained": {"config": {"classes": ["a"]}, "bases": None, "measured_at": 1}}, "has not been measured yet"),
        ({"trained": None}, "is not a checkpoint of this program"),
        ({"epoch": "three"}, "is not a checkpoint of this program"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused(run, change, message):
    changed = RunFolder(run.path)
    torch.save(run.load_checkpoint() | change, run.path / "changed.pt")
    object.__setattr__(changed, "checkpoint_file", run.path / "changed.pt")
    with pytest.raises(InputError, match=message):
        vmcr2.load(changed)


def test_a_recipe_edited_since_is_refused(run, tmp_path):
    edited = RunFolder(shutil.copytree(run.path, tmp_path / "run"))
    edited.write_recipe(replace(run.recipe(), eps_sq=0.01))
    with pytest.raises(InputError, match=r"checkpoint\.pt belongs to a different recipe from .*recipe\.json"):
        vmcr2.load(edited)


def test_damaged_weights_and_features_that_overflow_are_no_silent_nan(tmp_path):
    generator = torch.Generator().manual_seed(0)
    rows, labels = torch.randn(60, 5, generator=generator), torch.arange(60) % 3
    np.savez(tmp_path / "rows.npz", x_train=rows, y_train=labels, x_test=rows, y_test=labels)
    data = DataSettings(source=str(tmp_path / "rows.npz"))
    recipe = replace(SMALL, epochs=1, data=data, network="mlp", augmentation=Augmentation())
    made = train.start(recipe, tmp_path / "run")
    loaded = vmcr2.load(made)
    for scale in (1e30, 1e37):
        with pytest.raises(vmcr2.NumericalError, match=r"\d+ of 60 samples features that are not of norm 1"):
            loaded.predict(rows * scale)
    expected = loaded.embed(rows)
    for dtype in (torch.float64, torch.bfloat16):
        torch.testing.assert_close(loaded.to(dtype).embed(rows).float(), expected, atol=0.02, rtol=0)
    state = made.load_checkpoint()
    state["trained"]["bases"][0, 0, 0] = torch.nan
    torch.save(state, made.checkpoint_file)
    with pytest.raises(InputError, match="is damaged: NaN or infinite entries in subspaces"):
        vmcr2.load(made)


def test_a_model_that_is_being_trained_further_predicts_as_in_eval_mode_and_stays_as_it_is(run):
    loaded, images = vmcr2.load(run), sources.load(DataSettings()).test_inputs
    expected = loaded.predict(images)
    loaded.model.train()
    before = {name: value.clone() for name, value in loaded.state_dict().items()}
    assert loaded.predict(images) == expected
    assert loaded.model.training
    assert all(torch.equal(value, before[name]) for name, value in loaded.state_dict().items())
