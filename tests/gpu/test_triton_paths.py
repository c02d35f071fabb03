"""What only large problems, or chips with more to offer, make the Triton backend do: here on small ones."""

import pytest
import torch

from sslkern import functional, use_backend
from sslkern.backends import triton as triton_backend
from sslkern.ops import sampled_similarity, similarity_lse, similarity_softplus

from ..conftest import EVERY
from ..ops import test_similarity_lse as lse
from ..ops import test_similarity_softplus as softplus
from ..ops.test_similarity_lse import compare, features

if "triton" not in EVERY:
    pytest.skip("needs Triton with its interpreter or a GPU", allow_module_level=True)

from sslkern.backends import strips
from sslkern.backends.triton import chips, configs, launch, measured, schemes, tuning
from sslkern.backends.triton import similarity_lse as kernels

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture
def large(monkeypatch):
    """Every problem counts as large: triangles, id ranges of blocks, one exponential for both directions."""
    monkeypatch.setattr(launch, "LARGE", 0)
    monkeypatch.setattr(kernels, "TRIANGLE_FROM", 0)


@pytest.fixture
def descriptors(monkeypatch):
    monkeypatch.setattr(launch, "TMA_FROM", 0)
    if triton_backend.INTERPRETED:
        monkeypatch.setattr(chips, "of", lambda device: chips.Chip(90, 3))
    elif chips.of(torch.device("cuda")).architecture < 90:
        pytest.skip("the chip has no tensor descriptors")


def problem(dtype, N=330, M=200, D=40):
    q, k = features(N, D, dtype=dtype).requires_grad_(), features(M, D, dtype=dtype).requires_grad_()
    return {"q": q, "k": k, "scale": torch.tensor(8.0, requires_grad=True)}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_triangle(backend, large, dtype):
    tensors = problem(dtype)
    del tensors["k"]
    for N in (1, 63, 330):  # one block; one under it; a last round that some programs have no block in
        tensors["q"] = features(N, 40, dtype=dtype).requires_grad_()
        compare(tensors | {"q_ids": torch.arange(N) % ((N + 1) // 2)}, best=True)
    compare(tensors)
    compare(tensors | {"q": features(2, 130, 20, dtype=dtype).requires_grad_()})


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ids_that_meet_in_some_blocks_only(backend, large, dtype):
    tensors = problem(dtype)
    near = {"q_ids": torch.arange(330), "k_ids": torch.arange(200).flip(0) * 2 - 50}
    compare(tensors | near, columns=True, best=True)
    compare(tensors | near | {"k": tensors["k"].detach()})
    compare(tensors | near, columns=True, pairs="same")


def test_log_sum_exps_too_far_apart_for_one_exponential(backend, large):
    q = (features(150, 24) * torch.linspace(0.01, 20, 150)[:, None]).requires_grad_()
    k = features(140, 24).requires_grad_()
    compare({"q": q, "k": k, "scale": torch.tensor(20.0, requires_grad=True)}, arbitrary=True, columns=True)
    compare({"q": q}, arbitrary=True, scale=20.0)
    lse.test_nothing_left_beside_sums_beyond_the_largest_exponential(backend)
    lse.test_duplicates_at_a_small_temperature(backend)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tensor_descriptors(backend, large, descriptors, dtype):
    for D in (8, 64, 200):  # narrower than a block; wider, so that products run over several
        compare(problem(dtype, D=D), columns=True)
        compare({"q": features(130, D, dtype=dtype).requires_grad_()}, scale=8.0)
        frozen = problem(dtype, D=D)
        compare(frozen | {"k": frozen["k"].detach()})
    compare(problem(dtype, D=33))  # rows that are not whole: without


def test_tensor_descriptors_of_softplus(backend, descriptors):
    q, k = features(70, 64).requires_grad_(), features(90, 64).requires_grad_()
    got = torch.autograd.grad(similarity_softplus(q, k, 5.0, -3.0), (q, k))
    want = torch.autograd.grad(torch.nn.functional.softplus(5 * q @ k.T - 3).sum(), (q, k))
    for a, b in zip(got, want, strict=True):
        assert torch.allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_scores_so_small_that_no_maximum_is_taken_off(backend, large, dtype):
    ids = {"q_ids": torch.arange(330) // 2}
    q = features(330, 40, dtype=dtype)
    q[64:128] *= 30  # some blocks are far from it, and a row meets both kinds
    for tensors in ({"q": q.requires_grad_()}, {"q": q.requires_grad_(), "k": features(200, 40, dtype=dtype)}):
        compare(tensors, arbitrary=True, scale=3.0, columns="k" in tensors)
        compare(tensors | ids | ({"k_ids": torch.arange(200)} if "k" in tensors else {}), arbitrary=True, scale=-3.0)
    lse.test_nan_and_inf_stay_in_their_rows(backend)
    lse.test_nothing_left_has_exactly_zero_gradient(backend, torch.nan, False)


@pytest.fixture
def by_products(monkeypatch):
    """The other scheme than fused kernels, in several strips; in fp32 scores are products by BLAS as well."""
    monkeypatch.setattr(strips, "LEAST", 1)
    monkeypatch.setattr(strips, "TILE", 64)
    with schemes.use_scheme("shared"):
        yield


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_products_by_blas(backend, by_products, dtype):
    tensors = problem(dtype)
    bias = torch.randn(200).masked_fill(torch.arange(200) % 7 == 0, -torch.inf)
    ids = {"q_ids": torch.arange(330), "k_ids": torch.arange(200) * 2}
    compare(tensors | ids, columns=True, best=True)
    compare(tensors | {"k_bias": bias})
    frozen = tensors | ids | {"k": tensors["k"].detach()}
    compare(frozen, best=True)
    compare(frozen, pairs="same")
    compare({"q": tensors["q"], "scale": tensors["scale"], "q_ids": torch.arange(330) // 2}, best=True)
    lse.test_nothing_left_has_exactly_zero_gradient(backend, torch.nan, False)
    lse.test_nan_and_inf_stay_in_their_rows(backend)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_products_by_blas_in_a_narrow_cone(backend, by_products, dtype):
    # Weights are nearly equal, and so are the errors of their rounding: the gradient of the scale must not feel them.
    centre = torch.randn(24)
    q, k = (torch.nn.functional.normalize(centre + 0.1 * torch.randn(300, 24), dim=1).to(dtype) for _ in range(2))

    def dscale(x, y, wide):
        scale = torch.tensor(14.3, dtype=wide, requires_grad=True)
        out = similarity_lse(x.clone().requires_grad_(), y, scale, columns=y is not None)
        total = out.sum() if y is None else out[0].sum() + out[1].sum()
        return torch.autograd.grad(total, scale)[0].double()

    for keys in (k, None):
        with use_backend("reference"):
            exact = dscale(q.double(), None if keys is None else keys.double(), torch.float64)
        assert (dscale(q, keys, torch.float32) - exact).abs() < 1e-6 * exact.abs()


def test_what_a_tile_leaves_out_keeps_its_earlier_sum(backend, large, monkeypatch):
    chip = chips.of(features(1, 1).device)
    monkeypatch.setattr(chips, "of", lambda device: chip._replace(processors=1))  # several rounds
    q = features(256, 16, dtype=torch.bfloat16)
    k = features(64, 16, dtype=torch.bfloat16)
    q[:64] = -40 * k[:1]  # all far below, and no bound that spares the maximum
    k[:] = k[:1]
    k_ids = torch.arange(64) + 1000
    k_ids[3] = 7
    for ids in (torch.full((256,), 7), torch.cat((torch.arange(64) + 50, torch.full((192,), 7)))):
        sides = {"q": q, "k": k.requires_grad_(), "q_ids": ids, "k_ids": k_ids}
        turned = {"q": k, "k": q, "q_ids": k_ids, "k_ids": ids}
        for tensors in (sides, turned):
            compare(tensors, arbitrary=True, scale=5.0, columns=True)


def test_products_by_blas_for_one_side(backend, by_products):
    tensors = problem(torch.float32)
    learned = tensors["k"]
    compare(tensors | {"q": tensors["q"].detach()}, columns=True)
    compare(tensors | {"q": tensors["q"].detach(), "k": learned.detach()}, columns=True)  # the scale only
    limit, bias = torch.full((330,), 6.0), torch.randn(330)
    compare(tensors | {"q_limit": limit}, columns=True, best=True)
    del tensors["k"]
    for extra in ({"q_limit": limit}, {"k_bias": bias}, {"k_bias": bias, "q_limit": limit}):
        compare(tensors | extra)
    compare(tensors | {"k_bias": bias.requires_grad_()})


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_products_by_blas_for_softplus(backend, by_products, dtype):
    tensors = problem(dtype) | {"bias": torch.randn(330).requires_grad_()}
    tensors["weights"] = torch.rand(330)
    softplus.compare(tensors)
    softplus.compare(tensors | {"q_ids": torch.arange(330), "k_ids": torch.arange(200) * 2}, pairs="same", sign=-1)
    tensors = problem(dtype)
    softplus.compare(tensors | {"q": tensors["q"].detach(), "k_bias": torch.randn(200)})
    softplus.compare(tensors | {"k": tensors["k"].detach(), "q_limit": torch.full((330,), 1.0)})
    softplus.compare({"q": tensors["q"], "scale": tensors["scale"]})
    softplus.test_nothing_left_has_exactly_zero_gradient(backend, torch.nan, 1)


def test_what_was_measured_goes_first(monkeypatch, tmp_path):
    chip = chips.Chip(90, 132, "Some GPU 80GB")
    monkeypatch.setenv("SSLKERN_CACHE", str(tmp_path))
    q = torch.empty(8192, 128, dtype=torch.bfloat16)
    measured.on.cache_clear()
    assert not schemes.is_shared(q, 8192, 8192, chip)
    measured.path(chip).write_text('{"scheme": {"bfloat16 128": "shared"}, "config": {}}')
    measured.on.cache_clear()
    assert schemes.is_shared(q, 8192, 8192, chip)
    for other in ('{"scheme": {"bfloat16 128": "library"}}', '{"scheme": 1}', "{"):  # of another version; damaged
        measured.path(chip).write_text(other)
        measured.on.cache_clear()
        assert not schemes.is_shared(q, 8192, 8192, chip)
    measured.on.cache_clear()


def test_scores_are_products_by_blas_in_true_fp32_alone(monkeypatch):
    chip, q = chips.Chip(90, 132), torch.empty(8192, 128)
    limit = q[:, 0]
    for matrix_units, x in ((True, q.bfloat16()), (False, q)):
        assert schemes.is_shared(x, 8192, 8192, chip) is not matrix_units
        assert schemes.scores_by_blas(x, None, False) is not matrix_units
        assert not schemes.scores_by_blas(x, limit, False) and not schemes.scores_by_blas(x, None, True)
    monkeypatch.setattr(chips, "tf32", lambda dtype: dtype == torch.float32)
    assert not schemes.is_shared(q, 8192, 8192, chip) and not schemes.scores_by_blas(q, None, False)


def test_tuning_keeps_what_it_found(backend, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("SSLKERN_CACHE", str(tmp_path))
    chip = chips.of(features(1, 1).device)._replace(name="Some GPU 80GB")
    monkeypatch.setattr(chips, "of", lambda device: chip)
    monkeypatch.setattr(configs, "candidates", lambda kind, D, default, chip: [default, default._replace(BN=16)])
    measured.on.cache_clear()
    measured.write(chip, {"scheme": {"bfloat16 2048": "shared"}, "config": {}})
    tuning.main(["--rows", "40", "--features", "16"])
    found = measured.on(chip)["scheme"]
    assert found["bfloat16 2048"] == "shared" and found["bfloat16 16"] in schemes.SCHEMES
    said = capsys.readouterr().out
    assert said.count(" ms") >= 3 and str(measured.path(chip)) in said and "Error" not in said
    measured.on.cache_clear()


def test_candidates_are_other_tiles():
    default = configs.Config(128, 64, 128, 128, 4, 3)
    for architecture in (80, 90, 100):
        near = configs.candidates("forward", 128, default, chips.Chip(architecture, 100))
        assert near[0] == default and len(set(near)) == len(near) > 10
        assert any(config.specialised for config in near) == (architecture == 100)
    with pytest.raises(ValueError, match="scheme must be one of fused, shared, not"):
        schemes.use_scheme("fast")


@pytest.mark.skipif(not triton_backend.INTERPRETED, reason="counts the interpreter's launches")
@pytest.mark.parametrize("name, most", [("nt_xent", 9), ("clip", 17), ("moco", 10), ("siglip", 41)])
def test_few_launches(backend, monkeypatch, name, most):
    """Of kernels and of what torch computes between them, forward and backward, in a second step."""
    from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
    from triton.runtime.interpreter import GridExecutor

    launches, execute = [], GridExecutor.__call__
    views = "view _unsafe_view t detach expand slice select squeeze unsqueeze permute split as_strided alias".split()
    views.append("split_with_sizes")

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            namespace, _, called = op._schema.name.partition("::")
            if namespace == "sslkern":
                with self:  # what it computes counts
                    return op._op_dk(torch._C.DispatchKey.CompositeExplicitAutograd, *args, **(kwargs or {}))
            if called not in views and "empty" not in called:
                launches.append(called)
            return op(*args, **(kwargs or {}))

    def call(self, *args, **kwargs):
        launches.append(self.fn.__name__)
        with _disable_current_modes():
            return execute(self, *args, **kwargs)

    monkeypatch.setattr(GridExecutor, "__call__", call)
    monkeypatch.setattr(
        "sslkern.common.tensors._watchers", lambda: 0
    )  # who counts does not change the way that is taken
    torch.use_deterministic_algorithms(False)  # it fills fresh memory
    x, y = (features(256, 128, dtype=torch.bfloat16).requires_grad_() for _ in range(2))
    scale, bias = (torch.tensor(value, requires_grad=True) for value in (10.0, -10.0))
    queue = features(4096, 128, dtype=torch.bfloat16)
    loss, learned = {
        "nt_xent": (lambda: functional.nt_xent(x, y, 0.1), (x, y)),
        "clip": (lambda: functional.clip(x, y, scale), (x, y, scale)),
        "moco": (lambda: functional.moco(x, y.detach(), queue), (x,)),
        "siglip": (lambda: functional.siglip(x, y, scale, bias), (x, y, scale, bias)),
    }[name]
    for _ in range(2):
        launches.clear()
        with Count():
            torch.autograd.grad(loss(), learned)
    assert 5 < len(launches) <= most, launches


def test_sampled_rows_reach_the_kernels_from_multiples_of_16_bytes(backend, monkeypatch):
    """Else loads would be narrower, and sums have another order, for the same rows at another place."""
    from sslkern.backends.triton import sampled_similarity as sampled

    seen = []

    class Watched:
        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            def launch(**options):
                seen.extend(x for x in options.values() if isinstance(x, torch.Tensor) and x.is_floating_point())
                return self.kernel[grid](**options)

            return launch

    for name in ("sampled_similarity_fwd_kernel", "sampled_similarity_bwd_kernel"):
        monkeypatch.setattr(sampled, name, Watched(getattr(sampled, name)))
    q, bank = (torch.randn(rows * 6 + 1)[1:].view(rows, 6).requires_grad_() for rows in (3, 20))
    index, g = torch.randint(20, (3, 5)), torch.randn(3, 5)
    assert q.data_ptr() % 16 == bank.data_ptr() % 16 == 4
    got = sampled_similarity(q, bank, index)
    dq, dbank = torch.autograd.grad((got * g).sum(), (q, bank))
    assert len(seen) == 6 and all(x.data_ptr() % 16 == 0 for x in seen)
    assert torch.allclose(got, (bank[index] @ q.unsqueeze(2)).squeeze(2), atol=1e-5)
    assert torch.allclose(dq, (g.unsqueeze(2) * bank[index]).sum(1), atol=1e-5) and dbank.isfinite().all()
