"""Efficient Maximal Coding Rate Reduction by Variational Forms (V-MCR², CVPR 2022).

In a training loop, with a model that returns rows of norm 1:

    loss = vmcr2.VMCR2Loss(num_classes=100, feature_dim=200)
    loss.latch_from(model, batches)              # and again from time to time
    loss(model(inputs), labels).backward()       # like any criterion
"""

from __future__ import annotations

import importlib
import os
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

# OpenMP threads spin while they wait for each other; where other programs want the cores, a step may then take several
# times as long (results/busy.md). GNU OpenMP reads this when torch is loaded, below: in `__main__.py` it is too late.
# In anybody else's program the environment is left alone.
# `argv` begins with "-m" while `python -m vmcr2` imports the package, and an embedded interpreter may have none.
if Path((_argv := getattr(sys, "argv", None) or [""])[0]).stem == "vmcr2" or (
    _argv[0] == "-m" and any(word.endswith("vmcr2") for word in sys.orig_argv)
):
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")

from vmcr2.errors import InputError, NotLatchedError, NumericalError
from vmcr2.losses import MCR2Loss, TotalCodingRateLoss, VMCR2Loss, balanced_mu
from vmcr2.rates import RateReduction, coding_rate, rate_reduction, transrate
from vmcr2.sampling import ClassBalancedBatchSampler
from vmcr2.variational import VariationalRates, variational_logdet

if TYPE_CHECKING:
    from vmcr2.embeddings import LabelQuality, Report, label_quality, report
    from vmcr2.lab.trained import load
    from vmcr2.sklearn import CodingRateClassifier, CodingRateTransformer, NearestSubspaceClassifier

__version__ = "0.1.0"

__all__ = [
    "ClassBalancedBatchSampler",
    "InputError",
    "LabelQuality",
    "MCR2Loss",
    "NotLatchedError",
    "NumericalError",
    "RateReduction",
    "Report",
    "TotalCodingRateLoss",
    "VMCR2Loss",
    "VariationalRates",
    "balanced_mu",
    "coding_rate",
    "label_quality",
    "rate_reduction",
    "report",
    "transrate",
    "variational_logdet",
]


def _installed(package: str) -> bool:
    try:
        return find_spec(package) is not None
    except (ImportError, ValueError):  # a finder that refuses the name; a module inserted by hand
        return False


# An extra's names are listed only if it is installed, since `import *` and inspect load everything listed.
if _installed("sklearn"):
    __all__ += ["CodingRateClassifier", "CodingRateTransformer", "NearestSubspaceClassifier"]
if _installed("filelock"):
    __all__ += ["load"]

# Imported on first use: scikit-learn takes seconds, reports half as long as everything else.
_LATE = {
    "CodingRateClassifier": "vmcr2.sklearn",
    "CodingRateTransformer": "vmcr2.sklearn",
    "LabelQuality": "vmcr2.embeddings",
    "NearestSubspaceClassifier": "vmcr2.sklearn",
    "Report": "vmcr2.embeddings",
    "label_quality": "vmcr2.embeddings",
    "load": "vmcr2.lab.trained",
    "report": "vmcr2.embeddings",
}


def __getattr__(name: str) -> Any:
    if name in _LATE:
        try:
            return getattr(importlib.import_module(_LATE[name]), name)
        except ModuleNotFoundError as error:
            if error.name is None or error.name.split(".")[0] == "vmcr2":
                raise
            extra = _LATE[name].split(".")[1]
            text = f"vmcr2.{name} needs {error.name}, which is missing: pip install 'vmcr2[{extra}]'"
            raise ModuleNotFoundError(text, name=error.name) from error
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
