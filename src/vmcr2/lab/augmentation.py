"""Random crops and flips of whole batches on the device that holds them, drawn for each image separately."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from jaxtyping import Float, Shaped, UInt8
from torch import Tensor
from torch.nn import functional

from vmcr2.checks import check_count, check_fields


@dataclass(frozen=True)
class Augmentation:
    """Random crops and flips, drawn anew for each image of a batch.

    Attributes:
        crop: side of the square cut out; None keeps the image's size. One below the image's size warns.
        padding: zeros added around the image first, so shifts go up to padding + (size − crop)/2 pixels.
        flip: mirror half of the images.
    """

    crop: int | None = None
    padding: int = 0
    flip: bool = False

    def __post_init__(self) -> None:
        check_fields(self, "augmentation.")
        if self.crop is not None:
            check_count("augmentation.crop", self.crop)
        check_count("augmentation.padding", self.padding, at_least=0)


def augmented(
    inputs: Shaped[Tensor, "b ..."],
    settings: Augmentation,
    generator: torch.Generator,
    share: slice = slice(None),
) -> Float[Tensor, "n ..."]:
    """Returns a batch as floats, each image cropped and mirrored independently; embeddings are returned as they are.

    Args:
        inputs: uint8 images (b, c, h, w), or float embeddings (b, d).
        settings: the augmentation.
        generator: the source of randomness, on the inputs' device.
        share: the n samples of the batch to return. They come out as they would in the whole batch, and the generator
            advances as for all of it.
    """
    b = len(inputs)
    inputs = inputs[share]
    if inputs.ndim == 2:
        return inputs
    n, c = inputs.shape[:2]
    height, width = _crop_size(inputs, settings)
    padded = functional.pad(inputs, (settings.padding,) * 4)
    device = inputs.device

    def starts(room: int) -> Tensor:
        return torch.randint(room + 1, (b, 1), generator=generator, device=device)[share]

    rows = starts(padded.shape[2] - height) + torch.arange(height, device=device)
    columns = starts(padded.shape[3] - width) + torch.arange(width, device=device)
    if settings.flip:
        mirrored = torch.rand(b, 1, generator=generator, device=device)[share] < 0.5
        columns = torch.where(mirrored, columns.flip(1), columns)
    samples = torch.arange(n, device=device)[:, None, None, None]
    channels = torch.arange(c, device=device)[None, :, None, None]
    return _to_float(padded[samples, channels, rows[:, None, :, None], columns[:, None, None, :]])


def plain(inputs: Shaped[Tensor, "b ..."], settings: Augmentation) -> Float[Tensor, "b ..."]:
    """Returns a batch as floats without augmentation: the middle of the padded image, at the crop's size."""
    if inputs.ndim == 2:
        return inputs
    height, width = _crop_size(inputs, settings)
    top, left = inputs.shape[2] - height, inputs.shape[3] - width
    # Negative padding cuts, positive padding adds zeros: either way the image stays in the middle.
    return _to_float(functional.pad(inputs, (-(left // 2), -(left - left // 2), -(top // 2), -(top - top // 2))))


def _crop_size(inputs: UInt8[Tensor, "b c h w"], settings: Augmentation) -> tuple[int, int]:
    height, width = inputs.shape[2:]
    if settings.crop is None:
        return height, width
    limit = min(height, width) + 2 * settings.padding
    check_count("augmentation.crop", settings.crop, at_most=limit, limit="the padded image")
    return settings.crop, settings.crop


def warn_of_lost_borders(image_size: tuple[int, int], settings: Augmentation) -> None:
    """Warns if a crop is smaller than the images, whose borders the network then never sees in evaluation."""
    if settings.crop is not None and settings.crop < min(image_size):
        height, width = image_size
        warnings.warn(
            f"augmentation.crop {settings.crop} is smaller than the images of {height}×{width} pixels: evaluation "
            "sees only their middle",
            stacklevel=2,
        )


def _to_float(images: UInt8[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
    """Returns images from 0 to 1, in the default dtype of torch, as networks have it."""
    return images.to(torch.get_default_dtype()).div_(255)
