"""Augmentation, encoders and the two evaluations, each by itself."""

import dataclasses
import importlib

import pytest
import torch
from ssltrain import UsageError, augment, config, data, encoders, evaluate, logistic, methods, report
from ssltrain.config import ImageConfig
from ssltrain.draws import Draws, drawing, others, rand, rows
from ssltrain.images import features
from ssltrain.lars import LARS

from ..functional.agreement import peer


@pytest.mark.parametrize("channels, size", [(1, (28, 28)), (1, (8, 8)), (3, (32, 32)), (3, (24, 40))])
def test_augmentation_keeps_shape_and_range_and_draws_for_each_image(channels, size):
    torch.manual_seed(0)
    image = torch.rand(1, channels, *size)
    views = augment.build(channels, size)(image.repeat(6, 1, 1, 1))
    assert views.shape == (6, channels, *size) and views.dtype == torch.float32
    assert views.min() >= -1e-4 and views.max() <= 1 + 1e-4
    assert all(not torch.equal(views[0], v) for v in views[1:])


@pytest.mark.parametrize("channels", [1, 3])
def test_what_an_image_gets_does_not_depend_on_the_others(channels):
    augmented = augment.build(channels, (8, 8), flip=True)
    images, rows = torch.rand(20, channels, 8, 8), torch.randperm(1000)[:20]

    def views(part, seed=0, epoch=1, batch=2):
        with Draws(seed, epoch, batch, rows[part]):
            return torch.stack(augmented(torch.cat([images[part], images[part]])).chunk(2), 1)

    torch.manual_seed(1)
    whole = views(slice(0, 20))
    before = torch.get_rng_state()
    for part in (slice(0, 7), slice(7, 8), slice(8, 20)):
        assert torch.equal(views(part), whole[part])
    assert torch.equal(torch.get_rng_state(), before)
    for other in (views(slice(0, 20), seed=1), views(slice(0, 20), epoch=2), whole.flip(1)):
        assert not (other == whole).flatten(1).all(1).any()


def test_draws_are_uniform_and_do_not_belong_together():
    with Draws(0, 0, 0, torch.arange(5000)):
        a = rand(10_000, 8)
        with drawing():
            b = torch.rand((10_000, 40), dtype=torch.float64)[:, ::5]
            orders = [tuple(torch.randperm(4).tolist()) for _ in range(200)]
    x = torch.cat([a.double(), b], 1)
    x = torch.cat([x.view(2, 5000, 16).unbind()[0], x[5000:], x[:5000].roll(1, 0)], 1)  # both views, the next sample
    assert x.min() >= 0 and x.max() < 1 and a.dtype == torch.float32 and len(set(orders)) == 24
    assert (x.mean(0) - 1 / 2).abs().max() < 5 * (1 / 12 / 5000) ** 0.5
    assert (torch.corrcoef(x.T).fill_diagonal_(0)).abs().max() < 5 / 5000**0.5
    counts = torch.stack([column.histc(50, 0, 1) for column in x.float().T])
    assert ((counts - 100).square().sum(1) / 100).max() < 49 + 5 * (2 * 49) ** 0.5  # chi-squared


def test_a_draw_that_fits_to_no_sample():
    with Draws(0, 0, 0, torch.arange(3)), pytest.raises(RuntimeError, match="^4 rows are drawn for 3 samples"):
        rand(4)


def test_the_rows_of_a_batch_are_known_while_it_is_current():
    with Draws(0, 0, 0, torch.tensor([5, 3])):
        with Draws(0, 0, 1, torch.tensor([9])):
            assert rows().tolist() == [9]
        assert rows().tolist() == [5, 3]
    with pytest.raises(RuntimeError, match="^no batch is current"):
        rows()


def test_each_image_gets_another_one_anew_in_each_batch():
    drawn = []
    for batch in range(100):
        with Draws(0, 0, batch, torch.arange(6)):
            drawn.append(others(6))
    assert all(other.sort().values.tolist() == list(range(6)) for other in drawn)
    counts = torch.nn.functional.one_hot(torch.stack(drawn), 6).sum(0)
    assert (counts.diag() == 0).all() and counts[~torch.eye(6, dtype=torch.bool)].min() > 5  # of 20 each


def flipped_first(channels: int, flip: bool | None) -> bool:
    import kornia.augmentation as K

    steps = augment.build(channels, (8, 8), flip).__closure__
    modules = [m for cell in steps for step in cell.cell_contents for m in step.modules()]
    return any(isinstance(m, K.RandomHorizontalFlip) for m in modules)


def test_flips_are_for_colour_images_unless_asked_for():
    assert flipped_first(3, None) and not flipped_first(1, None)
    assert flipped_first(1, True) and not flipped_first(3, False)


def test_steps_of_the_views_by_name():
    images = torch.rand(8, 3, 8, 8)
    draws = Draws(0, 0, 0, torch.arange(8))
    assert torch.equal(augment.build(3, (8, 8), names="none")(images), images)
    with draws:
        mirrored = augment.build(3, (8, 8), names="flip")(images)
    same, turned = ((mirrored == x).flatten(1).all(1) for x in (images, images.flip(3)))
    assert (same ^ turned).all() and same.any() and turned.any()
    with draws:
        gray = augment.build(3, (8, 8), flip=True, names="gray")(images)
    changed = (gray != images).flatten(1).any(1)
    assert changed.any() and not changed.all() and (gray[changed].amax(1) == gray[changed].amin(1)).all()
    for channels, name, there in ((3, "blur", "crop, jitter, hue, gray"), (1, "crop", "affine, blur, erase")):
        with pytest.raises(UsageError, match=f"^--augmentations flip,{name}: {name!r} is .*; choose of {there}, flip"):
            augment.build(channels, (8, 8), names=f"flip,{name}")


@pytest.mark.parametrize("name, millions", [("convnet", 0.093), ("resnet18", 11.17)])
@pytest.mark.parametrize("channels, size", [(1, 8), (3, 32)])
def test_encoders(name, millions, channels, size):
    images = torch.randint(256, (16, channels, size, size), dtype=torch.uint8)
    encoder = encoders.build(name, images)
    assert encoder(images.float() / 255).shape == (16, encoder.features)
    assert sum(p.numel() for p in encoder.parameters()) == pytest.approx(millions * 1e6, rel=0.01)


ON_IMAGES = [name for name in methods.NAMES if issubclass(methods.config_of(name), ImageConfig)]


@pytest.mark.parametrize("name", ON_IMAGES)
@pytest.mark.parametrize("encoder, wide", [("convnet", 256), pytest.param("resnet18", 1024, marks=pytest.mark.long)])
def test_every_method_on_images_builds_the_encoder_as_wide_as_asked(name, encoder, wide):
    images, options = data.load("digits", limit=64), methods.config_of(name)(encoder=encoder, width=2)
    features = wide * {"cmc": 2}.get(name, 1)  # which has an encoder for each of two views
    assert options.build(images).encoder.features == features
    assert options.build_encoder(images.shape).features == features  # into which the weights of a run are read


@pytest.mark.parametrize("name, cells", [("convnet", 4), ("resnet18", 4), ("timm:resnet18", 1)])
def test_encoders_give_their_last_maps_with_their_features(name, cells):
    if name.startswith("timm:"):
        peer("timm")
    images = torch.randint(256, (4, 3, 32, 32), dtype=torch.uint8)
    encoder = encoders.build(name, images).eval()
    maps, features = encoder.maps_and_features(images.float() / 255)
    assert maps.shape == (4, encoder.features, cells, cells)
    assert torch.equal(features, encoder(images.float() / 255))
    assert torch.allclose(features, maps.mean((2, 3)), atol=1e-5)


def test_standardize():
    images = torch.randint(256, (50, 3, 9, 9), dtype=torch.uint8)
    out = encoders.Standardize(images)(images.float() / 255)
    assert torch.allclose(out.mean((0, 2, 3)), torch.zeros(3), atol=1e-5)
    assert torch.allclose(out.std((0, 2, 3), correction=0), torch.ones(3), atol=1e-5)


def clusters(n: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Three directions in 16 dimensions with noise, features of very different scales, and one constant feature."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % 3
    x = 4 * torch.eye(16)[labels] + 0.3 * torch.randn(n, 16, generator=generator)
    x[:, 15] = 7.0
    return x, labels


def test_separable_features_are_separated_and_noise_is_not():
    train, test = clusters(300, 0), clusters(90, 1)
    scales = torch.logspace(-3, 3, 16)
    assert evaluate.linear_probe(train[0] * scales, train[1], test[0] * scales, test[1]) == 1.0
    assert evaluate.knn(*train, *test) == 1.0
    shuffled = test[1][torch.randperm(90, generator=torch.Generator().manual_seed(0))]
    assert evaluate.linear_probe(*train, test[0], shuffled) < 0.6 and evaluate.knn(*train, test[0], shuffled) < 0.6


def test_the_probe_is_scikit_learns_logistic_regression():
    from sklearn.datasets import load_digits
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    x, y = load_digits(return_X_y=True)
    scaler = StandardScaler().fit(x[:1000])
    theirs = LogisticRegression(max_iter=1000).fit(scaler.transform(x[:1000]), y[:1000])
    parts = [torch.tensor(a) for a in (x[:1000], y[:1000], x[1000:], y[1000:])]
    ours = evaluate.linear_probe(parts[0].float(), parts[1], parts[2].float(), parts[3])
    assert ours == pytest.approx(theirs.score(scaler.transform(x[1000:]), y[1000:]), abs=0.005)


@pytest.mark.parametrize("block", [logistic.BLOCK, 5], ids=["whole", "in blocks"])
def test_the_probe_finds_the_optimum_however_much_features_go_together(monkeypatch, block):
    """Against Newton's method in float64 on the dense Hessian."""
    monkeypatch.setattr(logistic, "BLOCK", block)
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(2000, 12, generator=draw) @ torch.randn(12, 12, generator=draw).matrix_power(3)
    x = (x - x.mean(0)) / x.std(0)
    labels = (x[:, :4] + torch.randn(2000, 4, generator=draw)).argmax(1)

    def loss(parameters):
        weight, bias = parameters.split([48, 4])
        scores = x.double() @ weight.view(4, 12).T + bias
        return torch.nn.functional.cross_entropy(scores, labels) + weight.square().sum() / 4000

    parameters = torch.zeros(52, dtype=torch.float64)
    for _ in range(20):
        gradient, hessian = torch.func.grad(loss)(parameters), torch.func.hessian(loss)(parameters)
        parameters -= torch.linalg.lstsq(hessian, gradient, driver="gelsd").solution  # a shift of all biases is free
    weight, bias = logistic.fit(x, labels, 4)
    ours = torch.cat([weight.flatten(), bias - bias.mean()]).double()
    assert loss(ours) - loss(parameters) < 1e-6 and (ours - parameters)[:48].abs().max() < 0.02


def test_features_that_are_no_numbers_are_no_error():
    (train, labels), (test, test_labels) = clusters(60, 0), clusters(30, 1)
    train[3, 2] = torch.nan
    assert 0 <= evaluate.linear_probe(train, labels, test, test_labels) <= 1


def test_an_untrained_encoder_is_calibrated_on_the_images():
    images = torch.randint(256, (64, 1, 8, 8), dtype=torch.uint8) // 9
    encoder = encoders.build("convnet", images)
    before = {k: v.clone() for k, v in encoder.state_dict().items()}
    batch = images.float() / 255
    ours = encoders.calibrated(encoder, [batch, batch])
    assert not ours.training and torch.allclose(ours(batch), encoder.train()(batch), atol=0.05)
    assert not torch.allclose(encoder.eval()(batch), ours(batch), atol=0.05)
    encoder.load_state_dict(before)
    assert all(torch.equal(v, before[k]) for k, v in ours.state_dict().items() if "running" not in k and "num" not in k)


class Pooled(torch.nn.Module):
    """Images of 8 x 8 pixels to their means in 4 x 4 squares."""

    features = 16

    def forward(self, images):
        return torch.nn.functional.avg_pool2d(images, 2).flatten(1)


@pytest.fixture(scope="module")
def digits():
    return data.load("digits", limit=400)


def test_the_evaluation_keeps_what_pictures_of_it_need(digits):
    found = digits.evaluate(Pooled(), Pooled(), torch.device("cpu"))
    assert found.widths == {"": 16, "raw_": 64, "untrained_": 16}
    right = int((found.predictions == digits.test_labels).sum())
    assert found.accuracies["linear"] == right / len(digits.test) > 0.8
    of = torch.tensor([3, 40])
    nearest = found.nearest(of, 5)
    unit = torch.nn.functional.normalize
    scores = unit(found.features, dim=1)[of] @ unit(found.train_features, dim=1).T
    assert torch.equal(nearest, scores.topk(5).indices)
    assert report.table(found).splitlines()[2].split()[:3] == ["raw", "pixels", "64"]


def test_what_pixels_reach_is_kept_for_the_same_images_alone(monkeypatch, tmp_path, digits):
    monkeypatch.setenv("SSLTRAIN_CACHE", str(tmp_path / "cache"))
    computed, counted = [], evaluate.knn
    monkeypatch.setattr(evaluate, "knn", lambda *x: computed.append(1) or counted(*x))
    monkeypatch.setattr(evaluate, "version", lambda: "now")

    def pixels(images=digits) -> dict[str, float]:
        computed.clear()
        return images._raw(["linear", "knn"], torch.device("cpu"))

    first = pixels()
    (file,) = (tmp_path / "cache").iterdir()
    assert computed and pixels() == first and not computed
    for broken in ("", file.read_text()[:-5], "[]", "{}", '{"linear": null, "knn": 0.5}'):
        file.write_text(broken)
        assert pixels() == first and computed
    for change in ("train", "train_labels", "test", "test_labels"):
        tensor = getattr(digits, change).clone()
        tensor.view(-1)[0] += 1
        assert pixels(dataclasses.replace(digits, **{change: tensor})) and computed
    monkeypatch.setattr(evaluate, "version", lambda: "later")
    assert pixels() and computed
    monkeypatch.setenv("SSLTRAIN_CACHE", str(file))  # no folder
    assert pixels() == first and computed and pixels() == first and computed


def test_features_come_from_the_encoder_in_evaluation_mode():
    images = torch.randint(256, (20, 1, 8, 8), dtype=torch.uint8)
    encoder = encoders.build("convnet", images).train()
    before = {k: v.clone() for k, v in encoder.state_dict().items()}
    whole = features(encoder, images, torch.device("cpu"))
    parts = features(encoder, images, torch.device("cpu"), batch=7)
    assert torch.allclose(whole, parts, atol=1e-5) and encoder.training
    assert all(torch.equal(v, before[k]) for k, v in encoder.state_dict().items())


def test_any_model_of_timm():
    peer("timm")
    images = torch.randint(256, (4, 1, 32, 32), dtype=torch.uint8)
    encoder = encoders.build("timm:resnet18", images)
    assert encoder(images.float() / 255).shape == (4, 512) and encoder.features == 512
    with pytest.raises(UsageError, match="^--encoder timm:no_such_model: timm cannot build it"):
        encoders.build("timm:no_such_model", images)


@pytest.mark.parametrize("library", ["timm", "torchvision"])
def test_the_weights_of_resnet18_fit_other_libraries(library):
    peer("timm")  # which also makes torchvision importable
    images = torch.randint(256, (4, 3, 32, 32), dtype=torch.uint8)
    encoder = encoders.build("resnet18", images).eval()
    if library == "timm":
        model = importlib.import_module("timm").create_model("resnet18", num_classes=0)
    else:
        model = importlib.import_module("torchvision.models").resnet18()
    model.conv1 = torch.nn.Conv2d(3, 64, 3, 1, 1, bias=False)
    model.maxpool = model.fc = torch.nn.Identity()
    model.load_state_dict(encoder[1].state_dict())
    x = encoder[0](images.float() / 255)
    assert torch.allclose(model.eval()(x), encoder[1](x), atol=1e-5)


def test_lars_takes_steps_that_fit_to_each_matrix():
    torch.manual_seed(0)
    matrix, vector = torch.randn(4, 3, requires_grad=True), torch.randn(5, requires_grad=True)
    zero = torch.zeros(2, 2, requires_grad=True)
    groups = [{"params": [matrix, zero], "weight_decay": 0.1}, {"params": [vector], "weight_decay": 0.0}]
    optimizer = LARS(groups, lr=2.0)
    w, b, v_w, v_b = matrix.detach().clone(), vector.detach().clone(), 0, 0
    for _ in range(3):
        g_w, g_b = torch.randn(4, 3), torch.randn(5)
        matrix.grad, vector.grad, zero.grad = g_w.clone(), g_b.clone(), torch.ones(2, 2)
        optimizer.step()
        g = g_w + 0.1 * w
        v_w = 0.9 * v_w + 0.001 * w.norm() / g.norm() * g
        v_b = 0.9 * v_b + g_b
        w, b = w - 2 * v_w, b - 2 * v_b
        torch.testing.assert_close(matrix.detach(), w)
        torch.testing.assert_close(vector.detach(), b)
    assert zero.isfinite().all() and (zero < 0).all()  # whose norm is 0 at first


@pytest.mark.parametrize("name", methods.NAMES)
def test_presets_are_options_that_a_method_takes(name):
    kind = methods.config_of(name)
    for preset in kind.presets:
        options = config.preset(kind, preset)
        assert all(getattr(kind(**options).check(), option) == value for option, value in options.items())
    with pytest.raises(UsageError, match=f"^--preset none: is none of {name}; "):
        config.preset(kind, "none")
