import copy
import inspect
import itertools
import math
import warnings
from types import SimpleNamespace

import pytest
import torch
from hypothesis import strategies as st
from torch import nn

from ..distributed.pool import preload
from . import peer
from .agreement import errs_no_more, random_configurations, same, stepped, trained
from .ranks import as_world, three  # noqa: F401

losses = peer("sentence_transformers.sentence_transformer.losses")
util = peer("sentence_transformers.util")
import tokenizers  # noqa: E402
import transformers  # noqa: E402
from sentence_transformers import SentenceTransformer  # noqa: E402
from sentence_transformers.sentence_transformer import modules  # noqa: E402

from sslkern.compat import sentence_transformers as ours  # noqa: E402

preload(__name__)  # the package takes seconds to import
pytestmark = pytest.mark.filterwarnings("ignore:.*hardness_mode")


@pytest.fixture(autouse=True)
def none_are_few(monkeypatch):
    """Batches of the size of these tests are left to the package otherwise."""
    for limit in ("FEW", "FEW_ONE_WAY", "FEW_GUIDED"):
        monkeypatch.setattr(ours, limit, -1)


DIRECTIONS = ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")
JOINT = [DIRECTIONS[:1] + extra for n in range(4) for extra in itertools.combinations(DIRECTIONS[1:], n)]
COMBINATIONS = [(directions, "joint") for directions in JOINT]
COMBINATIONS += [(DIRECTIONS[:1], "per_direction"), (("doc_to_query", "query_to_doc"), "per_direction")]
HARDNESS = [(None, 0.0), ("in_batch_negatives", 9.0), ("hard_negatives", 5.0), ("all_negatives", 0.5)]
RANKING = ["MultipleNegativesRankingLoss", "CachedMultipleNegativesRankingLoss"]
SYMMETRIC = ["MultipleNegativesSymmetricRankingLoss", "CachedMultipleNegativesSymmetricRankingLoss"]
GUIDED = ["GISTEmbedLoss", "CachedGISTEmbedLoss"]


def columns(count, N, D):
    """An anchor, a positive that is near it, and hard negatives."""
    x = [torch.randn(N, D, dtype=torch.float64) for _ in range(count)]
    return [x[0], x[1] + x[0], *x[2:]]


class Given(nn.Module):
    """A model whose embeddings are the features."""

    tokenizer, max_seq_length = None, 9

    def __getitem__(self, i):
        return self

    def forward(self, features):
        return {"sentence_embedding": features["embedding"]}


def ranking(package, name, **options):
    """A loss as a function of its columns."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        loss = getattr(package, name)(Given(), **options)

    def of_columns(*embeddings):
        if name.startswith("Cached"):
            return loss.calculate_loss([list(x.split(4)) for x in embeddings])
        return loss([{"embedding": x} for x in embeddings], None)

    return of_columns


class Guide(Given):
    def forward(self, features):
        return {"sentence_embedding": features["of_guide"]}


def guided(package, name, guides=None, **options):
    """The same of one with a guide, which finds `guides` for the columns; without them it is the model."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inspect.getmodule(getattr(losses, name)), "PreTrainedTokenizerBase", SimpleNamespace)
        patch.setattr(Given, "tokenizer", SimpleNamespace(get_vocab=dict))
        loss = getattr(package, name)(Given(), Guide(), **options)

    def of_columns(*embeddings):
        of_guide = guides or [x.detach() for x in embeddings]
        if name.startswith("Cached"):
            return loss.calculate_loss(*([list(x.split(4)) for x in of_model] for of_model in (embeddings, of_guide)))
        return loss([{"embedding": x, "of_guide": g} for x, g in zip(embeddings, of_guide, strict=True)], None)

    return of_columns


def both(make, *args, **options):
    return make(ours, *args, **options), make(losses, *args, **options)


def results(loss, x, dtype=torch.float64):
    """The value and the gradients."""
    return stepped(loss, [[z.to(dtype).detach().requires_grad_() for z in x]])


def equal(mine, of_peer, x):
    same(results(mine, x), results(of_peer, x))


# ---- the numbers -----------------------------------------------------------------------------------------------------


@random_configurations(
    name=st.sampled_from(RANKING),
    how=st.sampled_from(COMBINATIONS),
    hardness=st.sampled_from(HARDNESS),
    fct=st.sampled_from([util.cos_sim, util.dot_score]),
    sizes=st.tuples(st.integers(1, 9), st.integers(0, 2), st.integers(1, 6)),
    scale=st.sampled_from([1.0, 20.0, 5]),
    seed=st.integers(0, 10**6),
)
def test_ranking_has_their_value_and_gradients(name, how, hardness, fct, sizes, scale, seed):
    N, H, D = sizes
    torch.manual_seed(seed)
    options = dict(scale=scale, similarity_fct=fct, directions=how[0], partition_mode=how[1])
    options |= dict(hardness_mode=hardness[0], hardness_strength=hardness[1])
    equal(*both(ranking, name, **options), columns(2 + H, N, D))


@pytest.mark.parametrize("name", RANKING)
@pytest.mark.parametrize("directions, partition", COMBINATIONS)
def test_every_combination_of_directions_and_partition_mode(name, directions, partition):
    for N, H in (1, 0), (1, 2), (7, 0), (7, 2):
        options = dict(directions=directions, partition_mode=partition)
        equal(*both(ranking, name, **options), columns(2 + H, N, 5))


@pytest.mark.parametrize("name", RANKING)
def test_one_pair_in_both_directions_jointly_is_ln_2(name):
    loss = ranking(ours, name, directions=("query_to_doc", "doc_to_query"))
    x = columns(2, 1, 5)
    assert loss(*x).item() == pytest.approx(math.log(2), abs=1e-12)
    assert all(g.abs().max() < 1e-12 for g in results(loss, x)[1:])


@pytest.mark.parametrize("name", SYMMETRIC)
@pytest.mark.parametrize("hard", [0, 1])
def test_symmetric(name, hard):
    """It says that it is deprecated, as theirs does, to who makes one and not to who imports it."""
    equal(*both(ranking, name, scale=7.0), columns(2 + hard, 6, 5))
    for package in (ours, losses):
        with pytest.warns(DeprecationWarning, match="doc_to_query"):
            loss = getattr(package, name)(Given())
        assert loss.partition_mode == "per_direction" and loss.directions == ("query_to_doc", "doc_to_query")


def of_seed(N):
    """The results of a loss for columns that are rounded to a type, in that type or in float64."""

    def of(loss, seed, dtype):
        torch.manual_seed(seed)
        return results(loss, [z.bfloat16() for z in columns(3, N, 24)], dtype)

    return of


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("directions, partition", [COMBINATIONS[0], COMBINATIONS[7], COMBINATIONS[9]])
def test_ranking_errs_no_more_than_theirs(dtype, directions, partition):
    options = dict(directions=directions, partition_mode=partition)
    errs_no_more(of_seed(33), *both(ranking, RANKING[0], **options), dtype)


def test_columns_of_different_types():
    """Theirs computes all of less than 32 bits in fp32, and so do we; gradients have the type of their column."""
    x, y = columns(3, 8, 5), []
    for package in (ours, losses):
        leaves = [z.to(t).requires_grad_() for z, t in zip(x, (torch.bfloat16, torch.float32, torch.half), strict=True)]
        loss = ranking(package, RANKING[0])(*leaves)
        loss.backward()
        assert loss.dtype == torch.float32 and all(z.grad.dtype == z.dtype for z in leaves)
        y.append([loss.detach(), *(z.grad for z in leaves)])
    assert all(torch.allclose(a, b, rtol=1e-2, atol=1e-3) for a, b in zip(*y, strict=True))


def test_inside_autocast_it_is_nearer_to_the_exact_loss_than_theirs():
    x = [z.float() for z in columns(3, 40, 16)]
    exact = ranking(losses, RANKING[0])(*(z.double() for z in x))
    with torch.autocast("cpu", torch.bfloat16):
        got, plain = (loss(*x) for loss in both(ranking, RANKING[0]))
    assert got.dtype == torch.float32
    assert (got - exact).abs() <= 2 * (plain - exact).abs() + torch.finfo(torch.bfloat16).eps


def test_a_scale_that_learns():
    """(Where theirs leaves out pairs, its gradient is NaN, and ours is not.)"""
    x = columns(3, 8, 5)
    grads = []
    for package in (ours, losses):
        scale = torch.tensor(7.0, dtype=torch.float64, requires_grad=True)
        ranking(package, RANKING[0], scale=scale, directions=DIRECTIONS[::2])(*x).backward()
        grads.append(scale.grad)
    assert torch.allclose(*grads, rtol=1e-9)


@random_configurations(
    name=st.sampled_from(GUIDED),
    sizes=st.tuples(st.integers(1, 9), st.integers(0, 1), st.integers(1, 6)),
    texts=st.sampled_from([2, 5, 99]),
    margin=st.tuples(st.sampled_from(["absolute", "relative"]), st.sampled_from([0.0, 0.1, -0.2])),
    contrast=st.tuples(st.booleans(), st.booleans()),
    temperature=st.sampled_from([0.01, 0.3]),
    seed=st.integers(0, 10**6),
)
def test_guided_has_their_value_and_gradients(name, sizes, texts, margin, contrast, temperature, seed):
    N, H, D = sizes
    torch.manual_seed(seed)
    known = torch.randn(texts, 7, dtype=torch.float64)
    guides = [known[torch.randint(texts, (N,))] for _ in range(2 + H)]  # the same text more than once
    options = dict(margin_strategy=margin[0], margin=margin[1], temperature=temperature)
    options |= dict(contrast_anchors=contrast[0], contrast_positives=contrast[1])
    equal(*both(guided, name, guides, **options), columns(2 + H, N, D))


def test_guided_with_more_hard_negatives():
    x = columns(4, 9, 5)
    equal(*both(guided, GUIDED[1], columns(4, 9, 6)), x)
    for package in (ours, losses):
        with pytest.raises(ValueError, match="2 or 3"):
            guided(package, GUIDED[0], x)(*x)


def test_equal_texts_are_no_false_negatives_of_each_other():
    """A pair of one text twice: the guide finds nothing more similar than it, not even the text itself. In products, on
    which a comparison by `>` would hang by a rounding, that is not so."""
    guide = torch.randn(3, 50)
    guides = [guide[[0, 0, 1, 2]], guide[[0, 0, 2, 1]]]
    for dtype in (torch.float64, torch.float32):
        x = columns(2, 4, 5)
        loss = both(guided, GUIDED[0], [g.to(dtype) for g in guides], temperature=1.0)
        got, want = (results(one, x, dtype) for one in loss)
        assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in zip(got, want, strict=True))


def test_guided_works_in_blocks(monkeypatch):
    import sys

    x, guides = columns(3, 12, 5), columns(3, 12, 6)
    monkeypatch.setattr(sys.modules["sslkern.functional.mnrl"], "BLOCK", 5 * 36)
    equal(*both(guided, GUIDED[0], guides, temperature=0.2), x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_guided_errs_no_more_than_theirs(dtype):
    """The guide is sure of itself: by rounding it decides nothing."""
    guides = [x.sign() for x in columns(3, 20, 3)]
    errs_no_more(of_seed(20), *both(guided, GUIDED[0], guides, temperature=0.1), dtype)


# ---- what theirs does besides ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RANKING + GUIDED)
def test_they_are_theirs_to_who_asks(name):
    mine, of_peer = getattr(ours, name), getattr(losses, name)
    assert issubclass(mine, of_peer) and mine.__name__ == name
    assert inspect.signature(mine.__init__) == inspect.signature(of_peer.__init__)


def test_the_module_has_all_of_their_losses():
    assert ours.MatryoshkaLoss is losses.MatryoshkaLoss and ours.CoSENTLoss is losses.CoSENTLoss
    with pytest.raises(AttributeError, match="NoSuchLoss"):
        ours.NoSuchLoss  # noqa: B018


@pytest.mark.parametrize("name", RANKING)
def test_constructor_checks(name):
    for message, options in [
        ("positive", dict(scale=0.0)),
        ("At least one", dict(directions=())),
        ("Invalid directions", dict(directions=("query_to_doc", "docs"))),
        ("required", dict(directions=("doc_to_query",))),
        ("partition_mode must", dict(partition_mode="both")),
        ("per_direction", dict(directions=DIRECTIONS, partition_mode="per_direction")),
        ("hardness_mode must", dict(hardness_mode="some")),
        ("non-negative", dict(hardness_mode="all_negatives", hardness_strength=-1.0)),
    ]:
        with pytest.raises(ValueError, match=message):
            getattr(ours, name)(Given(), **options)
    with pytest.raises(ValueError, match="at least 2"):
        getattr(ours, name)(Given())([{"embedding": torch.randn(3, 4)}], None)


def test_mini_batch_num_tokens_is_checked():
    with pytest.raises(ValueError, match="mini_batch_num_tokens"):
        ours.CachedMultipleNegativesRankingLoss(Given(), mini_batch_num_tokens=0)


def test_get_config_dict_and_temperature():
    for name in RANKING:
        options = dict(scale=8.0, directions=DIRECTIONS, similarity_fct=util.dot_score)
        mine, of_peer = (getattr(package, name)(Given(), **options) for package in (ours, losses))
        assert mine.get_config_dict() == of_peer.get_config_dict() and mine.temperature == 1 / 8
        assert mine.citation == of_peer.citation


def test_options_that_change_later():
    """Attributes are read at each call; those of a cached loss go to the loss that it wraps, as theirs do."""
    x = columns(2, 6, 5)
    for name in RANKING:
        values = []
        for package in (ours, losses):
            loss = getattr(package, name)(Given())
            loss.scale, loss.directions = 3.0, DIRECTIONS
            if name.startswith("Cached"):
                values.append(loss.calculate_loss([[z] for z in x]))
            else:
                values.append(loss([{"embedding": z} for z in x], None))
        assert torch.allclose(*values, rtol=1e-12)


@pytest.mark.parametrize("fct", [lambda a, b: a @ b.T / 3, util.manhattan_sim, util.euclidean_sim])
def test_any_similarity_fct_takes_the_dense_path(fct):
    x = columns(3, 6, 5)
    with pytest.warns(UserWarning, match="dense path.*similarity_fct"):
        equal(*both(ranking, RANKING[0], similarity_fct=fct), x)


@pytest.mark.parametrize("fct, quick", [("cosine", True), ("dot", True), ("euclidean", False)])
def test_the_similarity_of_a_model(fct, quick):
    model = SentenceTransformer(modules=[Given()], similarity_fn_name=fct, device="cpu")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        equal(*both(ranking, RANKING[0], similarity_fct=model.similarity), columns(2, 6, 5))
    assert quick == (not [w for w in said if "dense path" in str(w.message)])


@pytest.mark.parametrize("name", RANKING)
@pytest.mark.parametrize("mode, strength", HARDNESS[1:])
def test_hardness_is_fused(name, mode, strength):
    """With each of the directions; not with a scale that learns."""
    options = dict(hardness_mode=mode, hardness_strength=strength)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for directions, partition in COMBINATIONS:
            for count in (2, 4):
                of_way = dict(directions=directions, partition_mode=partition)
                equal(*both(ranking, name, **options, **of_way), columns(count, 6, 5))
    with pytest.warns(UserWarning, match="hardness_mode"):
        ranking(ours, name, scale=torch.tensor(7.0, requires_grad=True), **options)(*columns(2, 6, 5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_hardness_errs_no_more_than_theirs(dtype):
    options = dict(hardness_mode="all_negatives", hardness_strength=9.0, directions=DIRECTIONS)
    errs_no_more(of_seed(33), *both(ranking, RANKING[0], **options), dtype)


@pytest.mark.parametrize("options, count, N", [({}, 3, 181), (dict(directions=DIRECTIONS[:2]), 2, 64)])
def test_small_batches_are_left_to_the_package(options, count, N, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(ours, "mnrl", None)
    equal(*both(ranking, RANKING[0], **options), columns(count, N, 4))
    with pytest.raises(TypeError):
        ranking(ours, RANKING[0], **options)(*columns(count, N + 1, 4))


def test_small_guided_batches_are_left_to_the_package(monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(ours, "_guided", None)
    few, more = columns(3, 11, 4), columns(3, 12, 4)
    equal(*(guided(package, GUIDED[0], few) for package in (ours, losses)), few)
    with pytest.raises(TypeError):
        guided(ours, GUIDED[0], more)(*more)


def test_what_warns_warns_once():
    loss = ranking(ours, RANKING[0], similarity_fct=util.manhattan_sim)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        loss(*columns(2, 6, 5)), loss(*columns(2, 6, 5))
    assert len(said) == 1


def test_documents_that_no_query_has():
    """More positives than anchors: theirs takes the first ones for the positives, the others for negatives."""
    x = [columns(2, 4, 5)[0], columns(2, 6, 5)[1]]
    with pytest.warns(UserWarning, match="differ in shape"):
        equal(*both(ranking, RANKING[0]), x)


def test_a_guided_loss_whose_parts_were_replaced():
    x, seen = columns(2, 4, 5), []
    loss = guided(ours, GUIDED[1], x)
    cross_entropy = nn.CrossEntropyLoss()
    cross_entropy.register_forward_hook(lambda *_: seen.append(1))
    of = inspect.getclosurevars(loss).nonlocals["loss"]
    of.cross_entropy_loss = nn.Sequential()
    of.cross_entropy_loss.forward = lambda s, target: cross_entropy(s, target)
    with pytest.warns(UserWarning, match="replaced"):
        assert torch.isfinite(loss(*x)) and seen


def test_the_loss_without_gradients():
    x = columns(3, 6, 5)
    with torch.no_grad():
        assert all(torch.allclose(*(f(*x) for f in both(ranking, name)), rtol=1e-12) for name in RANKING)


# ---- with models -----------------------------------------------------------------------------------------------------

WORDS = "the a cat dog house tree runs sleeps barks is was green red big small to of in on with".split()


@pytest.fixture(scope="module")
def make_model(tmp_path_factory):
    """A tiny transformer with dropout and a tokenizer, always the same; no download."""
    path = str(tmp_path_factory.mktemp("tiny"))
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", *WORDS])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    special = dict(unk_token="[UNK]", pad_token="[PAD]")
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(path)
    sizes = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    transformers.BertModel(transformers.BertConfig(vocab_size=len(vocabulary), **sizes)).save_pretrained(path)

    def make():
        parts = [modules.Transformer(path), modules.Pooling(16)]
        return SentenceTransformer(modules=parts, device="cpu").train()

    return make


def texts(count, N, seed=0):
    draw = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, 9, (count, N), generator=draw)
    return [
        [" ".join(WORDS[i] for i in torch.randint(len(WORDS), (int(n),), generator=draw)) for n in of_column]
        for of_column in lengths
    ]


def made(package, name, model, guide, inside=None, **options):
    loss_class = getattr(package, name)
    loss = loss_class(model, guide, **options) if "GIST" in name else loss_class(model, **options)
    return loss if inside is None else losses.MatryoshkaLoss(model, loss, inside, n_dims_per_step=-1)


CASES = {
    "plain": ("MultipleNegativesRankingLoss", dict(directions=DIRECTIONS)),
    "hardness": ("MultipleNegativesRankingLoss", dict(hardness_mode="all_negatives", hardness_strength=3.0)),
    "cached": ("CachedMultipleNegativesRankingLoss", dict(mini_batch_size=3)),
    "by tokens": ("CachedMultipleNegativesRankingLoss", dict(mini_batch_num_tokens=20)),
    "guided": ("GISTEmbedLoss", dict(temperature=0.1)),
    "guided, cached": ("CachedGISTEmbedLoss", dict(mini_batch_size=3, temperature=0.1)),
    "matryoshka": ("MultipleNegativesRankingLoss", dict(inside=[16, 4])),
    "matryoshka, cached": ("CachedMultipleNegativesRankingLoss", dict(inside=[16, 4], mini_batch_size=3)),
    "matryoshka, guided": ("GISTEmbedLoss", dict(inside=[16, 4])),
    "matryoshka, guided, cached": ("CachedGISTEmbedLoss", dict(inside=[16, 4], mini_batch_size=3)),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_twenty_steps_of_sgd(make_model, case):
    """Dropout included: what a gradient cache embeds twice has to be the same twice."""
    name, options = CASES[case]
    guide, before = make_model().double().eval(), make_model().double()
    weights = []
    for package in (ours, losses):
        model = make_model().double()
        loss = made(package, name, model, guide, **options)

        def step(model, i, loss=loss):
            torch.manual_seed(i)
            return loss([model.preprocess(column) for column in texts(3, 8, i)], None)

        weights.append(trained(model, step))
    same(*weights, within=1e-8)
    assert not all(torch.equal(a, b) for a, b in zip(weights[0], before.parameters(), strict=True))


def test_state_dict_loads_both_ways(make_model):
    for name in RANKING + GUIDED:
        mine, of_peer = (made(package, name, make_model(), make_model()) for package in (ours, losses))
        mine.load_state_dict(of_peer.state_dict(), strict=True)
        of_peer.load_state_dict(mine.state_dict(), strict=True)
        copy.deepcopy(mine)


def test_a_guide_with_another_tokenizer(make_model):
    """Texts are decoded and tokenized again, and the guide does not write into what the model is given."""
    guide = make_model().eval()
    guide.tokenizer.add_tokens(["extra"])
    model = make_model().eval()
    values = []
    for package, name in itertools.product((ours, losses), GUIDED):
        loss = made(package, name, model, guide)
        assert loss.must_retokenize
        values.append(loss([model.preprocess(column) for column in texts(3, 5)], None).item())
    assert values == pytest.approx([values[-1]] * 4, rel=1e-5)


@pytest.mark.slow
def test_the_trainer(make_model, tmp_path):
    package, datasets = peer("sentence_transformers"), pytest.importorskip("datasets")
    anchors, positives = texts(2, 12)
    weights = []
    for of in (ours, losses):
        model = make_model().double()
        where = dict(output_dir=str(tmp_path), save_strategy="no", report_to="none", use_cpu=True)
        args = package.SentenceTransformerTrainingArguments(**where, max_steps=4, per_device_train_batch_size=4, seed=3)
        table = datasets.table.InMemoryTable.from_pydict(dict(anchor=anchors, positive=positives))
        data = datasets.Dataset(table, fingerprint="tiny")
        loss = of.MultipleNegativesRankingLoss(model)
        package.SentenceTransformerTrainer(model=model, args=args, train_dataset=data, loss=loss).train()
        weights.append([p.detach() for p in model.parameters()])
    same(*weights, within=1e-8)


# ---- over processes --------------------------------------------------------------------------------------------------


def in_rows(x):
    """What their `all_gather_with_grad` does. Over gloo torch mixes up gradients that are not laid out in rows."""
    together = util.all_gather_with_grad(x)
    if together.requires_grad:
        together.register_hook(torch.Tensor.contiguous)
    return together


def gathered(group, cases, embeddings):
    """On each rank: value and gradients of its columns, ours and theirs."""
    with as_world(group), pytest.MonkeyPatch.context() as patch:
        found = []
        for name in RANKING + GUIDED:
            patch.setattr(inspect.getmodule(getattr(losses, name)), "all_gather_with_grad", in_rows)
        for name, options in cases:
            make = ranking if name in RANKING else guided
            loss = both(make, name, gather_across_devices=True, **options)
            found.append([results(one, embeddings[torch.distributed.get_rank()]) for one in loss])
        return found


@pytest.mark.slow
def test_gather_across_devices(three):  # noqa: F811
    """Each rank has the mean over its own rows, and its columns the gradient of the sum over all ranks."""
    how = [COMBINATIONS[0], COMBINATIONS[-1], COMBINATIONS[7]]
    cases = [(name, dict(directions=way[0], partition_mode=way[1])) for name in RANKING for way in how]
    cases += [(name, dict(temperature=0.2, margin=m)) for name in GUIDED for m in (0.0, 0.1)]
    for of_rank in three.run(gathered, cases, [columns(3, 4, 5) for _ in range(2)], ranks=2, within=600):
        for mine, of_peer in of_rank:
            same(mine, of_peer)
