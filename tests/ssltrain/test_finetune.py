"""Fine-tuning on a part of the labels: what is drawn, what chooses, and when the test set is read."""

import dataclasses

import pytest
import torch
from ssltrain import UsageError, data, finetune
from ssltrain.finetune import Recipe
from torch import nn

CPU = torch.device("cpu")
NOTHING, MUCH = Recipe(1e-9, 1, 0), Recipe(3e-2, 60, 0)


class Pixels(nn.Flatten):
    """An encoder without weights."""

    features = 64


class Sealed:
    """Images whose test set may not be read."""

    def __init__(self, images):
        self.images = images

    def __getattr__(self, name):
        assert not name.startswith("test"), "the test set is read"
        return getattr(self.images, name)


@pytest.fixture(scope="module")
def digits():
    return data.load("digits", limit=400)


@pytest.fixture(autouse=True)
def recipes(monkeypatch):
    monkeypatch.setattr(finetune, "RECIPES", [NOTHING, MUCH])


def test_held_out_training_images_choose_and_the_test_set_is_not_read(monkeypatch, digits):
    sealed, seen = Sealed(digits), []
    learn = finetune.trained

    def trained(images, encoder, views, rows, *more):
        predict = learn(images, encoder, views, rows, *more)
        seen.append((set(rows.tolist()), []))
        return lambda others: seen[-1][1].append(others) or predict(others)

    monkeypatch.setattr(finetune, "trained", trained)
    assert finetune.choose(sealed, Pixels(), lambda x: x, 0.5, CPU) == MUCH
    assert len(seen) == 2 and seen[0][0] == seen[1][0]
    for rows, judges in seen:
        of = {i for x in judges[0] for i in (digits.train == x).flatten(1).all(1).nonzero().flatten().tolist()}
        assert len(judges[0]) == pytest.approx(40, abs=5) and not of & rows
    with pytest.raises(AssertionError, match="the test set is read"):
        finetune.fine_tune(sealed, {"scratch": Pixels()}, lambda x: x, 0.5, 1, CPU)
    assert len(seen) == 5  # two trials again, and the draw whose test was asked for


def test_mean_and_spread_are_those_of_draws_that_differ(monkeypatch, digits):
    drawn, learn = [], finetune.trained

    def trained(images, encoder, views, rows, recipe, *more):
        drawn.append((tuple(rows.tolist()), recipe))
        return learn(images, encoder, views, rows, recipe, *more)

    monkeypatch.setattr(finetune, "trained", trained)
    networks = {"fine_tuned": Pixels(), "scratch": Pixels()}
    found = finetune.fine_tune(digits, networks, lambda x: x, 0.2, 3, CPU)
    assert found["images"] == len(drawn[-1][0]) and found["draws"] == 3 and found["trials"] == 2
    assert found["fine_tuned"] == found["scratch"] > 0.6 and found["fine_tuned_spread"] > 0
    assert found["scratch_recipe"] == {"lr": 3e-2, "steps": 60, "passes": 0}
    last = drawn[-6:]  # the draws after all trials, each for both
    assert [recipe for _, recipe in last] == [MUCH] * 6 and len({rows for rows, _ in last}) == 3
    one = finetune.fine_tune(digits, {"scratch": Pixels()}, lambda x: x, 0.2, 1, CPU)
    assert one["scratch_spread"] is None


def test_every_class_is_drawn_in_its_share():
    labels = torch.tensor([0] * 10 + [1] * 100 + [2])
    rows = finetune.labelled(labels, torch.arange(5, 111), 0.2, seed=0)
    assert labels[rows].bincount().tolist() == [1, 20, 1] and rows.min() >= 5 and len(rows.unique()) == 22
    assert not torch.equal(rows, finetune.labelled(labels, torch.arange(5, 111), 0.2, seed=1))


def test_a_class_of_one_image_is_refused(digits):
    rows = torch.cat([(digits.train_labels != 3).nonzero(), (digits.train_labels == 3).nonzero()[:1]]).flatten()
    few = dataclasses.replace(digits, train=digits.train[rows], train_labels=digits.train_labels[rows])
    with pytest.raises(UsageError, match="^--labels: digits has a class of one training image, which cannot"):
        finetune.choose(few, Pixels(), lambda x: x, 0.5, CPU)


def test_images_are_made_like_those_of_a_run(digits):
    like = digits.like([3, 12, 10])
    assert like.shape == [3, 12, 10] and like.test.shape[1:] == (3, 12, 10) and like.train.dtype == torch.uint8
    assert (like.train.float().mean() - digits.train.float().mean()).abs() < 3 and "made 10 x 12" in like.notes[-1]
    assert digits.like(digits.shape) is digits
