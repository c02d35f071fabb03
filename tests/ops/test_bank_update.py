import pytest
import torch
import torch.nn.functional as F

from sslkern.ops import bank_update_

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def one_by_one(bank, index, x, momentum):
    """The last of equal indices counts, and starts from the old row."""
    old, bank = bank.clone(), bank.clone()
    for i, row in zip(index.tolist(), x.double(), strict=True):
        bank[i] = F.normalize(momentum * old[i].double() + (1 - momentum) * row, dim=0, eps=1e-12).to(bank.dtype)
    return bank


@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("x_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equals_updating_one_by_one(backend, dtype, x_dtype, strided):
    if dtype == torch.float64 and backend != "reference":
        pytest.skip("fp64 runs through the reference")
    M, D = 70, 33
    bank = F.normalize(torch.randn(M, D), dim=1).to(dtype)
    bank = bank.t().contiguous().t() if strided else bank
    for batch, momentum in ((0, 0.5), (1, 0.5), (40, 0.0), (300, 0.9), (20, 1.0)):
        index, x = torch.randint(M, (batch,)), torch.randn(batch, D).to(x_dtype)
        want = one_by_one(bank, index, x, momentum)
        bank_update_(bank, index, x, momentum)
        tolerance = {torch.float32: 2e-7, torch.float64: 1e-12, torch.bfloat16: 4e-3, torch.float16: 5e-4}[dtype]
        assert (bank.double() - want.double()).abs().max() <= tolerance
        untouched = torch.ones(M, dtype=torch.bool).index_fill(0, index, False)
        assert torch.equal(bank[untouched], want[untouched])


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
def test_rows_of_any_length(backend, dtype):
    for D in (1, 8, 136, 768, 4100):  # parts of a warp to more than a block holds
        bank = F.normalize(torch.randn(9, D), dim=1).to(dtype)
        index, x = torch.tensor([4, 0, 4, 8, 4]), torch.randn(5, D)
        want = one_by_one(bank, index, x, 0.5)
        bank_update_(bank, index, x, 0.5)
        tolerance = {torch.float32: 2e-7, torch.bfloat16: 4e-3, torch.float16: 5e-4}[dtype]
        assert (bank.double() - want.double()).abs().max() <= tolerance


def test_the_last_of_many_wins_for_any_number_of_threads(backend):
    before, banks = torch.get_num_threads(), []
    start, index, x = F.normalize(torch.randn(30, 80), dim=1), torch.randint(30, (5000,)), torch.randn(5000, 80)
    for threads in (1, 2, 3, 5):
        torch.set_num_threads(threads)
        banks.append(start.clone())
        bank_update_(banks[-1], index, x)
    torch.set_num_threads(before)
    assert all(torch.equal(banks[0], bank) for bank in banks[1:])
    last = {i: n for n, i in enumerate(index.tolist())}
    alone = start.clone()
    for i, n in last.items():
        bank_update_(alone, torch.tensor([i]), x[n : n + 1])
    assert torch.allclose(banks[0], alone, atol=1e-7)


def test_a_row_of_length_0_stays(backend):
    bank = torch.zeros(3, 4)
    bank_update_(bank, torch.tensor([1]), torch.zeros(1, 4))
    assert (bank == 0).all()


def test_autograd_sees_the_write(backend):
    bank, x = torch.ones(4, 2), torch.ones(3, 2, requires_grad=True)
    w = torch.ones(2, requires_grad=True)
    out, before = (bank @ w).sum(), bank._version
    bank_update_(bank, torch.arange(3), x)
    assert not bank.requires_grad and bank._version > before
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward()


def test_no_row_of_the_bank_and_nothing_written(backend):
    if torch.empty(0).device.type != "cpu":
        pytest.skip("on a GPU an index outside stops the kernel, and with it all that the process has there")
    bank = torch.ones(4, 2)
    for bad in (-1, 4, 2**40):
        with pytest.raises(IndexError, match=f"index must be 0 ... 3, .* but one is {bad}"):
            bank_update_(bank, torch.tensor([0, bad]), torch.zeros(2, 2) + 5)
        assert (bank == 1).all()


def test_opcheck_and_no_clone_in_compiled_code(backend):
    name = backend.partition("-")[0]
    args = torch.eye(4), torch.tensor([0, 2]), torch.ones(2, 4), 0.5, name
    torch.library.opcheck(torch.ops.sslkern.bank_update_.default, args)
    torch.compiler.reset()
    bank = torch.eye(4)
    address = bank.data_ptr()
    torch.compile(bank_update_, fullgraph=True, backend="aot_eager")(bank, torch.tensor([1]), torch.ones(1, 4), 0.0)
    assert bank.data_ptr() == address and torch.allclose(bank[1], torch.full((4,), 0.5))


def test_bad_arguments_are_named():
    bank, index, x = torch.ones(4, 2), torch.arange(3), torch.ones(3, 2)
    cases = [
        ("bank must", (bank[0], index, x)),
        ("bank must", (bank.long(), index, x)),
        ("bank gets no gradient", (bank.clone().requires_grad_(), index, x)),
        ("x must be a tensor", (bank, index, x[:, :1])),
        ("x must be floating", (bank, index, x.long())),
        ("index must be an int64", (bank, index[:2], x)),
        ("index must be int64", (bank, index.int(), x)),
        ("momentum must", (bank, index, x, 1.5)),
        ("momentum must", (bank, index, x, torch.tensor(0.5))),
        ("x is on meta", (bank, index, x.to("meta"))),
    ]
    for message, args in cases:
        with pytest.raises((ValueError, TypeError), match=message) as error:
            bank_update_(*args)
        assert "\n" not in str(error.value)


def test_features_that_are_rows_of_the_bank(backend):
    for index, rows in ((torch.tensor([1, 0, 2]), slice(0, 3)), (torch.arange(9).flip(0), slice(0, 9))):
        bank = torch.randn(9, 8)
        ours, plain = bank.clone(), bank.clone()
        bank_update_(ours, index, ours[rows], 0.5)
        bank_update_(plain, index, bank[rows].clone(), 0.5)
        assert torch.equal(ours, plain)


def test_types_that_have_no_kernel():
    bank, index, x = torch.eye(3), torch.tensor([0]), torch.ones(1, 3)
    for args in ((bank.to(torch.float8_e4m3fn), index, x), (bank, index, x.to(torch.float8_e5m2))):
        with pytest.raises((TypeError, ValueError), match="must be .*(fp64|floating point, not torch.float8)"):
            bank_update_(*args)


def test_features_that_are_rows_of_the_bank_by_another_name():
    """The same memory as another storage, as from NumPy."""
    bank = torch.randn(5, 8)
    ours, plain, index = bank.clone(), bank.clone(), torch.tensor([1, 0, 2])
    bank_update_(ours, index, torch.from_dlpack(ours)[:3])
    bank_update_(plain, index, bank[:3].clone())
    assert torch.equal(ours, plain)
