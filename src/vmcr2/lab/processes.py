"""The processes of one run: how `torchrun` starts them, how they agree, and how one of them speaks for all.

A single process needs no other way of calling them: `first(call)` is then `call()`.
"""

from __future__ import annotations

import ctypes
import os
import platform
import signal
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from types import FrameType, TracebackType
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist

from vmcr2.distributed import process_rank, world_size
from vmcr2.errors import InputError, NumericalError

_Made = TypeVar("_Made")
_ENVIRONMENT = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # what torchrun tells each process
_MALLOC_OPTIONS = (  # for mallopt(3): number and value
    (-1, 2**31 - 1),  # M_TRIM_THRESHOLD
    (-2, 2**28),  # M_TOP_PAD
    (-4, 0),  # M_MMAP_MAX
)


class PeerError(RuntimeError):
    """Another process failed or ended; it reports the reason itself if it can."""


class Terminated(BaseException):
    """SIGTERM: torchrun ends the remaining processes once one of them has ended."""


def keep_freed_memory() -> None:
    """Makes glibc keep the memory of freed tensors, instead of returning it to the system, which zeroes it every step.

    On a CPU that takes up to a third of a step (`benchmarks/network.py`). Other C libraries are left as they are.
    """
    if platform.libc_ver()[0] == "glibc":
        for option, value in _MALLOC_OPTIONS:
            ctypes.CDLL(None).mallopt(option, value)


def share(count: int, rank: int, processes: int) -> slice:
    """Returns a process's share of `count` samples: as equal as possible, in order, like `tensor_split`."""
    size, over = divmod(count, processes)
    start = rank * size + min(rank, over)
    return slice(start, start + size + (rank < over))


def chosen_device(name: str) -> torch.device:
    """Returns the device for auto, cuda or cpu; auto skips accelerators without float64.

    If there are several processes on a machine, each gets a CUDA device of its own.

    Raises:
        InputError: cuda is requested and there is none, or there are fewer devices than processes (a ValueError).
    """
    there = torch.cuda.is_available()
    if name == "cuda" and not there:
        raise InputError("device must be cpu or auto here, got cuda: torch sees no CUDA device")
    if name == "cpu" or not there:
        return torch.device("cpu")
    if world_size() == 1:
        return torch.device("cuda")
    if local_rank() >= torch.cuda.device_count():
        raise InputError(
            f"the processes on a machine must be at most its {torch.cuda.device_count()} CUDA devices, got local rank "
            f"{local_rank()}: start fewer (--nproc-per-node), or set device to cpu"
        )
    return torch.device("cuda", local_rank())


def local_rank() -> int:
    """Returns this process's number on its machine, from 0."""
    return int(os.environ.get("LOCAL_RANK", process_rank()))


def is_first() -> bool:
    """Whether this is the process that reads, writes and speaks for all."""
    return process_rank() == 0


def gathered(value: _Made) -> list[_Made]:
    """Returns the values of all processes, of any type that can be pickled, in the order of ranks."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def any_of(flag: bool) -> bool:
    """Whether the flag is true in any process."""
    return any(gathered(flag))


def first(call: Callable[[], _Made]) -> _Made:
    """Runs a call in the first process only; all processes get its result, which must be picklable, or its error."""
    if world_size() == 1:
        return call()
    made, error = _tried(call) if is_first() else (None, None)
    if is_first() and error is None:
        sent: list[Any] = [(made, None)]
    else:
        sent = [(None, _to_send(error))]
    dist.broadcast_object_list(sent, 0)
    theirs, their_error = sent[0]
    if error is not None:
        raise error
    if their_error is not None:
        raise their_error
    return made if is_first() else theirs  # pyrefly: ignore[bad-return]


def everywhere(call: Callable[[], _Made]) -> _Made:
    """Runs a call in every process, each of which gets its own result; an error in one is an error in all."""
    if world_size() == 1:
        return call()
    made, error = _tried(call)
    errors = gathered(_to_send(error))
    failed = {rank: each for rank, each in enumerate(errors) if each is not None}
    if error is not None and (len(failed) == len(errors) or not isinstance(error, InputError)):
        raise error
    for rank, theirs in failed.items():
        raise InputError(f"process {rank}: {theirs}") if rank and isinstance(theirs, InputError) else theirs
    return made  # pyrefly: ignore[bad-return]


def in_turns(call: Callable[[], _Made]) -> _Made:
    """Runs a call in the first process, then in the first one of each other machine, then in the rest.

    So what one of them downloads is available to the rest, whether or not machines share their disks.
    """
    turn = 0 if is_first() else 1 if local_rank() == 0 else 2
    made: list[_Made] = []
    for now in range(3):
        everywhere(lambda now=now: made.append(call()) if now == turn else None)
    return made[0]


def _tried(call: Callable[[], _Made]) -> tuple[_Made | None, BaseException | None]:
    try:
        return call(), None
    except (Exception, SystemExit) as error:
        return None, error


def _to_send(error: BaseException | None) -> BaseException | None:
    """Returns an error in the form in which the other processes will raise it."""
    if error is None or isinstance(error, (InputError, NumericalError, OSError, SystemExit)):
        return error
    return PeerError(f"process {process_rank()} failed: {error!r}")


def is_loss(error: BaseException) -> bool:
    """Whether an error was caused by another process having ended."""
    if isinstance(error, (PeerError, Terminated)):
        return True
    if world_size() == 1:
        return False
    # gloo has no error type of its own; its messages begin with the location in its source code.
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "/gloo/" in str(error))


class Launch:
    """Joins the processes that torchrun started, and leaves them at the end; does nothing if there are no others.

    If a process group already exists, it is used, and left as it is.
    """

    def __init__(self) -> None:
        self.store: Any = None

    def __enter__(self) -> Launch:
        given = {name: os.environ.get(name, "") for name in _ENVIRONMENT}
        if not all(given.values()) or given["WORLD_SIZE"] == "1" or dist.is_initialized():
            return self
        from torch.distributed.rendezvous import rendezvous

        store, rank, world = next(rendezvous("env://"))
        # torchrun's store outlives a restart (--max-restarts), with the addresses of processes that have died.
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        self.store = dist.PrefixStore(f"vmcr2/{attempt}", store)
        # For tensors the device decides; everything else uses gloo.
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, store=self.store, rank=rank, world_size=world)
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, _terminate)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.store is None:
            return
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # only the last words could still be interrupted
        if error is None:
            dist.destroy_process_group()

    def last_words(self, text: str) -> None:
        """Prints to stderr why the run ends, unless another process has done so."""
        if self.store is not None:
            try:
                if self.store.add("last words", 1) > 1:
                    return
            except RuntimeError:  # the launcher, and the store with it, is gone
                if not is_first():
                    return
        with suppress(BrokenPipeError):
            print(text, file=sys.stderr, flush=True)


def _terminate(number: int, frame: FrameType | None) -> NoReturn:
    raise Terminated(f"signal {number}")
