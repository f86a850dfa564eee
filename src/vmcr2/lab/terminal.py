"""What the user sees during long work: a progress bar on a terminal, plain lines elsewhere, and tables."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import TracebackType

import torch
from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

_PLAIN_SECONDS = 10.0


class _Bar(Progress):
    """A progress bar with the figures on a line below, so that nothing is cut off at 80 columns."""

    figures = ""

    def get_renderables(self) -> Iterable[RenderableType]:
        """Returns the bar and the figures."""
        yield from super().get_renderables()
        yield Text(self.figures)


class EpochProgress:
    """Shows epochs as they pass: a bar with the latest figures and the time left, or a line every ten seconds."""

    def __init__(self, title: str, epochs: int, done: int, console: Console | None) -> None:
        self.console = Console(markup=False, emoji=False) if console is None else console
        self.title = title
        self.epochs = epochs
        self.start_epoch = done
        self.started = self.said = time.monotonic()
        self.figures: dict[str, tuple[int, str]] = {}
        self.bar: _Bar | None = None
        if self.console.is_terminal:
            self.bar = _Bar(
                TextColumn("{task.description}", markup=False),
                BarColumn(bar_width=None),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                console=self.console,
                expand=True,
            )
            self.task = self.bar.add_task(title, total=epochs, completed=done)

    def __enter__(self) -> EpochProgress:
        if self.bar is not None:
            self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bar is not None:
            self.bar.stop()

    def update(self, epoch: int, figures: dict[str, str]) -> None:
        """Reports that an epoch has passed; figures not given keep their last value, shown with its epoch."""
        self.figures |= {name: (epoch, value) for name, value in figures.items()}
        parts = [f"{name} {value}" for name, (_, value) in self.figures.items()]
        for i, (measured, _) in enumerate(self.figures.values()):
            last_of_its_epoch = i + 1 == len(parts) or list(self.figures.values())[i + 1][0] != measured
            if measured != epoch and last_of_its_epoch:
                parts[i] += f" (epoch {measured})"
        text = "  ".join(parts)
        if self.bar is not None:
            self.bar.figures = text
            self.bar.update(self.task, completed=epoch)
            return
        now = time.monotonic()
        if epoch in (self.start_epoch + 1, self.epochs) or now - self.said >= _PLAIN_SECONDS:
            self.said = now
            left = (now - self.started) / (epoch - self.start_epoch) * (self.epochs - epoch)
            self.console.print(
                f"{self.title}  epoch {epoch}/{self.epochs}  {text}  {left:.0f} s left", highlight=False, soft_wrap=True
            )


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """Returns a table for the terminal, with the first column left-aligned and the others right-aligned."""
    made = Table(title=title, title_justify="left")
    for place, column in enumerate(columns):
        made.add_column(column, justify="left" if place == 0 else "right", overflow="fold")
    for row in rows:
        made.add_row(*row)
    return made


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Returns the same table in Markdown."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def mean_and_spread(values: Sequence[float | None], digits: int) -> str:
    """Returns mean ± standard deviation of the known values, or – if there are none."""
    known = [value for value in values if value is not None]
    if not known:
        return "–"
    spread = f" ± {statistics.stdev(known):.{digits}f}" if len(known) > 1 else ""
    return f"{statistics.mean(known):.{digits}f}{spread}"


def device_name(device: torch.device) -> str:
    """Returns the manufacturer's name for a device."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine() or "cpu"


def describe_device(device: torch.device) -> str:
    """Returns the hardware and versions to state with every measurement."""
    return hardware(device_name(device), torch.get_num_threads(), torch.__version__)


def hardware(name: str, threads: int, version: str) -> str:
    """Returns a device's name, the number of threads and torch's version, in words."""
    return f"{name}, {threads} thread{'s' * (threads != 1)}, torch {version}"
