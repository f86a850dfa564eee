"""Differentiable gathering of a batch over ranks, so that many processes compute the loss of one."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def world_size() -> int:
    """Returns the number of processes, 1 where torch.distributed is not in use."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


class _Gather(torch.autograd.Function):
    """Rows of all ranks, in rank order: all-reduce forward and backward.

    Every rank computes the same loss of the gathered rows, so summing the gradients over ranks multiplies this
    rank's by the world size, which the mean over ranks that DistributedDataParallel takes undoes exactly.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, start: int, total: int) -> Tensor:
        ctx.start, ctx.size = start, rows.shape[0]
        gathered = rows.new_zeros(total, *rows.shape[1:])
        gathered[start : start + rows.shape[0]] = rows
        dist.all_reduce(gathered)
        return gathered

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        summed = grad_outputs[0].contiguous().clone()
        dist.all_reduce(summed)
        return summed[ctx.start : ctx.start + ctx.size], None, None


def gather_rows(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Returns each tensor's rows from all ranks, in rank order; the tensors as they are in a single process.

    The ranks may hold different numbers of rows. Floating tensors carry gradients back to the rank they came from.
    """
    if world_size() == 1:
        return tensors
    sizes = torch.zeros(world_size(), dtype=torch.long, device=tensors[0].device)
    sizes[dist.get_rank()] = tensors[0].shape[0]
    dist.all_reduce(sizes)
    start, total = int(sizes[: dist.get_rank()].sum()), int(sizes.sum())
    gathered = []
    for tensor in tensors:
        result = _Gather.apply(tensor, start, total)
        assert isinstance(result, Tensor)
        gathered.append(result)
    return tuple(gathered)
