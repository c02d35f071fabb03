import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.nn.functional import normalize

import sslkern
from sslkern.backends.cpu import sampled_similarity as cpu
from sslkern.ops import sampled_similarity, sampled_similarity_bwd

from . import dense

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
both_ways = pytest.mark.parametrize("streams", [False, True], ids=["gather", "stream"])


def problem(N, M, K, D, dtype=torch.float32, groups=()):
    q, bank = (normalize(torch.randn(*groups, rows, D), dim=-1).to(dtype).requires_grad_() for rows in (N, M))
    return q, bank, torch.randint(M, (*groups, N, K))


def gathered(q, bank, index):
    """[N, K, D] and all."""
    if q.ndim == 3:
        return torch.stack([gathered(*x) for x in zip(q, bank, index, strict=True)])
    return (bank[index] @ q.unsqueeze(2)).squeeze(2)


def results(function, q, bank, index, weights):
    out = function(q, bank, index)
    return out.detach(), *torch.autograd.grad((out * weights).sum(), (q, bank))


@pytest.fixture
def way(streams, monkeypatch, request):
    if streams and not str(request.node.callspec.params.get("backend", "cpu")).startswith("cpu"):
        pytest.skip("only the CPU has a choice")
    monkeypatch.setattr(cpu, "streams", lambda N, M, K: streams)


@both_ways
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "N, M, K, D",
    [
        (1, 1, 1, 1),
        (2, 3, 5, 3),  # named more than once
        (17, 191, 4, 33),
        (97, 193, 300, 130),
        (257, 40, 9, 16),  # more than one part of queries
        (3, 1000, 1030, 257),
    ],
)
def test_equals_the_gathered_product(backend, way, streams, N, M, K, D, dtype):
    q, bank, index = problem(N, M, K, D, dtype)
    weights = torch.randn(N, K)
    got = results(sampled_similarity, q, bank, index, weights)
    assert got[0].dtype == torch.float32 and got[1].dtype == got[2].dtype == dtype
    wide = [x.detach().double().requires_grad_() for x in (q, bank)]
    exact = results(gathered, *wide, index, weights.double())
    # the plain form in its dtype: all scores as a product, some picked
    plain = results(lambda q, bank, index: (q @ bank.T).gather(1, index), q, bank, index, weights.to(dtype))
    for name, a, b, c in zip(("out", "dq", "dbank"), got, exact, plain, strict=True):
        dense.within(a, b, c.double(), name, scale=weights.abs().sum(1).max().item() if name != "out" else 1)


@settings(max_examples=25, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_sizes_and_strides(backend, data):
    draw = data.draw
    torch.manual_seed(draw(st.integers(0, 10**6)))
    N, K = (draw(st.sampled_from([0, 1, 2, 33, 70])) for _ in range(2))
    M, D = draw(st.sampled_from([1, 3, 65, 700])), draw(st.sampled_from([1, 3, 33]))
    groups = draw(st.sampled_from([(), (1,), (3,)]))
    dtype = torch.float64 if backend == "reference" and draw(st.booleans()) else torch.float32
    q = torch.randint(-3, 4, (*groups, N, 2 * D)).to(dtype)[..., ::2].requires_grad_()  # sums are exact
    bank = torch.randint(-3, 4, (*groups, D, M)).to(dtype).mT.requires_grad_()
    index = torch.randint(M, (*groups, K, N)).mT
    weights = torch.randint(-2, 3, index.shape).to(dtype)
    got = results(sampled_similarity, q, bank, index, weights)
    for a, b in zip(got, results(gathered, q, bank, index, weights), strict=True):
        assert torch.equal(a, b)


@both_ways
def test_only_what_is_named_counts(backend, way, streams):
    """A row that is not finite shows where it is named, and nowhere else."""
    q, bank, index = problem(70, 200, 60, 40)
    with torch.no_grad():
        bank[5], q[3] = torch.inf, torch.nan
    index[index == 5] = 6
    index[10, 2] = 5
    weights = torch.randn(70, 60)
    got = results(sampled_similarity, q, bank, index, weights)
    want = results(gathered, q, bank, index, weights)
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a.isfinite(), b.isfinite())
        assert torch.allclose(a[b.isfinite()], b[b.isfinite()], atol=1e-5)


@both_ways
def test_same_bits_for_any_number_of_threads(way, streams):
    q, bank, index = problem(300, 900, 400, 70)
    weights, before, all_results = torch.randn(300, 400), torch.get_num_threads(), []
    for threads in (1, 2, 3, 5):
        torch.set_num_threads(threads)
        all_results.append(results(sampled_similarity, q, bank, index, weights))
    torch.set_num_threads(before)
    for other in all_results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(all_results[0], other, strict=True))


def test_same_bits_wherever_rows_lie(backend):
    """Rows that begin on no multiple of 16 bytes are summed in the same order."""
    q, bank, index = problem(5, 90, 700, 64)
    weights, all_results = torch.randn(5, 700), []
    for shift in (0, 1):
        moved = [torch.empty(x.numel() + shift)[shift:].view(x.shape).copy_(x.detach()) for x in (q, bank)]
        all_results.append(results(sampled_similarity, *(x.requires_grad_() for x in moved), index, weights))
    assert all(torch.equal(a, b) for a, b in zip(*all_results, strict=True))


def test_derivatives():
    q, bank, index = problem(3, 5, 4, 3)
    inputs = [x.detach().double().requires_grad_() for x in (q, bank)]
    assert torch.autograd.gradcheck(lambda q, b: sampled_similarity(q, b, index), inputs)
    (once,) = torch.autograd.grad(sampled_similarity(*inputs, index).sum(), inputs[0], create_graph=True)
    with pytest.raises((NotImplementedError, RuntimeError), match="second|twice|does not require grad"):
        torch.autograd.grad(once.sum(), inputs)
    dq, none = sampled_similarity_bwd(*inputs, index, torch.ones(3, 4), need_bank=False)
    assert none is None and torch.allclose(dq, inputs[1].detach()[index].sum(1))


def test_opcheck(backend):
    name = backend.partition("-")[0]
    q, bank, index = problem(3, 5, 4, 3)
    torch.library.opcheck(torch.ops.sslkern.sampled_similarity.default, (q, bank, index, name))
    args = q.detach(), bank.detach(), index, torch.randn(3, 4), True, True, name
    torch.library.opcheck(torch.ops.sslkern.sampled_similarity_bwd.default, args)


def test_no_row_of_the_bank(backend):
    if torch.empty(0).device.type != "cpu":
        pytest.skip("on a GPU an index outside stops the kernel, and with it all that the process has there")
    for N, K in ((40, 60), (5, 6)):  # the bank is streamed, and gathered
        q, bank, index = problem(N, 50, K, 8)
        for bad in (-1, 50, 2**40, -(2**63)):
            index[3, 4] = bad
            with pytest.raises(IndexError, match=f"index must be 0 ... 49, .* but one is {bad}"):
                sampled_similarity(q, bank, index)
            for need_q, need_bank in ((True, True), (True, False), (False, True)):
                with pytest.raises(IndexError, match="index must be"):
                    sampled_similarity_bwd(q, bank, index, torch.zeros(N, K), need_q=need_q, need_bank=need_bank)


def test_bad_arguments_are_named():
    q, bank, index = problem(3, 5, 4, 2)
    cases = [
        ("q must be a tensor", (q[0], bank, index)),
        ("q must be fp32", (q.long(), bank.long(), index)),
        ("bank must be a tensor", (q, bank[:, :1], index)),
        ("bank must have the groups", (q.expand(2, 3, 2), bank.expand(3, 5, 2), index.expand(2, 3, 4))),
        ("bank must have the dtype", (q, bank.half(), index)),
        ("index must be an int64", (q, bank, index[:2])),
        ("index must be int64", (q, bank, index.int())),
        ("index is on meta", (q, bank, index.to("meta"))),
    ]
    for message, args in cases:
        with pytest.raises((ValueError, TypeError), match=message) as error:
            sampled_similarity(*args)
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="g must be"):
        sampled_similarity_bwd(q, bank, index, torch.zeros(3, 3))
    with sslkern.use_backend("reference"):
        assert sampled_similarity(q.double(), bank.double(), index).dtype == torch.float64
