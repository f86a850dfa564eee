"""The run folder: what a run leaves behind, written so that being killed at any moment leaves it intact.

recipe.json      the resolved recipe
metrics.jsonl    one line per epoch
checkpoint.pt    the latest state, tensors and primitives only; checkpoint.previous.pt the one before
features.npz     features for the figures
summary.json     the final numbers; exists once the run is complete
evaluation.json  what `vmcr2 evaluate` measured
suspects.csv     what `vmcr2 audit` found; suspects.previous.csv, suspects.previous-2.csv, … earlier
figures/*.png
.lock.part       locked while a process writes
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock, Timeout

from vmcr2.errors import InputError
from vmcr2.lab import recipes
from vmcr2.lab.files import check_folder, is_free, replacing, write_atomically, write_json
from vmcr2.lab.recipes import Recipe

# What a checkpoint contains, and what a summary contains at least.
_STATE = {
    "epoch": int,
    "seconds": float,
    "model": dict,
    "criterion": dict,
    "optimizer": dict,
    "rng": torch.Tensor,
    "recipe": str,
    "data": str,
    "trained": dict,
}
_SUMMARY = (
    *("recipe", "objective", "seed", "epochs", "train_reduction", "train_expansion", "train_compression"),
    *("test_accuracy", "head_accuracy", "evaluated_on", "seconds_per_epoch", "device", "threads", "torch"),
)


class _Inside:
    """The path of a file in the run folder."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __get__(self, run: RunFolder, kind: type | None = None) -> Path:
        return run.path / self.name


@dataclass(frozen=True)
class RunFolder:
    """A run folder and the files in it."""

    path: Path

    recipe_file = _Inside("recipe.json")
    metrics_file = _Inside("metrics.jsonl")
    checkpoint_file = _Inside("checkpoint.pt")
    previous_checkpoint_file = _Inside("checkpoint.previous.pt")
    features_file = _Inside("features.npz")
    summary_file = _Inside("summary.json")
    evaluation_file = _Inside("evaluation.json")
    suspects_file = _Inside("suspects.csv")
    figures = _Inside("figures")
    suspects_figure = _Inside("figures/suspects.png")

    @classmethod
    @contextmanager
    def created(cls, path: str | Path, recipe: Recipe) -> Iterator[RunFolder]:
        """Makes a new run folder and holds it, as `held` does.

        Raises:
            InputError: the path is taken, by a run or by anything else (a ValueError).
        """
        run = cls(Path(path))
        run._refuse_taken()
        try:
            run.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:  # no folder may be made there
            raise InputError(f"out must be a folder that can be created, got {run.path}: {error.strerror}") from error
        with run.held():
            run._refuse_taken()  # another run may have begun since
            run.write_recipe(recipe)
            yield run

    def _refuse_taken(self) -> None:
        check_folder("out", self.path)
        if is_free(self.path):
            return
        what = "a run is there already; continue it with --resume, or" if self.is_begun() else "it holds other files;"
        raise InputError(f"out must be a new or empty folder, got {self.path}: {what} choose another --out")

    @classmethod
    def open(cls, path: str | Path) -> RunFolder:
        """Opens a run folder that exists.

        Raises:
            InputError: it is not a path, the folder is missing, or has no recipe.json (a ValueError).
        """
        if not isinstance(path, str | os.PathLike):
            raise InputError(f"path must be that of a run folder, got {type(path).__name__}")
        path = Path(path)
        run = cls(path)
        if not path.is_dir():
            raise InputError(f"there is no run folder {path}")
        if not run.is_begun():
            what = "it has no recipe.json"
            if (path / "comparison.json").is_file():
                names = sorted(file.parent.name for file in path.glob("*/recipe.json"))
                what = f"it is a comparison; its runs are {', '.join(names)}"
            elif (path / "model.safetensors").is_file():
                what = "it is an exported model, which vmcr2.load and vmcr2 predict take"
            raise InputError(f"{path} is not a run folder: {what}")
        return run

    def write_recipe(self, recipe: Recipe) -> None:
        """Writes recipe.json."""
        write_atomically(self.recipe_file, recipes.to_json(recipe).encode(errors="surrogateescape"))

    def recipe(self) -> Recipe:
        """Returns the recipe of the run."""
        return recipes.from_json(self.recipe_file)

    def is_begun(self) -> bool:
        """Whether there is a run in the folder."""
        return self.recipe_file.is_file()

    def is_complete(self) -> bool:
        """Whether the run has reached its end."""
        return self.summary_file.is_file()

    def drop_measured(self) -> None:
        """Deletes what was measured on a run that now goes on; suspects.csv, which people edit, gets another name."""
        for file in (self.features_file, self.evaluation_file, self.suspects_figure):
            file.unlink(missing_ok=True)
        self.put_suspects_aside()

    def put_suspects_aside(self) -> Path | None:
        """Gives suspects.csv, which people edit, a name that is free, and returns it; None if there is no such file."""
        if not self.suspects_file.exists():
            return None
        names = (f"suspects.previous{'' if number == 1 else f'-{number}'}.csv" for number in itertools.count(1))
        aside = next(path for path in map(self.path.joinpath, names) if not path.exists())
        self.suspects_file.replace(aside)
        return aside

    @contextmanager
    def held(self) -> Iterator[None]:
        """Locks the folder against writing by other processes; the system unlocks it however this process ends.

        Raises:
            InputError: another process has locked it (a ValueError).
        """
        try:
            with FileLock(self.path / ".lock.part", timeout=0):
                yield
        except Timeout as error:
            raise InputError(f"{self.path} is in use by another process") from error

    def save_checkpoint(self, state: dict[str, Any]) -> None:
        """Writes checkpoint.pt, keeping the one before as checkpoint.previous.pt; both are intact at any moment."""
        with replacing(self.checkpoint_file, ".checkpoint.part") as file:
            torch.save(state, file)
            if self.checkpoint_file.exists():
                spare = self.path / ".checkpoint.previous.part"
                spare.unlink(missing_ok=True)
                try:
                    os.link(self.checkpoint_file, spare)
                except OSError:  # a file system without hard links
                    shutil.copyfile(self.checkpoint_file, spare)
                spare.replace(self.previous_checkpoint_file)

    def load_checkpoint(self) -> dict[str, Any] | None:
        """Returns the latest checkpoint with its tensors on the CPU, or None if none has been written yet.

        Raises:
            InputError: checkpoint.pt is damaged or not a checkpoint; it and the previous one are left as they are (a
                ValueError).
        """
        if not self.checkpoint_file.exists():
            if self.previous_checkpoint_file.exists():
                raise InputError(
                    f"{self.checkpoint_file} is missing; to continue from the one before it, copy "
                    f"{self.previous_checkpoint_file.name} to {self.checkpoint_file.name}"
                )
            return None
        try:
            # The zip's checksums detect what loading would not: flipped bits inside a tensor.
            with zipfile.ZipFile(self.checkpoint_file) as archive:
                broken = archive.testzip()
            if broken is not None:
                raise ValueError(f"checksum of {broken} is wrong")
            state = torch.load(self.checkpoint_file, map_location="cpu", weights_only=True)
        except Exception as error:
            previous = self.previous_checkpoint_file
            cure = (
                f"the previous one may be intact: to continue from it, move {previous.name} over "
                f"{self.checkpoint_file.name}"
                if previous.exists()
                else "there is no checkpoint before it; start the run again"
            )
            raise InputError(f"{self.checkpoint_file} is damaged ({error}); {cure}") from error
        if not isinstance(state, dict) or not all(isinstance(state.get(name), kind) for name, kind in _STATE.items()):
            raise InputError(
                f"{self.checkpoint_file} is not a checkpoint of this program: it must hold {', '.join(sorted(_STATE))}"
            )
        return state

    def check_recipe_of(self, state: dict[str, Any], recipe: Recipe) -> None:
        """Raises InputError unless a checkpoint's recipe is this one in everything that a run must keep."""
        # Read as recipes, so that a setting newer than the checkpoint has its default in both.
        if recipes.from_text(state["recipe"], str(self.checkpoint_file)) != recipes.comparable(recipe):
            raise InputError(f"{self.checkpoint_file} belongs to a different recipe from {self.recipe_file}")

    @contextmanager
    def fits(self, what: str) -> Iterator[None]:
        """Raises InputError if a checkpoint's contents cannot be loaded into `what`."""
        try:
            yield
        except (RuntimeError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise InputError(f"{self.checkpoint_file} does not fit {what}: {error}") from error

    def metrics(self) -> list[dict[str, Any]]:
        """Returns the lines of metrics.jsonl; a last line that was cut off by a kill is left out.

        Raises:
            InputError: another line is damaged (a ValueError).
        """
        if not self.metrics_file.exists():
            return []
        lines = self.metrics_file.read_bytes().split(b"\n")
        metrics = []
        cure = "delete that line; curves will lack any epoch it held"
        for number, text in enumerate(lines[:-1], 1):
            try:
                line = json.loads(text.decode("utf-8-sig"))
            except (ValueError, RecursionError) as error:
                raise InputError(f"{self.metrics_file} is damaged in line {number} ({error}); {cure}") from error
            if not isinstance(line, dict) or not isinstance(line.get("epoch"), int):
                raise InputError(
                    f"{self.metrics_file} is damaged in line {number} (it must be an object with its epoch); {cure}"
                )
            metrics.append(line)
        return metrics

    def truncate_metrics(self, epochs: int) -> None:
        """Drops the lines after an epoch, which a resumed run will write again."""
        kept = [line for line in self.metrics() if line["epoch"] <= epochs]
        write_atomically(self.metrics_file, "".join(json.dumps(line) + "\n" for line in kept).encode())

    def add_metrics(self, line: dict[str, Any]) -> None:
        """Appends one line."""
        with self.metrics_file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def save_features(self, arrays: dict[str, np.ndarray]) -> None:
        """Writes features.npz."""
        with replacing(self.features_file, ".features.part") as file:
            np.savez_compressed(file, allow_pickle=False, **arrays)

    def features(self) -> dict[str, np.ndarray]:
        """Returns the arrays of features.npz.

        Raises:
            InputError: the run is not complete, or the file is damaged (a ValueError).
        """
        self._check_complete()
        if not self.features_file.is_file():
            raise InputError(f"{self.features_file} is missing; {self._renewed}")
        try:
            with np.load(self.features_file, allow_pickle=False) as file:
                return {name: file[name] for name in file.files}
        except Exception as error:  # NumPy passes on any error from the zip, the header or the decompression
            raise InputError(f"{self.features_file} is damaged ({error}); {self._renewed}") from error

    def _check_complete(self) -> None:
        if not self.is_complete():
            raise InputError(f"{self.path} is not complete; finish it with vmcr2 train --resume {self.path}")

    @property
    def _renewed(self) -> str:
        return f"delete {self.summary_file} and run vmcr2 train --resume {self.path}, which writes it again"

    def save_summary(self, summary: dict[str, Any]) -> None:
        """Writes summary.json."""
        write_json(self.summary_file, summary)

    def summary(self) -> dict[str, Any]:
        """Returns summary.json.

        Raises:
            InputError: the run is not complete, or the file is damaged (a ValueError).
        """
        self._check_complete()
        try:
            summary = json.loads(self.summary_file.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise InputError(f"{self.summary_file} is damaged ({error}); {self._renewed}") from error
        if not isinstance(summary, dict) or not set(_SUMMARY) <= summary.keys():
            raise InputError(f"{self.summary_file} is damaged (it must hold {', '.join(_SUMMARY)}); {self._renewed}")
        return summary
