"""Every wrong argument is a ValueError that names it, before anything is computed or overwritten."""

import copy

import numpy as np
import pytest
import torch
from conftest import random_labels, unit_rows

import vmcr2
from vmcr2.subspaces import class_subspaces

Z = unit_rows(12, 6)
LABELS = random_labels(12, 3)
NAN = Z.clone()
NAN[3, 2] = torch.nan
ROWS = torch.full((12, 3), 1 / 3, dtype=torch.float64)

BATCHES = [
    ("features .*NaN", NAN, LABELS),
    ("features .*shape", Z[0], LABELS),
    ("features .*shape", Z[:0], LABELS[:0]),
    ("features .*floating", Z.long(), LABELS),
    ("features .*Tensor", Z.numpy(), LABELS),
    ("membership .*Tensor", Z, LABELS.tolist()),
    ("membership .*integer", Z, LABELS.double()),
    ("membership .*integer labels", Z, LABELS > 1),
    ("membership .*shape", Z, LABELS[:5]),
    ("membership .*shape", Z, LABELS[:, None, None]),
    (r"membership labels .*\[0, 3\), got labels from 0 to 3", Z, LABELS.clone().index_fill_(0, torch.tensor(0), 3)),
    ("membership labels .*from -1", Z, LABELS.clone().index_fill_(0, torch.tensor(0), -1)),
    ("membership rows .*sum to 1", Z, ROWS * 2),
    ("membership rows .*sum to 1", Z, ROWS * 1.005),
    ("membership rows .*>= 0", Z, ROWS + torch.tensor([1.0, -1.0, 0.0])),
    ("membership rows .*finite", Z, ROWS * torch.nan),
    ("membership rows .*num_classes = 3", Z, torch.full((12, 4), 0.25)),
]


@pytest.mark.parametrize(("message", "features", "membership"), BATCHES)
def test_batches(message, features, membership):
    variational = vmcr2.VMCR2Loss(3, 6, atoms_per_class=2).double()
    variational.latch(Z, LABELS)
    state = copy.deepcopy(variational.state_dict())
    calls = [
        lambda: vmcr2.rate_reduction(features, membership, num_classes=3),
        lambda: vmcr2.MCR2Loss(3)(features, membership),
        lambda: variational(features, membership),
        lambda: variational.latch(features, membership),
        lambda: variational.rates(features, membership),
        lambda: class_subspaces(features, membership, 3),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=message):
            call()
    for name, tensor in variational.state_dict().items():
        assert torch.equal(tensor, state[name]), name


def test_numpy_numbers_are_numbers():
    vmcr2.VMCR2Loss(np.int64(3), np.int32(6), atoms_per_class=np.int64(2), mu=np.float32(0.5))
    vmcr2.NearestSubspaceClassifier(np.int64(2)).fit(Z.numpy(), LABELS.numpy())


def test_a_forgotten_num_classes():
    with pytest.raises(ValueError, match="pass num_classes if they are right"):
        vmcr2.rate_reduction(Z, LABELS * 10**12 + 1)


def test_losses_need_rows_of_norm_1_and_rates_do_not():
    """ΔR grows without bound in the scale of the features: as a loss that is a trap, as a diagnostic it is a number."""
    loss = vmcr2.VMCR2Loss(3, 6, atoms_per_class=2).double()
    for call in (vmcr2.MCR2Loss(3), loss, loss.latch):
        with pytest.raises(ValueError, match=r"features must have rows of norm 1 .*got norms from 3 to 3"):
            call(3 * Z, LABELS)
        with pytest.raises(ValueError, match=r"features must have rows of norm 1 .*got norms from 0 to 0"):
            call(0 * Z, LABELS)
    assert float(vmcr2.rate_reduction(3 * Z, LABELS).reduction) > 0
    rounded = torch.nn.functional.normalize(torch.randn(50, 300).bfloat16(), dim=1)
    assert vmcr2.MCR2Loss(2)(rounded, torch.arange(50) % 2).isfinite()


@pytest.mark.parametrize("value", [0, -1.0, float("nan"), float("inf"), "1", None, True])
def test_eps_sq(value):
    for call in (
        lambda: vmcr2.coding_rate(Z, eps_sq=value),
        lambda: vmcr2.rate_reduction(Z, LABELS, eps_sq=value),
        lambda: vmcr2.MCR2Loss(3, eps_sq=value),
        lambda: vmcr2.VMCR2Loss(3, 6, atoms_per_class=2, eps_sq=value),
    ):
        with pytest.raises(ValueError, match="eps_sq must be a finite number > 0"):
            call()


@pytest.mark.parametrize("name", ["mu", "step_atoms", "step_codes"])
@pytest.mark.parametrize("value", [0, -1.0, float("nan")])
def test_step_sizes_and_penalty(name, value):
    with pytest.raises(ValueError, match=f"{name} must be a finite number > 0, got"):
        vmcr2.VMCR2Loss(3, 6, atoms_per_class=2, **{name: value})


@pytest.mark.parametrize(
    ("message", "arguments"),
    [
        ("num_classes must be an integer >= 1, got 0", {"num_classes": 0}),
        ("num_classes must be an integer >= 1, got 2.5", {"num_classes": 2.5}),
        ("feature_dim must be an integer >= 1, got -3", {"feature_dim": -3}),
        ("atoms_per_class must be an integer >= 1, got 0", {"atoms_per_class": 0}),
        (r"atoms_per_class must be at most 6 \(feature_dim\), got 7", {"atoms_per_class": 7}),
        ('structure must be "shared" or "block", got \'dense\'', {"structure": "dense"}),
    ],
)
def test_sizes(message, arguments):
    with pytest.raises(ValueError, match=message):
        vmcr2.VMCR2Loss(**({"num_classes": 3, "feature_dim": 6, "atoms_per_class": 2} | arguments))


def test_features_of_another_dimension():
    loss = vmcr2.VMCR2Loss(3, 5, atoms_per_class=2).double()
    for call in (loss, loss.latch):
        with pytest.raises(ValueError, match=r"features must have feature_dim = 5 columns, got shape \(12, 6\)"):
            call(Z, LABELS)


def test_before_latching():
    """Training latches a class when it first sees it; eval mode and `rates` have nothing to compare with."""
    loss = vmcr2.VMCR2Loss(3, 6, atoms_per_class=2).double()
    for call in (loss.eval(), loss.rates):
        with pytest.raises(vmcr2.NotLatchedError, match="never latched: call loss.latch"):
            call(Z, LABELS)
    with pytest.raises(ValueError, match="never latched"):
        loss(Z, LABELS)
    with pytest.raises(ValueError, match="batches must give at least one pair"):
        loss.latch_from(torch.nn.Identity(), [])


def test_latch_from_restores_the_model_after_an_error():
    model = torch.nn.Sequential(torch.nn.Linear(6, 6), torch.nn.BatchNorm1d(6), torch.nn.Dropout(0.5))
    with pytest.raises(ValueError, match="norm 1"):
        vmcr2.VMCR2Loss(3, 6, atoms_per_class=2).latch_from(model, [(Z.float(), LABELS)])
    assert all(module.training for module in model.modules())
    assert model[1].momentum == 0.1


@pytest.mark.parametrize("r", [0, -1, 7, 2.0])
def test_components(r):
    with pytest.raises(ValueError, match="n_components must be"):
        vmcr2.NearestSubspaceClassifier(r).fit(Z.numpy(), LABELS.numpy())
    with pytest.raises(ValueError, match="n_components must be"):
        class_subspaces(Z, LABELS, 3, r)


def test_estimator_inputs():
    estimator = vmcr2.NearestSubspaceClassifier()
    with pytest.raises(ValueError, match="NaN"):
        estimator.fit(NAN.numpy(), LABELS.numpy())
    with pytest.raises(ValueError, match="at least 2 classes"):
        estimator.fit(Z.numpy(), np.zeros(12, int))
    with pytest.raises(ValueError, match="features"):
        estimator.fit(Z.numpy(), LABELS.numpy()).predict(Z.numpy()[:, :3])
