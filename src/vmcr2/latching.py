"""Latching (Algorithm 2): every class's top singular vectors and values, from all its samples, streamed.

`latched_blocks` is the mathematics; `MomentStream` gathers what it needs from batches, in memory bounded by k d²
however many samples there are; `batch_statistics` decides in which mode the network computes the features to latch.
"""

from __future__ import annotations

import functools
import sys
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.nn.parameter import is_lazy

from vmcr2.distributed import gather_rows, sum_over_ranks
from vmcr2.errors import InputError, NumericalError
from vmcr2.membership import Membership, as_rows, moments, shared_in, weighted_rows

_EIGH_ELEMENTS = 2**24  # entries of the d×d matrices decomposed at once
_FOLDED = 8192  # rows folded into the moments at once: many cost memory, few cost time
_COPIES = 8  # copies of the rows being decomposed, counting those the decomposition itself makes


def latched_blocks(
    features: Float[Tensor, "m d"], membership: Membership, atoms_per_class: int
) -> tuple[Float[Tensor, "k d s"], Float[Tensor, "k s"]]:
    """Returns every class's top s eigenvectors and eigenvalues of C_j, largest first (Alg. 2).

    A class of rank below s gets orthonormal directions with eigenvalue 0 for the rest; an absent class gets zeros.

    Args:
        features: Z, (m, d), finite.
        membership: Π.
        atoms_per_class: s, at most d.

    Raises:
        NumericalError: the decomposition did not converge.
    """
    d, s = features.shape[1], atoms_per_class
    blocks = features.new_zeros(membership.num_classes, d, s)
    energies = features.new_zeros(membership.num_classes, s)
    for group in membership.groups(_COPIES * d):
        rows = group.take(features)
        n = rows.shape[1]
        for part in group.split(d):
            if n < d:
                # Rows of zeros let the SVD complete a class of fewer than s samples to s orthonormal directions.
                padded = nn.functional.pad(weighted_rows(rows, part.shares), (0, 0, 0, max(0, s - n))).flatten(0, 1)
                _, values, vectors = _decomposed(torch.linalg.svd, padded, full_matrices=False)
                top = vectors[:, :s].mT, _above(values, torch.finfo(values.dtype).eps * d)[:, :s].square()
            else:
                top = _top_eigen(moments(rows, part.shares).flatten(0, 1), s)
            classes = part.classes.flatten()
            blocks[classes], energies[classes] = top
    return blocks, energies


def _top_eigen(moments: Float[Tensor, "b d d"], s: int) -> tuple[Float[Tensor, "b d s"], Float[Tensor, "b s"]]:
    values, vectors = _decomposed(torch.linalg.eigh, moments)
    values = _above(values, torch.finfo(values.dtype).eps * moments.shape[-1] ** 0.5)
    return vectors[..., -s:].flip(-1), values[..., -s:].flip(-1)


def _above(values: Tensor, rounding: float) -> Tensor:
    """Returns values, 0 for those within rounding (relative to the largest): codes beyond a class's rank must be 0."""
    return torch.where(values <= rounding * values.amax(-1, keepdim=True), 0, values)  # NaN stays


def _decomposed(decompose: Callable[..., Any], matrices: Tensor, **options: Any) -> Any:
    try:
        return decompose(matrices, **options)
    except torch.linalg.LinAlgError as error:
        raise NumericalError(f"latching failed: the classes' singular vectors could not be found ({error})") from error


class MomentStream:
    """Gathers features batch by batch until latching, in at most about k d² numbers.

    Rows, and their memberships, are kept as they are while they are smaller than the moments. Beyond that they are
    folded into the second moments C_j and dropped.

    Args:
        num_classes: k.
        feature_dim: d.
        dtype: of the features to be added.
        device: likewise.
    """

    def __init__(self, num_classes: int, feature_dim: int, dtype: torch.dtype, device: torch.device) -> None:
        self.num_classes = num_classes
        self.feature_dim = feature_dim
        self.empty = torch.zeros(0, feature_dim, dtype=dtype, device=device)
        self.features: list[Tensor] = []
        self.memberships: list[Tensor] = []  # each batch's labels or soft rows
        self.kept = 0
        # Class sizes of the kept rows.
        self.sizes = torch.zeros(num_classes, dtype=torch.long, device="cpu")
        self.sums: Tensor | None = None
        self.counts = torch.zeros(num_classes, dtype=dtype, device=device)

    def add(self, features: Float[Tensor, "m d"], membership: Membership) -> None:
        """Adds a batch."""
        self._keep(features, membership.rows_or_labels, membership.sizes)
        self.counts += membership.counts
        soft = any(each.ndim == 2 for each in self.memberships)
        if self._exceed_moments(self.kept, soft) or (self.sums is not None and self.kept > _FOLDED):
            self._fold()

    def _exceed_moments(self, rows: int, soft: bool) -> bool:
        """Whether that many rows take more than k d² numbers, with their soft memberships if they have any."""
        k, d = self.num_classes, self.feature_dim
        return rows * (d + k if soft else d) > k * d * d

    def _keep(self, features: Tensor, rows_or_labels: Tensor, sizes: Tensor) -> None:
        self.features.append(features)
        self.memberships.append(rows_or_labels)
        self.kept += len(features)
        self.sizes += sizes

    def brings(self) -> list[int]:
        """Returns what every rank must tell the others before `meet`: whether rows have been folded, whether any are
        soft, and how many are kept.
        """
        return [int(self.sums is not None), int(any(each.ndim == 2 for each in self.memberships)), self.kept]

    def meet(self, brought: list[list[int]], group: Any = None) -> None:
        """Merges what all ranks of a group have added, any number of batches each, given every rank's `brings`.

        All ranks end with the same contents.
        """
        folded, soft, kept = zip(*brought, strict=True)
        if any(folded) or self._exceed_moments(sum(kept), any(soft)):
            self._fold()
            assert self.sums is not None
            self.sums = sum_over_ranks(self.sums, group)
        else:
            rows, rows_or_labels = gather_rows(*self._rows(any(soft)), shares=list(kept), group=group)
            sizes = sum_over_ranks(self.sizes.to(rows.device), group).cpu()
            self._forget()
            self._keep(rows, rows_or_labels, sizes)
        self.counts = sum_over_ranks(self.counts, group)

    def _rows(self, soft: bool) -> tuple[Tensor, Tensor]:
        """Returns the kept rows, and their labels or soft rows."""
        features = torch.cat([self.empty, *self.features])
        self.features = [features]  # so as not to hold them twice
        if not soft:
            return features, torch.cat([torch.zeros(0, dtype=torch.long, device=features.device), *self.memberships])
        rows = [as_rows(each, self.num_classes, features.dtype) for each in self.memberships]
        return features, torch.cat([self.empty.new_zeros(0, self.num_classes), *rows])

    def _gathered(self) -> tuple[Tensor, Membership]:
        soft = any(each.ndim == 2 for each in self.memberships)
        features, rows_or_labels = self._rows(soft)
        if not soft:
            return features, Membership(rows_or_labels, None, self.counts, self.sizes)
        # A class may have been absent from one batch, except for negligible entries, and present in the next.
        return features, Membership(
            None, rows_or_labels, self.counts, shared_in(rows_or_labels, self.counts).sum(0).cpu()
        )

    def _forget(self) -> None:
        self.features, self.memberships, self.kept, self.sizes = [], [], 0, torch.zeros_like(self.sizes)

    def _fold(self) -> None:
        if self.sums is None:
            self.sums = self.empty.new_zeros(self.num_classes, self.feature_dim, self.feature_dim)
        features, membership = self._gathered()
        for group in membership.groups(self.feature_dim) if self.kept else []:
            rows = group.take(features)
            for part in group.split(self.feature_dim):
                self.sums.index_add_(0, part.classes.flatten(), moments(rows, part.weights).flatten(0, 1))
        self._forget()

    def blocks(self, atoms_per_class: int) -> tuple[Float[Tensor, "k d s"], Float[Tensor, "k s"]]:
        """Returns each class's top eigenvectors and eigenvalues, as `latched_blocks`."""
        if self.sums is None:
            features, membership = self._gathered()
            return latched_blocks(features, membership, atoms_per_class)
        self._fold()
        at_once = max(1, _EIGH_ELEMENTS // self.feature_dim**2)
        scale = self.counts.clamp_min(torch.finfo(self.counts.dtype).tiny)
        parts = [
            _top_eigen(sums / n[:, None, None], atoms_per_class)
            for sums, n in zip(self.sums.split(at_once), scale.split(at_once), strict=True)
        ]
        return torch.cat([vectors for vectors, _ in parts]), torch.cat([values for _, values in parts])


@contextmanager
def batch_statistics(model: Callable[[Tensor], Tensor]) -> Iterator[Callable[[Tensor], Tensor]]:
    """Yields the model running on each batch's own statistics and without noise; everything is restored afterwards.

    Normalisation layers that would use batch statistics in training use them here and leave their running ones alone; a
    frozen one (in eval mode while another part of the model is in training mode) stays frozen. Everything else, such as
    dropout, is in eval mode. If `model` is a Module or a method of one, its submodules are known. Those that any other
    function calls, in this thread or in threads that it starts, are found by running the first batch once in eval mode;
    that batch then runs again for its features. The same is done if a lazy module has yet to infer its shapes.

    Args:
        model: a Module, or any function that calls Modules, however they are wrapped.
    """
    modes: dict[nn.Module, bool] = {}
    lent: list[tuple[dict[str, Any], dict[str, Any]]] = []
    settled, elsewhere = False, False
    others = {thread.ident for thread in threading.enumerate()} - {threading.get_ident()}

    def lend(attributes: dict[str, Any], **values: Any) -> None:
        lent.append((attributes, {name: attributes[name] for name in values}))
        attributes.update(values)

    def settle(module: nn.Module) -> None:
        if isinstance(module, _NormBase) and (modes[module] or not any(modes.values())):
            # Without running statistics a layer uses only the batch's, in any mode, and has none to change.
            lend(module._buffers, running_mean=None, running_var=None)
            lend(module.__dict__, track_running_stats=False)

    def enter(module: nn.Module, _: Any = None) -> None:
        nonlocal elsewhere
        if threading.get_ident() in others:  # the hook sees every thread's modules, and these may be training
            elsewhere = True
            return
        new = [inner for inner in module.modules() if inner not in modes]
        modes.update({inner: inner.training for inner in new})  # read all first: a compiled module passes its mode on
        for inner in new:
            inner.training = False
            if isinstance(inner, nn.parallel.DistributedDataParallel):
                # Its forward would synchronise ranks that may have unequal numbers of batches.
                lend(inner.__dict__, require_forward_param_sync=False)
            if settled:
                settle(inner)

    def run(inputs: Tensor) -> Tensor:
        nonlocal settled
        with nullcontext() if handle is None else _untraced():
            if not settled:
                if handle is not None or any(_is_unfinished(module) for module in modes):
                    model(inputs)
                if elsewhere and not modes:
                    warnings.warn(
                        "no module ran in this thread, but some did in threads that were there before: if the model "
                        "runs in such threads, pass the Module itself, otherwise it keeps its modes and statistics",
                        stacklevel=2,
                    )
                settled = True
                for module in list(modes):
                    settle(module)
            return _called(model, inputs)

    known, all_known = _modules_of(model)
    handle = None if all_known else register_module_forward_pre_hook(enter)
    try:
        for module in known:
            enter(module)
        yield run
    finally:
        if handle is not None:
            handle.remove()
        for attributes, values in reversed(lent):
            attributes.update(values)
        _reshard(modes)
        for module, mode in reversed(modes.items()):  # a compiled module, found last, passes its mode on
            module.training = mode


def _reshard(modules: Iterable[nn.Module]) -> None:
    """Parts the weights that FSDP keeps gathered in its outermost module until a backward pass, which never comes.

    An optimizer made next would train the gathered copies.
    """
    for module in modules:
        if hasattr(module, "set_requires_gradient_sync") and hasattr(module, "reshard"):
            module.reshard()  # pyrefly: ignore[not-callable]


def _is_unfinished(module: nn.Module) -> bool:
    """Whether a module infers its shapes from its first inputs and has not seen any yet."""
    return any(map(is_lazy, (*module.parameters(recurse=False), *module.buffers(recurse=False))))


@contextmanager
def _untraced() -> Iterator[None]:
    """Runs compiled modules uncompiled: a hook on all modules would be traced with them."""
    if "torch._dynamo" not in sys.modules:  # nothing has been compiled, and its import takes seconds
        yield
        return
    with torch.compiler.set_stance("force_eager"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Using `torch.compile")  # the hook then runs twice, harmlessly
        yield


def _called(model: Callable[[Tensor], Tensor], inputs: Tensor) -> Tensor:
    try:
        return model(inputs)
    except ValueError as error:
        if len(inputs) != 1 or "more than 1 value per channel" not in str(error):
            raise
        raise InputError(
            "batches must have at least 2 samples each, as latching shows the network batch statistics like "
            "training, got one of 1 sample; give the loader drop_last=True"
        ) from error


def _modules_of(function: Any) -> tuple[list[nn.Module], bool]:
    """Returns the modules that a function is, belongs to or is given, and whether to assume that it calls no others."""
    given: list[nn.Module] = []
    while isinstance(function, functools.partial):
        given += [each for each in (*function.args, *function.keywords.values()) if isinstance(each, nn.Module)]
        function = function.func
    owner = getattr(function, "__self__", function)
    if isinstance(owner, nn.Module):
        return [owner, *given], True
    return given, False
