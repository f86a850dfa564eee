"""A trained network with its subspaces and class names: loaded from a run in one line, exported, shared.

    trained = vmcr2.load("runs/digits-vmcr2-seed0")
    trained.predict(["a.png", "b.png"])          # class names
    trained.embed(images)                        # features (m, d) of uint8 images (m, c, h, w)

`export` writes config.json, model.safetensors and README.md, the layout of the Hugging Face Hub: `load` reads that
folder too, and the extra `hub` adds `TrainedModel.from_pretrained(…)` and `trained.push_to_hub("me/name")`.
"""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from vmcr2.checks import (
    UNIT_NORM_TOLERANCE,
    Condition,
    check_count,
    iterator_of,
    read_conditions,
    refuse_masked,
    tensor_of,
)
from vmcr2.errors import InputError, NumericalError
from vmcr2.lab import networks, objectives, sources
from vmcr2.lab.augmentation import Augmentation, plain
from vmcr2.lab.evaluate import Features, extract
from vmcr2.lab.files import is_free, write_atomically, write_json
from vmcr2.lab.objectives import Objective
from vmcr2.lab.processes import chosen_device
from vmcr2.lab.recipes import OBJECTIVES, Recipe
from vmcr2.lab.run import RunFolder
from vmcr2.lab.sources import Dataset, decode
from vmcr2.subspaces import subspace_energies

try:
    from huggingface_hub import PyTorchModelHubMixin  # pyrefly: ignore[missing-import]
except ModuleNotFoundError:

    class PyTorchModelHubMixin:
        """Stands in for huggingface_hub's mixin if that is not installed."""

        def __init_subclass__(cls, **_: Any) -> None: ...

        @classmethod
        def from_pretrained(cls, *_: Any, **__: Any) -> Any:
            """Says which extra is missing."""
            raise InputError("from_pretrained needs huggingface_hub: pip install 'vmcr2[hub]'")

        save_pretrained = push_to_hub = from_pretrained


_AT_ONCE = 256  # inputs sent through the network together


# The mixin is one of two classes, which the type checker does not accept as a base.
class TrainedModel(
    nn.Module,
    PyTorchModelHubMixin,  # pyrefly: ignore[invalid-inheritance]
    library_name="vmcr2",
    tags=["mcr2", "image-feature-extraction"],
):
    """A network, one subspace per class, and the names of the classes; `load` returns it in eval mode.

    All arguments can be written as JSON, so that config.json holds them.

    Args:
        network: a name in `vmcr2.lab.networks`, or timm:NAME.
        feature_dim: d.
        input_shape: of one input of the network, after cropping: (c, h, w) or (d,).
        image_shape: of one input in the data, before cropping.
        classes: the names of the k classes, in the order of the labels.
        components: r, the dimension of the subspaces.
        crop: the side of the square that is cut from the middle of an image; None for all of it.
        padding: zeros that may be added around an image first.
        about: what is known about the training, for the model card.

    Attributes:
        model: the network, from inputs (m, *input_shape) to features (m, d) of norm 1.
        subspaces: V^(j) of eq. (8), a buffer (k, d, r).
        classes: as given.

    Raises:
        InputError: the network is unknown or does not accept such inputs (a ValueError).
    """

    subspaces: Tensor

    def __init__(
        self,
        *,
        network: str,
        feature_dim: int,
        input_shape: Sequence[int],
        image_shape: Sequence[int],
        classes: Sequence[str],
        components: int,
        crop: int | None = None,
        padding: int = 0,
        about: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.classes = tuple(classes)
        self.image_shape = tuple(image_shape)
        self.augmentation = Augmentation(crop, padding)
        self.about = about or {}
        self.model = networks.build(network, tuple(input_shape), feature_dim)
        self.register_buffer("subspaces", torch.zeros(len(self.classes), feature_dim, components))
        self.config = {
            "network": network,
            "feature_dim": feature_dim,
            "input_shape": list(input_shape),
            "image_shape": list(image_shape),
            "classes": list(classes),
            "components": components,
            "crop": crop,
            "padding": padding,
            "about": self.about,
        }

    def forward(self, inputs: Float[Tensor, "m ..."]) -> Float[Tensor, "m d"]:
        """Returns the features of inputs that are already cropped and scaled to [0, 1]."""
        return self.model(inputs)

    @torch.no_grad()
    def embed(self, images: Any) -> Float[Tensor, "m d"]:
        """Returns features of norm 1, on the model's device.

        Args:
            images: uint8 images (m, c, h, w), or (m, h, w) if c = 1, of the training data's size, as a tensor or an
                array; or a path or PIL image, or a sequence of these, which are converted to the training data's number
                of channels and scaled to its size. For a run on embeddings: floats (m, d).

        Raises:
            InputError: images are not of that kind or size, embeddings are not finite, or a file cannot be read (a
                ValueError).
            NumericalError: some of the resulting features do not have norm 1.
        """
        given, device = self._inputs(images), self.subspaces.device
        with networks.evaluating(self.model):  # even if it is being trained further
            parts = [
                self.model(plain(batch.to(device), self.augmentation).to(self.subspaces.dtype))
                for batch in given.split(_AT_ONCE)
            ]
        features = torch.cat(parts)
        fine = (features.float().norm(dim=1) - 1).abs() <= UNIT_NORM_TOLERANCE
        if not bool(fine.all()):
            raise NumericalError(
                f"the network gives {int((~fine).sum())} of {len(fine)} samples features that are not of norm 1: "
                "inputs so large that they overflow, or weights that are damaged"
            )
        return features

    @torch.no_grad()
    def scores(self, images: Any) -> Float[Tensor, "m k"]:
        """Returns the share in [0, 1] of each sample's energy that lies in each class's subspace, in float64.

        Args:
            images: as for `embed`.

        Raises:
            InputError: as for `embed`.
        """
        features, bases = self.embed(images), self.subspaces
        if features.device.type == "mps":  # it has no float64
            features, bases = features.cpu(), bases.cpu()
        # Subspaces may contain nearly all of any sample: float32 would leave ties.
        return subspace_energies(features.double(), bases.double())

    def predict(self, images: Any) -> list[str]:
        """Returns the name of the class whose subspace is nearest to each sample, eq. (8), whatever the objective was.

        `trained.scores(images).argmax(1)` gives the indices of these names in `classes`.

        Args:
            images: as for `embed`.

        Raises:
            InputError: as for `embed`.
        """
        return [self.classes[j] for j in self.scores(images).argmax(1).tolist()]

    def _inputs(self, images: Any) -> Shaped[Tensor, "m ..."]:
        shape = self.image_shape
        refuse_masked("images", images)
        if isinstance(images, np.ndarray) and images.ndim < 2 and images.dtype.kind in "OSTU":
            images = images.tolist()  # paths or images, as in a data frame's column
        if isinstance(images, Tensor | np.ndarray):
            given = images if isinstance(images, Tensor) else tensor_of(images, "images")
            if len(shape) == 3 and shape[0] == 1 and given.shape[1:] == shape[1:]:
                given = given[:, None]
            fits = given.is_floating_point() if len(shape) == 1 else given.dtype == torch.uint8
            if given.shape[1:] == shape and fits:
                return _finite(given.float()) if len(shape) == 1 else given
            kind = "floats" if len(shape) == 1 else "uint8 images"
            sizes = ", ".join(map(str, shape))
            got = f"{str(given.dtype).removeprefix('torch.')} {tuple(given.shape)}"
            raise InputError(f"images must be {kind} (m, {sizes}) as in training, got {got}")
        single = isinstance(images, str | os.PathLike) or hasattr(images, "convert")
        form = "an array, a path, an image, or a sequence of paths or images"
        several = [images] if single else list(iterator_of("images", images, form))
        if any(isinstance(each, Tensor | np.ndarray) for each in several):
            raise InputError(f"images must be {form}, got a sequence of arrays: stack them (numpy.stack, torch.stack)")
        if len(shape) == 1 or not several:
            what = "an array of embeddings (this run has no images)" if len(shape) == 1 else "at least one image"
            raise InputError(f"images must be {what}, got {type(several[0]).__name__ if several else 'none'}")
        mode, size = "L" if shape[0] == 1 else "RGB", (shape[2], shape[1])
        arrays = [np.array(decode(image, size, mode)) for image in several]
        return torch.from_numpy(np.stack(arrays)).view(len(arrays), *shape[1:], shape[0]).permute(0, 3, 1, 2)

    def card(self) -> str:
        """Returns the model card: Markdown with the Hub's front matter."""
        k, names = len(self.classes), ", ".join(self.classes[:20])
        known = "\n".join(f"| {name.replace('_', ' ')} | {value} |" for name, value in self.about.items())
        kind = "images" if len(self.image_shape) == 3 else "embeddings"
        return f"""---
library_name: vmcr2
tags: [mcr2, image-feature-extraction]
---
# {self.about.get("recipe", "A vmcr2 model")}

Maps {kind} of shape {self.image_shape} to features of norm 1 in {self.config["feature_dim"]} dimensions, and to one of
{k} classes by the nearest of {k} subspaces of dimension {self.config["components"]}. Network: {self.config["network"]}.

```python
import vmcr2
trained = vmcr2.load("THIS FOLDER")
trained.embed(images), trained.predict(images)
```

| training | |
| --- | --- |
{known}

Classes: {names}{f", … ({k} in all)" if k > 20 else ""}.

It knows these classes only and names one of them for any input; the largest of `trained.scores(images)` is low for
inputs unlike any of them. Inputs must be prepared as in training: same size, same meaning of light and dark.
"""

    def save_pretrained(self, save_directory: str | Path, *, config: Any = None, **options: Any) -> Any:
        """Writes the files that `export` writes, through huggingface_hub."""
        # The mixin would write the model's initial configuration, which `load` may have changed since.
        return super().save_pretrained(save_directory, config=config or self.config, **options)

    def generate_model_card(self, *_: Any, **__: Any) -> Any:
        """Returns the card in the form that huggingface_hub expects."""
        from huggingface_hub import ModelCard  # pyrefly: ignore[missing-import]

        return ModelCard(self.card())


def _finite(embeddings: Float[Tensor, "m d"]) -> Float[Tensor, "m d"]:
    wrong, requirement = ~embeddings.isfinite(), "images must be finite in float32"
    read_conditions([Condition(wrong.any(), requirement, lambda: f"{int(wrong.sum())} NaN or infinite entries")])
    return embeddings


def config(recipe: Recipe, dataset: Dataset) -> dict[str, Any]:
    """Returns what a checkpoint keeps from a recipe and its data, so that prediction needs neither."""
    example = plain(dataset.train_inputs[:1], recipe.augmentation)
    return {
        "network": recipe.network,
        "feature_dim": recipe.feature_dim,
        "input_shape": list(example.shape[1:]),
        "image_shape": list(dataset.train_inputs.shape[1:]),
        "classes": list(dataset.class_names),
        "crop": recipe.augmentation.crop,
        "padding": recipe.augmentation.padding,
    }


def load(path: RunFolder | str | Path, components: int | None = None) -> TrainedModel:
    """Returns a trained model on the CPU, in eval mode; the data it was trained on is not needed.

    Args:
        path: a run folder, whose last checkpoint is used, or a folder that `vmcr2 export` wrote.
        components: how many directions of each class's subspace to keep, strongest first; by default all, ⌊d/k⌋.

    Raises:
        InputError: there is neither, the run has not been measured yet, it has fewer components, or a file is damaged
            (a ValueError).
    """
    exported = isinstance(path, str | os.PathLike) and (Path(path) / "model.safetensors").is_file()
    trained = _load_exported(Path(path)) if exported else Checkpoint.open(path).model()
    if components is not None:
        most = trained.subspaces.shape[2]
        check_count("components", components, at_most=most, limit="those of the model")
        components = int(components)  # JSON does not accept NumPy integers
        trained.subspaces = trained.subspaces[..., :components].contiguous()
        trained.config["components"] = components
        if components < most:  # what was measured is for all of them
            trained.about = {name: value for name, value in trained.about.items() if name != "test_accuracy"}
            trained.config["about"] = trained.about
    return trained


@dataclass(frozen=True)
class Checkpoint:
    """A run's last checkpoint, read once, and what can be built from it.

    Attributes:
        run: the run folder.
        recipe: its recipe.
        state: the contents of checkpoint.pt.
    """

    run: RunFolder
    recipe: Recipe
    state: dict[str, Any]

    @classmethod
    def open(cls, path: RunFolder | str | Path) -> Checkpoint:
        """Reads the checkpoint of a run folder.

        Raises:
            InputError: there is no run or no checkpoint, or a damaged one (a ValueError).
        """
        run = path if isinstance(path, RunFolder) else RunFolder.open(path)
        recipe, state = run.recipe(), run.load_checkpoint()
        if state is None:
            raise InputError(f"{run.path} has no checkpoint yet; continue it with vmcr2 train --resume")
        if "config" not in state["trained"]:
            raise InputError(f"{run.checkpoint_file} was written by an earlier version; train it again")
        run.check_recipe_of(state, recipe)
        return cls(run, recipe, state)

    def model(self) -> TrainedModel:
        """Returns the network with its subspaces, on the CPU and in eval mode; warns if they are older than it.

        Raises:
            InputError: the run has not been measured yet, or the checkpoint does not fit or is damaged (a ValueError).
        """
        run, recipe, state = self.run, self.recipe, self.state
        kept = state["trained"]
        if kept["bases"] is None:
            raise InputError(
                f"{run.path} has not been measured yet, so it has no subspaces; continue it with vmcr2 train --resume"
            )
        if kept["measured_at"] != state["epoch"]:
            warnings.warn(
                f"{run.path} has subspaces from epoch {kept['measured_at']} but a network from epoch "
                f"{state['epoch']}: vmcr2 train --resume brings them into line",
                stacklevel=2,
            )
        about: dict[str, Any] = {"recipe": recipe.name, "objective": OBJECTIVES[recipe.objective]}
        about["epochs"] = state["epoch"]
        if run.is_complete():
            summary = run.summary()
            about |= {name: round(summary[name], 4) for name in ("train_reduction", "test_accuracy")}
            about["evaluated_on"] = summary["evaluated_on"]
        with run.fits("the network of its recipe"):
            trained = TrainedModel(**kept["config"], components=kept["bases"].shape[2], about=about)
            trained.model.load_state_dict(state["model"])
            if kept["bases"].shape != trained.subspaces.shape:
                fit = tuple(trained.subspaces.shape)
                raise ValueError(f"subspaces of {tuple(kept['bases'].shape)}, where {fit} fit")
            trained.subspaces.copy_(kept["bases"])
        _refuse_spoilt(trained, run.path)
        return trained.eval()

    def objective(self) -> Objective:
        """Returns the run's objective, with its dictionary or classifier, in eval mode.

        Raises:
            InputError: the checkpoint does not fit (a ValueError).
        """
        with self.run.fits("the objective of its recipe"):
            objective = objectives.build(self.recipe, len(self.state["trained"]["config"]["classes"]))
            objective.criterion.load_state_dict(self.state["criterion"])
        objective.criterion.eval()
        return objective

    def data(self, data_root: str | Path | None = None) -> Dataset:
        """Returns the data that the run was trained and measured on; warns if it has changed since.

        Args:
            data_root: the folder of named data sets.

        Raises:
            InputError: the data is missing, or has other classes or sizes (a ValueError).
        """
        source, known = self.recipe.data.source, self.state["trained"]["config"]
        sources.refuse_gone(self.recipe.data, data_root, self.run.path)
        dataset = sources.load(self.recipe.data, data_root)
        sizes = list(dataset.train_inputs.shape[1:])
        if list(dataset.class_names) != known["classes"] or sizes != known["image_shape"]:
            raise InputError(f"{source} has other classes or sizes than {self.run.path} was trained on")
        if self.state["data"] != sources.fingerprint(dataset):
            warnings.warn(f"{source} has changed since {self.run.path} was trained on it", stacklevel=2)
        return dataset

    def features(self, data_root: str | Path | None = None) -> tuple[Dataset, Features]:
        """Returns the data and its features, on the CPU; the network runs on a GPU, unless the recipe wants the CPU.

        Args:
            data_root: as for `data`.

        Raises:
            InputError: as for `model` and `data`, or a GPU is lacking for a process (a ValueError).
        """
        recipe, model, dataset = self.recipe, self.model().model, self.data(data_root)
        model.to(chosen_device("cpu" if recipe.device == "cpu" else "auto"))
        return dataset, extract(model, dataset, recipe.augmentation, recipe.batch_size, recipe.precision)


def _refuse_spoilt(trained: TrainedModel, path: Path) -> None:
    """Raises InputError if the model holds NaN or infinite entries."""
    spoilt = [name for name, value in trained.state_dict().items() if not bool(value.isfinite().all())]
    if spoilt:
        raise InputError(f"the model in {path} is damaged: NaN or infinite entries in {', '.join(spoilt)}")


def export(trained: TrainedModel, folder: str | Path) -> None:
    """Writes a model as config.json, model.safetensors and README.md, its card.

    Args:
        trained: from `load`.
        folder: new or empty.

    Raises:
        InputError: the folder is taken, or safetensors is not installed (a ValueError).
        OSError: the system refuses to write, as when the disk is full.
    """
    folder = Path(folder)
    if not is_free(folder):
        raise InputError(f"the folder to export to must be new or empty, got {folder}")
    save_model = _safetensors().save_model
    from safetensors import SafetensorError

    made = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / ".model.safetensors.part"
    try:
        try:
            save_model(trained, str(part))
        except SafetensorError as error:
            raise OSError(f"{folder} cannot be written: {error}") from error
        write_atomically(folder / "README.md", trained.card().encode(errors="surrogateescape"))
        write_json(folder / "config.json", trained.config)
        with suppress(OSError):  # not every file system has modes to set
            shutil.copymode(folder / "config.json", part)  # safetensors lets only the owner read it
        part.replace(folder / "model.safetensors")
    except BaseException:
        with suppress(OSError):
            for name in (part.name, "README.md", "config.json"):
                (folder / name).unlink(missing_ok=True)
            if made:
                folder.rmdir()
        raise


def _load_exported(folder: Path) -> TrainedModel:
    load_model = _safetensors().load_model
    try:
        trained = TrainedModel(**json.loads((folder / "config.json").read_text(encoding="utf-8")))
        load_model(trained, str(folder / "model.safetensors"))
    except InputError:
        raise
    except Exception as error:  # safetensors has errors of its own
        raise InputError(f"{folder} holds no readable model: {error}") from error
    _refuse_spoilt(trained, folder)
    return trained.eval()


def _safetensors() -> Any:
    try:
        import safetensors.torch
    except ModuleNotFoundError as error:
        raise InputError("exported models need safetensors: pip install 'vmcr2[hub]'") from error
    return safetensors.torch
