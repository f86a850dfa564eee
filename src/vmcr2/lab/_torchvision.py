"""Imports torchvision alongside a torch it was not built for.

torchvision's PyPI wheels are CUDA builds. With a CPU-only torch their compiled operators do not load, and the import
fails while registering fake kernels for `torchvision::nms` and `qnms`, which this package never calls. Declaring the
two schemas first lets everything that is plain Python import. If torchvision imports normally, nothing is done.
"""

from __future__ import annotations

import sys
from types import ModuleType

import torch

_declared: list[torch.library.Library] = []


def import_torchvision() -> ModuleType:
    """Returns the torchvision package."""
    try:
        import torchvision
    except RuntimeError as error:
        if "torchvision::nms does not exist" not in str(error):
            raise
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        library = torch.library.Library("torchvision", "FRAGMENT")
        library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _declared.append(library)  # the definitions last as long as the library object
        import torchvision
    return torchvision
