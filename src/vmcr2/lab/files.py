"""Files written so that being killed at any moment leaves either the old or the new content, complete."""

from __future__ import annotations

import csv
import glob
import io
import json
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from vmcr2.errors import InputError

_ABANDONED_SECONDS = 86400.0  # a half-written file that nobody has touched for this long is swept


@contextmanager
def replacing(path: Path, part: str | None = None) -> Iterator[IO[bytes]]:
    """Opens a file to write so that at any moment the path has either its old or its new content, complete.

    Args:
        path: of the file.
        part: the name of the half-written file beside it, which a kill leaves behind; by default it has the process id,
            and those that killed processes have left are deleted.

    Raises:
        InputError: the folder may not be written to (a ValueError).
        OSError: the system refuses to write, as when the disk is full; it names the path.
    """
    if part is None:
        _sweep(path)
    written = path.with_name(f".{path.name}.{os.getpid()}.part" if part is None else part)
    try:
        try:
            opened = written.open("wb")
        except PermissionError as error:
            raise InputError(f"{path} cannot be written: you have no right to write in {path.parent}") from error
        with opened as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        written.replace(path)
    except BaseException as error:
        with suppress(OSError):  # where nothing can be written, nothing is left behind
            written.unlink(missing_ok=True)
        refusal = _refusal(error)
        if refusal is None or refusal.errno is None or refusal.filename not in (None, *map(str, (written, path))):
            raise
        raise OSError(refusal.errno, f"cannot be written: {refusal.strerror}", str(path)) from error


def _sweep(path: Path) -> None:
    """Deletes the half-written files that killed processes have left beside a file long ago."""
    for left in path.parent.glob(f".{glob.escape(path.name)}.*.part"):
        with suppress(OSError):
            old = time.time() - left.stat().st_mtime > _ABANDONED_SECONDS
            if old and left.name[len(path.name) + 2 : -len(".part")].isdecimal():  # a process id, not another file's
                left.unlink()


def _refusal(error: BaseException) -> OSError | None:
    """Returns the system's error, which torch.save hides behind one of its own; None if there is none."""
    if isinstance(error, OSError):
        return error
    hidden = error.__context__ if isinstance(error, RuntimeError) else None
    return hidden if isinstance(hidden, OSError) and hidden.filename is None else None


def describe_refusal(error: OSError) -> str:
    """Returns the system's error in words, with its file."""
    text = error.strerror or str(error)
    return text if error.filename is None else f"{error.filename}: {text}"


def check_writable(folder: Path) -> None:
    """Raises InputError if nothing can be written in a folder that exists; Windows says that it can in any."""
    if not os.access(folder, os.W_OK):
        raise InputError(f"{folder} must be a folder that can be written to, got one that cannot")


def write_atomically(path: Path, content: bytes) -> None:
    """Writes a file so that at any moment it has either its old or its new content, complete."""
    with replacing(path) as file:
        file.write(content)


def write_json(path: Path, value: Any) -> None:
    """Writes a value as indented JSON, atomically."""
    write_atomically(path, (json.dumps(value, indent=2) + "\n").encode())


def as_csv(rows: Iterable[Sequence[Any]]) -> bytes:
    """Returns the content of a .csv file."""
    text = io.StringIO(newline="")
    csv.writer(text).writerows(rows)
    return text.getvalue().encode(errors="surrogateescape")


def write_csv(path: Path, rows: Iterable[Sequence[Any]]) -> None:
    """Writes rows as a .csv file, atomically."""
    write_atomically(path, as_csv(rows))


def check_file(name: str, path: Path) -> None:
    """Raises InputError unless a file can be written at the path, which the user gave as `name`."""
    if not os.path.isdir(path.absolute().parent):  # unlike Path's, it raises no error where access is denied
        raise InputError(f"{name} must lie in a folder that exists, got {path}")
    if os.path.isdir(path):
        raise InputError(f"{name} must be a file, got the folder {path}")


def check_folder(name: str, path: Path) -> None:
    """Raises InputError unless the path, which the user gave as `name`, is a folder or can become one."""
    nearest = next(each for each in (path, *path.absolute().parents) if os.path.exists(each))
    if not os.path.isdir(nearest):
        raise InputError(f"{name} must be a folder, there already or new, got {path}: {nearest} is a file")


def is_free(path: Path) -> bool:
    """Whether nothing is at the path, or a folder that holds at most half-written files of a killed run."""
    if not path.exists():
        return True
    return path.is_dir() and all(file.name.startswith(".") and ".part" in file.name for file in path.iterdir())
