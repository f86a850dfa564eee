"""The paper's settings, as Sections 4 and 7 print them."""

import pytest

from vmcr2.lab.augmentation import Augmentation
from vmcr2.lab.paper import FIGURE1, PAPER, TABLE2, TABLE3


def test_every_row_has_its_recipe_with_the_papers_settings():
    for name in [*TABLE2, *TABLE3, *FIGURE1]:
        recipe = PAPER[name]
        assert recipe.epochs == 2000
        assert recipe.eps_sq == 0.5
        assert recipe.vmcr2.latch_every == 50
        assert (recipe.vmcr2.step_atoms, recipe.vmcr2.step_codes) == (5.0, 5.0)
        assert (recipe.vmcr2.energy, recipe.vmcr2.pull, recipe.vmcr2.expand) == (None, 1.0, 0.0)
        assert (recipe.vmcr2.step, recipe.vmcr2.reduction) == ("paper", "sum")
        assert not recipe.vmcr2.stop_on_collapse
        assert recipe.batch_size == (1000 if name in ("mnist", "cifar10") else 2000)
        assert recipe.momentum == 0.9
        assert recipe.network == ("cnn" if name == "mnist" else "preact_resnet18" if "strong" in name else "resnet18")
        crops = Augmentation(crop=32, padding=4 if "strong" in name else 8, flip=True)
        assert recipe.augmentation == (Augmentation(flip=True) if "tiny" in name else crops)
        strong = name.endswith("-strong")
        assert recipe.weight_decay == (1e-4 if strong else 0)
        assert recipe.vmcr2.mu == (0.1 if strong else 1.0)
        assert (recipe.vmcr2.lr, recipe.mcr2.lr, recipe.ce.lr) == ((0.1, 0.1, 0.1) if strong else (1e-3, 1e-3, 1e-2))
    assert [PAPER[name].feature_dim for name in TABLE2] == [128, 128, 500, 500]
    assert [PAPER[name].feature_dim for name in ("cifar100-d100", "tiny-imagenet-d200")] == [100, 200]
    assert [PAPER[name].vmcr2.atoms_per_class for name in TABLE2] == [20, 20, 10, 10]
    strong = PAPER["cifar100-strong"]
    rates = [strong.lr_at(epoch) for epoch in (0.5, 999.9, 1000.1, 1499.9, 1500.1, 1999.9)]
    assert rates == pytest.approx([0.1, 0.1, 0.01, 0.01, 0.001, 0.001])


def test_our_recipes_keep_the_papers_network_images_and_dimension():
    for name in TABLE2:
        ours, papers = PAPER[f"{name}-ours"], PAPER[name]
        for kept in ("network", "data", "augmentation", "feature_dim", "eps_sq", "momentum"):
            assert getattr(ours, kept) == getattr(papers, kept)


def test_our_recipes_expand_on_mnist_alone_and_take_adamw_there_as_results_paper_says():
    ours = [PAPER[f"{name}-ours"] for name in TABLE2]
    assert [recipe.vmcr2.expand for recipe in ours] == [0.1, 0.0, 0.0, 0.0]
    assert [(recipe.optimizer, recipe.vmcr2.lr) for recipe in ours] == [("adamw", 3e-3), *3 * [("sgd", 0.3)]]
