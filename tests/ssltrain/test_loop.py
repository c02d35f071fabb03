"""Runs repeat and resume at the same bits, stop when asked, and time their loss."""

import dataclasses
import functools
import math
import os
import signal
import time

import pytest
import torch
from ssltrain import UsageError, checkpoints, data, loop, rehearsal
from ssltrain.methods._method import Method
from ssltrain.methods.cmc import CMCConfig
from ssltrain.methods.cpc_images import CPCImagesConfig
from ssltrain.methods.deep_infomax import DeepInfoMaxConfig
from ssltrain.methods.instdisc import InstDiscConfig
from ssltrain.methods.moco import MoCoConfig
from ssltrain.methods.nnclr import NNCLRConfig
from ssltrain.methods.simclr import SimCLRConfig
from ssltrain.methods.supcon import SupConConfig
from ssltrain.methods.supervised import SupervisedConfig
from ssltrain.stopwatch import Stopwatch

import sslkern

WITHOUT_DIM = dict(data="digits", epochs=3, batch_size=64, precision="fp32", threads=1, device="cpu")
COMMON = dict(**WITHOUT_DIM, dim=32)
CONFIG = SimCLRConfig(**COMMON)
METHODS = {
    "simclr": CONFIG,
    "simclr v2": SimCLRConfig(**COMMON, version=2),
    "simclr by lars": SimCLRConfig(**COMMON, optimizer="lars", lr=1.0),
    "simclr without head": SimCLRConfig(**COMMON, head="none"),
    "moco": MoCoConfig(**COMMON, queue=256),
    "moco v3": MoCoConfig(**COMMON, version=3),
    "moco symmetric": MoCoConfig(**COMMON, queue=256, symmetric=True),
    "moco shuffled": MoCoConfig(**COMMON, queue=256, shuffle_bn=8),
    "instdisc": InstDiscConfig(**COMMON, negatives=64),
    "instdisc nce": InstDiscConfig(**COMMON, negatives=64, form="nce", temperature=0.5),
    "nnclr": NNCLRConfig(**COMMON, support=256),
    "supcon": SupConConfig(**COMMON),
    "supervised": SupervisedConfig(**WITHOUT_DIM),
    "cmc": CMCConfig(**COMMON),
    "cmc bank": CMCConfig(**COMMON, candidates="bank", negatives=8),
    "deep_infomax": DeepInfoMaxConfig(**COMMON),
    "deep_infomax prior": DeepInfoMaxConfig(**COMMON, estimator="jsd", prior=0.1),
    "cpc_images": CPCImagesConfig(**COMMON, patch=4, steps=1, context_width=32),
}
CONTRASTIVE = {name: options for name, options in METHODS.items() if name != "supervised"}
per_method = pytest.mark.parametrize("options", METHODS.values(), ids=METHODS)


def in_brief(names):
    """Names of methods as parameters, of which the variants are for where long tests run."""
    return [pytest.param(name, marks=pytest.mark.long if is_variant(name) else ()) for name in names]


def is_variant(name: str) -> bool:
    return " " in name


CHANCE = {  # the loss when all similarities are equal
    "simclr": math.log(2 * 64 - 1),
    "moco": math.log(1 + 256),
    "moco v3": 2 * 2 * 0.2 * math.log(64),  # of both directions, each times 2 T
    "instdisc": math.log(1 + 64),
    "instdisc nce": math.log(1 + 64) + 64 * math.log(1 + 1 / 64),  # each is the own one with probability 1 / 65
    "nnclr": math.log(64),
    "supcon": math.log(2 * 64 - 1),
    "supervised": math.log(10),
    "cmc": math.log(64),
    "cmc bank": 2 * (math.log(9) + 8 * math.log(9 / 8)),  # of both directions, where each h is 1 / 9
    "deep_infomax": math.log(64),  # of images that have one part
    "deep_infomax prior": 2 * math.log(2),
    "cpc_images": math.log(64 * 3),  # three columns
}


def chance(name: str) -> float:
    return CHANCE.get(name) or CHANCE[name.split()[0]]


def at_the_end(state) -> float:
    """The contrastive loss of the last steps."""
    return sum(state.losses[-8:]) / 8 - sum(state.stats.get("prior", [])[-8:]) / 8


@pytest.fixture(scope="module")
def images():
    return data.load("digits", limit=300)


def build(images, options):
    torch.manual_seed(options.seed)
    return options.build(images)


def run(images, out, options=CONFIG, **more):
    method = build(images, options)
    state = loop.train(method, images.train, options, out, **more)
    return method.state_dict(), state


@pytest.fixture(scope="module")
def whole(images, tmp_path_factory):
    """The end and the state of a run of a method that nothing interrupts."""
    return functools.cache(lambda name: run(images, tmp_path_factory.mktemp("whole"), METHODS[name]))


def stop_at(step: int):
    """A report that interrupts the process after that step, as Ctrl-C does."""

    def report(state, progress) -> None:
        if state.step == step:
            os.kill(os.getpid(), signal.SIGINT)

    return report


@pytest.mark.parametrize("name", METHODS)
def test_a_run_repeats_and_another_seed_differs(images, tmp_path, whole, name):
    options = METHODS[name]
    first, state = whole(name)
    again, _ = run(images, tmp_path, options)
    other, _ = run(images, tmp_path, dataclasses.replace(options, seed=1))
    assert all(torch.equal(first[k], again[k]) for k in first)
    assert not all(torch.equal(first[k], other[k]) for k in first)
    assert state.finished and state.step == len(state.losses) == 12
    assert all(len(values) == 12 for values in state.stats.values())
    assert 0 < state.loss_share < 1 and state.samples == 12 * 64 and state.samples_per_s > 0


@per_method
def test_all_that_is_drawn_at_first_is_by_the_seed(images, options):
    """What a memory begins with, too, which with `group` it would draw by its sizes."""
    first, other = (build(images, dataclasses.replace(options, seed=seed)).state_dict() for seed in (0, 1))
    assert not [name for name in first if first[name].ndim in (2, 4) and torch.equal(first[name], other[name])]


STOPS = [  # within an epoch and at the end of one
    pytest.param(name, step, marks=pytest.mark.long if is_variant(name) and step != 6 else ())
    for name in METHODS
    for step in (1, 6, 8)
]


@pytest.mark.parametrize("name, step", STOPS)
def test_resumed_equals_uninterrupted_to_the_bit(images, tmp_path, whole, name, step):
    options, (uncut, state) = METHODS[name], whole(name)
    with pytest.raises(loop.Interrupted):
        run(images, tmp_path, options, report=stop_at(step))
    checkpoint = checkpoints.load(tmp_path)
    assert checkpoint["state"]["step"] == step
    torch.manual_seed(123)  # the state of another process
    resumed, resumed_state = run(images, tmp_path, options, checkpoint=checkpoint)
    assert all(torch.equal(uncut[k], resumed[k]) for k in uncut)
    assert resumed_state.losses == state.losses and resumed_state.stats == state.stats


def test_keys_are_normalised_beside_other_images_than_their_queries(images, tmp_path, monkeypatch):
    options, seeds = METHODS["moco shuffled"], []
    _, shuffled = run(images, tmp_path, options)
    monkeypatch.setattr(sslkern.distributed, "shuffled", lambda encoder, x, seed: seeds.append(seed) or encoder(x))
    _, straight = run(images, tmp_path, options)
    _, whole = run(images, tmp_path, dataclasses.replace(options, shuffle_bn=None))
    assert len(set(seeds)) == 12  # anew in each step
    assert len({state.losses[0] for state in (shuffled, straight, whole)}) == 3


def test_symmetric_moco_asks_with_either_view_for_the_other(images):
    method = build(images, METHODS["moco symmetric"])
    views, queue = method.views(images.train[:64]), method.criterion.memory.queue.clone().t()
    queries, keys = method.queries(views).chunk(2), method.keys(views).chunk(2)
    ways = [sslkern.functional.moco(q, k, queue, 0.1, stats=True) for q, k in zip(queries, keys[::-1], strict=True)]
    loss, stats = method.loss(views)
    torch.testing.assert_close(loss, sum(way[0] for way in ways) / 2)
    torch.testing.assert_close(stats["top1"], sum(way[1] for way in ways) / 2)
    kept = torch.nn.functional.normalize(torch.stack(keys[::-1], 1).flatten(0, 1), dim=1)
    torch.testing.assert_close(method.criterion.memory.queue[:, :128].t(), kept)


def test_an_interrupt_leaves_the_signal_handler_as_it_was(images, tmp_path):
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(loop.Interrupted):
        run(images, tmp_path, report=stop_at(2))
    assert signal.getsignal(signal.SIGINT) is before


def test_training_gets_below_the_loss_of_a_collapsed_encoder(images, tmp_path):
    _, state = run(images, tmp_path, dataclasses.replace(CONFIG, epochs=30))
    assert sum(state.losses[-8:]) / 8 < chance("simclr") - 0.3


@pytest.mark.parametrize("name", in_brief(METHODS))
def test_with_shuffled_positives_there_is_nothing_to_learn(images, tmp_path, name):
    _, state = run(images, tmp_path, dataclasses.replace(METHODS[name], epochs=12, shuffle_positives=True))
    assert at_the_end(state) > chance(name) - 0.02


def test_the_control_is_for_one_process(monkeypatch):
    monkeypatch.setattr("ssltrain.ranks.size", lambda: 2)
    with pytest.raises(UsageError, match="^--shuffle-positives: is a control for one process, and there are 2; "):
        dataclasses.replace(CONFIG, shuffle_positives=True).check()


@pytest.mark.slow
@pytest.mark.parametrize("name", [x for x in in_brief(METHODS) if x.values != ("simclr",)])  # of which is more above
def test_without_there_is_something(images, tmp_path, name):
    _, state = run(images, tmp_path, dataclasses.replace(METHODS[name], epochs=30))
    assert at_the_end(state) < chance(name) - 0.1


def test_minutes_end_by_the_clock(images, tmp_path):
    _, state = run(images, tmp_path, dataclasses.replace(CONFIG, epochs=None, minutes=0.01))
    assert 0.6 <= state.seconds < 3.0 and state.finished


def test_a_checkpoint_that_fails_to_be_written_leaves_the_old_one(images, tmp_path, monkeypatch):
    before, _ = run(images, tmp_path)

    def half(content, file):
        file.write(b"half of it")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(OSError, match="disk full"):
        run(images, tmp_path, dataclasses.replace(CONFIG, seed=1))
    checkpoint = checkpoints.load(tmp_path)
    assert all(torch.equal(before[k], checkpoint["method"][k]) for k in before)
    assert sorted(f.suffix for f in tmp_path.iterdir()) == [".part", ".pt", ".safetensors", ".safetensors"]
    monkeypatch.undo()
    run(images, tmp_path)  # and the next one cleans up
    assert sorted(f.suffix for f in tmp_path.iterdir()) == [".pt", ".safetensors"]


ENGINE = "sslkern::sim", "sslkern::pair_contrast", "sslkern::nce"


@pytest.mark.parametrize("name", in_brief(CONTRASTIVE))
def test_every_contrastive_loss_goes_through_the_engine(tmp_path, name):
    options, few = METHODS[name], data.load("digits", limit=128)
    with torch.profiler.profile() as profile:
        _, state = run(few, tmp_path, dataclasses.replace(options, epochs=1))
    calls = {event.key: event.count for event in profile.key_averages()}
    engine = {name: calls[name] for name in calls if name.startswith(ENGINE)}
    assert max(engine.values()) >= state.step, engine
    elsewhere = {name for name in calls if "softmax" in name or "cross_entropy" in name or "logsumexp" in name}
    has_bank = options.method == "instdisc" or options == METHODS["cmc bank"]
    of_rows = {"aten::logsumexp", "aten::softmax", "aten::_softmax"} if has_bank else set()
    assert elsewhere <= of_rows  # of the scores of named rows, which the engine has by itself


def test_the_stopwatch_sees_forward_and_backward_of_its_module_only():
    class Slow(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, seconds):
            time.sleep(seconds)
            ctx.seconds = seconds
            return x.sum()

        @staticmethod
        def backward(ctx, g):
            time.sleep(2 * ctx.seconds)
            return g.expand(3), None

    class Criterion(torch.nn.Module):
        def forward(self, x):
            return Slow.apply(x, 0.02)

    criterion = Criterion()
    x = torch.ones(3, requires_grad=True)
    with Stopwatch(criterion, torch.device("cpu")) as stopwatch:
        (criterion(x * 2) + Slow.apply(x, 0.1)).backward()
        assert 0.06 <= stopwatch.read() < 0.2
        assert stopwatch.read() == 0


PASSES = [
    ("simclr", 2),
    ("moco", 2),
    ("moco v3", 4),
    ("moco symmetric", 4),
    ("moco shuffled", 2),
    ("instdisc", 1),
    ("cmc", 1),
]


@pytest.mark.parametrize("name, passes", PASSES)
def test_passes_through_the_encoders_are_counted_and_leave_no_trace(images, name, passes):
    method = build(images, METHODS[name])
    before = {k: v.clone() for k, v in method.state_dict().items()}
    random_state = torch.get_rng_state()
    assert rehearsal.encoder_passes(method, images.train[:64]) == passes
    assert all(torch.equal(v, before[k]) for k, v in method.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random_state)


def test_a_patch_is_a_part_of_a_pass():
    """Patches of 16 x 16 pixels, every 8 of 32 x 32: nine, each a quarter of the image."""

    class Patched(Method):
        def __init__(self):
            super().__init__()
            self.encoder = CPCImagesConfig(patch=16, stride=8).build_encoder([3, 32, 32])

        def views(self, images):
            return images.float() / 255

        def loss(self, views):
            return self.encoder(views).sum(), {}

    images = torch.zeros(4, 3, 32, 32, dtype=torch.uint8)
    assert rehearsal.encoder_passes(Patched(), images) == 9 / 4


def test_precision_is_chosen_by_trial_and_leaves_no_trace(images):
    method = build(images, CONFIG)
    before = {k: v.clone() for k, v in method.state_dict().items()}
    random_state = torch.get_rng_state()
    assert rehearsal.faster_precision(method, images.train[:64]) in ("fp32", "bf16")
    assert all(torch.equal(v, before[k]) for k, v in method.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(p.grad is None for p in method.parameters())


@per_method
@pytest.mark.parametrize("precision", ["bf16", "fp64"])
def test_other_precisions_train(images, tmp_path, options, precision):
    _, state = run(images, tmp_path, dataclasses.replace(options, epochs=1, precision=precision))
    assert state.precision == precision and all(0 < x < 10 for x in state.losses)


@pytest.mark.parametrize(
    "field, value",
    [("encoder", "vgg"), ("epochs", 0), ("minutes", 0.0), ("batch_size", 1), ("temperature", 0.0), ("dim", 0)]
    + [("temperature", float("nan")), ("lr", -1.0), ("weight_decay", -1.0), ("seed", -1), ("threads", 0), ("limit", 0)]
    + [("image_size", 1), ("precision", "fp8"), ("device", "quark"), ("version", 4), ("momentum", 1.0), ("queue", 0)]
    + [("lr", "fast"), ("epochs", 1.5), ("flip", 3), ("data", None), ("save_every", -1.0)],
)
def test_every_wrong_value_names_its_flag(field, value):
    with pytest.raises(UsageError, match=f"^--{field.replace('_', '-')} .*\\.$"):
        dataclasses.replace(MoCoConfig(), **{field: value}).check()


def test_a_batch_larger_than_the_set(images, tmp_path):
    with pytest.raises(UsageError, match="--batch-size 512: there are 300 training samples"):
        run(images, tmp_path, dataclasses.replace(CONFIG, batch_size=512))


def test_a_foreign_checkpoint(tmp_path):
    (tmp_path / checkpoints.CHECKPOINT).write_bytes(b"something else")
    with pytest.raises(UsageError, match="no checkpoint that can be read"):
        checkpoints.load(tmp_path)
