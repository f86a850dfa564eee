"""Sources, and what is said when they are missing or damaged."""

import shutil
import urllib.request

import numpy as np
import pytest
import torch
from PIL import Image

from vmcr2.errors import InputError
from vmcr2.lab import recipes, sources
from vmcr2.lab.sources import DataSettings


def write_npz(path, **changed):
    generator = np.random.default_rng(0)
    arrays = {
        "x_train": generator.integers(0, 256, (20, 6, 5), dtype=np.uint8),
        "y_train": np.arange(20) % 4,
        "x_test": generator.integers(0, 256, (8, 6, 5), dtype=np.uint8),
        "y_test": np.arange(8) % 4,
    } | changed
    np.savez(path, **{name: array for name, array in arrays.items() if array is not None})
    return path


def write_folder(root, size=(8, 8)):
    for part, count in (("train", 3), ("test", 2)):
        for j, name in enumerate(("ash", "oak")):
            (root / part / name).mkdir(parents=True)
            for i in range(count):
                Image.new("RGB", size, (100 * j, 10 * i, 0)).save(root / part / name / f"{i}.png")
    return root


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*_, **__):
        raise OSError("no network in this test")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)


def test_digits_ship_with_scikit_learn():
    digits = sources.load(DataSettings())
    assert digits.train_inputs.shape == (1437, 1, 8, 8)
    assert digits.train_inputs.dtype == torch.uint8
    assert digits.test_inputs.shape == (360, 1, 8, 8)
    assert digits.num_classes == 10
    assert int(digits.train_inputs.max()) == 255
    assert torch.bincount(digits.test_labels).min() >= 34  # the split is stratified


@pytest.mark.parametrize(
    ("source", "shape", "train", "test", "classes"),
    [
        ("mnist", (1, 28, 28), 60000, 10000, 10),
        ("cifar100", (3, 32, 32), 50000, 10000, 100),
        ("omniglot", (1, 28, 28), 14460, 4820, 964),
    ],
)
def test_named_sources(data_root, no_network, source, shape, train, test, classes):
    """Files that are there are read without a word to the network."""
    if not any(data_root.glob({"mnist": "MNIST", "cifar100": "cifar-100*", "omniglot": "omniglot.npz"}[source])):
        pytest.skip(f"needs {source} under {data_root}")
    read = sources.load(DataSettings(source=source), data_root)
    assert read.train_inputs.shape == (train, *shape)
    assert read.test_inputs.shape == (test, *shape)
    assert read.num_classes == classes
    assert torch.equal(read.train_labels.unique(), torch.arange(classes))


def test_omniglot_from_the_original_archive(tmp_path, no_network):
    """Two characters drawn by three people, laid out as torchvision unpacks them."""
    for character in ("character01", "character02"):
        folder = tmp_path / "omniglot-py" / "images_background" / "Greek" / character
        folder.mkdir(parents=True)
        for drawer in (1, 15, 16):
            image = Image.new("1", (105, 105), 1)
            image.paste(0, (0, 0, 105, 30))
            image.save(folder / f"0001_{drawer:02d}.png")
    arrays = sources._pack_omniglot(tmp_path / "omniglot-py" / "images_background")
    assert arrays["x_train"].shape == (4, 28, 28)
    assert arrays["y_train"].tolist() == [0, 0, 1, 1]
    assert arrays["x_test"].shape == (2, 28, 28)
    assert arrays["class_names"].tolist() == ["Greek/character01", "Greek/character02"]
    assert arrays["x_train"][0, 0, 0] == 255
    assert arrays["x_train"][0, -1, -1] == 0


def test_subsets(tmp_path):
    path = write_npz(tmp_path / "some.npz")
    some = sources.load(DataSettings(source=str(path), classes=3, train_size=7))
    assert some.num_classes == 3
    assert len(some.train_labels) == 7
    assert some.test_labels.max() == 2
    with pytest.raises(InputError, match=r"data.classes must be at most 4 .*got 9"):
        sources.load(DataSettings(source=str(path), classes=9))
    with pytest.raises(InputError, match=r"data.train_size must be at most 20 .*got 21"):
        sources.load(DataSettings(source=str(path), train_size=21))
    with pytest.raises(InputError, match=r"data.train_size must be an integer >= 1"):
        DataSettings(train_size=0)


def test_npz_of_images_and_of_embeddings(tmp_path):
    images = sources.load(DataSettings(source=str(write_npz(tmp_path / "images.npz"))))
    assert images.train_inputs.shape == (20, 1, 6, 5)
    colour = np.zeros((20, 6, 5, 3), np.uint8), np.zeros((8, 6, 5, 3), np.uint8)
    path = write_npz(tmp_path / "colour.npz", x_train=colour[0], x_test=colour[1])
    assert sources.load(DataSettings(source=str(path))).train_inputs.shape == (20, 3, 6, 5)
    embeddings = {"x_train": np.ones((20, 7)), "x_test": np.ones((8, 7))}
    write_npz(tmp_path / "vectors.npz", **embeddings)
    vectors = sources.load(DataSettings(source="vectors.npz"), tmp_path)
    assert vectors.train_inputs.dtype == torch.float32
    assert vectors.train_inputs.shape == (20, 7)


def test_classes_without_a_training_sample_are_said(tmp_path):
    path = write_npz(tmp_path / "gap.npz", class_names=np.array(["a", "b", "c", "d", "elm"]))
    with pytest.warns(UserWarning, match=r"1 of the 5 classes of .*gap\.npz have no training sample, such as elm"):
        assert sources.load(DataSettings(source=str(path))).num_classes == 5


@pytest.mark.parametrize(
    ("message", "changed"),
    [
        ("lacks y_test", {"y_test": None}),
        ("y_train must hold one integer or text label", {"y_train": np.arange(19)}),
        ("y_train must hold one integer or text label", {"y_train": np.arange(20) / 2}),
        (r"y_test has classes that y_train lacks: \[-1\]", {"y_test": np.arange(8) % 4 - 1}),
        (r"labels must lie in \[0, 3\), .* got labels from 0 to 3", {"class_names": np.array(["a", "b", "c"])}),
        (
            r"class_names must be distinct names .* got shape \(2, 2\)",
            {"class_names": np.array([["a", "b"], ["c", "d"]])},
        ),
        ("class_names must be distinct names .* got 1 duplicate", {"class_names": np.array(["a", "b", "a", "c"])}),
        ("x_train must hold uint8 images", {"x_train": np.zeros((20, 6, 5))}),
        ("must be finite", {"x_train": np.full((20, 3), np.nan), "x_test": np.ones((8, 3))}),
        ("must be finite in float32", {"x_train": np.full((20, 3), 1e300), "x_test": np.ones((8, 3))}),
        ("x_train must hold uint8 images", {"x_train": np.ones((20, 0)), "x_test": np.ones((8, 0))}),
        ("y_train must hold one integer or text label", {"x_train": np.float64(3)}),
        (r"y_test has classes that y_train lacks: \[1, 2, 3\]", {"y_train": np.arange(20) % 2 * 10**9}),
        ("lacks x_test, y_test; data.validation can hold out a share", {"x_test": None, "y_test": None}),
        ("x_train and x_test must agree", {"x_test": np.zeros((8, 9, 9), np.uint8)}),
    ],
)
def test_wrong_npz(tmp_path, message, changed):
    with pytest.raises(InputError, match=message):
        sources.load(DataSettings(source=str(write_npz(tmp_path / "wrong.npz", **changed))))


def test_damaged_files_are_named_whatever_is_wrong_with_them(tmp_path):
    whole = write_npz(tmp_path / "some.npz").read_bytes()
    generator = np.random.default_rng(0)
    refused = 0
    for _ in range(60):
        damaged = bytearray(whole)
        for place in generator.integers(0, len(whole), 20):
            damaged[place] = generator.integers(256)
        (tmp_path / "damaged.npz").write_bytes(damaged)
        try:
            sources.load(DataSettings(source=str(tmp_path / "damaged.npz")))
        except InputError as error:
            refused += "damaged.npz" in str(error)
    assert refused > 30
    np.save(tmp_path / "array.npy", np.zeros(3))
    (tmp_path / "array.npy").rename(tmp_path / "array.npz")
    with pytest.raises(InputError, match="array.npz"):
        sources.load(DataSettings(source=str(tmp_path / "array.npz")))


def test_a_truncated_npz(tmp_path):
    path = write_npz(tmp_path / "cut.npz")
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(InputError, match=r"cut\.npz is not a readable \.npz file \(truncated"):
        sources.load(DataSettings(source=str(path)))


def test_truncated_archives(tmp_path, data_root, no_network):
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for file in (data_root / "MNIST" / "raw").iterdir():
        (raw / file.name).write_bytes(file.read_bytes()[:1000])
    with pytest.raises(InputError, match="mnist under the data root .* is damaged"):
        sources.load(DataSettings(source="mnist"), tmp_path)
    (tmp_path / "cifar-100-python").mkdir()
    for name in ("train", "test", "meta"):
        (tmp_path / "cifar-100-python" / name).write_bytes(b"cut")
    with pytest.raises(InputError, match=r"cifar100 is not under the data root .*\(or fails its checksum\)"):
        sources.load(DataSettings(source="cifar100"), tmp_path)


@pytest.mark.parametrize("source", ["mnist", "fashion-mnist", "cifar10", "cifar100", "omniglot"])
def test_a_failed_download_leaves_no_data_root_behind(tmp_path, no_network, source):
    with pytest.raises(InputError, match="could not be downloaded"):
        sources.load(DataSettings(source=source), tmp_path / "new" / "root")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("source", ["mnist", "fashion-mnist", "cifar10", "cifar100", "omniglot"])
def test_a_data_root_without_the_data(tmp_path, no_network, source):
    with pytest.raises(InputError, match=f"{source} is not under the data root .*--data-root or VMCR2_DATA_ROOT"):
        sources.load(DataSettings(source=source), tmp_path)


def test_unknown_sources(tmp_path):
    with pytest.raises(InputError, match="data.source must be one of digits, mnist"):
        sources.load(DataSettings(source="cifar-10"))
    with pytest.raises(InputError, match=r"there is no file .*gone\.npz"):
        sources.load(DataSettings(source="gone.npz"), tmp_path)


def test_folder_of_images_by_class(tmp_path):
    read = sources.load(DataSettings(source=str(write_folder(tmp_path))))
    assert read.train_inputs.shape == (6, 3, 8, 8)
    assert read.class_names == ("ash", "oak")
    assert read.train_labels.tolist() == [0, 1, 0, 1, 0, 1]  # so that any first part has all classes
    assert read.train_inputs[3, :, 0, 0].tolist() == [100, 10, 0]
    part = sources.load(DataSettings(source=str(tmp_path), train_size=4, test_size=2))
    assert (part.train_labels.tolist(), part.test_labels.tolist()) == ([0, 1, 0, 1], [0, 1])
    assert sources.load(DataSettings(source=str(tmp_path), image_size=4)).test_inputs.shape == (4, 3, 4, 4)


def test_a_size_for_the_images_of_anything_but_a_folder_is_refused():
    with pytest.raises(InputError, match=r"data\.image_size must be left out for digits .*, got 4"):
        sources.load(DataSettings(source="digits", image_size=4))


def test_wrong_folders(tmp_path):
    root = write_folder(tmp_path / "a")
    Image.new("RGB", (9, 9)).save(root / "train" / "oak" / "large.png")
    with pytest.raises(InputError, match="images of one size, got sizes .* set data.image_size"):
        sources.load(DataSettings(source=str(root)))
    cut = root / "train" / "oak" / "large.png"
    cut.write_bytes(cut.read_bytes()[:40])
    with pytest.raises(InputError, match=r"large\.png is not a readable image"):
        sources.load(DataSettings(source=str(root)))
    for name in ("cut.png", "empty.png"):
        (root / "test" / "ash" / name).write_bytes(cut.read_bytes() if name == "cut.png" else b"")
    with pytest.raises(InputError, match=r"(?s)large\.png is not .*cut\.png is not .*empty\.png is not "):
        sources.outline(root)
    for name in ("cut.png", "empty.png"):
        (root / "test" / "ash" / name).rename(root / "train" / "ash" / name)
    with pytest.raises(InputError, match=r"(?s)cut\.png is not .*large\.png is not .*empty\.png is not ") as few:
        sources.load(DataSettings(source=str(root)))
    assert "more" not in str(few.value)
    whole = (root / "test" / "ash" / "0.png").read_bytes()
    (root / "test" / "ash" / "half.png").write_bytes(whole[:48])  # whose header is intact
    for read in (sources.outline, lambda root: sources.load(DataSettings(source=str(root)))):
        with pytest.raises(InputError, match=r"(?s)cut\.png is not .*empty\.png is not .*half\.png is not "):
            read(root)
    (root / "test" / "ash" / "half.png").unlink()
    for i in range(4):
        (root / "train" / "ash" / f"empty{i}.png").touch()
    with pytest.raises(InputError, match=r"; and 2 more$"):
        sources.load(DataSettings(source=str(root)))
    for name in ("cut.png", "empty.png", *(f"empty{i}.png" for i in range(4))):
        (root / "train" / "ash" / name).unlink()
    (root / "test" / "elm").mkdir()
    with pytest.raises(InputError, match=r"classes that train/ lacks: \['elm'\]"):
        sources.load(DataSettings(source=str(root)))
    (root / "test" / "elm").rmdir()
    (root / "train" / "elm").mkdir()
    cut.unlink()
    with pytest.raises(InputError, match="an image of every class, it has none of elm"):
        sources.load(DataSettings(source=str(root)))
    (tmp_path / "b").mkdir()
    with pytest.raises(InputError, match="train/<class> and test/<class>"):
        sources.load(DataSettings(source=str(tmp_path / "b")))


def write_tiny_imagenet(root, each=4):
    """A made-up archive: 3 classes, one image in grayscale, as some of the original's are."""
    folder = root / "tiny-imagenet-200"
    wnids = ["n02", "n01", "n03"]
    (folder / "val" / "images").mkdir(parents=True)
    (folder / "wnids.txt").write_text("\n".join(wnids) + "\n")
    (folder / "words.txt").write_text("n01\tash, ash tree\nn02\toak\nn09\tnever used\n")
    lines = []
    for j, wnid in enumerate(sorted(wnids)):
        images = folder / "train" / wnid / "images"
        images.mkdir(parents=True)
        names = [f"{wnid}_{i}.JPEG" for i in range(each)]
        for i, name in enumerate(names):
            image = Image.new("RGB", (64, 64), (80 * j, 20 * i, 7))
            (image.convert("L") if i == 0 else image).save(images / name, quality=95)
        (images.parent / f"{wnid}_boxes.txt").write_text("".join(f"{name}\t0\t0\t63\t63\n" for name in names))
        name = f"val_{2 - j}.JPEG"
        Image.new("RGB", (64, 64), (80 * j, 0, 7)).save(folder / "val" / "images" / name)
        lines.append(f"{name}\t{wnid}\t0\t0\t63\t63")
    (folder / "val" / "val_annotations.txt").write_text("\n".join(lines))
    return folder


def test_tiny_imagenet_is_decoded_once_at_half_size(tmp_path):
    folder = write_tiny_imagenet(tmp_path)
    first = sources.load(DataSettings(source="tiny-imagenet"), tmp_path)
    assert first.train_inputs.shape == (12, 3, 32, 32)
    assert first.train_inputs.dtype == torch.uint8
    assert first.class_names == ("ash", "oak", "n03")
    assert first.train_labels.tolist() == [0, 1, 2] * 4
    assert first.test_labels.tolist() == [0, 1, 2]
    red = first.test_inputs[:, 0].float().mean((1, 2))
    assert torch.allclose(red, torch.tensor([0.0, 80.0, 160.0]), atol=3)  # each image under its own label
    gray = first.train_inputs[1]
    assert (gray[0] == gray[1]).all()
    (folder / "wnids.txt").unlink()  # from now on the cache is read
    again = sources.load(DataSettings(source="tiny-imagenet"), tmp_path)
    assert torch.equal(again.train_inputs, first.train_inputs)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda folder: (folder / "train/n01/images/n01_2.JPEG").unlink(), "1 of 15 images are missing.*n01_2"),
        (lambda folder: (folder / "val/val_annotations.txt").write_text("val_0.JPEG\tn77\t0\n"), "wnids.txt lacks"),
        (lambda folder: (folder / "train/n03/n03_boxes.txt").unlink(), "n03_boxes.txt cannot be read"),
        (lambda folder: (folder / "wnids.txt").write_text("\n"), "wnids.txt is empty"),
        (
            lambda folder: (folder / "val/images/val_1.JPEG").write_bytes(
                (folder / "val/images/val_1.JPEG").read_bytes()[:300]
            ),
            "val_1.JPEG is not a readable image",
        ),
    ],
)
def test_a_damaged_tiny_imagenet_is_named(tmp_path, damage, said):
    damage(write_tiny_imagenet(tmp_path))
    with pytest.raises(InputError, match=said):
        sources.load(DataSettings(source="tiny-imagenet"), tmp_path)
    assert not (tmp_path / "tiny-imagenet-32.npz").exists()


def test_no_tiny_imagenet_says_where_it_belongs(tmp_path):
    with pytest.raises(InputError, match="no folder .*tiny-imagenet-200; unpack"):
        sources.load(DataSettings(source="tiny-imagenet"), tmp_path)


def test_label_noise_moves_the_share_it_says_and_no_test_label():
    clean = sources.load(DataSettings())
    noisy = sources.load(DataSettings(label_noise=0.3))
    moved = clean.train_labels != noisy.train_labels
    assert int(moved.sum()) == round(0.3 * len(moved))  # every label that was drawn is another one now
    assert torch.equal(clean.test_labels, noisy.test_labels)
    assert torch.equal(noisy.train_labels, sources.load(DataSettings(label_noise=0.3)).train_labels)
    into = torch.bincount((noisy.train_labels - clean.train_labels)[moved] % 10, minlength=10)
    assert into[0] == 0
    assert into[1:].min() > 20
    for share in (-0.1, 1.0):
        with pytest.raises(InputError, match="data.label_noise must be"):
            DataSettings(label_noise=share)


def test_label_noise_needs_another_class(tmp_path):
    one = {name: np.zeros(n, dtype=int) for name, n in (("y_train", 20), ("y_test", 8))}
    path = write_npz(tmp_path / "data.npz", **one)
    with pytest.raises(InputError, match="must have at least 2 classes, it has 1"):
        sources.load(DataSettings(source=str(path), label_noise=0.5))


def test_a_subset_that_loses_a_class_is_refused(tmp_path):
    path = write_npz(tmp_path / "data.npz", y_train=np.sort(np.arange(20) % 4))
    with pytest.raises(
        InputError, match=r"train_size must keep a sample of every class; .* none of 2 classes \(label 2"
    ):
        sources.load(DataSettings(source=str(path), train_size=10))


def test_labels_of_a_file_become_places_and_keep_their_names(tmp_path):
    path = write_npz(tmp_path / "far.npz", y_train=np.arange(20) % 4 * 5 + 100, y_test=np.arange(8) % 3 * 5 + 100)
    read = sources.load(DataSettings(source=str(path)))
    assert read.class_names == ("100", "105", "110", "115")
    assert read.train_labels.tolist() == [0, 1, 2, 3] * 5
    assert read.test_labels.tolist() == [0, 1, 2, 0, 1, 2, 0, 1]


def test_hidden_folders_and_files_are_no_classes_and_no_images(tmp_path):
    root = write_folder(tmp_path)
    (root / "train" / ".ipynb_checkpoints").mkdir()
    (root / "test" / ".git").mkdir()
    (root / "train" / "oak" / "._0.png").write_bytes(b"what a file manager leaves")
    assert sources.load(DataSettings(source=str(root))).class_names == ("ash", "oak")


def test_what_is_not_read_in_a_folder_is_said(tmp_path):
    root = write_folder(tmp_path)
    (root / ".cache").mkdir()
    assert sources.outline(root).ignored == ""
    (root / "val" / "oak").mkdir(parents=True)
    (root / "train" / "oak" / "more.png").mkdir()
    for name in ("a.gif", "b.jfif", "c.gif", "Thumbs.db"):
        (root / "train" / "oak" / name).touch()
    shutil.copy(root / "train" / "oak" / "0.png", root / "train" / "loose.png")
    within = "1 image outside of class folders, 1 folder within classes, 3 files of other kinds (.gif, .jfif)"
    assert sources.outline(root).ignored == f"val/, {within}"
    assert (
        recipes.for_data(root).about
        == f"chosen for {root.name}: 2 classes, 6 training samples (ignored: val/, {within})"
    )
    for i in range(6):
        (root / f"a{i}").mkdir()
    assert sources.outline(root).ignored == f"a0/, a1/, a2/, a3/, a4/ and 2 more, {within}"


def test_validation_holds_the_same_share_of_every_class_out():
    whole = sources.load(DataSettings())
    read = sources.load(DataSettings(validation=0.25))
    assert len(read.train_labels) + len(read.test_labels) == len(whole.train_labels)
    counts, held = torch.bincount(whole.train_labels), torch.bincount(read.test_labels)
    assert ((held - counts / 4).abs() <= 0.5).all()
    rows = {row.numpy().tobytes() for row in whole.test_inputs} - {row.numpy().tobytes() for row in whole.train_inputs}
    assert not rows & {row.numpy().tobytes() for row in torch.cat([read.train_inputs, read.test_inputs])}
    again = sources.load(DataSettings(validation=0.25, label_noise=0.5))
    assert torch.equal(again.train_inputs, read.train_inputs)
    assert torch.equal(again.test_labels, read.test_labels)  # wrong labels are for training alone
    few = sources.load(DataSettings(validation=1e-6))
    assert sorted(few.test_labels.tolist()) == list(range(10))  # one of each at least


def test_a_class_of_one_sample_is_not_held_out_and_that_is_said(tmp_path):
    file = tmp_path / "e.npz"
    np.savez(file, features=np.eye(6), labels=np.array([0, 0, 1, 1, 1, 2]))
    with pytest.warns(UserWarning, match="1 of 3 classes have a single sample, which data.validation cannot hold out"):
        read = sources.load(DataSettings(source=str(file), validation=0.2))
    assert read.test_labels.tolist() == [0, 1]
    np.savez(file, features=np.eye(3), labels=np.arange(3))
    with pytest.raises(InputError, match="needs a class of at least two samples, got a single sample in each"):
        sources.load(DataSettings(source=str(file), validation=0.2))


@pytest.mark.parametrize("ending", ["jpg", "png", "webp", "tif"])
def test_photos_are_turned_as_their_exif_data_says(tmp_path, ending):
    pixels = np.zeros((16, 32, 3), dtype=np.uint8)
    pixels[:, :16] = 255  # the left half is white: turned by a quarter to the right, the upper one
    exif = Image.Exif()
    exif[0x0112] = 6
    for name in ("a", "b"):
        (tmp_path / "train" / name).mkdir(parents=True)
        for number in range(4):
            Image.fromarray(pixels).save(tmp_path / "train" / name / f"{number}.{ending}", exif=exif)
    dataset = sources.load(sources.resolved(DataSettings(source=str(tmp_path), validation=0.5)))
    assert dataset.train_inputs.shape[1:] == (3, 32, 16)
    assert dataset.train_inputs[0, :, :14].min() > 200
    assert dataset.train_inputs[0, :, 18:].max() < 50


@pytest.mark.parametrize("damaged", [b"Exif\0\0garbage", b"Exif\0\0II*\0\xff\xff\xff\xff"])
def test_damaged_exif_data_is_no_reason_to_refuse_a_photo(tmp_path, damaged):
    for number in range(4):
        folder = tmp_path / "train" / "ab"[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 8), "white").save(folder / f"{number}.jpg", exif=damaged)
    dataset = sources.load(sources.resolved(DataSettings(source=str(tmp_path), validation=0.5)))
    assert dataset.train_inputs.shape[1:] == (3, 8, 16)


def test_a_picture_that_is_given_stays_open(tmp_path):
    frames = [Image.new("L", (8, 8), shade) for shade in (0, 200)]
    frames[0].save(tmp_path / "two.gif", save_all=True, append_images=frames[1:])
    with Image.open(tmp_path / "two.gif") as picture:
        read = []
        for number in range(2):
            picture.seek(number)
            read.append(np.array(sources.decode(picture, mode="L"))[0, 0])
    assert read == [0, 200]


def test_pictures_of_16_bits_and_with_transparency_are_read_as_they_look(tmp_path):
    ramp = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    Image.fromarray(ramp).save(tmp_path / "wide.png")
    assert Image.open(tmp_path / "wide.png").mode.startswith("I;16")
    read = np.asarray(sources.decode(tmp_path / "wide.png"))
    np.testing.assert_array_equal(read, np.repeat((ramp >> 8)[..., None], 3, axis=2))
    drawn = np.zeros((8, 8, 4), np.uint8)
    drawn[2:4, :, 3] = 255  # black strokes on nothing
    Image.fromarray(drawn).save(tmp_path / "alpha.png")
    read = np.asarray(sources.decode(tmp_path / "alpha.png", mode="L"))
    assert (read[2:4] == 0).all()
    assert (read[:2] == 255).all()
    (tmp_path / "wide.pgm").write_bytes(b"P5 8 8 65535\n" + ramp.astype(">u2").tobytes())
    np.testing.assert_array_equal(np.asarray(sources.decode(tmp_path / "wide.pgm", mode="L")), ramp >> 8)
    Image.fromarray(np.ones((4, 4), np.float32)).save(tmp_path / "float.tif")
    with pytest.raises(InputError, match=r"float\.tif must have 8 or 16 bits per channel; it has 32"):
        sources.decode(tmp_path / "float.tif")


def test_a_large_jpeg_is_decoded_at_a_coarser_scale_to_nearly_the_same(tmp_path):
    smooth = np.linspace(0, 255, 800)[:, None] * np.linspace(0, 1, 800)
    whole = Image.fromarray(smooth.astype(np.uint8)).convert("RGB")
    whole.save(tmp_path / "a.jpg", quality=95)
    expected = np.asarray(whole.resize((32, 32), Image.Resampling.BILINEAR), dtype=float)
    assert np.abs(np.asarray(sources.decode(tmp_path / "a.jpg", (32, 32)), dtype=float) - expected).max() < 4
    opened = Image.open(tmp_path / "a.jpg")  # the caller's own stays whole
    sources.decode(opened, (32, 32), "L")
    assert (opened.size, opened.mode) == ((800, 800), "RGB")


def test_labels_may_be_text(tmp_path):
    file, x = tmp_path / "e.npz", np.eye(6)
    np.savez(file, x_train=x, y_train=np.array(list("bbaacc")), x_test=x[:4], y_test=np.array(list("aacc")))
    read = sources.load(DataSettings(source=str(file)))
    assert read.class_names == ("a", "b", "c")
    assert (read.train_labels.tolist(), read.test_labels.tolist()) == ([1, 1, 0, 0, 2, 2], [0, 0, 2, 2])
    np.savez(file, x_train=x, y_train=np.array(list("bbaacc")), x_test=x[:4], y_test=np.arange(4))
    with pytest.raises(InputError, match="y_test has classes that y_train lacks"):
        sources.load(DataSettings(source=str(file)))
    np.savez(file, features=x, y_train=np.array(list("bbaacc"), dtype=object), notes=np.array([{}], dtype=object))
    with pytest.raises(InputError, match=r"got Python objects in y_train; astype\(str\)"):
        sources.read_npz(file, needs_test=False)
    np.savez(file, features=x, y_train=np.arange(6) // 2, notes=np.array([{}], dtype=object))
    assert len(sources.read_npz(file, needs_test=False).train_labels) == 6


def test_a_folder_that_moved_is_told_from_another_one(tmp_path):
    before, now = (DataSettings(source=str(tmp_path / name)) for name in ("old", "new"))
    assert not sources.has_moved(before, now)
    (tmp_path / "new").mkdir()
    assert sources.has_moved(before, now)
    assert not sources.has_moved(before, DataSettings(source="digits"))
    (tmp_path / "old").mkdir()
    assert not sources.has_moved(before, now)
    (tmp_path / "f.npz").touch()
    gone, root = DataSettings(source=str(tmp_path / "gone.npz")), tmp_path
    assert sources.has_moved(gone, DataSettings(source="f.npz"), root)
    assert not sources.has_moved(DataSettings(source="f.npz"), DataSettings(source="f.npz"), root)


def test_without_a_test_part_validation_serves(tmp_path):
    root = write_folder(tmp_path / "images")
    shutil.rmtree(root / "test")
    with pytest.raises(InputError, match="no test/<class> beside train/; set data.validation"):
        sources.load(DataSettings(source=str(root)))
    assert sources.load(DataSettings(source=str(root), validation=0.4)).test_labels.tolist() == [0, 1]
    path = write_npz(tmp_path / "some.npz", x_test=None, y_test=None)
    assert len(sources.load(DataSettings(source=str(path), validation=0.2)).test_labels) == 4


def test_data_of_one_class_are_refused(tmp_path):
    np.savez(tmp_path / "one.npz", features=np.eye(8, dtype=np.float32), labels=np.zeros(8, int))
    with pytest.raises(InputError, match="must have at least 2 classes, it has 1"):
        sources.load(DataSettings(source=str(tmp_path / "one.npz"), validation=0.2))
