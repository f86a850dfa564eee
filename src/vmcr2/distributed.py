"""Many processes, one loss: what ranks must agree on, the batch gathered over them, a dictionary sharded by class.

A call of a loss begins with one all-gather of a few integers, in which every rank says what it brings. So all ranks
know what is wrong on one of them, or differs between them, before anything else is sent. Then the rows are gathered,
and every rank computes the loss of the whole batch, or, if the dictionary is sharded, its classes' part.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from torch import Tensor, nn

from vmcr2.errors import InputError

_T = TypeVar("_T")

# What ranks can differ in that is not a number; sent as an index into this.
_WORDS = (
    *("a training step", "an evaluation", "rates", "latch", "latch_from", "nearest_class", "full_state_dict"),
    *("MCR2Loss", "TotalCodingRateLoss", "labels", "soft rows"),
    *("with gradient", "with gradient in the membership alone", "with gradient in both", "without gradient"),
    *map(str, (torch.float16, torch.bfloat16, torch.float32, torch.float64)),
)
_WIDTH = 16  # integers in a message: whether something failed, the call, then the facts and numbers


def world_size(group: Any = None) -> int:
    """Returns the number of processes in a group (None: all), or 1 if torch.distributed is not in use."""
    return dist.get_world_size(group) if dist.is_available() and dist.is_initialized() else 1


def process_rank(group: Any = None) -> int:
    """Returns this process's rank in a group (None: among all), or 0 if torch.distributed is not in use."""
    return dist.get_rank(group) if dist.is_available() and dist.is_initialized() else 0


def check_group(group: Any) -> None:
    """Raises InputError unless this is None or a torch.distributed group that this process belongs to."""
    if group is None:
        return
    member = dist.is_available() and isinstance(group, dist.ProcessGroup)
    # To a rank that it leaves out, `new_group` returns a number.
    outside = dist.is_available() and isinstance(group, int) and group == dist.GroupMember.NON_GROUP_MEMBER
    if not member and not outside:
        raise InputError(f"process_group must be a torch.distributed.ProcessGroup or None, got {group!r}")
    if outside or world_size(group) < 1:
        raise InputError("process_group must include this process, got a group of others")


def sum_over_ranks(tensor: Tensor, group: Any = None) -> Tensor:
    """Returns the sum of a tensor over ranks."""
    total = tensor.clone()
    if world_size(group) > 1:
        dist.all_reduce(total, group=group)
    return total


def agree(
    prepare: Callable[[], tuple[_T, Sequence[int]]],
    facts: Callable[[_T], Mapping[str, int | str]],
    call: str,
    group: Any = None,
) -> tuple[_T, list[list[int]]]:
    """Prepares this rank's part of a call, and raises on every rank if that failed on any, or if the ranks disagree.

    This costs one all-gather of 16 integers. They are read on the host, which waits for the device unless the group has
    a CPU backend, as gloo and "cpu:gloo,cuda:nccl" have.

    Args:
        prepare: checks what this rank brings; returns its result, and numbers in which ranks may differ.
        facts: returns, by name, what must be the same on all ranks, given that result: integers ≥ 0, or words from
            `_WORDS`.
        call: which call it is, from `_WORDS`.
        group: the ranks; None for all.

    Returns:
        What `prepare` made, and the numbers of every rank.

    Raises:
        InputError: on every rank except the one at fault, which raises its own error; or, if ranks disagree, on all,
            naming who had what (a ValueError).
    """
    if world_size(group) == 1:
        result, numbers = prepare()
        return result, [list(numbers)]
    error, made, alike, numbers = None, [], {}, []
    try:
        result, numbers = prepare()
        alike = facts(result)
        made.append(result)
    except Exception as raised:  # any error: the others must not be left waiting
        error = raised
    message = [int(error is not None), _WORDS.index(call)]
    message += [_encoded(value) for value in alike.values()] + list(numbers)
    if len(message) > _WIDTH:
        raise AssertionError("a message takes 16 integers")
    heard = _exchanged(message + [0] * (_WIDTH - len(message)), group)
    if error is not None:
        raise error
    faulty = [rank for rank, said in enumerate(heard) if said[0]]
    if faulty:
        raise InputError(f"the call failed on {_named(faulty, group)}, see the error there; no rank continues")
    require_equal("the call", [_WORDS[said[1]] for said in heard], group)
    for place, name in enumerate(alike, start=2):
        require_equal(name, [_decoded(said[place]) for said in heard], group)
    start = 2 + len(alike)
    return made[0], [said[start : start + len(numbers)] for said in heard]


def require_equal(name: str, values: Sequence[int | str], group: Any = None) -> None:
    """Raises InputError, naming which rank has what, unless all ranks of a group have the same value."""
    if len(set(values)) == 1:
        return
    claims = [
        f"{value} on {_named([rank for rank, its in enumerate(values) if its == value], group)}"
        for value in dict.fromkeys(values)
    ]
    raise InputError(f"ranks disagree on {name}: {'; '.join(claims)}. This must be the same on every rank")


def _exchanged(message: list[int], group: Any) -> list[list[int]]:
    sent = torch.tensor(message, device=_message_device(group))
    table = sent.new_empty(world_size(group), len(message))
    dist.all_gather(list(table), sent, group=group)
    return table.tolist()


def _message_device(group: Any) -> torch.device:
    backends = dict(part.split(":") for part in dist.get_backend_config(group).split(","))
    if "cpu" in backends:
        return torch.device("cpu")
    kind = next(iter(backends))
    return torch.device(kind, torch.accelerator.current_device_index())


def _encoded(value: int | str) -> int:
    return -1 - _WORDS.index(value) if isinstance(value, str) else value


def _decoded(value: int) -> int | str:
    return value if value >= 0 else _WORDS[-1 - value]


def _named(ranks: Sequence[int], group: Any) -> str:
    """Returns the names of a group's ranks, numbered among all processes."""
    numbers = [str(rank if group is None else dist.get_global_rank(group, rank)) for rank in ranks]
    return f"rank {numbers[0]}" if len(numbers) == 1 else f"ranks {', '.join(numbers)}"


class _Gather(torch.autograd.Function):
    """Rows of all ranks, in rank order: all-gather forward, reduce-scatter backward.

    Gradients are those of the sum over ranks of what each rank returns. Every rank returns the same loss of the
    gathered rows, so a rank's gradient is the world size times a single process's, which DistributedDataParallel's
    mean over ranks undoes exactly.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, shares: list[int], group: Any) -> Tensor:
        ctx.shares, ctx.group = shares, group
        largest = max(shares)
        gathered = rows.new_empty(len(shares), largest, *rows.shape[1:])
        dist.all_gather(list(gathered), _padded(rows, largest), group=group)
        if min(shares) == largest:
            return gathered.flatten(0, 1)
        return torch.cat([part[:share] for part, share in zip(gathered, shares, strict=True)])

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        gradient = _Scatter.apply(grad_outputs[0], ctx.shares, ctx.group)
        assert isinstance(gradient, Tensor)
        return gradient, None, None


class _Scatter(torch.autograd.Function):
    """Each rank's own rows of the sum over ranks: reduce-scatter forward, all-gather backward (second derivatives)."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, shares: list[int], group: Any) -> Tensor:
        ctx.shares, ctx.group = shares, group
        largest, own = max(shares), shares[dist.get_rank(group)]
        parts = [_padded(part, largest) for part in rows.split(shares)]
        total = torch.empty_like(parts[0])
        dist.reduce_scatter(total, parts, group=group)
        return total[:own]

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        (gathered,) = gather_rows(grad_outputs[0], shares=ctx.shares, group=ctx.group)
        return gathered, None, None


def _padded(rows: Tensor, size: int) -> Tensor:
    """Pads with rows of zeros to `size` rows: collectives need shares of one size."""
    if len(rows) == size:
        return rows.contiguous()
    return torch.cat([rows, rows.new_zeros(size - len(rows), *rows.shape[1:])])


def gather_rows(*tensors: Tensor, shares: list[int], group: Any = None) -> tuple[Tensor, ...]:
    """Returns each tensor's rows from all ranks, in rank order; `shares` says how many each rank holds.

    Floating-point tensors carry gradients back to the rank they came from.
    """
    if len(shares) == 1:
        return tensors
    gathered = []
    for tensor in tensors:
        result = _Gather.apply(tensor, shares, group)
        assert isinstance(result, Tensor)
        gathered.append(result)
    return tuple(gathered)


def broadcast(module: nn.Module, group: Any = None) -> None:
    """Gives every rank the first one's state: buffers, and whatever else `state_dict` holds."""
    source = 0 if group is None else dist.get_global_rank(group, 0)
    device = next(module.buffers()).device
    state = {name: value.to(device).clone() for name, value in module.state_dict().items()}
    for value in state.values():
        dist.broadcast(value, source, group=group)
    module.load_state_dict(state)


class _Total(torch.autograd.Function):
    """The sum over ranks, forward and backward; `_Gather` says what the gradients are of."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return sum_over_ranks(part, group)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        return total_over_ranks(grad_outputs[0].contiguous(), ctx.group), None


def total_over_ranks(part: Tensor, group: Any = None) -> Tensor:
    """Returns the sum over ranks of a tensor. Differentiable: its gradient is the sum of all ranks' gradients."""
    if world_size(group) == 1:
        return part
    result = _Total.apply(part, group)
    assert isinstance(result, Tensor)
    return result


@dataclass(frozen=True)
class Shards:
    """Which classes each rank of a group holds: the ranges of `torch.chunk`, as in DTensor's `Shard(0)`.

    Attributes:
        num_classes: k, over all ranks.
        group: the ranks; None for all.
    """

    num_classes: int
    group: Any = None

    @property
    def classes_per_rank(self) -> int:
        """How many classes a rank holds, except the last ranks, which may hold fewer or none."""
        return -(-self.num_classes // world_size(self.group))

    def range_of(self, rank: int) -> range:
        """Returns the classes that a rank holds."""
        return range(
            min(self.num_classes, rank * self.classes_per_rank),
            min(self.num_classes, (rank + 1) * self.classes_per_rank),
        )

    @property
    def own(self) -> range:
        """The classes that this rank holds."""
        return self.range_of(process_rank(self.group))

    def total(self, part: Tensor) -> Tensor:
        """Returns the sum over ranks of each rank's part, from its own classes. Differentiable."""
        return total_over_ranks(part, self.group)

    def gathered(self, own: Tensor) -> Tensor:
        """Returns a copy of the values of all classes, (k, ...), from each rank's own."""
        if world_size(self.group) == 1:
            return own.clone()
        shares = [len(self.range_of(rank)) for rank in range(world_size(self.group))]
        return gather_rows(own, shares=shares, group=self.group)[0]

    def best_class(self, scores: Float[Tensor, " m"], classes: Int[Tensor, " m"]) -> Int[Tensor, " m"]:
        """Returns each sample's class of highest score over all ranks' candidates; of equal scores, the first class."""
        if world_size(self.group) == 1:
            return classes
        highest = scores.clone()
        dist.all_reduce(highest, dist.ReduceOp.MAX, group=self.group)
        first = torch.where(scores == highest, classes, self.num_classes)
        dist.all_reduce(first, dist.ReduceOp.MIN, group=self.group)
        return first

    def distributed_tensor(self, own: Tensor) -> Tensor:
        """Returns this rank's values by class, (k_own, ...), as its part of a DTensor `Shard(0)`; makes no copy.

        Without torch.distributed, returns the tensor itself, which `torch.distributed.checkpoint` treats the same way.
        """
        if not (dist.is_available() and dist.is_initialized()):
            return own
        from torch.distributed.device_mesh import DeviceMesh
        from torch.distributed.tensor import DTensor, Shard

        group = dist.group.WORLD if self.group is None else self.group
        assert group is not None
        mesh = DeviceMesh.from_group(group, own.device.type)
        shape = torch.Size((self.num_classes, *own.shape[1:]))
        stride = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(own, mesh, [Shard(0)], run_check=False, shape=shape, stride=stride)


def part_of_another_rank(value: Tensor) -> str:
    """Returns which part of the whole a DTensor that another process saved holds, or "" for any other tensor.

    torch.save writes a DTensor as one rank's rows, and they stay that rank's wherever they are loaded.
    """
    mesh = getattr(value, "device_mesh", None)
    if mesh is None or mesh.size() == 1:  # a single process has the whole
        return ""
    place = mesh.get_coordinate()
    saver = None if place is None else int(mesh.mesh[tuple(place)])
    if dist.is_available() and dist.is_initialized() and saver == dist.get_rank():
        try:
            if world_size(mesh.get_group()) == mesh.size():
                return ""
        except RuntimeError:  # the group that saved it does not exist here
            pass
    return f"the part of rank {saver} among {mesh.size()} processes"


def full_tensor(value: Tensor) -> Tensor:
    """Returns the whole of a DTensor (a collective of its ranks), or any other tensor as it is."""
    # Recognised by its method: importing DTensor takes a second, which only those who have one should pay.
    if not hasattr(value, "full_tensor"):
        return value
    if value.device_mesh.size() == 1:  # pyrefly: ignore[missing-attribute]
        return value.to_local()  # pyrefly: ignore[missing-attribute]
    return value.full_tensor()  # pyrefly: ignore[missing-attribute]
