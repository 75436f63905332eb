"""Heads trained together are the heads trained alone, and those that torch's own layers give."""

from dataclasses import replace

import pytest
import torch
from timm.optim import Lars as TimmLars

from latentddae.core.errors import DataError, UsageError
from latentddae.core.rng import normal
from latentddae.transfer.probes import sgd
from latentddae.transfer.probes.recipes import RECIPES, Recipe
from latentddae.transfer.probes.sgd import Heads, HeadTrainer, epoch_order, schedule

from ..conftest import planted as clusters

CLASSES, WIDTH, ROWS = 5, 12, 230
RATES = [(1e-3, 0.0), (1e-3, 0.0), (1e-2, 0.0), (1e-2, 1e-2)]
SMALL = {  # every recipe at a size that takes several steps an epoch and both parts of a schedule
    name: replace(recipe, batch=32, epochs=4, warmup_epochs=min(recipe.warmup_epochs, 1))
    for name, recipe in RECIPES.items()
}


def planted(seed, rows=ROWS, dtype=torch.float32):
    x, labels = clusters(rows, seed, classes=CLASSES, width=WIDTH, offset=3.0)
    return torch.from_numpy(x).to(dtype), torch.from_numpy(labels)


def trained(recipe, rates, epochs, y, own=False, seed=0):
    training = HeadTrainer(
        recipe,
        rates,
        width=WIDTH,
        classes=CLASSES,
        separate_inputs=own,
        seed=seed,
        like=epochs[0],
    )
    for x in epochs:
        training.train_epoch(x, y)
    training.check()
    return training.heads


def with_torch(recipe, rate, decay, epochs, y):
    """The same head by torch.nn: the slow reference."""
    norm = torch.nn.BatchNorm1d(WIDTH, eps=1e-6, affine=False).to(epochs[0].dtype)
    layer = torch.nn.Linear(WIDTH, CLASSES).to(epochs[0].dtype)
    first = normal(0, "probe/initial", torch.arange(CLASSES), (WIDTH,))
    with torch.no_grad():
        layer.weight.copy_(0.01 * first)
        layer.bias.zero_()
    groups = [
        {"params": [layer.weight], "weight_decay": decay, "always_adapt": True},
        {"params": [layer.bias], "weight_decay": decay if recipe.optimizer != "lars" else 0.0},
    ]
    optimiser = {
        "adam": lambda: torch.optim.Adam(groups),
        "sgd": lambda: torch.optim.SGD(groups, lr=0.1, momentum=0.9),
        "lars": lambda: TimmLars(groups, lr=0.1, momentum=0.9, trust_coeff=1e-3, eps=0.0),
    }[recipe.optimizer]()
    for epoch, x in enumerate(epochs):
        order = epoch_order(0, epoch, len(x))
        steps = len(x) // recipe.batch
        for step in range(steps):
            rows = order[step * recipe.batch : (step + 1) * recipe.batch]
            place = epoch if recipe.lr_update == "epoch" else epoch + step / steps
            for group in optimiser.param_groups:
                group["lr"] = rate * schedule(recipe, place)
            optimiser.zero_grad()
            z = norm(x[rows]) if recipe.norm else x[rows]
            torch.nn.functional.cross_entropy(layer(z), y[rows]).backward()
            optimiser.step()
    return layer, norm


@pytest.mark.parametrize("name", RECIPES)
def test_heads_equal_those_of_torch(name):
    recipe = SMALL[name]
    y = planted(0)[1]
    epochs = [planted(0)[0].double() + 0.1 * e for e in range(recipe.epochs)]
    rate = 2.0 if name == "mae" else 0.02
    head = trained(recipe, [(rate, 0.01)], epochs, y)
    layer, norm = with_torch(recipe, rate, 0.01, epochs, y)
    torch.testing.assert_close(head.weight[0], layer.weight.detach(), rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(head.bias[0], layer.bias.detach(), rtol=1e-6, atol=1e-9)
    other = planted(1, dtype=torch.float64)[0]
    expected = layer(norm.eval()(other) if recipe.norm else other)
    torch.testing.assert_close(head.logits(other)[0], expected.detach(), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("own", [False, True])
def test_batched_heads_are_the_heads_trained_one_by_one(name, own, monkeypatch):
    monkeypatch.setattr(sgd, "HEADS_PER_GROUP", 3)  # the fourth head has a turn of its own
    recipe = SMALL[name]
    y = planted(0)[1]
    shift = torch.arange(4)[:, None, None] / 4
    epochs = [planted(0)[0] + 0.1 * e + (shift if own else 0) for e in range(recipe.epochs)]
    fast = 100 if name == "mae" else 1  # its steps are a thousandth of the weights
    rates = [(fast * rate, decay) for rate, decay in RATES]
    together = trained(recipe, rates, epochs, y, own)
    for place, rate in enumerate(rates):
        x = [part[place] if own else part for part in epochs]
        alone = trained(recipe, [rate], x, y)
        one = together.select(place)
        torch.testing.assert_close(one.weight, alone.weight, rtol=0, atol=1e-6)
        torch.testing.assert_close(one.bias, alone.bias, rtol=0, atol=1e-6)
        torch.testing.assert_close(one.logits(x[0]), alone.logits(x[0]), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(together.weight[1], together.weight[2], atol=1e-4)


def test_the_schedule_warms_up_and_ends_at_zero():
    recipe = replace(RECIPES["mae"], epochs=90)
    assert [schedule(recipe, e) for e in (0, 5, 10, 50, 90)] == [0, 0.5, 1, 0.5, 0]
    ddae = [schedule(RECIPES["ddae"], e) for e in range(15)]
    assert ddae[0] == 1
    assert sorted(ddae, reverse=True) == ddae


def test_order_visits_everything_once_and_changes():
    one, two = epoch_order(0, 0, 100), epoch_order(0, 1, 100)
    assert one.sort().values.tolist() == list(range(100))
    assert one.tolist() != two.tolist()


def test_rates_scale_with_the_batch_size():
    recipe = Recipe(
        optimizer="sgd",
        learning_rates=(0.1, 1.0),
        weight_decays=(0.0, 0.5),
        reference_batch=256,
        batch=512,
        epochs=1,
        norm=False,
    )
    assert recipe.scaled(10_000) == [(0.2, 0.0), (0.2, 0.5), (2.0, 0.0), (2.0, 0.5)]
    assert recipe.scaled(128)[0] == (0.05, 0.0)


def test_impossible_recipes_are_refused():
    with pytest.raises(UsageError, match="positive learning rates"):
        replace(RECIPES["mae"], learning_rates=(0.0,))
    with pytest.raises(UsageError, match="warms up"):
        replace(RECIPES["mae"], epochs=10)
    x, y = planted(0)
    training = HeadTrainer(SMALL["ddae"], [(1e-3, 0.0)], width=WIDTH, classes=CLASSES)
    training.train_epoch(x * float("nan"), y)
    with pytest.raises(DataError, match="finite"):
        training.check()


def test_a_diverged_head_scores_zero():
    x, y = planted(0)
    weight = torch.zeros(2, CLASSES, WIDTH)
    weight[1, 0, 0] = float("nan")
    two = Heads(weight, torch.zeros(2, CLASSES))
    assert two.accuracies(x, torch.zeros_like(y)) == [1.0, 0.0]
