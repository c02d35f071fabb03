"""What CMC, Deep InfoMax and CPC make of one view of an image: planes, parts, patches and contexts."""

import dataclasses

import pytest
import torch
from ssltrain import UsageError, augment, planes
from ssltrain.draws import Draws
from ssltrain.images import Images
from ssltrain.methods.cmc import CMCConfig
from ssltrain.methods.cpc_images import CPCImagesConfig
from ssltrain.methods.deep_infomax import DeepInfoMaxConfig

METHODS = {"cmc": CMCConfig, "deep_infomax": DeepInfoMaxConfig, "cpc_images": CPCImagesConfig}


def images(channels: int, size: int = 32) -> Images:
    pixels = torch.randint(256, (16, channels, size, size), dtype=torch.uint8)
    return Images("noise", pixels, torch.zeros(16).long(), pixels, torch.zeros(16).long(), [])


def of_batch(method, data: Images):
    """Views and loss of the data as a batch."""
    with Draws(0, 0, 0, torch.arange(len(data.train))):
        views = method.views(data.train)
        return views, method.loss(views)[0]


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", METHODS)
def test_the_report_shows_pairs_of_each_image(name, channels):
    data = images(channels)
    method = METHODS[name]().build(data)
    pairs = method.shown(of_batch(method, data)[0])
    assert pairs.shape[0] == 2 * 16 and pairs.shape[1] in (1, 3)
    assert not any(torch.equal(*pair) for pair in zip(*pairs.chunk(2), strict=True))


def test_lightness_and_colours():
    colours = torch.tensor([[1.0, 1, 1], [1, 0, 0], [0, 0, 1], [0.5, 0.5, 0.5]]).view(4, 3, 1, 1)
    lab = planes.split(colours, "Lab").view(4, 3)
    known = torch.tensor([[100.0, 0, 0], [53.24, 80.09, 67.20], [32.30, 79.19, -107.86], [53.39, 0, 0]])
    assert (lab - known).abs().max() < 0.05
    assert torch.equal(planes.split(colours, "BGR"), colours.flip(1))
    assert torch.equal(planes.split(colours, "aLR"), planes.split(colours, "LabR")[:, [1, 0, 3]])


def test_each_view_of_cmc_has_an_encoder_that_sees_its_planes_only():
    data = images(3)
    encoder = CMCConfig(views="L,ab,RGB").build(data).encoder.eval()
    seen = planes.Planes("LabRGB", data.train)(data.train.float() / 255)
    assert seen.mean((0, 2, 3)).abs().max() < 1e-4 and (seen.std((0, 2, 3), correction=0) - 1).abs().max() < 1e-4
    seen.requires_grad_()
    per_view = encoder[1](seen).chunk(3, 1)
    for view, own in enumerate(([0], [1, 2], [3, 4, 5])):
        (gradient,) = torch.autograd.grad(per_view[view].sum(), seen, retain_graph=True)
        assert (gradient.abs().sum((0, 2, 3)) > 0).nonzero().flatten().tolist() == own
    assert encoder.features == 3 * 128 and [network[0].in_channels for network in encoder[1].networks] == [1, 2, 3]


def test_cmc_leaves_the_colours_of_its_images_as_they_are():
    data = images(3)
    for flip, names in ((None, "crop,flip"), (False, "crop")):
        with Draws(0, 0, 0, torch.arange(16)):
            views = CMCConfig(flip=flip).build(data).views(data.train)
        with Draws(0, 0, 0, torch.arange(16)):
            assert torch.equal(views, augment.build(3, (32, 32), names=names)(data.train / 255))


@pytest.mark.parametrize("graph, pairs", [("core", [(0, 1), (0, 2)]), ("full", [(0, 1), (0, 2), (1, 2)])])
def test_the_graphs_of_cmc_say_which_views_are_compared(monkeypatch, graph, pairs):
    data, seen = images(3), []
    method = CMCConfig(views="R,G,B", graph=graph).build(data)
    codes = method.codes(method.views(data.train))
    numbers = {id(code): number for number, code in enumerate(codes)}
    monkeypatch.setattr(method, "codes", lambda views: codes)
    criterion = method.criterion.forward
    monkeypatch.setattr(
        method.criterion, "forward", lambda a, b: seen.append((numbers[id(a)], numbers[id(b)])) or criterion(a, b)
    )
    loss, _ = method.loss(method.views(data.train))
    assert seen == pairs and loss == sum(criterion(codes[a], codes[b])[0] for a, b in pairs)


@pytest.mark.parametrize("patch, stride", [(8, 4), (8, 8), (6, 4), (8, 3)])
def test_no_pixel_that_is_to_be_predicted_reaches_its_context(patch, stride):
    data = images(3)
    method = CPCImagesConfig(patch=patch, stride=stride, steps=1, augmentations="none", gray=0.0).build(data).eval()
    pixels = (data.train[:2].float() / 255).requires_grad_()
    cut = method.encoder[1].cut
    contexts, targets = method.contexts_and_targets(cut(pixels))  # [B, columns, rows, width]
    rows, seen = contexts.shape[2], method.encoder[1].overlap
    for row in range(rows - seen):
        (to_context,) = torch.autograd.grad(contexts[:, :, row].abs().sum(), pixels, retain_graph=True)
        (to_target,) = torch.autograd.grad(targets[:, :, row + seen].abs().sum(), pixels, retain_graph=True)
        assert to_context.any() and to_target.any()
        last = to_context.abs().sum((0, 1, 3)).nonzero().max()
        assert last < to_target.abs().sum((0, 1, 3)).nonzero().min() and last == row * stride + patch - 1
        (to_next,) = torch.autograd.grad(targets[:, :, row + seen - 1].abs().sum(), pixels, retain_graph=True)
        assert seen == 1 or to_next.abs().sum((0, 1, 3)).nonzero().min() <= last  # a row less would overlap


def test_what_cpc_predicts_are_the_patches_below(monkeypatch):
    """The loss compares a context with the targets of rows that begin where what it has seen ends."""
    data = images(3)
    method = CPCImagesConfig(steps=2).build(data)
    contexts, targets = torch.randn(16, 7, 7, 64), torch.randn(16, 7, 7, 64)
    monkeypatch.setattr(method, "contexts_and_targets", lambda views: (contexts, targets))
    loss, _ = method.loss(torch.zeros(1))
    of_step = []
    for step, ahead in enumerate((2, 3)):  # of patches of 8 every 4 pixels the next row overlaps
        predicted = contexts[:, :, : 7 - ahead] @ method.criterion.predictors[step].T
        query, key = (x.permute(2, 0, 1, 3).flatten(1, 2) for x in (predicted, targets[:, :, ahead:]))
        query, key = torch.nn.functional.normalize(query, dim=2), torch.nn.functional.normalize(key, dim=2)
        scores = query @ key.mT / method.criterion.temperature
        of_step.append(torch.nn.functional.cross_entropy(scores.mT, torch.arange(16 * 7).expand(len(scores), -1)))
    assert loss.item() == pytest.approx(sum(of_step).item() / 2, abs=1e-4)


def test_patches_show_one_channel_as_gray_as_often_as_asked():
    data = images(3, 16)
    for share in (0.0, 0.5, 1.0):
        method = CPCImagesConfig(patch=4, steps=1, augmentations="none", gray=share).build(data)
        with Draws(0, 0, 0, torch.arange(16)):
            patches = method.views(data.train)
        plain = method.encoder[1].cut(data.train.float() / 255)
        gray = (patches == patches[:, :, :, :1]).flatten(3).all(3)
        one_of = (patches[:, :, :, :1] == plain).flatten(4).all(4).any(3)
        assert abs(gray.float().mean() - share) < 0.06 and one_of.all()
        assert torch.equal(patches[~gray], plain[~gray])


def test_the_features_of_cpc_are_the_mean_over_patches():
    data = images(1, 28)
    encoder = CPCImagesConfig().build(data).encoder.eval()
    pixels = data.train.float() / 255
    single = [
        encoder[1].network(encoder[0](pixels[:, :, y : y + 7, x : x + 7]))
        for y in range(0, 22, 3)
        for x in range(0, 22, 3)
    ]
    assert torch.allclose(encoder(pixels), torch.stack(single).mean(0), atol=1e-5)


def test_the_adversary_of_deep_infomax_has_two_sides():
    """The discriminator goes down its loss, the encoder up, by the weight; and nothing is added without one."""
    data = images(1, 8)

    def gradients(prior: float):
        torch.manual_seed(0)
        method = DeepInfoMaxConfig(prior=prior).build(data)
        with Draws(0, 0, 0, torch.arange(16)):
            whole = torch.randn(16, 128, generator=torch.Generator().manual_seed(1)).requires_grad_()
            loss = method._adversary(whole)
            y = whole.detach().sigmoid().requires_grad_()
        loss.backward()
        scores = method.discriminator(y)
        torch.nn.functional.softplus(scores).sum().backward()
        straight = y.grad * whole.detach().sigmoid() * (1 - whole.detach().sigmoid()) / 16
        return whole.grad, straight

    for prior in (0.1, 2.0):
        turned, straight = gradients(prior)
        assert torch.allclose(turned, -prior * straight, atol=1e-7)
    assert DeepInfoMaxConfig().build(data).loss(torch.rand(16, 1, 8, 8))[1] == {}


@pytest.mark.parametrize(
    "options, channels, said",
    [
        (CMCConfig(views="L,ab"), 1, "--views L,ab: the images have no colours; "),
        (CPCImagesConfig(patch=40), 3, "--patch 40: is more than the 32 pixels of an image; "),
        (CPCImagesConfig(steps=6), 3, "--steps 6: images of 32 pixels have 7 rows of patches, and a context can "),
    ],
)
def test_what_cannot_be_built(options, channels, said):
    with pytest.raises(UsageError, match=f"^{said}.*\\.$"):
        options.check().build(images(channels))


@pytest.mark.parametrize("views", ["L", "L,", "L,x", "", "ab"])
def test_views_are_groups_of_letters(views):
    with pytest.raises(UsageError, match="^--views .*: must be two groups or more of the letters RGBLabSD"):
        CMCConfig(views=views).check()


def test_the_prior_is_for_one_process(monkeypatch):
    monkeypatch.setattr("ssltrain.ranks.size", lambda: 2)
    with pytest.raises(UsageError, match="^--prior 0.1: is for one process, and there are 2; "):
        DeepInfoMaxConfig(prior=0.1).check()
    assert dataclasses.replace(DeepInfoMaxConfig(), estimator="dv").check().prior == 0
