"""What holds for every method, also for one whose file is new."""

import dataclasses

import pytest
import torch
from ssltrain import UsageError, data, methods, speech
from ssltrain.config import ImageConfig
from ssltrain.draws import Draws, sampled
from ssltrain.images import Images

ON_IMAGES = [name for name in methods.NAMES if issubclass(methods.config_of(name), ImageConfig)]


def method_and_batch(name: str, samples: int = 16):
    """A method as it is by default, and a batch of noise."""
    torch.manual_seed(0)
    options = methods.config_of(name)(batch_size=samples, threads=1, device="cpu")
    if name not in ON_IMAGES:
        return options.build(None), speech.Clips.of([torch.randint(-999, 999, (4000,)).short() for _ in range(samples)])
    pixels, labels = torch.randint(256, (samples, 3, 32, 32), dtype=torch.uint8), torch.arange(samples) % 3
    images = Images("noise", pixels, labels, pixels, labels, ["a", "b", "c"])
    return options.build(images), images.train


def behind(node) -> set:
    """It and all that its gradient goes to."""
    found, waiting = set(), [node]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in found:
            found.add(node)
            waiting += [following for following, _ in node.next_functions]
    return found


@pytest.mark.parametrize("name", [name for name in methods.NAMES if name != "supervised"])  # which is no contrast
def test_the_gradient_of_the_encoder_comes_through_the_engine(name):
    method, batch = method_and_batch(name)
    with Draws(seed=0, epoch=0, batch=0, rows=torch.arange(len(batch))):
        loss, _ = method.loss(method.views(batch))
    engine = [node for node in behind(loss.grad_fn) if node.name().startswith("sslkern::")]
    arrived = []
    for node in engine:
        node.register_hook(lambda given, _: arrived.append(max(g.abs().max().item() for g in given if g is not None)))
        reached = {id(leaf.variable) for leaf in behind(node) if hasattr(leaf, "variable")}
        assert reached & set(map(id, method.encoder.parameters()))
    loss.backward()
    assert 0 < len(arrived) == len(engine) and min(arrived) > 0
    assert any(p.grad.abs().max() > 0 for p in method.encoder.parameters())


@pytest.mark.parametrize("name", ["supcon", "supervised"])
def test_what_learns_from_labels_says_that_there_are_none(name):
    images = dataclasses.replace(data.load("digits", limit=20), classes=[])
    with pytest.raises(UsageError, match=f"^--data digits: has no labels, which {name} learns from; .*\\.$"):
        methods.config_of(name)().build(images)


def test_supervised_is_for_one_process(monkeypatch):
    monkeypatch.setattr("ssltrain.ranks.size", lambda: 2)
    with pytest.raises(UsageError, match="^supervised: trains in one process, and there are 2; "):
        methods.config_of("supervised")().check()


def test_simclr_2_is_fine_tuned_up_to_the_first_layer_of_its_head():
    images = data.load("digits", limit=20)
    options = methods.config_of("simclr")(version=2)
    method = options.build(images).eval()
    x = images.train.float() / 255
    for p in method.parameters():  # what the head has at first, too
        p.data.add_(torch.rand_like(p) / 10)
    middle = options.up_to_middle(method.encoder, method.state_dict()).eval()
    linear, norm, relu = method.head[:3]
    assert torch.equal(middle(x), relu(norm(linear(method.encoder(x))))) and middle.features == middle(x).shape[1]
    for other in (methods.config_of("moco")(), dataclasses.replace(options, version=1)):
        with pytest.raises(UsageError, match="^--from-middle: is for runs of simclr --version 2"):
            other.up_to_middle(method.encoder, method.state_dict())


def test_an_image_is_told_from_others_drawn_alike():
    own = torch.tensor([3, 0, 5])
    with Draws(0, 0, 0, own):
        index = sampled(own, 6, 6000)
    with Draws(0, 0, 0, own[1:]):  # in another process
        assert torch.equal(sampled(own[1:], 6, 6000), index[1:])
    assert torch.equal(index[:, 0], own)
    counts = torch.stack([torch.bincount(row, minlength=6) for row in index[:, 1:]])
    assert counts.gather(1, own.unsqueeze(1)).eq(0).all()
    assert ((counts[counts > 0] - 1200).abs() < 5 * 31).all()


def test_a_batch_of_supcon_has_the_labels_of_its_rows():
    method, batch = method_and_batch("supcon")
    rows, asked = torch.tensor([7, 2, 11, 4]), []
    method.criterion.register_forward_pre_hook(lambda _, given: asked.append(given[1]))
    with Draws(seed=0, epoch=0, batch=0, rows=rows):
        method.loss(method.views(batch[rows]))
    assert asked[0].tolist() == [1, 2, 2, 1]


def test_the_bank_of_instdisc_moves_where_the_batch_has_rows():
    method, batch = method_and_batch("instdisc")
    bank, rows = method.criterion.memory.bank, torch.tensor([7, 2, 11, 4])
    before = bank.clone()
    with Draws(seed=0, epoch=0, batch=0, rows=rows):
        method.loss(method.views(batch[rows]))
    assert (bank != before).any(1).nonzero().flatten().tolist() == [2, 4, 7, 11]
