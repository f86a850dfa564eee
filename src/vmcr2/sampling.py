"""Batches that hold as many samples of each of their classes, on one process or split over several."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from torch.utils.data import Sampler

from vmcr2.checks import check_count
from vmcr2.distributed import process_rank, world_size
from vmcr2.errors import InputError


class ClassBalancedBatchSampler(Sampler[list[int]]):
    """Draws batches of `classes_per_batch` classes with `samples_per_class` samples of each, for a DataLoader.

    Classes take turns, so that over an epoch each comes up as often as the next, give or take one; so do the samples of
    a class, and one that has fewer than a batch takes gives some of them again. Under torch.distributed all ranks draw
    the same batch and each takes its share of it, so that the batch of all ranks together is balanced.

    Everything follows from the seed and the epoch: call `set_epoch` before each epoch, as with DistributedSampler. A
    sampler given the `state_dict` of another goes on where that one stood.

    Args:
        labels: the class of every sample, (m,), integers ≥ 0. Classes without a sample are never drawn.
        samples_per_class: n_j in a batch, from 1.
        classes_per_batch: from 1 to the number of classes that have a sample; None takes all of them.
        batches: in an epoch, from 1; None takes about as many as show every sample once.
        seed: from 0.
        process_group: the ranks that share a batch; None for all.

    Raises:
        InputError: a wrong argument, or a batch that does not divide over the ranks (a ValueError).
    """

    def __init__(
        self,
        labels: Int[Tensor, " m"],
        samples_per_class: int,
        *,
        classes_per_batch: int | None = None,
        batches: int | None = None,
        seed: int = 0,
        process_group: Any = None,
    ) -> None:
        labels = torch.as_tensor(labels)
        if labels.ndim != 1 or len(labels) == 0 or labels.is_floating_point() or labels.dtype == torch.bool:
            raise InputError(f"labels must be integers of shape (m,), got {labels.dtype} {tuple(labels.shape)}")
        if int(labels.min()) < 0:
            raise InputError(f"labels must be >= 0, got {int(labels.min())}")
        check_count("samples_per_class", samples_per_class)
        present = labels.unique()
        if classes_per_batch is None:
            classes_per_batch = len(present)
        check_count("classes_per_batch", classes_per_batch, at_most=len(present), limit="classes that have a sample")
        size = classes_per_batch * samples_per_class
        if batches is None:
            batches = max(1, len(labels) // size)
        check_count("batches", batches)
        check_count("seed", seed, at_least=0)
        world = world_size(process_group)
        if size % world:
            raise InputError(
                f"classes_per_batch * samples_per_class must be divisible by the {world} processes, "
                f"got {classes_per_batch} * {samples_per_class}"
            )
        order = torch.argsort(labels.cpu(), stable=True)
        self.members = order.split(torch.bincount(labels.cpu())[present.cpu()].tolist())
        self.samples_per_class = samples_per_class
        self.classes_per_batch = classes_per_batch
        self.batches = batches
        self.seed = seed
        self.share = slice(
            process_rank(process_group) * size // world, (process_rank(process_group) + 1) * size // world
        )
        self.epoch = 0
        self.done = 0

    def __len__(self) -> int:
        """Returns the number of batches of an epoch."""
        return self.batches

    def set_epoch(self, epoch: int) -> None:
        """Sets the epoch, from 0, that the next iteration draws, from its beginning."""
        check_count("epoch", epoch, at_least=0)
        self.epoch, self.done = epoch, 0

    def state_dict(self) -> dict[str, int]:
        """Returns the epoch and how many of its batches have been drawn; all of them stand for the next epoch."""
        return {"epoch": self.epoch, "done": self.done}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Goes on where the sampler of a `state_dict` stood."""
        self.set_epoch(state["epoch"])
        check_count("done", state["done"], at_least=0, at_most=self.batches, limit="batches of an epoch")
        self.done = state["done"]

    def __iter__(self) -> Iterator[list[int]]:
        """Yields this rank's share of each batch that is left of the epoch."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        classes = _Turns(len(self.members), generator)
        turns = [_Turns(len(own), generator) for own in self.members]
        for number in range(self.batches):
            batch = [
                self.members[j][turns[j].take(self.samples_per_class)]
                for j in classes.take(self.classes_per_batch).tolist()
            ]
            if number < self.done:
                continue
            self.done = number + 1
            yield torch.cat(batch)[self.share].tolist()
        self.done = 0


class _Turns:
    """Deals numbers below `count` in random order, all of them before any again; one hand has no number twice."""

    def __init__(self, count: int, generator: torch.Generator) -> None:
        self.count, self.generator = count, generator
        self.left = torch.zeros(0, dtype=torch.long)

    def take(self, number: int) -> Int[Tensor, " n"]:
        """Returns the next so many; where there are fewer than that, some again."""
        hand = self.left[:number]
        self.left = self.left[number:]
        while len(hand) < number:
            fresh = torch.randperm(self.count, generator=self.generator)
            if self.count >= number:  # those of the hand come last, so that none is in it twice
                again = torch.isin(fresh, hand)
                fresh = torch.cat([fresh[~again], fresh[again]])
            missing = number - len(hand)
            hand, self.left = torch.cat([hand, fresh[:missing]]), fresh[missing:]
        return hand
