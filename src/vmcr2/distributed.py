"""Differentiable gathering of a batch over ranks, so that many processes compute the loss of one."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from vmcr2.membership import Membership


def world_size(group: Any = None) -> int:
    """Returns the number of processes of a group (None: all), 1 where torch.distributed is not in use."""
    return dist.get_world_size(group) if dist.is_available() and dist.is_initialized() else 1


def process_rank(group: Any = None) -> int:
    """Returns this process's rank in a group (None: among all), 0 where torch.distributed is not in use."""
    return dist.get_rank(group) if dist.is_available() and dist.is_initialized() else 0


def sum_over_ranks(tensor: Tensor, group: Any = None) -> Tensor:
    """Returns the sum of a tensor over ranks."""
    total = tensor.clone()
    dist.all_reduce(total, group=group)
    return total


class _Gather(torch.autograd.Function):
    """Rows of all ranks, in rank order: all-reduce forward and backward.

    Every rank computes the same loss of the gathered rows, so summing the gradients over ranks multiplies this
    rank's by the world size, which the mean over ranks that DistributedDataParallel takes undoes exactly.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, start: int, total: int, group: Any) -> Tensor:
        ctx.start, ctx.size, ctx.group = start, rows.shape[0], group
        gathered = rows.new_zeros(total, *rows.shape[1:])
        gathered[start : start + rows.shape[0]] = rows
        dist.all_reduce(gathered, group=group)
        return gathered

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None, None]:
        summed = grad_outputs[0].contiguous().clone()
        dist.all_reduce(summed, group=ctx.group)
        return summed[ctx.start : ctx.start + ctx.size], None, None, None


def gather_rows(*tensors: Tensor, group: Any = None, flag: bool = False) -> tuple[tuple[Tensor, ...], bool]:
    """Returns each tensor's rows from all ranks, in rank order, and whether any rank has raised its flag.

    The ranks may hold different numbers of rows. Floating tensors carry gradients back to the rank they came from.
    """
    world = world_size(group)
    if world == 1:
        return tensors, flag
    rank = dist.get_rank(group)
    sizes = torch.zeros(world + 1, dtype=torch.long, device=tensors[0].device)
    sizes[rank], sizes[world] = tensors[0].shape[0], int(flag)
    *shares, flags = sum_over_ranks(sizes, group).tolist()
    start, total = sum(shares[:rank]), sum(shares)
    gathered = []
    for tensor in tensors:
        result = _Gather.apply(tensor, start, total, group)
        assert isinstance(result, Tensor)
        gathered.append(result)
    return tuple(gathered), bool(flags)


def gather_membership(features: Tensor, membership: Membership, group: Any = None) -> tuple[Tensor, Membership]:
    """Returns features and membership that have been checked, those of all ranks; where one has soft rows, all do."""
    # On the features' device, the only one that every backend is sure to take.
    kind = torch.tensor([int(membership.labels is None)], device=features.device)
    soft = sum_over_ranks(kind, group).item() > 0
    held = membership.rows() if soft else membership.rows_or_labels
    (features, held), _ = gather_rows(features, held, group=group)
    counts = sum_over_ranks(membership.counts, group)
    sizes = sum_over_ranks(membership.sizes.to(counts.device), group).cpu()
    return features, Membership(None if soft else held, held if soft else None, counts, sizes)


def broadcast(module: nn.Module, group: Any = None) -> None:
    """Gives every rank the state of the first: buffers, and what else `state_dict` holds."""
    source = 0 if group is None else dist.get_global_rank(group, 0)
    device = next(module.buffers()).device
    state = {name: value.to(device).clone() for name, value in module.state_dict().items()}
    for value in state.values():
        dist.broadcast(value, source, group=group)
    module.load_state_dict(state)
