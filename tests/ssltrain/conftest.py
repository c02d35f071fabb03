import pytest

for package in ("kornia", "matplotlib", "mlxtend", "PIL", "rich", "sklearn", "typer"):
    pytest.importorskip(package, reason="needs the extra sslkern[train]")


@pytest.fixture(autouse=True, scope="session")
def cache_of_its_own(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SSLTRAIN_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def one_thread():
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
