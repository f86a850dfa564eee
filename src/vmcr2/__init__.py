"""Efficient Maximal Coding Rate Reduction by Variational Forms (V-MCR², CVPR 2022).

loss = vmcr2.VMCR2Loss(num_classes=100, feature_dim=200)
loss.latch_from(model, batches)              # and again now and then
loss(model(inputs), labels).backward()       # as any criterion
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from vmcr2.errors import InputError, NotLatchedError, NumericalError
from vmcr2.losses import MCR2Loss, TotalCodingRateLoss, VMCR2Loss, balanced_mu
from vmcr2.rates import RateReduction, coding_rate, rate_reduction, transrate
from vmcr2.variational import VariationalRates, variational_logdet

if TYPE_CHECKING:
    from vmcr2.embeddings import LabelQuality, Report, label_quality, report
    from vmcr2.sklearn import CodingRateClassifier, CodingRateTransformer, NearestSubspaceClassifier

__version__ = "0.1.0"

__all__ = [
    "CodingRateClassifier",
    "CodingRateTransformer",
    "InputError",
    "LabelQuality",
    "MCR2Loss",
    "NearestSubspaceClassifier",
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

# What is not always used is imported when it is first asked for; scikit-learn alone takes seconds.
_LATER = {
    "CodingRateClassifier": "vmcr2.sklearn",
    "CodingRateTransformer": "vmcr2.sklearn",
    "NearestSubspaceClassifier": "vmcr2.sklearn",
    "LabelQuality": "vmcr2.embeddings",
    "Report": "vmcr2.embeddings",
    "label_quality": "vmcr2.embeddings",
    "report": "vmcr2.embeddings",
}


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        module = import_module(_LATER[name])
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] != "sklearn":
            raise
        raise ImportError(f"vmcr2.{name} needs scikit-learn: pip install 'vmcr2[sklearn]'") from error
    return getattr(module, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
