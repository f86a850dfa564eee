"""Batches with the same number of samples from each of their classes, on one process or split over several."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor
from torch.utils.data import Sampler

from vmcr2.checks import check_count, refuse_distributed, refuse_masked
from vmcr2.distributed import check_group, process_rank, world_size
from vmcr2.errors import InputError

_LARGEST = 2**43  # seed and epoch: torch's generator is seeded with both combined, in 64 bits


class ClassBalancedBatchSampler(Sampler[list[int]]):
    """Draws batches of `classes_per_batch` classes with `samples_per_class` samples of each, for a DataLoader.

    Classes take turns, so that over an epoch all come up equally often, give or take one; so do the samples of a class,
    and a class with fewer samples than a batch needs repeats some. Under torch.distributed all ranks draw the same
    batch and each takes its share of it, so that the batch of all ranks together is balanced.

    Everything follows from the seed and the epoch: call `set_epoch` before each epoch, as with DistributedSampler. A
    sampler that loads another's `state_dict` continues where that one stopped.

    Args:
        labels: the class of every sample, (m,), integers ≥ 0, torch or NumPy. Classes without a sample are never drawn.
        samples_per_class: n_j in a batch, from 1.
        classes_per_batch: from 1 to the number of classes that have a sample; None means all of them.
        batches: batches per epoch, from 1; None means about as many as show every sample once.
        seed: from 0 to 2⁴³.
        process_group: the ranks that share a batch; None for all.

    Raises:
        InputError: a wrong argument, or a batch that does not divide over the ranks (a ValueError).
    """

    def __init__(
        self,
        labels: Tensor | np.ndarray | Sequence[int],
        samples_per_class: int,
        *,
        classes_per_batch: int | None = None,
        batches: int | None = None,
        seed: int = 0,
        process_group: Any = None,
    ) -> None:
        classes = _int64(labels)
        if int(classes.min()) < 0:
            raise InputError(f"labels must be >= 0, got {int(classes.min())}")
        samples_per_class = check_count("samples_per_class", samples_per_class)
        present, sizes = classes.unique(return_counts=True)
        if classes_per_batch is None:
            classes_per_batch = len(present)
        limit = "classes that have a sample"
        classes_per_batch = check_count("classes_per_batch", classes_per_batch, at_most=len(present), limit=limit)
        size = classes_per_batch * samples_per_class
        if batches is None:
            batches = max(1, len(classes) // size)
        batches = check_count("batches", batches)
        seed = check_count("seed", seed, at_least=0, at_most=_LARGEST)
        check_group(process_group)
        self.members = torch.argsort(classes, stable=True).split(sizes.tolist())
        self.samples_per_class = samples_per_class
        self.classes_per_batch = classes_per_batch
        self.batches = batches
        self.seed = seed
        # Without a group, ranks may meet after the sampler is made; a group itself could be neither copied nor pickled.
        share = self._share(process_group)
        self.share = None if process_group is None else share
        self.epoch = 0
        self.start = 0  # the batch that the next iteration begins with
        self.done = 0  # how many the latest iteration has drawn

    def _share(self, group: Any) -> slice:
        """Returns this rank's part of a batch of a group."""
        world, rank = world_size(group), process_rank(group)
        each, rest = divmod(self.classes_per_batch * self.samples_per_class, world)
        if rest:
            raise InputError(
                f"classes_per_batch * samples_per_class must be divisible by the {world} processes, "
                f"got {self.classes_per_batch} * {self.samples_per_class}"
            )
        return slice(rank * each, (rank + 1) * each)

    def __len__(self) -> int:
        """Returns the number of batches in an epoch."""
        return self.batches

    def set_epoch(self, epoch: int) -> None:
        """Sets the epoch, from 0, that the next iteration draws, from its beginning.

        If a state of this same epoch has been loaded, and nothing drawn since, the next iteration continues from there.
        """
        if epoch != self.epoch or not self.start:
            self.load_state_dict({"epoch": epoch, "done": 0})

    def state_dict(self) -> dict[str, int]:
        """Returns the epoch and how many of its batches have been drawn; once all have, the next epoch and 0.

        Batches that a DataLoader's workers have fetched ahead count as drawn.
        """
        if self.done == self.batches:
            return {"epoch": self.epoch + 1, "done": 0}
        return {"epoch": self.epoch, "done": self.done}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Continues, in the next iteration, where the sampler that returned the state stopped.

        Raises:
            InputError: the state is not from a sampler with the same number of batches (a ValueError).
        """
        if not isinstance(state, Mapping) or not {"epoch", "done"} <= state.keys():
            raise InputError(f"state must hold epoch and done, as state_dict returns them, got {state!r}")
        check_count("epoch", state["epoch"], at_least=0, at_most=_LARGEST)
        check_count("done", state["done"], at_least=0, at_most=self.batches, limit="batches of an epoch")
        self.epoch = int(state["epoch"])
        self.start = self.done = int(state["done"])

    def __iter__(self) -> Iterator[list[int]]:
        """Yields this rank's share of each batch of the epoch: of all, or of those left after `load_state_dict`."""
        share = self._share(None) if self.share is None else self.share
        start, self.start = self.start, 0
        generator = epoch_generator(self.seed, self.epoch)
        classes = _Turns(len(self.members), generator)
        turns = [_Turns(len(own), generator) for own in self.members]
        for number in range(self.batches):
            batch = [
                self.members[j][turns[j].take(self.samples_per_class)]
                for j in classes.take(self.classes_per_batch).tolist()
            ]
            if number < start:
                continue
            self.done = number + 1
            yield torch.cat(batch)[share].tolist()


def batch_count(m: int, batch_size: int) -> int:
    """Returns into how many batches of nearly equal size to split m ≥ 2 samples: at least 2 in each, for BatchNorm.

    So if `batch_size` is 2 and m odd, one batch has 3 samples. For a single sample the result is 0.

    Args:
        m: the samples of an epoch.
        batch_size: samples per batch at most, 2 or more.
    """
    return min(-(-m // batch_size), m // 2)


def epoch_generator(seed: int, epoch: int, device: torch.device | str = "cpu") -> torch.Generator:
    """Returns the generator for everything random in an epoch; it depends only on the seed and the epoch's number.

    Args:
        seed: of the run.
        epoch: its number.
        device: where the numbers are drawn.
    """
    return torch.Generator(device).manual_seed(seed * 1_000_003 + epoch)


@contextmanager
def position_kept(sampler: Any) -> Iterator[None]:
    """Lets a `ClassBalancedBatchSampler` draw a whole epoch, then restores its position; others are left alone."""
    if not isinstance(sampler, ClassBalancedBatchSampler):
        yield
        return
    position = sampler.epoch, sampler.start, sampler.done
    sampler.start = 0
    try:
        yield
    finally:
        sampler.epoch, sampler.start, sampler.done = position


def _int64(labels: Any) -> Int[Tensor, " m"]:
    """Returns labels as int64 on the CPU: torch would take uint8 for a mask, and lacks wider unsigned dtypes."""
    refuse_distributed("labels", labels)
    if isinstance(labels, Tensor):
        integers = not (labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool)
    else:
        refuse_masked("labels", labels)
        labels = np.asarray(labels)  # works for a pandas Series too, whatever its index
        integers = labels.dtype.kind in "iu"
    if labels.ndim != 1 or len(labels) == 0 or not integers:
        raise InputError(f"labels must be integers of shape (m,), m >= 1, got {labels.dtype} {tuple(labels.shape)}")
    return labels.long().cpu() if isinstance(labels, Tensor) else torch.from_numpy(labels.astype(np.int64))


class _Turns:
    """Deals numbers below `count` in random order, each once before any again; a hand has none twice unless it must."""

    def __init__(self, count: int, generator: torch.Generator) -> None:
        self.count, self.generator = count, generator
        self.left = torch.zeros(0, dtype=torch.long, device="cpu")

    def take(self, number: int) -> Int[Tensor, " n"]:
        """Returns the next `number` numbers, some of them repeated if `count` is smaller."""
        hand = self.left[:number]
        self.left = self.left[number:]
        while len(hand) < number:
            fresh = torch.randperm(self.count, generator=self.generator, device="cpu")
            # Those that the hand has fewest of come first, so that none is in it twice unless it must.
            fresh = fresh[torch.bincount(hand, minlength=self.count)[fresh].argsort(stable=True)]
            missing = number - len(hand)
            hand, self.left = torch.cat([hand, fresh[:missing]]), fresh[missing:]
        return hand
