"""Checks of arguments; each message names the argument, what is required and what was given."""

from __future__ import annotations

import difflib
import math
import numbers
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

import numpy as np
import torch
from torch import Tensor

from vmcr2.errors import InputError
from vmcr2.linalg import is_batched, wide_dtype

UNIT_NORM_TOLERANCE = 0.02  # bf16 normalisation is off by up to 2⁻⁸ in the norm and as much in each entry
# Not bool, complex or quantised. torch can neither take norms of narrower floats nor promote them.
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_INTEGERS = (
    *(torch.int8, torch.int16, torch.int32, torch.int64),
    *(torch.uint8, torch.uint16, torch.uint32, torch.uint64),
)


def check_number(name: str, value: float, *, positive: bool = True, at_most: float = math.inf) -> float:
    """Returns the value as a float to compute with: torch accepts neither fractions nor integers beyond 64 bits.

    Raises:
        InputError: it is not a finite number above 0 (at least 0 if `positive` is false), or is above `at_most`.
    """
    is_number = isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)
    try:
        number = float(value) if is_number else math.nan
    except OverflowError:  # an integer larger than any float
        number = math.inf
    if not math.isfinite(number) or number < 0 or (positive and number == 0) or number > at_most:
        limit = "" if at_most == math.inf else f" and at most {at_most:g}"
        raise InputError(f"{name} must be a finite number {'> 0' if positive else '>= 0'}{limit}, got {value!r}")
    return number


def check_count(name: str, value: int, *, at_least: int = 1, at_most: int | None = None, limit: str = "") -> int:
    """Returns the value as Python's own integer, since torch does not take NumPy's everywhere.

    Args:
        name: the argument's name, for messages.
        value: anything.
        at_least: the lower end.
        at_most: the upper end, or None.
        limit: what the upper end is, in words.

    Raises:
        InputError: it is not an integer in the range (a ValueError).
    """
    if not isinstance(value, numbers.Integral) or isinstance(value, bool) or value < at_least:
        raise InputError(f"{name} must be an integer >= {at_least}, got {value!r}")
    if at_most is not None and value > at_most:
        raise InputError(f"{name} must be at most {at_most}{f' ({limit})' if limit else ''}, got {value}")
    return int(value)


def check_flag(name: str, value: bool) -> None:
    """Raises InputError unless the value is True or False."""
    if not isinstance(value, bool | np.bool_):
        raise InputError(f"{name} must be True or False, got {value!r}")


def check_choice(name: str, value: str, choices: Sequence[str]) -> str:
    """Returns the value; raises InputError unless it is one of the choices."""
    if not isinstance(value, str) or value not in choices:
        raise InputError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")
    return value


def check_fields(settings: Any, prefix: str = "") -> None:
    """Checks a frozen dataclass's flags and choices by its field types, and turns NumPy scalars into Python's.

    Values from a loop over an array can then be written as JSON.

    Args:
        settings: the dataclass, from its `__post_init__`.
        prefix: what the user writes before a field's name.

    Raises:
        InputError: a flag is not True or False, or a choice is not one of those allowed.
    """
    for name, kind in get_type_hints(type(settings)).items():
        value = getattr(settings, name)
        if isinstance(value, np.generic):
            value = value.item()
            object.__setattr__(settings, name, value)
        if kind is bool:
            check_flag(f"{prefix}{name}", value)
        elif get_origin(kind) is Literal:
            check_choice(f"{prefix}{name}", value, get_args(kind))


def refuse_masked(name: str, value: Any) -> None:
    """Raises InputError for a NumPy array with masked entries, whose mask would be lost silently."""
    if isinstance(value, np.ma.MaskedArray) and (missing := int(np.ma.count_masked(value))):
        raise InputError(f"{name} must have no masked entries, got {missing}; leave those samples out, or fill them in")


def refuse_distributed(name: str, value: Any) -> None:
    """Raises InputError for a DTensor, which does not mix with other tensors."""
    if hasattr(value, "full_tensor"):  # recognised by its method: importing DTensor takes a second
        raise InputError(
            f"{name} must be a plain tensor, got a DTensor; pass the whole, {name}.full_tensor(), or, where a loss "
            f"gathers rows over ranks itself, this rank's, {name}.to_local()"
        )


def tensor_of(array: np.ndarray, name: str = "X") -> Tensor:
    """Returns an array as a tensor, for reading only: it shares the array's memory unless a stride is negative.

    Args:
        array: numbers, of any shape.
        name: the argument's name, for messages.

    Raises:
        InputError: its dtype does not exist in torch, or its byte order is not the machine's.
    """
    if any(stride < 0 for stride in array.strides):
        array = array.copy()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
            return torch.from_numpy(array)
    except (TypeError, ValueError) as error:  # ValueError for another byte order
        raise InputError(
            f"{name} must hold numbers of a dtype that torch supports, got {array.dtype} ({error})"
        ) from error


def did_you_mean(name: str, known: Iterable[str], prefix: str = "") -> str:
    """Returns "; did you mean …?" for an unknown name, or "" if no known one is close.

    Args:
        name: what was given.
        known: the valid names.
        prefix: what the user writes before either.
    """
    near = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {prefix}{near[0]}?" if near else ""


def iterator_of(name: str, value: Any, form: str) -> Iterator[Any]:
    """Returns an iterator over the value.

    Raises:
        InputError: it is not iterable; `form` says what is required.
    """
    try:
        return iter(value)
    except TypeError as error:
        raise InputError(f"{name} must be {form}, got {type(value).__name__} ({error})") from error


def pair_of(batch: Any, second: str = "membership") -> tuple[Tensor, Tensor]:
    """Returns a batch as (inputs, `second`), both of which can be moved to a device.

    Raises:
        InputError: it is not a pair (a dict of two would unpack into its keys), its parts are not tensors with values,
            or it is a single sample, as from a Dataset used in place of a DataLoader.
    """
    if isinstance(batch, tuple | list) and len(batch) == 2:
        if isinstance(batch[1], int) or getattr(batch[1], "ndim", 1) == 0:
            raise InputError(
                f"batches must give {second} of shape (m,) or (m, k), got those of one sample; wrap a Dataset in "
                "a DataLoader"
            )
        for name, value in zip(("inputs", second), batch, strict=True):
            meta = getattr(value, "is_meta", False)
            if meta or not hasattr(value, "to"):
                got = "on the meta device, which holds no values" if meta else f"of type {type(value).__name__}"
                if name == "inputs" and isinstance(value, dict | tuple | list):
                    got += "; several may come as one object with a method `to`, such as transformers' BatchEncoding"
                raise InputError(f"batches must give pairs (inputs, {second}) of tensors, got {name} {got}")
        return batch[0], batch[1]
    got, cure = f"a {type(batch).__name__}", ""
    if isinstance(batch, dict):
        got = f"a dict of {', '.join(map(repr, batch))}"
        cure = (
            "; turn dicts into pairs, in the DataLoader's collate_fn or as "
            "((batch['pixel_values'], batch['labels']) for batch in loader)"
        )
    elif isinstance(batch, tuple | list):
        got += f" of {len(batch)}"
        if len(batch) > 2:
            cure = "; take the two out, in the DataLoader's collate_fn or as ((batch[0], batch[1]) for batch in loader)"
    raise InputError(f"batches must give pairs (inputs, {second}), got {got}{cure}")


class Condition(NamedTuple):
    """Something that must hold for a tensor's values.

    Attributes:
        wrong: 0-d bool tensor, true if it does not hold.
        requirement: what is required, and of which argument.
        got: returns what was found instead.
    """

    wrong: Tensor
    requirement: str
    got: Callable[[], str]


def read_conditions(conditions: Sequence[Condition], values: Tensor | None = None) -> Tensor | None:
    """Reads conditions, and values along with them, from the device in one transfer.

    What `torch.vmap` has batched cannot be read: such conditions count as holding.

    Args:
        conditions: what must hold.
        values: a vector of counts (below 2⁵³) to read as well, or None.

    Returns:
        The values on the CPU, float64.

    Raises:
        InputError: a condition does not hold, or belongs to a tensor on the meta device; names the first such one.
    """
    if values is not None and is_batched(values):
        values = None
    readable = [condition for condition in conditions if not is_batched(condition.wrong)]
    for condition in readable:
        if condition.wrong.is_meta:
            raise InputError(f"{condition.requirement}, got a tensor on the meta device, which holds no values")
    parts = [condition.wrong.detach().double()[None] for condition in readable]
    if values is not None:
        parts.append(values.detach().double())
    if not parts:
        return None
    on_host = torch.cat(parts).cpu()
    for wrong, condition in zip(on_host[: len(readable)].tolist(), readable, strict=True):
        if wrong:
            raise InputError(f"{condition.requirement}, got {condition.got()}")
    return None if values is None else on_host[len(readable) :]


def check_tensor(name: str, value: Any, form: str, *, integers: bool = False) -> None:
    """Raises InputError unless the value is a dense tensor of floats that torch can compute with.

    Args:
        name: the argument's name, for messages.
        value: anything.
        form: the required shape in words.
        integers: whether integers are accepted as well.
    """
    if not isinstance(value, Tensor):
        raise InputError(f"{name} must be a torch.Tensor {form}, got {type(value).__name__}")
    refuse_distributed(name, value)
    if value.layout != torch.strided or value.is_nested:
        got = "a nested one" if value.is_nested else f"layout {value.layout}"
        raise InputError(f"{name} must be a dense torch.Tensor {form}, got {got}")
    if integers and value.dtype not in _FLOATS + _INTEGERS:
        raise InputError(f"{name} must hold integer labels or real rows, got {value.dtype}")
    if not integers and value.dtype not in _FLOATS:
        raise InputError(f"{name} must be floating point (16, 32 or 64 bits) {form}, got {value.dtype}")


def feature_conditions(features: Tensor, *, feature_dim: int | None = None, unit: bool = False) -> list[Condition]:
    """Checks the type and shape of features now, and returns the conditions on their values, which are read later.

    Args:
        features: (m, d), floating point.
        feature_dim: the required d, or None.
        unit: whether rows must have norm 1 (within 2 %, so that bf16 features pass).

    Raises:
        InputError: features are not a dense floating-point matrix, or do not have `feature_dim` columns.
    """
    check_tensor("features", features, "of shape (m, d)")
    if features.ndim != 2 or 0 in features.shape:
        raise InputError(f"features must have shape (m, d) with m, d >= 1, got {tuple(features.shape)}")
    if feature_dim is not None and features.shape[1] != feature_dim:
        raise InputError(f"features must have feature_dim = {feature_dim} columns, got shape {tuple(features.shape)}")
    detached = features.detach()
    norms = torch.linalg.vector_norm(detached, dim=1, dtype=wide_dtype(detached))
    conditions = [
        Condition(
            ~(norms if unit else detached).isfinite().all(),
            "features must be finite",
            lambda: (
                f"{int((~detached.isfinite()).sum())} NaN or infinite entries"
                + (f" and norms up to {float(norms.max()):.3g}" if unit else "")
            ),
        )
    ]
    if unit:
        conditions.append(
            Condition(
                (norms - 1).abs().max() > UNIT_NORM_TOLERANCE,
                "features must have rows of norm 1 (the objective is unbounded otherwise)",
                lambda: (
                    f"norms from {float(norms.min()):.3g} to {float(norms.max()):.3g}; "
                    + (
                        f"{int((norms == 0).sum())} rows are zeros, which normalising leaves as they are (does a ReLU "
                        "or dropout come last?)"
                        if bool((norms == 0).any())
                        else "end the network with torch.nn.functional.normalize(z, dim=1)"
                    )
                ),
            )
        )
    return conditions
