"""Data sources: each returns whole data sets as tensors, to be kept on the training device and augmented there.

digits                                       ships with scikit-learn
mnist, fashion-mnist, cifar10, cifar100      torchvision's layout under the data root, downloaded if missing
omniglot                                     <data root>/omniglot.npz, or built from torchvision's archive
tiny-imagenet                                <data root>/tiny-imagenet-200, as its archive unpacks; cached at 32×32
a folder                                     train/<class>/*.png and test/<class>/*.png
a .npz file                                  x_train, y_train, x_test, y_test: images or ready embeddings

docs/data.md describes files and folders.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import warnings
import zipfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int, Shaped
from torch import Tensor

from vmcr2.checks import check_count, check_fields, check_number
from vmcr2.errors import InputError
from vmcr2.lab._torchvision import import_torchvision
from vmcr2.lab.files import replacing

DATA_ROOT_VARIABLE = "VMCR2_DATA_ROOT"
_ORIENTATION = 0x0112  # the EXIF tag
_SIDEWAYS = (5, 6, 7, 8)
_ARRAYS = {"x_train", "y_train", "x_test", "y_test", "features", "labels", "class_names"}  # read from a .npz file
_SHOWN = 5  # of many files, in a message
_MANY_FILES = 2000  # from this many on, decoding shows a progress bar
_IMAGE_ENDINGS = {".png", ".jpg", ".jpeg", ".bmp", ".ppm", ".pgm", ".webp", ".tif", ".tiff"}


@dataclass(frozen=True)
class DataSettings:
    """Which data, and how much of it.

    Attributes:
        source: a name (digits, mnist, fashion-mnist, cifar10, cifar100, omniglot, tiny-imagenet) or the path of a
            .npz file or a folder of images by class.
        classes: keep only this many classes, the first ones.
        train_size: keep only this many training samples, the first ones.
        test_size: keep only this many test samples, the first ones.
        image_size: scale a folder's images to this many pixels per side; required if they differ in size.
        validation: share of every class's training samples, drawn once for all runs, that is held out and replaces the
            test set, so that settings can be chosen without it.
        label_noise: share of the training samples, drawn once for all runs, that get the label of another class.
    """

    source: str = "digits"
    classes: int | None = None
    train_size: int | None = None
    test_size: int | None = None
    image_size: int | None = None
    validation: float = 0.0
    label_noise: float = 0.0

    def __post_init__(self) -> None:
        check_fields(self, "data.")
        for name, least in (("classes", 2), ("train_size", 1), ("test_size", 1), ("image_size", 1)):
            value = getattr(self, name)
            if value is not None:
                check_count(f"data.{name}", value, at_least=least)
        for name in ("validation", "label_noise"):
            check_number(f"data.{name}", getattr(self, name), positive=False)
            if getattr(self, name) >= 1:
                raise InputError(f"data.{name} must be a share below 1, got {getattr(self, name)}")
        if self.validation and self.test_size is not None:
            raise InputError(
                "data.test_size must be left out with data.validation, which replaces the test set (0.2 by default "
                f"where the data has none), got test_size {self.test_size} and validation {self.validation}"
            )


@dataclass(frozen=True)
class Dataset:
    """A data set as tensors: images are uint8 (n, c, h, w), embeddings float32 (n, d); labels are int64.

    Attributes:
        train_inputs: of the training samples.
        train_labels: in [0, k).
        test_inputs: of the test samples.
        test_labels: in [0, k).
        class_names: of the k classes.
        train_rows: the index of each training sample in the source, before a part of it was chosen.
        train_files: the files of a folder's training images, before a part was chosen; empty for other sources.
    """

    train_inputs: Shaped[Tensor, "m ..."]
    train_labels: Int[Tensor, " m"]
    test_inputs: Shaped[Tensor, "t ..."]
    test_labels: Int[Tensor, " t"]
    class_names: tuple[str, ...]
    train_rows: Int[Tensor, " m"] | None = None
    train_files: tuple[str, ...] = ()

    def train_name(self, sample: int) -> str:
        """Returns the file of a training sample, or its index in the source."""
        row = sample if self.train_rows is None else int(self.train_rows[sample])
        return self.train_files[row] if self.train_files else str(row)

    @property
    def num_classes(self) -> int:
        """The number of classes k."""
        return len(self.class_names)

    def to(self, device: torch.device) -> Dataset:
        """Returns the data set on a device."""
        names = ("train_inputs", "train_labels", "test_inputs", "test_labels")
        return replace(self, **{name: getattr(self, name).to(device) for name in names})


def _root(data_root: str | Path | None) -> Path:
    """Returns the folder of named data sets; by default $VMCR2_DATA_ROOT, or ./data."""
    return Path(os.environ.get(DATA_ROOT_VARIABLE) or "data") if data_root is None else Path(data_root)


def load(settings: DataSettings, data_root: str | Path | None = None) -> Dataset:
    """Returns a data set.

    Args:
        settings: what to load.
        data_root: the folder of named data sets; by default $VMCR2_DATA_ROOT or ./data.

    Raises:
        InputError: the source is unknown, or its files are missing, damaged or in the wrong form (a ValueError).
    """
    root = _root(data_root)
    path = _place(settings.source, data_root)
    if settings.image_size is not None and (settings.source in _NAMED or path.suffix == ".npz"):
        raise InputError(
            f"data.image_size must be left out for {settings.source} (only a folder's images are scaled), got "
            f"{settings.image_size}"
        )
    if settings.source in _NAMED:
        dataset = _NAMED[settings.source](root)
    elif path.suffix == ".npz":
        dataset = read_npz(path, needs_test=not settings.validation)
    elif path.is_dir():
        dataset = _folder(path, settings.image_size, needs_test=not settings.validation)
    else:
        what = "a file of another kind" if path.exists() else "none of these: there is no such file or folder"
        raise InputError(
            f"data.source must be one of {', '.join(_NAMED)}, a .npz file or a folder of images by class, "
            f"got {settings.source!r}, which is {what}"
        )
    if dataset.num_classes < 2:
        raise InputError(f"{settings.source} must have at least 2 classes, it has {dataset.num_classes}")
    dataset = _subset(replace(dataset, train_rows=torch.arange(len(dataset.train_labels))), settings)
    for part, labels in (("training", dataset.train_labels), ("test", dataset.test_labels)):
        if not len(labels):
            raise InputError(f"{settings.source} must have {part} samples of the classes chosen, it has none")
    empty = (dataset.train_labels.bincount(minlength=dataset.num_classes) == 0).nonzero()[:, 0]
    if len(empty):
        warnings.warn(
            f"{len(empty)} of the {dataset.num_classes} classes of {settings.source} have no training sample, such as "
            f"{dataset.class_names[int(empty[0])]}",
            stacklevel=2,
        )
    return dataset


def resolved(settings: DataSettings) -> DataSettings:
    """Returns the settings with a file's or folder's path made absolute, so that a run finds it from anywhere."""
    path = Path(settings.source)
    if settings.source in _NAMED or not path.exists():
        return settings
    return replace(settings, source=str(path.resolve()))


def without_place(settings: DataSettings) -> DataSettings:
    """Returns the settings without the path of a file or folder, which may move; a name stays."""
    return settings if settings.source in _NAMED else replace(settings, source="")


def is_gone(settings: DataSettings, data_root: str | Path | None = None) -> bool:
    """Whether the settings name a file or folder, and there is none."""
    return settings.source not in _NAMED and not _place(settings.source, data_root).exists()


def refuse_gone(settings: DataSettings, data_root: str | Path | None, run: Path) -> None:
    """Raises InputError if the file or folder of a run's data is gone; it says what to do."""
    if is_gone(settings, data_root):
        raise InputError(
            f"the data of {run} must be where it was, got no file or folder {settings.source}; if it has moved, "
            f"say so once: vmcr2 train --resume {run} --data.source PLACE"
        )


def has_moved(before: DataSettings, now: DataSettings, data_root: str | Path | None = None) -> bool:
    """Whether a file or folder is gone and another, existing one is named instead; its contents are not compared."""
    return is_gone(before, data_root) and now.source not in _NAMED and not is_gone(now, data_root)


def _place(source: str, data_root: str | Path | None) -> Path:
    """Returns the path of a file or folder; a .npz file may lie under the root of named data sets."""
    path = Path(source)
    if path.suffix != ".npz" or path.is_file() or path.is_absolute():
        return path
    return _root(data_root) / path


def fingerprint(dataset: Dataset) -> str:
    """Returns a digest of the tensors, by which a resumed run recognises its data."""
    digest = hashlib.blake2b(digest_size=16)
    for tensor in (dataset.train_inputs, dataset.train_labels, dataset.test_inputs, dataset.test_labels):
        digest.update(str(tuple(tensor.shape)).encode())
        digest.update(tensor.contiguous().numpy().data)
    return digest.hexdigest()


def _subset(dataset: Dataset, settings: DataSettings) -> Dataset:
    if settings.classes is not None:
        check_count("data.classes", settings.classes, at_most=dataset.num_classes, limit=f"in {settings.source}")
        train, test = dataset.train_labels < settings.classes, dataset.test_labels < settings.classes
        dataset = replace(
            _kept(dataset, train),
            test_inputs=dataset.test_inputs[test],
            test_labels=dataset.test_labels[test],
            class_names=dataset.class_names[: settings.classes],
        )
    for part, size in (("train", settings.train_size), ("test", settings.test_size)):
        if size is not None:
            inputs, labels = getattr(dataset, f"{part}_inputs"), getattr(dataset, f"{part}_labels")
            check_count(f"data.{part}_size", size, at_most=len(labels), limit=f"samples in {settings.source}")
            lost = sorted({*labels.tolist()} - {*labels[:size].tolist()}) if part == "train" else []
            if lost:
                raise InputError(
                    f"data.train_size must keep a sample of every class; the first {size} samples of {settings.source} "
                    f"have none of {len(lost)} classes (label {lost[0]} is the first): take more, or fewer data.classes"
                )
            kept = {f"{part}_inputs": inputs[:size].clone(), f"{part}_labels": labels[:size].clone()}
            if part == "train" and dataset.train_rows is not None:
                kept["train_rows"] = dataset.train_rows[:size]
            dataset = replace(dataset, **kept)
    if settings.validation:
        dataset = _held_out(dataset, settings.validation)
    if settings.label_noise:
        dataset = replace(dataset, train_labels=_mislabelled(dataset, settings.label_noise))
    return dataset


def _held_out(dataset: Dataset, share: float) -> Dataset:
    """Returns the data set with a share of every class's training samples in place of the test set.

    A class with two samples or more gives at least one.
    """
    m = len(dataset.train_labels)
    shuffled = torch.randperm(m, generator=torch.Generator().manual_seed(0))
    chosen = torch.zeros(m, dtype=torch.bool)
    for j in range(dataset.num_classes):
        members = shuffled[dataset.train_labels[shuffled] == j]
        chosen[members[: min(max(1, round(share * len(members))), len(members) - 1)]] = True
    inputs, labels = dataset.train_inputs, dataset.train_labels
    single = int((labels.bincount(minlength=dataset.num_classes) == 1).sum())
    if not chosen.any():
        raise InputError(
            f"data.validation ({share:g}) needs a class of at least two samples, got a single sample in each"
        )
    if single:
        warnings.warn(
            f"{single} of {dataset.num_classes} classes have a single sample, which data.validation cannot hold out",
            stacklevel=2,
        )
    return replace(_kept(dataset, ~chosen), test_inputs=inputs[chosen], test_labels=labels[chosen])


def _kept(dataset: Dataset, chosen: Bool[Tensor, " m"]) -> Dataset:
    """Returns the data set with some of its training samples."""
    names = ("train_inputs", "train_labels", "train_rows")
    return replace(dataset, **{name: getattr(dataset, name)[chosen] for name in names})


def _mislabelled(dataset: Dataset, share: float) -> Int[Tensor, " m"]:
    """Returns the training labels, with a share of them moved to another class, all equally likely."""
    m, k = len(dataset.train_labels), dataset.num_classes
    generator = torch.Generator().manual_seed(0)
    wrong = torch.randperm(m, generator=generator)[: round(share * m)]
    labels = dataset.train_labels.clone()
    labels[wrong] = (labels[wrong] + torch.randint(1, k, (len(wrong),), generator=generator)) % k
    return labels


def _digits(_: Path) -> Dataset:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    bunch: Any = load_digits()
    images = np.round(bunch.images * (255 / 16)).astype(np.uint8)
    split = train_test_split(images, bunch.target, test_size=0.2, stratify=bunch.target, random_state=0)
    x_train, x_test, y_train, y_test = split
    return _from_arrays("digits", x_train, y_train, x_test, y_test, [str(j) for j in range(10)])


def _torchvision_source(name: str) -> Callable[[Path], Dataset]:
    def read(root: Path) -> Dataset:
        datasets = import_torchvision().datasets
        kinds = {
            "mnist": datasets.MNIST,
            "fashion-mnist": datasets.FashionMNIST,
            "cifar10": datasets.CIFAR10,
            "cifar100": datasets.CIFAR100,
        }
        train, test = (_present_or_downloaded(name, kinds[name], root, train=part) for part in (True, False))
        y_train, y_test = np.asarray(train.targets), np.asarray(test.targets)
        return _from_arrays(name, np.asarray(train.data), y_train, np.asarray(test.data), y_test, list(train.classes))

    return read


def _present_or_downloaded(name: str, kind: Callable[..., Any], root: Path, **which: bool) -> Any:
    """Reads a torchvision data set; uses the network only if its files are missing or fail their checksum."""
    try:
        return kind(root=str(root), download=False, **which)
    except Exception as error:
        # torchvision's message for a missing file or a wrong checksum; any other error means an unreadable file.
        if not (isinstance(error, RuntimeError) and "not found" in str(error)):
            raise InputError(
                f"{name} under the data root {root} is damaged (truncated?): {str(error) or type(error).__name__}. "
                "Delete its files to have them fetched again."
            ) from error
    absent = [each for each in (root, *root.absolute().parents) if not os.path.exists(each)]
    try:
        return kind(root=str(root), download=True, **which)
    except Exception as error:
        for made in absent and [*sorted(root.rglob("*"), reverse=True), *absent]:
            with suppress(OSError):  # folders that are not empty
                made.rmdir()
        raise InputError(
            f"{name} is not under the data root {root} (or fails its checksum), and could not be downloaded: {error}. "
            f"Name the folder that holds it with --data-root or {DATA_ROOT_VARIABLE}."
        ) from error


def _omniglot(root: Path) -> Dataset:
    packed = root / "omniglot.npz"
    if packed.is_file():
        return read_npz(packed)
    datasets = import_torchvision().datasets
    source = _present_or_downloaded("omniglot", datasets.Omniglot, root, background=True)
    arrays = _pack_omniglot(Path(source.target_folder))
    with replacing(packed) as file:
        np.savez_compressed(file, allow_pickle=False, **arrays)
    return read_npz(packed)


def _pack_omniglot(folder: Path) -> dict[str, np.ndarray]:
    """Returns the background set at 28×28, ink 255: drawers 1 to 15 for training, the rest for test."""
    from PIL import Image

    characters = sorted(path for path in folder.glob("*/*") if path.is_dir())
    if not characters:
        raise InputError(f"omniglot: no characters under {folder}")
    arrays: dict[str, list[Any]] = {"x_train": [], "y_train": [], "x_test": [], "y_test": []}
    for label, character in enumerate(characters):
        for file in sorted(character.glob("*.png")):
            drawer = int(file.stem.split("_")[1])
            with Image.open(file) as image:
                small = np.asarray(image.convert("L").resize((28, 28), Image.Resampling.BOX))
            part = "train" if drawer <= 15 else "test"
            arrays[f"x_{part}"].append(255 - small)
            arrays[f"y_{part}"].append(label)
    names = [f"{character.parent.name}/{character.name}" for character in characters]
    return {name: np.asarray(values) for name, values in arrays.items()} | {"class_names": np.asarray(names)}


_TINY_SIDE = 32  # Transformations 2 of the paper scale the 64×64 images to this


def _tiny_imagenet(root: Path) -> Dataset:
    """Reads the folder of the original archive, whose labels are WordNet ids: once, then from the cache beside it."""
    folder, cached = root / "tiny-imagenet-200", root / f"tiny-imagenet-{_TINY_SIDE}.npz"
    if cached.is_file():
        return read_npz(cached)
    if not folder.is_dir():
        raise InputError(
            f"tiny-imagenet: there is no folder {folder}; unpack tiny-imagenet-200.zip of the Stanford course CS231n "
            f"under the data root, or name another one with --data-root or {DATA_ROOT_VARIABLE}"
        )
    wnids = sorted(_tiny_lines(folder / "wnids.txt"))
    words = dict(line.split("\t", 1) for line in _tiny_lines(folder / "words.txt") if "\t" in line)
    places = {wnid: j for j, wnid in enumerate(wnids)}
    files, test = [], []
    for wnid in wnids:
        listed = _tiny_lines(folder / "train" / wnid / f"{wnid}_boxes.txt")
        files.append([folder / "train" / wnid / "images" / line.split("\t")[0] for line in listed])
    train = _in_turn(files)
    for line in _tiny_lines(folder / "val" / "val_annotations.txt"):
        name, wnid, *_ = [*line.split("\t"), "", ""]
        if wnid not in places:
            raise InputError(f"tiny-imagenet: val_annotations.txt names a class that wnids.txt lacks: {line!r}")
        test.append((folder / "val" / "images" / name, places[wnid]))
    missing = [file for file, _ in train + test if not file.is_file()]
    if missing:
        raise InputError(
            f"tiny-imagenet: {len(missing)} of {len(train) + len(test)} images are missing under {folder}, "
            f"the first is {missing[0]}; unpack the archive again"
        )
    size = (_TINY_SIDE, _TINY_SIDE)
    decoded = _decoded([file for file, _ in train + test], size, "tiny-imagenet, once")
    images = np.fromiter(decoded, np.dtype((np.uint8, (*size, 3))), len(train) + len(test))
    arrays = {
        "x_train": images[: len(train)],
        "y_train": np.asarray([label for _, label in train]),
        "x_test": images[len(train) :],
        "y_test": np.asarray([label for _, label in test]),
        "class_names": np.asarray([words.get(wnid, wnid).split(",")[0] for wnid in wnids]),
    }
    with replacing(cached) as file:
        np.savez(file, allow_pickle=False, **arrays)
    return read_npz(cached)


def _in_turn(files: Sequence[Sequence[Path]]) -> list[tuple[Path, int]]:
    """Returns the files of classes with their labels: the first of each class, then the second, and so on.

    So any number of first samples holds all classes equally.
    """
    most = max(map(len, files), default=0)
    return [(own[i], j) for i in range(most) for j, own in enumerate(files) if i < len(own)]


def _tiny_lines(file: Path) -> list[str]:
    try:
        lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise InputError(f"tiny-imagenet: {file} cannot be read ({error}); unpack the archive again") from error
    if not lines:
        raise InputError(f"tiny-imagenet: {file} is empty; unpack the archive again")
    return lines


def _decoded(files: list[Path], size: tuple[int, int] | None, title: str) -> Iterator[np.ndarray]:
    """Yields images (h, w, 3), decoded on all cores, with a progress bar if there are many.

    Raises:
        InputError: some cannot be read, after the others (a ValueError).
    """
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import track

    def decoded(file: Path) -> np.ndarray | InputError:
        try:
            return np.asarray(decode(file, size))
        except InputError as error:
            return error

    console = Console(stderr=True, emoji=False)
    unreadable = []
    # Pillow releases the interpreter lock while it decodes.
    with ThreadPoolExecutor() as pool:
        images = pool.map(decoded, files)
        for image in track(images, escape(title), len(files), console=console, disable=len(files) < _MANY_FILES):
            if isinstance(image, InputError):
                unreadable.append(str(image))
            else:
                yield image
    refuse_unreadable(unreadable)


def read_npz(path: Path, *, needs_test: bool = True) -> Dataset:
    """Returns the data set in a .npz file (docs/data.md); without a test part its test set is empty.

    Args:
        path: of the file.
        needs_test: whether it must have a test part.

    Raises:
        InputError: it is missing, damaged or not in the right form (a ValueError).
    """
    if not path.is_file():
        raise InputError(f"there is no file {path}")
    if not zipfile.is_zipfile(path):
        raise InputError(f"{path} is not a readable .npz file (truncated, or of another kind?)")
    arrays: dict[str, np.ndarray] = {}
    objects: list[str] = []
    try:
        with np.load(path, allow_pickle=False) as file:
            if not file.files:
                raise ValueError("it holds no arrays")
            for name in _ARRAYS & set(file.files):
                try:
                    arrays[name] = file[name]
                except ValueError as error:
                    if "Object arrays" not in str(error):
                        raise
                    objects.append(name)
    except Exception as error:  # NumPy passes on any error from the zip, the header or the decompression
        raise InputError(f"{path} is not a readable .npz file (truncated or damaged?): {error}") from error
    if objects:
        raise InputError(
            f"{path} must hold arrays of numbers or text, got Python objects in {', '.join(sorted(objects))}; "
            "astype(str) makes text of them"
        )
    x_name, y_name = (
        same if same in arrays and name not in arrays else name
        for name, same in (("x_train", "features"), ("y_train", "labels"))
    )
    called = (x_name, y_name)
    missing = [name for name in (*called, "x_test", "y_test") if name not in arrays]
    no_test = missing == ["x_test", "y_test"]
    if no_test and not needs_test:
        arrays |= {"x_test": arrays[x_name][:0], "y_test": arrays[y_name][:0]}
    elif missing:
        hint = "; data.validation can hold out a share of the training set instead" if no_test else ""
        whole = needs_test or len({"x_test", "y_test"} & set(missing)) < 2
        wanted = "x_train, y_train, x_test, y_test" if whole else "features and labels, or x_train and y_train"
        lacking = missing if whole else [name for name in missing if name in called]
        raise InputError(f"{path} must hold {wanted}; it lacks {', '.join(lacking)}{hint}")
    names = None
    if "class_names" in arrays:
        given = np.atleast_1d(arrays["class_names"])
        names = [str(name) for name in given]
        if given.ndim != 1 or len(set(names)) < len(names):
            got = f"shape {given.shape}" if given.ndim != 1 else f"{len(names) - len(set(names))} duplicate(s)"
            raise InputError(f"{path}: class_names must be distinct names of shape (k,), got {got}")
    return _from_arrays(str(path), arrays[x_name], arrays[y_name], arrays["x_test"], arrays["y_test"], names, called)


def read_npy(path: Path) -> Shaped[Tensor, "m ..."]:
    """Returns the images or embeddings in a .npy file as `Dataset` holds them, at least one.

    Raises:
        InputError: it is missing, damaged or empty, or holds something else (a ValueError).
    """
    try:
        array = np.load(path, allow_pickle=False)
        if not isinstance(array, np.ndarray):
            raise ValueError("it is an .npz archive")
    except Exception as error:  # NumPy passes on any error from the header or the data
        raise InputError(f"{path} is not a readable .npy file: {error}") from error
    if not array.size:
        raise InputError(f"{path} must hold at least one sample, got shape {array.shape}")
    return _as_inputs(str(path), array)


def _listed(root: Path, *, needs_test: bool) -> tuple[list[str], dict[str, list[tuple[Path, int]]]]:
    """Returns the classes of a folder, and its images with their labels by part."""
    folders: dict[str, dict[str, Path]] = {"train": {}, "test": {}}
    for part, classes in folders.items():
        if (root / part).is_dir():
            found = sorted(path for path in (root / part).iterdir() if path.is_dir() and path.name[0] != ".")
            classes |= {path.name: path for path in found}
        elif part == "train":
            raise InputError(f"{root} must hold folders train/<class> and test/<class> of images, it has no train/")
        elif needs_test:
            raise InputError(
                f"{root} has no test/<class> beside train/; set data.validation to hold a share of train/ out instead"
            )
    names = list(folders["train"])
    unknown = sorted(set(folders["test"]) - set(names))
    if not names or unknown:
        raise InputError(
            f"{root}: test/ has classes that train/ lacks: {unknown}" if names else f"{root}/train is empty"
        )
    parts = {
        part: _in_turn([image_files(classes[name]) if name in classes else [] for name in names])
        for part, classes in folders.items()
    }
    filled = {label for _, label in parts["train"]}
    if len(filled) < len(names):
        empty = ", ".join(name for j, name in enumerate(names) if j not in filled)
        raise InputError(f"{root}/train must hold an image of every class, it has none of {empty}")
    return names, parts


def _folder(root: Path, image_size: int | None, *, needs_test: bool) -> Dataset:
    names, parts = _listed(root, needs_test=needs_test)
    size = None if image_size is None else (image_size, image_size)
    every = [file for files in parts.values() for file, _ in files]
    decoded = iter(list(_decoded(every, size, root.name)))  # of both parts, so that an error names all bad files
    arrays: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for part, files in parts.items():
        if not files and not needs_test:
            arrays[part] = arrays["train"][0][:0], arrays["train"][1][:0]
            continue
        images = list(itertools.islice(decoded, len(files)))
        sizes = {image.shape for image in images}
        if len(sizes) != 1:
            found_sizes = f"sizes {sorted(sizes)[:3]}; set data.image_size" if sizes else "no image"
            raise InputError(f"{root}/{part} must hold images of one size, got {found_sizes}")
        arrays[part] = np.stack(images), np.asarray([label for _, label in files])
    relative = tuple(file.relative_to(root).as_posix() for file, _ in parts["train"])
    return replace(_from_arrays(str(root), *arrays["train"], *arrays["test"], names), train_files=relative)


@dataclass(frozen=True)
class Outline:
    """What is known about a file or folder before training on it.

    Attributes:
        shapes: of its inputs, (c, h, w) or (d,); several if a folder's images differ in size.
        num_classes: k.
        samples: how many its training part has.
        has_test: whether it has a test part.
        smallest: the file of the image with the smallest side; empty for a .npz file.
        ignored: what else a folder holds, in words; empty for nothing.
    """

    shapes: tuple[tuple[int, ...], ...]
    num_classes: int
    samples: int
    has_test: bool
    smallest: str = ""
    ignored: str = ""


def outline(path: Path) -> Outline:
    """Returns the outline of a .npz file or a folder of images by class; images are decoded only if one is damaged.

    Raises:
        InputError: it is not in the right form (a ValueError).
    """
    if path.suffix == ".npz":
        dataset = read_npz(path, needs_test=False)
        shape = tuple(dataset.train_inputs.shape[1:])
        return Outline((shape,), dataset.num_classes, len(dataset.train_labels), len(dataset.test_labels) > 0)
    from PIL import Image

    names, parts = _listed(path, needs_test=False)
    shapes: dict[tuple[int, int, int], Path] = {}
    unreadable = []
    files = [file for file, _ in [*parts["train"], *parts["test"]]]
    for file in files:
        try:
            with Image.open(file) as image:
                width, height = image.size
                # Pillow rotates a TIFF itself, and gives its size as rotated.
                if image.format != "TIFF" and _orientation(image) in _SIDEWAYS:
                    width, height = height, width
                shapes.setdefault((3, height, width), file)
        except Exception as error:  # Pillow's decoders may raise anything
            unreadable.append(f"{file} is not a readable image (truncated or damaged?): {error}")
    if unreadable and len(files) < _MANY_FILES:
        for _ in _decoded(files, None, path.name):  # its error names the files with damage behind the header, too
            pass
    refuse_unreadable(unreadable)
    smallest = shapes[min(shapes, key=lambda shape: min(shape[1:]))].relative_to(path).as_posix()
    return Outline(
        tuple(sorted(shapes)), len(names), len(parts["train"]), bool(parts["test"]), smallest, _ignored(path)
    )


def _ignored(root: Path) -> str:
    """Returns what a folder of images by class holds that is not read, in words."""

    def visible(folder: Path) -> list[Path]:
        return sorted(path for path in folder.iterdir() if path.name[0] != "." and path.name != "Thumbs.db")

    def few(names: list[str]) -> str:
        more = len(names) - _SHOWN
        return ", ".join(names[:_SHOWN]) + (f" and {more} more" if more > 0 else "")

    parts = [root / part for part in ("train", "test") if (root / part).is_dir()]
    beside = [f"{path.name}/" for path in visible(root) if path.is_dir() and path not in parts]
    outside = [path for folder in (root, *parts) for path in image_files(folder)]
    classes = [path for part in parts for path in visible(part) if path.is_dir()]
    inner = [path for own in classes for path in visible(own)]
    folders = sum(path.is_dir() for path in inner)
    files = [path for path in inner if path.suffix.lower() not in _IMAGE_ENDINGS and not path.is_dir()]
    others = [few(beside)] if beside else []
    if outside:
        others.append(f"{len(outside)} image{'s' * (len(outside) > 1)} outside of class folders")
    if folders:
        others.append(f"{folders} folder{'s' * (folders > 1)} within classes")
    if files:
        endings = few(sorted({path.suffix.lower() or path.name for path in files}))
        others.append(f"{len(files)} file{'s' * (len(files) > 1)} of other kinds ({endings})")
    return ", ".join(others)


def refuse_unreadable(messages: Sequence[str]) -> None:
    """Raises InputError if files could not be read, given what is wrong with each; names the first few."""
    if messages:
        shown = "; ".join(messages[:_SHOWN])
        more = len(messages) - _SHOWN
        raise InputError(shown if more <= 0 else f"{shown}; and {more} more")


def image_files(folder: Path) -> list[Path]:
    """Returns the image files in a folder, sorted; hidden ones and folders are skipped."""
    return sorted(
        file
        for file in folder.iterdir()
        if file.suffix.lower() in _IMAGE_ENDINGS and file.name[0] != "." and not file.is_dir()
    )


def decode(source: Any, size: tuple[int, int] | None = None, mode: str = "RGB") -> Any:
    """Returns a file or a PIL image as a PIL image of a size (width, height) and mode; None keeps its size.

    Transparency becomes white; of 16 bits the upper eight are used; a photo is rotated as its EXIF data says.

    Raises:
        InputError: it is not a readable image, or has 32 bits per channel, whose range is unknown (a ValueError).
    """
    from PIL import Image, ImageOps

    if isinstance(source, str | Path) and not Path(source).is_file():
        what = "it is a folder" if Path(source).is_dir() else "there is no such file"
        raise InputError(f"{source} is not a readable image: {what}")
    try:
        with nullcontext(source) if isinstance(source, Image.Image) else Image.open(source) as image:
            if size is not None and not isinstance(source, Image.Image):
                image.draft(mode, (2 * max(size), 2 * max(size)))  # a large JPEG is decoded at a coarser scale
            wide = image.mode == "F" or (image.mode == "I" and image.format != "PPM")
            read = _as_mode(image, mode)
            if (turn := _orientation(image)) != 1:
                read.getexif()[_ORIENTATION] = turn  # not every conversion keeps it
                read = ImageOps.exif_transpose(read)
    except Exception as error:  # Pillow's decoders may raise anything
        raise InputError(f"{source} is not a readable image (truncated or damaged?): {error}") from error
    if wide:
        raise InputError(f"{source} must have 8 or 16 bits per channel; it has 32, whose range is unknown: convert it")
    return read if size is None or size == read.size else read.resize(size, Image.Resampling.BILINEAR)


def _orientation(image: Any) -> Any:
    """Returns a photo's EXIF orientation, 1 for none; damaged EXIF data is no reason to refuse the picture."""
    try:
        return image.getexif().get(_ORIENTATION, 1)
    except Exception:  # Pillow's parser may raise anything
        return 1


def _as_mode(image: Any, mode: str) -> Any:
    """Returns an image as it looks, since Pillow's own conversion would clip 16 bits and drop transparency."""
    from PIL import Image

    if image.mode.startswith("I;16") or (image.mode, image.format) == ("I", "PPM"):  # a .pgm scaled to 16 bits
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert(mode)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert(mode)
    return image.convert(mode)


def _from_arrays(
    name: str,
    x_train: np.ndarray,
    y_train: np.ndarray,
    x_test: np.ndarray,
    y_test: np.ndarray,
    class_names: list[str] | None,
    called: tuple[str, str] = ("x_train", "y_train"),
) -> Dataset:
    """Checks arrays and returns them as a data set; `called` is the user's names for the first two."""
    x_name, y_name = called
    for names, x, y in ((called, x_train, y_train), (("x_test", "y_test"), x_test, y_test)):
        empty = y is y_train and not y.size
        kinds, named = ("integer or text", "") if class_names is None else ("integer", " (an index into class_names)")
        fits = np.issubdtype(y.dtype, np.integer) or (class_names is None and y.dtype.kind == y_train.dtype.kind == "U")
        if y.ndim != 1 or not fits or x.shape[:1] != y.shape or empty:
            raise InputError(
                f"{name}: {names[1]} must hold one {kinds} label{named} per sample of {names[0]} {x.shape}, "
                f"got {y.dtype} {y.shape}"
            )
    if class_names is not None:
        k = len(class_names)
        lowest, highest = (extreme(np.concatenate([y_train, y_test])) for extreme in (np.min, np.max))
        if lowest < 0 or highest >= k:
            raise InputError(
                f"{name}: labels must lie in [0, {k}), as class_names are, got labels from {lowest} to {highest}"
            )
    unknown = np.setdiff1d(y_test, y_train)
    if unknown.size:
        raise InputError(f"{name}: y_test has classes that {y_name} lacks: {unknown[:5].tolist()}")
    if class_names is None:
        values, y_train = np.unique(y_train, return_inverse=True)
        y_test, class_names = np.searchsorted(values, y_test), [str(value) for value in values]
    inputs = [_as_inputs(f"{name}: {part}", x) for part, x in ((x_name, x_train), ("x_test", x_test))]
    if inputs[0].shape[1:] != inputs[1].shape[1:]:
        raise InputError(f"{name}: {x_name} and x_test must agree, got {x_train.shape} and {x_test.shape}")
    labels = [torch.from_numpy(y.astype(np.int64)) for y in (y_train, y_test)]
    return Dataset(inputs[0], labels[0], inputs[1], labels[1], tuple(class_names))


def _as_inputs(name: str, array: np.ndarray) -> Tensor:
    shape = array.shape
    if array.ndim == 2 and array.shape[1] and np.issubdtype(array.dtype, np.floating):
        with np.errstate(over="ignore"):
            narrow = np.ascontiguousarray(array, dtype=np.float32)
        if not np.isfinite(narrow).all():
            raise InputError(f"{name} must be finite in float32, it holds NaN or infinite entries")
        return torch.from_numpy(narrow)
    if array.ndim == 3:
        array = array[:, None]
    elif array.ndim == 4 and array.shape[-1] in (1, 3) and array.shape[1] not in (1, 3):
        array = array.transpose(0, 3, 1, 2)
    if array.ndim == 4 and array.shape[1] in (1, 3) and all(array.shape[1:]) and array.dtype == np.uint8:
        return torch.from_numpy(np.ascontiguousarray(array))
    raise InputError(
        f"{name} must hold uint8 images (n, h, w), (n, h, w, c) or (n, c, h, w) of c = 1 or 3 channels, or float "
        f"embeddings (n, d), got {array.dtype} {shape}"
    )


_NAMED: dict[str, Callable[[Path], Dataset]] = {
    "digits": _digits,
    "mnist": _torchvision_source("mnist"),
    "fashion-mnist": _torchvision_source("fashion-mnist"),
    "cifar10": _torchvision_source("cifar10"),
    "cifar100": _torchvision_source("cifar100"),
    "omniglot": _omniglot,
    "tiny-imagenet": _tiny_imagenet,
}
