"""Runs of a benchmark that are kept, a JSON line each, and the learning rate that does best among them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from vmcr2.lab.terminal import describe_device

Line = dict[str, Any]


class MissingRunError(Exception):
    """A run that is asked for has not been made yet."""


@dataclass(frozen=True)
class Runs:
    """The runs in a file.

    Attributes:
        path: of the file.
        keys: the fields of a line that tell runs apart.
        device: that they are made on.
    """

    path: Path
    keys: tuple[str, ...]
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def lines(self) -> list[Line]:
        """Returns all of them."""
        return [json.loads(line) for line in self.path.read_text().splitlines()] if self.path.is_file() else []

    def where(self) -> str:
        """Returns the hardware and versions that they were made with."""
        return "; ".join(sorted({line["where"] for line in self.lines()}))

    def kept(self, setting: Mapping[str, Any]) -> Line:
        """Returns the run of a setting.

        Raises:
            MissingRunError: it has not been made.
        """
        for line in self.lines():
            if all(line[key] == setting[key] for key in self.keys):
                return line
        raise MissingRunError(str(setting))

    def completed(self, setting: Mapping[str, Any], run: Callable[[], Line]) -> Line:
        """Returns the run of a setting, made and kept first where it is not there; one that breaks off is not kept."""
        try:
            return self.kept(setting)
        except MissingRunError:
            line = run() | {"where": describe_device(self.device)}
            with self.path.open("a") as file:
                file.write(json.dumps(line) + "\n")
            print({key: value for key, value in line.items() if not isinstance(value, dict)}, flush=True)
            return line


def best_rate(rates: Sequence[float], score: Callable[[float], float]) -> float:
    """Returns the learning rate of the best score.

    While that is at an end of what was tried, twice the largest or a third of the smallest is tried too, three times at
    most.
    """
    scores = {rate: score(rate) for rate in rates}
    for _ in range(3):
        best = max(scores, key=lambda rate: scores[rate])
        if best == max(scores):
            further = 2 * best
        elif best == min(scores):
            further = best / 3
        else:
            break
        further = float(f"{further:.2g}")
        scores[further] = score(further)
    return max(scores, key=lambda rate: scores[rate])
