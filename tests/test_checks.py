"""Every wrong argument is a ValueError that names it, before anything is computed or overwritten."""

from fractions import Fraction

import numpy as np
import pytest
import torch
from conftest import assert_unchanged, random_labels, snapshot, unit_rows

import vmcr2
from vmcr2.checks import Condition, read_conditions
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
    ("membership rows .*sum to 1, got sums from 1.005 to 1.005; divide the rows by their sums", Z, ROWS * 1.005),
    ("membership rows .*>= 0", Z, ROWS + torch.tensor([1.0, -1.0, 0.0])),
    ("membership rows .*finite", Z, ROWS * torch.nan),
    ("membership rows .*num_classes = 3", Z, torch.full((12, 4), 0.25)),
    (r"membership rows .*num_classes = 3 .*\(12, 1\); labels have shape \(m,\), not \(m, 1\)", Z, torch.ones(12, 1)),
    ("features must be a dense torch.Tensor .*sparse_coo", Z.to_sparse(), LABELS),
    ("features must be floating point .*got torch.float8", Z.to(torch.float8_e4m3fn), LABELS),
    ("features must be .*got .*meta", Z.to("meta"), LABELS.to("meta")),
    ("membership must be a dense torch.Tensor .*sparse_coo", Z, ROWS.to_sparse()),
    ("membership must hold integer labels or real rows, got torch.float8", Z, ROWS.to(torch.float8_e4m3fn)),
]


@pytest.mark.parametrize(("message", "features", "membership"), BATCHES)
def test_wrong_batches_are_refused_and_change_nothing(message, features, membership):
    variational = vmcr2.VMCR2Loss(3, 6, atoms_per_class=2).double()
    variational.latch(Z, LABELS)
    state = snapshot(variational)
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
    assert_unchanged(variational, state)


@pytest.mark.parametrize(
    ("message", "features"),
    [
        ("must be a dense torch.Tensor", Z.to_sparse()),
        ("must be a dense torch.Tensor", Z[None].to_sparse()),
        ("must be floating point .*got torch.float8", Z.to(torch.float8_e5m2)),
        ("must be .*got .*meta", Z.to("meta")),
        ("must be .*got .*meta", Z[None].to("meta")),
        ("must be a torch.Tensor", None),
        ("must be a torch.Tensor", 3),
    ],
)
def test_features_alone(message, features):
    loss = vmcr2.VMCR2Loss(3, 6, structure="block").double()
    loss.latch(Z, LABELS)
    for name, call in (
        ("features", vmcr2.coding_rate),
        ("features", vmcr2.TotalCodingRateLoss()),
        ("features", loss.nearest_class),
        ("factor", vmcr2.variational_logdet),
    ):
        if call != loss.nearest_class or not isinstance(features, torch.Tensor) or features.ndim == 2:
            with pytest.raises(vmcr2.InputError, match=f"{name} {message}"):
                call(features)


def test_a_loss_on_meta_has_no_values_to_work_with():
    with torch.device("meta"):
        loss = vmcr2.VMCR2Loss(3, 6, structure="block")
    empty, labels = torch.empty(12, 6, device="meta"), torch.empty(12, dtype=torch.long, device="meta")
    for call in (loss, loss.rates, loss.latch, vmcr2.MCR2Loss(3)):
        with pytest.raises(vmcr2.InputError, match="features must be finite, got a tensor on the meta device"):
            call(empty, labels)
    with pytest.raises(vmcr2.InputError, match="features must be finite, got a tensor on the meta device"):
        loss.nearest_class(empty)
    with pytest.raises(vmcr2.InputError, match="features must be on the loss's device meta, got cpu"):
        loss.nearest_class(Z)


def test_numpy_numbers_and_integers_of_any_size_are_numbers():
    loss = vmcr2.VMCR2Loss(np.int64(3), np.int32(6), atoms_per_class=np.int64(2), mu=np.float32(0.5))
    loss.double().latch_from(lambda z: z, [(Z.repeat(8, 1), LABELS.repeat(8))] * 2)
    loss = vmcr2.VMCR2Loss(3, 6, mu=10**30, energy=10**20, step="paper", step_codes=10**20).double()
    assert loss(Z, LABELS).isfinite()
    assert loss.rates(Z, LABELS).residual > 1e20
    assert vmcr2.variational_logdet(Z, scale=10**30).isfinite()
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
        with pytest.raises(ValueError, match="got norms from 0 to 1; 1 rows are zeros, which normalising leaves"):
            call(torch.cat([0 * Z[:1], torch.nn.functional.normalize(Z[1:], dim=1)]), LABELS)
    assert float(vmcr2.rate_reduction(3 * Z, LABELS).reduction) > 0
    rounded = torch.nn.functional.normalize(torch.randn(50, 300).bfloat16(), dim=1)
    assert vmcr2.MCR2Loss(2)(rounded, torch.arange(50) % 2).isfinite()


@pytest.mark.parametrize(
    "value", [0, -1.0, float("nan"), float("inf"), "1", None, True, Fraction(1, 2), pytest.param(10**400, id="10**400")]
)
def test_eps_sq(value):
    for call in (
        lambda: vmcr2.coding_rate(Z, eps_sq=value),
        lambda: vmcr2.rate_reduction(Z, LABELS, eps_sq=value),
        lambda: vmcr2.MCR2Loss(3, eps_sq=value),
        lambda: vmcr2.VMCR2Loss(3, 6, atoms_per_class=2, eps_sq=value),
    ):
        with pytest.raises(ValueError, match="eps_sq must be a finite number > 0"):
            call()


@pytest.mark.parametrize("name", ["mu", "step_atoms", "step_codes", "balance", "energy"])
@pytest.mark.parametrize("value", [0, -1.0, float("nan"), Fraction(1, 2), pytest.param(10**400, id="10**400")])
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
        ("structure must be one of 'shared', 'block', got 'dense'", {"structure": "dense"}),
        ("structure must be one of 'shared', 'block', got array", {"structure": np.array(["shared", "block"])}),
        ("eps_sq must be from 6e-10 to 6e.08 for features of dimension 6", {"eps_sq": 1e-30}),
        ("reduction must be one of 'mean', 'sum', got 'none'", {"reduction": "none"}),
        ("step must be one of 'ascent', 'paper', 'simultaneous', got None", {"step": None}),
        ("energy must be a finite number > 0, got 0", {"energy": 0}),
        ("pull must be a finite number > 0 and at most 1, got 0", {"pull": 0}),
        ("pull must be a finite number > 0 and at most 1, got 1.5", {"pull": 1.5}),
        ("expand must be a finite number >= 0, got -1", {"expand": -1}),
    ],
)
def test_wrong_settings_are_named(message, arguments):
    with pytest.raises(ValueError, match=message):
        vmcr2.VMCR2Loss(**({"num_classes": 3, "feature_dim": 6, "atoms_per_class": 2} | arguments))


def test_features_of_another_dimension():
    loss = vmcr2.VMCR2Loss(3, 5, atoms_per_class=2).double()
    for call in (loss, loss.latch):
        with pytest.raises(ValueError, match=r"features must have feature_dim = 5 columns, got shape \(12, 6\)"):
            call(Z, LABELS)


@pytest.mark.parametrize("wrong", [0, -1, 2.5, True, None, "3"])
def test_num_classes_of_the_exact_objective(wrong):
    with pytest.raises(ValueError, match="num_classes must be an integer >= 1"):
        vmcr2.MCR2Loss(wrong)


def test_features_and_membership_on_different_devices():
    for call in (vmcr2.rate_reduction, vmcr2.MCR2Loss(3)):
        with pytest.raises(ValueError, match="membership must be on the features' device meta, got cpu"):
            call(Z.to("meta"), LABELS)
    with pytest.raises(ValueError, match="features must be on the loss's device cpu, got meta"):
        vmcr2.VMCR2Loss(3, 6)(Z.to("meta"), LABELS.to("meta"))


def test_wrong_arguments_of_balanced_mu_are_named():
    for wrong in ({"feature_dim": 0}, {"batch_size": 2.5}, {"eps_sq": -1.0}, {"balance": 0.0}):
        with pytest.raises(vmcr2.InputError, match=next(iter(wrong))):
            vmcr2.balanced_mu(**({"feature_dim": 8, "batch_size": 4} | wrong))


def test_every_error_is_a_value_error_or_says_that_the_computation_broke_down():
    assert issubclass(vmcr2.InputError, ValueError)
    assert issubclass(vmcr2.NotLatchedError, vmcr2.InputError)
    assert issubclass(vmcr2.NumericalError, ArithmeticError)


def test_all_conditions_are_read_in_one_transfer_and_the_first_that_fails_is_named():
    right, wrong = torch.tensor(False), torch.tensor(True)

    def condition(flag, name):
        return Condition(flag, f"{name} must hold", lambda: f"{name}'s value")

    assert read_conditions([condition(right, "a")]) is None
    assert read_conditions([condition(right, "a")], torch.tensor([3, 4])).tolist() == [3, 4]
    with pytest.raises(vmcr2.InputError, match="^b must hold, got b's value$"):
        read_conditions([condition(right, "a"), condition(wrong, "b"), condition(wrong, "c")])


@pytest.mark.parametrize("r", [0, -1, 7, 2.0])
def test_wrong_numbers_of_components_are_named(r):
    with pytest.raises(ValueError, match="n_components must be"):
        vmcr2.NearestSubspaceClassifier(r).fit(Z.numpy(), LABELS.numpy())
    with pytest.raises(ValueError, match="n_components must be"):
        class_subspaces(Z, LABELS, 3, r)


def test_wrong_arrays_are_refused_by_the_classifier():
    estimator = vmcr2.NearestSubspaceClassifier()
    with pytest.raises(ValueError, match="NaN"):
        estimator.fit(NAN.numpy(), LABELS.numpy())
    with pytest.raises(ValueError, match="at least 2 classes"):
        estimator.fit(Z.numpy(), np.zeros(12, int))
    with pytest.raises(ValueError, match="features"):
        estimator.fit(Z.numpy(), LABELS.numpy()).predict(Z.numpy()[:, :3])


def test_batched_buffers_are_refused_in_words():
    loss = vmcr2.VMCR2Loss(3, 6).double().eval()
    loss.latch(Z, LABELS)
    stacked = {name: torch.stack([value, value]) for name, value in loss.named_buffers()}
    with pytest.raises(ValueError, match=r"buffers must not be batched by torch\.vmap"):
        torch.vmap(lambda buffers: torch.func.functional_call(loss, buffers, (Z, LABELS)))(stacked)


def test_a_nested_tensor_of_views_is_refused_in_words():
    nested = torch.nested.nested_tensor([Z, Z], layout=torch.jagged)
    with pytest.raises(ValueError, match="features must be a dense"):
        vmcr2.TotalCodingRateLoss()(nested)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[("mu", wrong) for wrong in (-1, np.nan, "1")],
        *[("eps_sq", wrong) for wrong in (0, None)],
        *[("pull", wrong) for wrong in (0, 5)],
        *[(name, -1) for name in ("expand", "balance", "energy", "step_atoms", "step_codes")],
        *[(name, "neither") for name in ("reduction", "step", "structure")],
        ("reduction", ["mean"]),
        ("sharded", "no"),
        ("sharded", None),
        ("sharded", 1),
    ],
)
def test_settings_are_checked_when_they_are_set_as_when_the_loss_is_made(name, value):
    with pytest.raises(ValueError, match=f"{name} "):
        vmcr2.VMCR2Loss(3, 6, **{name: value})
    if name != "sharded":
        loss = vmcr2.VMCR2Loss(3, 6)
        before = getattr(loss, name)
        with pytest.raises(ValueError, match=f"{name} "):
            setattr(loss, name, value)
        assert getattr(loss, name) == before
    if name == "eps_sq":
        for other in (vmcr2.MCR2Loss(3), vmcr2.TotalCodingRateLoss()):
            with pytest.raises(ValueError, match="eps_sq "):
                other.eps_sq = value


@pytest.mark.parametrize(
    "name", ["num_classes", "feature_dim", "atoms_per_class", "structure", "sharded", "process_group"]
)
def test_what_a_loss_was_made_with_cannot_change(name):
    for loss in (vmcr2.VMCR2Loss(3, 6), vmcr2.MCR2Loss(3), vmcr2.TotalCodingRateLoss()):
        if hasattr(loss, name):
            with pytest.raises(ValueError, match=f"{name} cannot change once the loss is made"):
                setattr(loss, name, "block" if name == "structure" else 2)


@pytest.mark.parametrize("mu", [None, 1.0])
def test_mu_at_no_samples(mu):
    for wrong in (0, -1, None):
        with pytest.raises(ValueError, match="batch_size must be an integer >= 1"):
            vmcr2.VMCR2Loss(3, 6, mu=mu).mu_at(wrong)
