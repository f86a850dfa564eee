"""Crops and flips, image by image."""

import pytest
import torch

from vmcr2.errors import InputError
from vmcr2.lab.augmentation import Augmentation, augmented, plain


def positions():
    """Images whose pixels tell their own place."""
    return torch.arange(1, 50, dtype=torch.uint8).view(1, 1, 7, 7).expand(400, 1, 7, 7)


def test_each_image_gets_a_crop_and_a_mirroring_of_its_own():
    images = positions()
    given = Augmentation(crop=6, padding=1, flip=True)
    got = (augmented(images, given, torch.Generator().manual_seed(0)) * 255).round().to(torch.uint8)
    assert got.shape == (400, 1, 6, 6)
    padded = torch.nn.functional.pad(images[0, 0], (1, 1, 1, 1))
    possible = [padded[top : top + 6, left : left + 6] for top in range(4) for left in range(4)]
    possible += [window.flip(1) for window in possible]
    found = [next(i for i, window in enumerate(possible) if torch.equal(window, image[0])) for image in got]
    assert len(set(found)) == 32  # every window and its mirror image occurs
    again = augmented(images, given, torch.Generator().manual_seed(0))
    assert torch.equal(again, augmented(images, given, torch.Generator().manual_seed(0)))


def test_plain_takes_the_middle():
    images = positions()[:1]
    assert torch.equal(plain(images, Augmentation()), images.float() / 255)
    larger = plain(images, Augmentation(crop=9, padding=3))
    assert torch.equal(larger[:, :, 1:8, 1:8], images.float() / 255)
    assert (larger > 0).sum() == 49
    assert torch.equal(plain(images, Augmentation(crop=5)), images[:, :, 1:6, 1:6].float() / 255)
    with pytest.raises(InputError, match=r"augmentation.crop must be at most 9 \(the padded image\), got 12"):
        plain(images, Augmentation(crop=12, padding=1))
    embeddings = torch.ones(3, 5)
    assert plain(embeddings, Augmentation(crop=9)) is embeddings
